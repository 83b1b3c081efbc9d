"""Two processes on the CPU (over gloo) come to what one comes to: DDP and FSDP2; and the guide's script runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import TrainingArguments

from peft_aso import load_chain
from tests.tiny_models import tiny
from tests.training.tools import tokenizer

SCRIPT, ROOT = Path(__file__).with_name("distributed.py"), Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "distributed.md").read_text()
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
needs_fsdp2 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="transformers below 5.20")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no DeepSpeed: make test-optional")


def run(folder: Path, processes: int, *command: str) -> None:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    call(folder, [sys.executable, *(start if processes > 1 else []), *command])


def call(folder: Path, command: list[str]) -> None:
    """Run a command, with this environment's programs and this repository first."""
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
    paths = {name: os.pathsep.join([str(place), os.environ.get(name, "")]) for name, place in first.items()}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("way", "start"),
    [
        ("ddp", ""),
        pytest.param("fsdp2", "", marks=needs_fsdp2),
        pytest.param("fsdp2", "inputs", marks=needs_fsdp2),
        pytest.param("zero2", "", marks=needs_deepspeed),
    ],
)
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, way: str, start: str) -> None:
    for processes in (1, 2):
        run(tmp_path, processes, str(SCRIPT), str(tmp_path), way if processes > 1 else "ddp", start)
    found = {place: json.loads((tmp_path / f"found_{place}.json").read_text()) for place in ("1_0", "2_0", "2_1")}
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM", "zero2": "DeepSpeedEngine"}
    assert found["2_0"]["wrapped"] == wrapper[way] and found["2_0"]["sharded"] == (way == "fsdp2")
    weights = {place: load_file(tmp_path / f"weights_{place}.safetensors") for place in found}
    for place in ("2_0", "2_1"):
        assert found[place]["psi"]["first"] == pytest.approx(found["1_0"]["psi"]["first"], abs=1e-5)
        for name, weight in weights["1_0"].items():
            torch.testing.assert_close(weights[place][name], weight, atol=1e-5, rtol=0)
    assert found["2_0"]["psi"] == found["2_1"]["psi"], "the same on every rank"
    for one, two in zip(found["1_0"]["log"], found["2_0"]["log"], strict=True):
        for value in ("loss", "grad_norm", "orthogonality_penalty"):
            assert two[value] == pytest.approx(one[value], rel=1e-4, abs=1e-7), value
    (saved,) = tmp_path.glob("run2_*/checkpoint-4/adapter_model.safetensors")  # one rank writes
    for name, weight in load_file(saved).items():
        if "lora_" in name:
            expected = weights["1_0"][name.replace(".weight", ".second.weight")]
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=0)


@needs_deepspeed
def test_zero_3_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeRO-3 takes.*\n?.*ZeRO-2 or FSDP2"):
        run(tmp_path, 2, str(SCRIPT), str(tmp_path), "zero3")
    assert not list(tmp_path.glob("run*/*"))


@needs_fsdp2
def test_the_commands_in_the_guide_train_task_after_task(tmp_path: Path) -> None:
    """The commands and options of the document, and what makes the runs short. Accelerate ignores FSDP2 on a CPU."""
    (tmp_path / "train_task.py").write_text(re.findall(r"```python\n(.*?)```", GUIDE, re.S)[0])
    (tmp_path / "fsdp.json").write_text(re.findall(r"```json\n(.*?)```", GUIDE, re.S)[0])
    tiny("llama").save_pretrained(tmp_path / "BASE")
    tokenizer().save_pretrained(tmp_path / "BASE")
    row = json.dumps({"prompt": "what is the sky", "completion": " blue"})
    for task in ("mood", "topic"):
        (tmp_path / f"{task}.jsonl").write_text(f"{row}\n" * 6)
    first, second = (line for line in GUIDE.splitlines() if line.startswith("torchrun"))
    (launch,) = re.findall(r"`(accelerate launch [^`]*)` takes the place of", GUIDE)
    (sharded,) = re.findall(r"`(--fsdp [^`]*)`", GUIDE)
    (on_cpu,) = re.findall(r"Without an accelerator, add `([^`]*)`", GUIDE)
    quick = f" {on_cpu} --max_steps 2 --report_to none --per_device_train_batch_size 1"
    quick += " --gradient_checkpointing_kwargs '{\"use_reentrant\":false}'"  # the default since transformers 5
    quick += " --learning_rate 0.1"  # the first of two steps has to move ranks, or psi is 0
    call(tmp_path, shlex.split(first.replace("torchrun --nproc-per-node 2", f"{launch} --cpu") + quick))
    call(tmp_path, shlex.split(f"{second} {sharded} {quick}"))
    model = load_chain(tiny("llama"), [str(tmp_path / "chain" / task) for task in ("mood", "topic")])
    assert model.base_model.history == ("mood",) and 0 < model.base_model.soft_coefficients["mood"] < 2
    assert set(model.base_model.attribution) == {"mood", "topic"}


@needs_fsdp2
def test_the_trainer_takes_the_settings_in_the_guide(tmp_path: Path) -> None:
    fsdp, zero = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", GUIDE, re.S))
    (tmp_path / "fsdp.json").write_text(json.dumps(fsdp))
    settings = {"fsdp": True, "fsdp_config": str(tmp_path / "fsdp.json"), "use_cpu": True, "report_to": []}
    plugin = TrainingArguments(str(tmp_path), **settings).fsdp_plugin_args
    assert plugin["fsdp_version"] == 2 and "FULL_STATE_DICT" in str(plugin["state_dict_type"])
    assert zero["zero_optimization"]["stage"] == 2
