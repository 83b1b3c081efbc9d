import importlib, json, sys, pytest
from tests.examples.conftest import *
@pytest.mark.parametrize("lr,ep,r", [(0.02,10,2),(0.02,40,8),(0.1,20,4),(0.05,40,4)])
def test_q(benchmark, data, saved, tmp_path, monkeypatch, lr, ep, r):
    q = importlib.import_module("quickstart")
    monkeypatch.setattr(q, "bf16_is_faster", lambda: False)
    line = f"--data {data} --tasks signs,colors --model {saved['llama']} --out {tmp_path} --rank {r} --lr {lr} --epochs {ep} --batch-size 5"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *line.split()])
    q.main()
    print("RES", lr, ep, r, json.loads((tmp_path / "results.json").read_text())["right"])
