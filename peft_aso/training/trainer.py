"""`ASOTrainer`: Hugging Face's Trainer with one term more in the loss (Eq. 7)."""

# the mixin reads what the Trainer sets
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import copy
import os
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..tuner import ASOLoraModel
from ..tuner.low_rank import MissingInputsError
from ..tuner.penalties import PENALTIES
from ..tuner.starts import needs_history_inputs, needs_inputs
from .callback import ASOCallback, choose_probe, probe_seed
from .coefficients import is_untrained, require_tuner, update_coefficients
from .inputs import INPUT_EXAMPLES, initialize_from_inputs

# settings that change what a resumed run computes
_RESUMED = ("lora_alpha", "use_rslora", "lora_dropout", "penalty", "penalty_weight", "l2_weight", "forward_history")


class ASOTrainerMixin:
    """Adds lambda times the orthogonality penalty to the training loss of a `transformers.Trainer` subclass.

    Put it before the Trainer in the bases: `class MyTrainer(ASOTrainerMixin, SomeTrainer)`. The model is a PEFT
    model whose active adapter is the task to train; its settings are those of the adapter's `ASOLoraConfig`.

    The data are what any Trainer takes. For attribution `labels` have to say what the answer is: -100 on the prompt,
    at most `AttributionConfig.max_answer_tokens` others a row (a class or a span, for models with such a head).

    Logged next to the Trainer's own values: `task_loss`, `orthogonality_penalty` (of the config's kind, without
    lambda), and for each earlier task `psi/<task>` and `similarity/<task>`.

    Raises:
        ValueError: on construction: no ASO-LoRA adapter, the active task is the history of another and therefore
            frozen, the adapters are merged or disabled, or DeepSpeed's ZeRO-3 or FSDP1 (ZeRO-2 and FSDP2 are fine).
            From `train`, before the first step: attribution cannot read the training data, and psi or
            `source="stored"` needs it (a warning where neither does); the optimizer was made for another task; the
            checkpoint to resume from is of another task or history.
        MissingHistoryError: on construction: a task of the history is not loaded.
        HistoryError: on construction: an earlier task shares no module with the current one.
    """

    # whether the Trainer's `compute_loss` divides by `num_items_in_batch` whatever the model does
    _loss_counts_items = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_trainable(self.tuner)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed's ZeRO-3 takes the weights apart, and the penalty and the attribution read them outside of "
                "the forward pass. Use ZeRO-2 or FSDP2, which shards the weights too (docs/distributed.md)."
            )
        if getattr(getattr(self.accelerator.state, "fsdp_plugin", None), "fsdp_version", 2) == 1:
            raise ValueError(
                "FSDP1 flattens the weights, and the penalty and the attribution read them one by one. Use FSDP2: "
                '"version": 2 in fsdp_config, with transformers 5.20 or newer (docs/distributed.md).'
            )
        self._coefficient_callback = ASOCallback()
        self.add_callback(self._coefficient_callback)
        self._clear_sums()

    @property
    def tuner(self) -> ASOLoraModel:
        """The `ASOLoraModel` of the trainer's model."""
        return require_tuner(self.model)

    # ---- the loss ------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in training, plus the penalty, counted once an optimizer step."""
        share, count = self._share_of_step(model, inputs, num_items_in_batch)
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=count
        )
        loss, outputs = found if return_outputs else (found, None)
        if share is not None:
            loss = loss * share
        if model.training:
            if not loss.requires_grad:  # the penalty has a gradient, and would be all that is trained
                raise ValueError(
                    "The loss has no gradient. With gradient_checkpointing and transformers 4, set "
                    'gradient_checkpointing_kwargs={"use_reentrant": False} in the training arguments.'
                )
            loss = self._with_penalty(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(self, model: nn.Module, inputs: dict[str, Any], total: Any) -> tuple[Any, Any]:
        """The part of the optimizer step's labels that is in this micro-batch, and the count to give to the loss.

        Some losses are a sum divided by the count that they are given, others (T5's) the mean of the micro-batch
        whatever they are given. Given the micro-batch's own count, both are its mean, and its mean times its share is
        its part of the step's loss. None and the step's own count where there is nothing to put right.
        """
        labels = inputs.get("labels")
        if not model.training or total is None or labels is None or self.args.n_gpu > 1:
            return None, total
        own = self.compute_loss_func is not None or getattr(self, "loss_is_scaled_for_ga", None) is not None
        if self._loss_counts_items or own:
            return None, total
        if self.current_gradient_accumulation_steps * self.accelerator.num_processes == 1:
            return None, total
        shifts = getattr(self, "_loss_shifts_labels", False)
        targets = inputs.get("shift_labels", labels[..., 1:] if shifts else labels)
        count = targets.ne(-100).sum().clamp(min=1)
        return count / total, count

    def _with_penalty(self, loss: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """`loss` plus this micro-batch's part of lambda times the penalty."""
        tuner = self.tuner
        config = tuner.peft_config[tuner.current_task]
        steps = self.current_gradient_accumulation_steps
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.0 has none
        if scaled is None:  # as `Trainer.training_step`, which divides the loss by the steps where it is not scaled
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        share = steps if scaled else 1
        self._summed_steps += 1 / steps
        self._sums["task_loss"] += loss.detach().float() * share / steps
        if tuner.has_penalty(tuner.current_task):
            penalty = tuner.orthogonality_penalty().to(loss.device)
            self._sums["orthogonality_penalty"] += penalty.detach() / steps
            loss = loss + config.resolved_penalty_weight * penalty / share
        if config.l2_weight > 0:
            loss = loss + config.l2_weight * tuner.norm_penalty().to(loss.device) / share
        return loss

    # ---- logging -------------------------------------------------------------------------------------------

    def _clear_sums(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)  # since the last log
        self._summed_steps = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the parts of the loss and the coefficients."""
        if "loss" in logs:
            logs.update({name: float(value) / self._summed_steps for name, value in self._sums.items()})
            tuner = self.tuner
            similarities = tuner.peft_config[tuner.current_task].similarities or {}
            psi = {tuner.task_name(name): value for name, value in tuner.soft_coefficients.items()}
            for kind, values in (("psi", psi), ("similarity", similarities)):
                for task, value in values.items():
                    logs[f"{kind}/{task}"] = sum(value) / len(value) if isinstance(value, list) else value
            self._clear_sums()
        super().log(logs, start_time)  # type: ignore[misc]

    # ---- the start of a run --------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which calls it in each run before the model is wrapped. The task is checked, and an
        untrained one whose `project_init` needs its inputs gets its A.

        Raises:
            ValueError: the task cannot be trained as it is; or nothing that trains is in the optimizer.
        """
        self._clear_sums()
        tuner, settings = self.tuner, self.args
        check_trainable(tuner)
        config = tuner.peft_config[tuner.current_task]
        if needs_inputs(config.project_init) and is_untrained(tuner):
            loader, seed, progress = self.get_train_dataloader(), probe_seed(settings), not settings.disable_tqdm
            # an untrained task is the model before it: only stored vectors tell the earlier tasks apart
            if needs_history_inputs(config.project_init) and all(name in tuner.attribution for name in tuner.history):
                chosen = config.attribution
                config.attribution = replace(chosen, source="stored")
                try:
                    update_coefficients(self.model, choose_probe(loader, chosen.probe_size, seed), progress=progress)
                finally:
                    config.attribution = chosen
            initialize_from_inputs(self.model, choose_probe(loader, INPUT_EXAMPLES, seed), progress=progress)
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # there the optimizer may hold other tensors
        if self.accelerator.distributed_type not in sharded:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if held.isdisjoint(id(parameter) for parameter in tuner.parameters() if parameter.requires_grad):
                raise ValueError(
                    f"The optimizer has none of the weights of {tuner.current_task!r}: it was made for another task. "
                    "Make a new trainer (and optimizer) for each task, after set_adapter."
                )
        return optimizer

    # ---- checkpoints: the current task alone, in the folder's root -----------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the current task's adapter and config, which has psi. The history does not change and is left out.

        PEFT's `save_pretrained` would write it again at each checkpoint, into subfolders in which the Trainer does not
        look for its best model.
        """
        args = self.args
        if not args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model, tuner = self._bare(self.model), self.tuner
        task = tuner.current_task
        tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=task)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        unfinished = folder / f"{SAFETENSORS_WEIGHTS_NAME}.part"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / SAFETENSORS_WEIGHTS_NAME)
        config = copy.copy(tuner.peft_config[task])
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or tuner.model.__dict__.get("name_or_path")
        config.save_pretrained(str(folder))
        processing = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(str(folder))
        torch.save(args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume the weights, and psi as it stood: it came from the weights of an earlier step.

        Raises:
            ValueError: the checkpoint is of another task or another history.
        """
        model = self._bare(model if model is not None else self.model)
        tuner = require_tuner(model)
        own = tuner.peft_config[tuner.current_task]
        saved: Any = PeftConfig.from_pretrained(resume_from_checkpoint)
        found = (getattr(saved, "task_name", None), getattr(saved, "history", None))
        if found != (own.task_name, own.history):
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} is of task {found[0]!r} with history {found[1]}, and the "
                f"current task is {own.task_name!r} with history {own.history}. Give each task an output_dir of its "
                "own, or activate the task that the checkpoint belongs to."
            )
        if saved.history_hashes and own.history_hashes and saved.history_hashes != own.history_hashes:
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} was trained on top of other weights of its history "
                f"{own.history} than the model holds. Load the history that it was trained on, or start the task anew."
            )
        then, now = saved.to_dict(), own.to_dict()
        changed = [f"{name} was {then[name]!r} and is {now[name]!r}" for name in _RESUMED if then[name] != now[name]]
        if changed:
            text = f"The run goes on with other settings than {resume_from_checkpoint} has: {', '.join(changed)}."
            warnings.warn(text, stacklevel=2)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if tuner.history and saved.soft_coefficients:
            own.attribution_layout = saved.attribution_layout
            tuner.set_soft_coefficients(saved.soft_coefficients, similarities=saved.similarities)
            self._coefficient_callback.restored = True

    def _bare(self, model: Any) -> Any:
        """The PEFT model inside torch.compile's or a data-parallel wrapper."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)


def check_trainable(tuner: ASOLoraModel) -> None:
    """Refuse to train a task that is merged, disabled or frozen, lacks its history, or shares no module with it.

    Raises:
        ValueError, MissingHistoryError, HistoryError: as `ASOTrainerMixin`.
    """
    task = tuner.current_task
    # outside of the forward pass the adapters get no gradient from the task, and would follow the penalty alone
    if tuner.is_merged:
        raise ValueError("The adapters are merged and do not train. Call model.unmerge_adapter() first.")
    if any(layer.disable_adapters for layer in tuner.lora_layers().values()):
        raise ValueError("The adapters are disabled and do not train. Call model.base_model.enable_adapter_layers().")
    dependents = tuner.tasks.dependents(task)
    if dependents:
        raise ValueError(
            f"{task!r} is the history of {', '.join(map(repr, dependents))} and stays frozen. Activate the task that "
            "is to be trained with model.set_adapter(...), or add a new one with model.add_adapter(...)."
        )
    tuner.tasks.require([task])
    config = tuner.peft_config[task]
    penalised = tuner.has_penalty(task) and PENALTIES[config.penalty].needs_history
    if penalised:
        tuner.check_shared_modules()
    if (penalised and PENALTIES[config.penalty].needs_inputs) or (
        needs_history_inputs(config.project_init) and is_untrained(tuner)
    ):
        layers = tuner.lora_layers([task]).values()
        without = [old for old in tuner.history if not any(old in layer.task_inputs for layer in layers)]
        if without:
            raise MissingInputsError(
                f"project_init={config.project_init!r} and penalty={config.penalty!r} of {task!r} read the input "
                f"directions of the earlier tasks, and {', '.join(map(repr, without))} stores none. Call "
                "peft_aso.update_input_memory(model, batches, adapter=...) with some of its data, or set "
                "input_directions=32 in its config before it trains."
            )
    if not any(parameter.requires_grad for parameter in tuner.parameters()):
        raise ValueError(
            f"Nothing in the model trains: the adapter {task!r} was loaded for inference. Call "
            f"model.set_adapter({task!r}) (or load it with is_trainable=True)."
        )


class ASOTrainer(ASOTrainerMixin, Trainer):
    """`transformers.Trainer` that trains the active ASO-LoRA task. See `ASOTrainerMixin`."""


class ASOSeq2SeqTrainer(ASOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains the active ASO-LoRA task. See `ASOTrainerMixin`."""


