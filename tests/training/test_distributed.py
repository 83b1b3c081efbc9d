"""Two processes on the CPU (DDP over gloo) come to what one comes to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("distributed.py")
ROOT = Path(__file__).parents[2]


def run(folder: Path, processes: int) -> None:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*start, str(SCRIPT), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path) -> None:
    for processes in (1, 2):
        run(tmp_path, processes)
    found = {place: json.loads((tmp_path / f"found_{place}.json").read_text()) for place in ("1_0", "2_0", "2_1")}
    assert found["2_0"]["processes"] == 2 and found["2_0"]["wrapped"] == "DistributedDataParallel"
    weights = {place: load_file(tmp_path / f"weights_{place}.safetensors") for place in found}
    for place in ("2_0", "2_1"):
        assert found[place]["psi"]["first"] == pytest.approx(found["1_0"]["psi"]["first"], abs=1e-5)
        for name, weight in weights["1_0"].items():
            torch.testing.assert_close(weights[place][name], weight, atol=1e-5, rtol=0)
    assert found["2_0"]["psi"] == found["2_1"]["psi"], "the same on every rank"
    written = [list((tmp_path / f"run2_{rank}").glob("checkpoint-4/*")) for rank in (0, 1)]
    assert any(path.name == "adapter_model.safetensors" for path in written[0])
    assert {path.name for path in written[1]} <= {"rng_state_1.pth"}, "one rank writes"
