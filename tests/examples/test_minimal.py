"""examples/minimal.py from its first line to its last on a tiny model, and the adapter that it exports."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.examples.conftest import EXAMPLES
from tests.tiny_models import tiny_batch


def test_minimal(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minimal.py", "--model", str(saved["llama"]), "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(EXAMPLES)
    names = runpy.run_path(str(EXAMPLES / "minimal.py"), run_name="__main__")
    assert re.findall(r"^(\w+): \d+% of the answers right$", capsys.readouterr().out, re.M) == ["mood", "topic"]
    base = AutoModelForCausalLM.from_pretrained(saved["llama"])
    batch = tiny_batch(base)
    with torch.no_grad():
        expected = names["merged"].eval()(**batch).logits
        assert (base(**batch).logits - expected).abs().max() > 1e-3
        served = PeftModel.from_pretrained(base, str(tmp_path / "served"))
        torch.testing.assert_close(served(**batch).logits, expected, atol=1e-4, rtol=1e-4)
