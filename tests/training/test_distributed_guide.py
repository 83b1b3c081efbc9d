"""The script of docs/distributed.md trains two tasks, each in two processes, and the Trainer takes its settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from peft_aso import load_chain
from tests.tiny_models import tiny
from tests.training.test_sft import data, tokenizer

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "distributed.md").read_text()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_the_script_in_the_guide_trains_task_after_task(tmp_path: Path) -> None:
    (tmp_path / "train_task.py").write_text(re.findall(r"```python\n(.*?)```", GUIDE, re.S)[0])
    base = tiny("llama")
    base.save_pretrained(tmp_path / "BASE")
    tokenizer().save_pretrained(tmp_path / "BASE")
    for task in ("mood", "topic"):
        data("text").to_json(tmp_path / f"{task}.jsonl")
    commands = [line for line in GUIDE.splitlines() if line.startswith("torchrun") and "..." not in line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quick = "--use_cpu true --bf16 false --max_steps 2 --report_to none --per_device_train_batch_size 1"
    quick += " --learning_rate 0.1"  # the first of two steps has to move ranks, or psi is 0
    for command in commands:
        words = command.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2").split()
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:], *quick.split()]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    model = load_chain(base, [str(tmp_path / "chain" / task) for task in ("mood", "topic")])
    assert len(commands) == 2 and model.base_model.history == ("mood",)
    assert 0 < model.base_model.soft_coefficients["mood"] < 2
    assert set(model.base_model.attribution) == {"mood", "topic"}


def test_the_settings_in_the_guide_are_ones_that_the_trainer_takes(tmp_path: Path) -> None:
    fsdp, zero = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, re.S))
    (tmp_path / "fsdp.json").write_text(json.dumps(fsdp))
    arguments = TrainingArguments(
        str(tmp_path), fsdp=True, fsdp_config=str(tmp_path / "fsdp.json"), use_cpu=True, report_to=[]
    )
    assert arguments.fsdp_plugin_args is not None
    assert arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert "FULL_STATE_DICT" in str(arguments.fsdp_plugin_args["state_dict_type"])
    assert zero["zero_optimization"]["stage"] == 2
