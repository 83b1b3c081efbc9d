"""One task trained on top of a random one, by as many processes as there are; run by test_distributed.py.

torchrun --nproc-per-node 2 tests/training/distributed.py FOLDER [ddp | fsdp2 | zero2 | zero3] [inputs]
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
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from peft_aso import ASOTrainer, AttributionConfig
from tests.tiny_models import tiny
from tests.training.tools import TinyTask, arguments, chain

SHARDED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
ZERO |= {"zero_allow_untested_optimizer": True}
WAYS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": SHARDED}}
for stage in (2, 3):
    WAYS[f"zero{stage}"] = {"deepspeed": {**ZERO, "zero_optimization": {"stage": stage}}, "use_cpu": False}


def main(folder: Path, way: str = "ddp", start: str = "") -> None:
    """Train, with A from the task's inputs if `start` is "inputs", and let each process write its results."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if way.startswith("zero"):  # Accelerate knows a backend for DeepSpeed on accelerators only
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.NO)
    attribution = AttributionConfig(steps=4, probe_size=3, refresh=2)
    # three rows of A do not go evenly into two processes
    model = chain(r=3, penalty_weight=0.3, l2_weight=0.01, attribution=attribution, project_init=start or False)
    run = arguments(
        folder / f"run{processes}_{rank}", per_device_train_batch_size=4 // processes, save_strategy="steps",
        save_steps=2, ddp_find_unused_parameters=False, **WAYS[way],
    )  # fmt: skip
    trainer = ASOTrainer(model=model, args=run, train_dataset=TinyTask(tiny("llama"), seed=1))
    if way == "fsdp2":  # Accelerate shards on accelerators only, though torch does so on a CPU, too
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**run.fsdp_plugin_args)
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    trainer.train()
    found = {
        "psi": model.base_model.soft_coefficients,
        "wrapped": type(trainer.model_wrapped).__name__,
        "sharded": any(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "log": [entry for entry in trainer.state.log_history if "orthogonality_penalty" in entry],
    }
    weights = {name: p.detach() for name, p in model.named_parameters() if ".second." in name}
    full = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()}
    save_file({name: p.clone() for name, p in full.items()}, folder / f"weights_{processes}_{rank}.safetensors")
    (folder / f"found_{processes}_{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # else a process may leave while the other still talks to it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo that asks for the interpreter while it shuts down would abort the process
