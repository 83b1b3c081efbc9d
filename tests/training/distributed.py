"""One task trained on top of a random one, by as many processes as there are; run by test_distributed.py.

    python -m torch.distributed.run --nproc-per-node 2 tests/training/distributed.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig
from tests.tiny_models import tiny
from tests.training.tools import TinyTask, arguments

GLOBAL_BATCH = 4


def main(folder: Path) -> None:
    """Train, and let each process write what it came to."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    base = tiny("llama")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "penalty_weight": 0.3}
    config = AttributionConfig(steps=4, probe_size=3, refresh=2)
    model = get_peft_model(base, ASOLoraConfig(**settings, attribution=config), adapter_name="first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.add_adapter("second", ASOLoraConfig(**settings, attribution=config))
    model.set_adapter("second")
    run = arguments(
        folder / f"run{processes}_{rank}", max_steps=4, per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=1e-2, save_strategy="steps", save_steps=4, ddp_find_unused_parameters=False,
    )  # fmt: skip
    trainer = ASOTrainer(model=model, args=run, train_dataset=TinyTask(base, seed=1))
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".second." in name}
    save_file(weights, folder / f"weights_{processes}_{rank}.safetensors")
    found = {
        "psi": model.base_model.soft_coefficients,
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [entry["task_loss"] for entry in trainer.state.log_history if "task_loss" in entry],
    }
    (folder / f"found_{processes}_{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
