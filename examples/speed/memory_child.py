"""The process whose peak memory is measured: `python -m speed.memory_child SETTINGS`, as memory.py starts it.

The peak counts from before the first step: what loading a model takes for a moment is not training's. On Linux the
high-water mark of the process is set back through /proc; elsewhere the peak of the whole process is all there is.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from peft_aso import load_chain

from .batches import training
from .models import Subject, load
from .steps import step_of

STEPS = 3


def set_back(device: str) -> str:
    """Start counting now; says what is counted."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return "torch.cuda.max_memory_allocated, from before the first step"
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that loading left unused
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss: the largest resident size of the whole process, loading included"
    return "VmHWM: the largest resident size from before the first step"


def peak(device: str, source: str) -> int:
    """Bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if source.startswith("VmHWM"):
        return _status("VmHWM")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def build(settings: dict[str, Any], subject: Subject) -> tuple[Any, int]:
    """The model, and the bytes of the frozen adapters in it. The subject's own model is used up."""
    folders = settings["folders"]
    if settings["kind"] == "plain":
        model: Any = PeftModel.from_pretrained(
            subject.model, folders[0], adapter_name=settings["first"], is_trainable=True
        )
        return model, 0
    model = load_chain(subject.model, folders, trainable=True)
    frozen = [p for name, p in model.named_parameters() if "lora_" in name and not p.requires_grad]
    return model, sum(parameter.numel() * parameter.element_size() for parameter in frozen)


def main() -> None:
    settings = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    subject = load(settings["model"], settings["device"], settings["dtype"], settings["quick"])
    batch = training(subject, settings["batch"], settings["tokens"])
    model, history = build(settings, subject)
    step = step_of(model, batch, penalty=settings["kind"] == "chain")
    source = set_back(settings["device"])
    before = peak(settings["device"], source)
    for _ in range(STEPS):
        step()
    found = {"peak": peak(settings["device"], source), "before": before, "history": history, "source": source}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