def __getattr__(name: str) -> Any:
    """`ASOSFTTrainer` is made at its first use, because TRL is optional and slow to import."""
    if name != "ASOSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise ImportError('ASOSFTTrainer needs TRL: pip install "peft-aso[trl]"') from error

    class ASOSFTTrainer(ASOTrainerMixin, SFTTrainer):
        """`trl.SFTTrainer` with the orthogonality penalty, for a PEFT model whose active adapter is the task to train.

        Datasets are TRL's. The answer, whose tokens the loss and the attribution read, is the completion
        (`completion_only_loss`, TRL's default for prompts and completions), or what the assistant says
        (`assistant_only_loss=True`). `model` is a `PeftModel` from `get_peft_model`, `load_chain` or `add_adapter`.

        Raises:
            ValueError: on construction: a `peft_config`; packing or padding-free batches, whose rows hold several
                examples each; or as `ASOTrainerMixin`.
        """

        _loss_counts_items = True

        def __init__(self, model: Any, args: Any = None, *more: Any, **keywords: Any) -> None:
            if keywords.get("peft_config") is not None:
                raise ValueError(
                    "peft_config would make an adapter without a name or a history. Make the model with "
                    "get_peft_model(base, ASOLoraConfig(...), adapter_name=...), or add the task with "
                    "model.add_adapter."
                )
            if args is not None and (args.packing or args.padding_free):
                raise ValueError(
                    "packing and padding_free put several examples into one row, which attribution cannot tell apart. "
                    "Leave both off."
                )
            super().__init__(model, args, *more, **keywords)

    ASOSFTTrainer.__qualname__ = "ASOSFTTrainer"
    globals()["ASOSFTTrainer"] = ASOSFTTrainer
    return ASOSFTTrainer
