"""The quickstart, which is the README's first command, from its first line to its last on two tiny tasks."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("bf16", [False, True])
def test_quickstart(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str, bf16: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(quickstart, "bf16_is_faster", lambda: bf16)  # as on either kind of CPU
    line = f"--data {data} --tasks colors,signs --model {saved[name]} --out {tmp_path} --rank 2 --steps 4 --probe 2"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *line.split(), "--epochs", "1", "--batch-size", "5"])
    quickstart.main()
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert results["tasks"] == ["colors", "signs"] and set(results["metrics"]) == {"AA", "FM", "BWT", "FWT"}
    assert results["settings"]["precision"] == ("bf16" if bf16 else "float32")
    assert results["settings"]["penalty_weight"] == 0.05 and results["accuracy"][0][1] is None
    assert results["metrics"]["AA"] == pytest.approx(sum(results["accuracy"][-1]) / 2)
    assert math.isfinite(results["similarity"][1]["colors"])
    for written in ("overview.png", "chain/chain.json", "served/adapter_model.safetensors"):
        assert (tmp_path / written).is_file()
    assert "merged model" in capsys.readouterr().out
