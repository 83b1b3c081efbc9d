"""Two processes on the CPU (over gloo) come to what one comes to: with whole weights (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed.py")
ROOT = Path(__file__).parents[2]


needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-optional"
)


def run(folder: Path, processes: int, *what: str) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*start, str(SCRIPT), str(folder), *what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize(
    ("way", "start"),
    [("ddp", ""), ("fsdp2", ""), ("fsdp2", "inputs"), pytest.param("zero2", "", marks=needs_deepspeed)],
)
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, way: str, start: str) -> None:
    for processes in (1, 2):
        run(tmp_path, processes, way if processes > 1 else "ddp", start)
    found = {place: json.loads((tmp_path / f"found_{place}.json").read_text()) for place in ("1_0", "2_0", "2_1")}
    sharded = way == "fsdp2"
    assert found["2_0"]["processes"] == 2 and found["2_0"]["sharded"] == sharded
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM", "zero2": "DeepSpeedEngine"}
    assert found["2_0"]["wrapped"] == wrapper[way]
    assert found["1_0"]["kept"] and found["2_0"]["kept"] is not sharded, "no whole copy of a sharded layer's history"
    weights = {place: load_file(tmp_path / f"weights_{place}.safetensors") for place in found}
    for place in ("2_0", "2_1"):
        assert found[place]["psi"]["first"] == pytest.approx(found["1_0"]["psi"]["first"], abs=1e-5)
        for name, weight in weights["1_0"].items():
            torch.testing.assert_close(weights[place][name], weight, atol=1e-5, rtol=0)
    assert found["2_0"]["psi"] == found["2_1"]["psi"], "the same on every rank"
    for one, two in zip(found["1_0"]["log"], found["2_0"]["log"], strict=True):
        for value in ("loss", "grad_norm", "orthogonality_penalty"):
            assert two[value] == pytest.approx(one[value], rel=1e-4, abs=1e-7), value
    written = [list((tmp_path / f"run2_{rank}").glob("checkpoint-4/*")) for rank in (0, 1)]
    saved = next(path for path in written[0] if path.name == "adapter_model.safetensors")
    for name, weight in load_file(saved).items():
        if "lora_" in name:
            whole = weights["1_0"][name.replace(".weight", ".second.weight")]
            torch.testing.assert_close(weight, whole, atol=1e-5, rtol=0)
    assert "adapter_model.safetensors" not in {path.name for path in written[1]}, "one rank writes"


@needs_deepspeed
def test_zero_3_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeRO-3 takes.*\n?.*ZeRO-2 or FSDP2"):
        run(tmp_path, 2, "zero3")
    assert not list(tmp_path.glob("run*/*"))
