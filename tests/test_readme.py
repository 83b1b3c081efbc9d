"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, arguments


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = {
        "name": str(tmp_path / "base"),
        "args": arguments(tmp_path / "run", max_steps=2),
        "dbpedia": TinyTask(base),
        "amazon": TinyTask(base, seed=1),
    }
    exec(compile(code, "README.md", "exec"), names)
    merged = names["merged"]
    batch = tiny_batch(base)
    with torch.no_grad():
        difference = merged(**batch).logits - base(**batch).logits
    assert type(merged) is type(base) and difference.abs().max() > 1e-3
    assert (tmp_path / "served" / "adapter_model.safetensors").is_file()
    assert names["model"].peft_config["amazon"].history == ["dbpedia"]
