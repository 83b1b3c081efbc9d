"""One task trained on top of a random one, by as many processes as there are; run by test_distributed.py.

torchrun --nproc-per-node 2 tests/training/distributed.py FOLDER [ddp | fsdp2 | zero2 | zero3]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from safetensors.torch import save_file

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig
from peft_aso.sharding import is_sharded, whole
from tests.tiny_models import tiny
from tests.training.tools import TinyTask, arguments

GLOBAL_BATCH = 4
SHARDED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
ZERO |= {"zero_allow_untested_optimizer": True}
WAYS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": SHARDED}}
for stage in (2, 3):
    WAYS[f"zero{stage}"] = {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}, "use_cpu": False}


def main(folder: Path, way: str = "ddp", start: str = "") -> None:
    """Train, with A from the task's inputs if `start` says "inputs", and let each process write what it came to."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if way.startswith("zero"):  # Accelerate knows a backend for DeepSpeed on accelerators only
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.NO)
    torch.manual_seed(0)
    base = tiny("llama")
    # three rows of A do not go evenly into two processes
    settings = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    settings |= {"penalty_weight": 0.3, "l2_weight": 0.01}
    config = AttributionConfig(steps=4, probe_size=3, refresh=2)
    model = get_peft_model(base, ASOLoraConfig(**settings, attribution=config), adapter_name="first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.add_adapter("second", ASOLoraConfig(**settings, attribution=config, project_init=start or False))
    model.set_adapter("second")
    run = arguments(
        folder / f"run{processes}_{rank}", max_steps=4, per_device_train_batch_size=GLOBAL_BATCH // processes,
        learning_rate=1e-2, save_strategy="steps", save_steps=2, ddp_find_unused_parameters=False, **WAYS[way],
    )  # fmt: skip
    trainer = ASOTrainer(model=model, args=run, train_dataset=TinyTask(base, seed=1))
    if way == "fsdp2":
        shard_on_cpu(trainer)
    trainer.train()
    layers = model.base_model.lora_layers().values()
    found = {
        "psi": model.base_model.soft_coefficients,
        "processes": trainer.accelerator.num_processes,
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": any(is_sharded(parameter) for parameter in model.parameters()),
        "kept": any(layer.history_cache._held is not None for layer in layers),
        "log": [entry for entry in trainer.state.log_history if "orthogonality_penalty" in entry],
    }
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters() if ".second." in name}
    copies = {name: weight.clone() for name, weight in weights.items()}
    save_file(copies, folder / f"weights_{processes}_{rank}.safetensors")
    (folder / f"found_{processes}_{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # else a process may leave while the other still talks to it
        torch.distributed.destroy_process_group()


def shard_on_cpu(trainer: Any) -> None:
    """Accelerate shards on accelerators only, though torch does so on a CPU, too: tell it that there is one."""
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    # All is written. A thread of gloo may still let go of a tensor, for which it needs the interpreter, and one that
    # asks while the interpreter shuts down aborts the process ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
