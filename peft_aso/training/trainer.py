"""`ASOTrainer`: Hugging Face's Trainer with one term more in the loss (Eq. 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..tuner import ASOLoraModel
from .accumulation import counts_items
from .callback import ASOCallback
from .checkpoint import check_checkpoint, restore_coefficients, save_current_task
from .coefficients import require_tuner
from .inputs import INPUT_EXAMPLES, initialize_from_inputs, is_untrained
from .probe import choose_probe, seed_of
from .trained import TrainedOnlyMixin


class ASOTrainerMixin(TrainedOnlyMixin):
    """Adds lambda times the orthogonality penalty to the training loss of a `transformers.Trainer` subclass.

    Put it before the Trainer in the bases: `class MyTrainer(ASOTrainerMixin, SomeTrainer)`. The model is a PEFT
    model whose active adapter is the task to train; its settings are those of the adapter's `ASOLoraConfig`.

    The data are what any Trainer takes. For attribution `labels` have to say what the answer is: -100 on the prompt,
    at most `AttributionConfig.max_answer_tokens` others a row (a class or a span, for models with such a head).

    Logged beside the Trainer's own values: `task_loss`, `orthogonality_penalty` (in the config's form, without
    lambda), and for each earlier task `psi/<task>` and `similarity/<task>`.

    Raises:
        ValueError: on construction: no ASO-LoRA adapter, the active task is the history of another and therefore
            frozen, the adapters are merged or switched off, or DeepSpeed's ZeRO-3 (ZeRO-2 and FSDP2 are fine). From
            `train`, before the first step: attribution cannot read the training data, and psi or `source="stored"`
            needs it (a warning where neither does).
        MissingHistoryError: on construction: a task of the history is not loaded.
        HistoryError: on construction: an earlier task shares no module with the current one.
    """

    _resuming: bool | None = None  # None until `train` is called

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_trainable(self.tuner)
        _refuse_zero_3(self.accelerator)  # type: ignore[attr-defined]
        self._ignores_item_count: bool | None = None
        self._sums: dict[str, torch.Tensor] = {}
        self._noted_steps = 0.0
        self.add_callback(ASOCallback())  # type: ignore[attr-defined]

    @property
    def tuner(self) -> ASOLoraModel:
        """The `ASOLoraModel` of the trainer's model."""
        return require_tuner(self.model)  # type: ignore[attr-defined]

    # ---- the loss ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; in training, plus the penalty, counted once an optimizer step."""
        labels = inputs.get("labels")  # the loss below may pop them
        scaled = self._scaled_for_accumulation(num_items_in_batch)
        mean = model.training and scaled and self._mean_in_spite_of_count(model, inputs, num_items_in_batch)
        found = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = found if return_outputs else (found, None)
        if model.training:
            if mean and labels is not None:
                loss = loss * self._share(labels, num_items_in_batch)
            share = self.current_gradient_accumulation_steps if scaled else 1  # type: ignore[attr-defined]
            loss = self._with_penalty(loss, share, scaled)
        return (loss, outputs) if return_outputs else loss

    def _with_penalty(self, loss: torch.Tensor, share: int, scaled: bool) -> torch.Tensor:
        """`loss` plus lambda times the penalty, of which this micro-batch carries one part in `share`."""
        config = self.tuner.peft_config[self.tuner.current_task]
        steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        self._noted_steps += 1 / steps
        self._note("task_loss", loss if scaled else loss / steps)
        if config.resolved_penalty_weight > 0 and self.tuner.history:
            penalty = self.tuner.orthogonality_penalty().to(loss.device)
            self._note("orthogonality_penalty", penalty / steps)
            loss = loss + config.resolved_penalty_weight * penalty / share
        if config.l2_weight > 0:
            loss = loss + config.l2_weight * self.tuner.norm_penalty().to(loss.device) / share
        return loss

    def _scaled_for_accumulation(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether the Trainer takes the loss as normalised over all micro-batches of the step already."""
        if self.loss_is_scaled_for_ga is not None:  # type: ignore[attr-defined]
            return bool(self.loss_is_scaled_for_ga)  # type: ignore[attr-defined]
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
        return bool(counted or self.compute_loss_func is not None)  # type: ignore[attr-defined]

    def _mean_in_spite_of_count(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> bool:
        """Whether the loss is the mean of each micro-batch, whatever `num_items_in_batch` it is given (T5's own is).

        Found out once a run, where a step has several micro-batches, from the loss below with two counts.
        """
        own = self.label_smoother is not None or self.compute_loss_func is not None  # type: ignore[attr-defined]
        if own or self.loss_is_scaled_for_ga is not None or count is None or inputs.get("labels") is None:  # type: ignore[attr-defined]
            return False
        parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes  # type: ignore[attr-defined]
        if parts == 1:
            return False
        if self._ignores_item_count is None:
            # sharded weights come together in the wrapper's pass
            bare = model if self.tuner.tasks.sharded else unwrap_parallel(model)
            counts = self._counts_items(bare, inputs, count)
            answered = inputs["labels"].ne(-100).any().to(counts.device)
            seen = self.accelerator.gather(torch.stack([counts, answered]).int()[None])  # type: ignore[attr-defined]
            counted, told = seen.bool().any(0).tolist()
            if not told:
                return False  # nothing labelled, no loss: the next micro-batch tells
            self._ignores_item_count = not counted
        return self._ignores_item_count

    def _counts_items(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        loss_of = super().compute_loss  # type: ignore[misc]
        return counts_items(lambda each, items: loss_of(model, each, num_items_in_batch=items), inputs, count)

    def _share(self, labels: torch.Tensor, num_items_in_batch: Any) -> Any:
        """The part of the step's labels that is in this micro-batch: turns its mean into its part of the sum."""
        if getattr(self, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        return labels.ne(-100).sum() / num_items_in_batch

    # ---- logging -------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: torch.Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _forget_notes(self) -> None:
        self._sums.clear()
        self._noted_steps = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the parts of the loss and the coefficients."""
        if "loss" in logs:
            logs.update({name: value.item() / self._noted_steps for name, value in self._sums.items()})
            logs.update(self._coefficient_logs())
            self._forget_notes()
        super().log(logs, start_time)  # type: ignore[misc]

    def _coefficient_logs(self) -> dict[str, float]:
        tuner = self.tuner
        if not tuner.history:
            return {}
        similarities = tuner.peft_config[tuner.current_task].similarities or {}
        psi = {tuner.task_name(name): value for name, value in tuner.soft_coefficients.items()}
        named = {"psi": psi, "similarity": similarities}
        return {
            f"{kind}/{task}": sum(value) / len(value) if isinstance(value, list) else value
            for kind, values in named.items()
            for task, value in values.items()
        }

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. A task with `project_init="inputs"` that has not been trained yet gets its A first."""
        self._forget_notes()
        self._ignores_item_count = None
        self._resuming = bool(resume_from_checkpoint)
        if self.model_init is None:  # type: ignore[attr-defined]
            self._make_ready(self.model)  # type: ignore[attr-defined]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the model of a run is made ready for it as a given one is."""
        model = super().call_model_init(trial)
        if self._resuming is not None:
            if self.place_model_on_device:  # type: ignore[attr-defined]
                self._move_model_to_device(model, self.args.device)  # type: ignore[attr-defined]
            self._make_ready(model)
        return model

    def _make_ready(self, model: nn.Module) -> None:
        """Before anything is wrapped: A of all processes is then the first one's, and whole."""
        tuner, args = require_tuner(model), self.args  # type: ignore[attr-defined]
        check_trainable(tuner)
        from_inputs = tuner.peft_config[tuner.current_task].project_init == "inputs"
        if self._resuming or not from_inputs or not is_untrained(tuner):
            return
        loader = self.get_train_dataloader()  # type: ignore[attr-defined]
        probe = choose_probe(loader, INPUT_EXAMPLES, seed_of(args))
        initialize_from_inputs(model, probe, progress=not args.disable_tqdm)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; one that was made for another task is refused.

        Raises:
            ValueError: nothing that trains is in the optimizer, so that the training would change nothing.
        """
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._trained is None:  # sharded: the optimizer may hold weights of its own
            return optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = [id(parameter) for parameter in self.tuner.parameters() if parameter.requires_grad]
        if trained and held.isdisjoint(trained):
            raise ValueError(
                f"The optimizer has none of the weights of {self.tuner.current_task!r}: it was made for another task, "
                "and nothing would be learned. Make a new trainer (and optimizer) for each task, after set_adapter."
            )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint holds the current task: the history does not change and is not written again."""
        args = self.args  # type: ignore[attr-defined]
        if not args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else args.output_dir)
        save_current_task(unwrap_parallel(self.model), folder, state_dict)  # type: ignore[attr-defined]
        processing = self.processing_class  # type: ignore[attr-defined]
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)  # type: ignore[attr-defined]
        if processing is not None:
            processing.save_pretrained(str(folder))
        torch.save(args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume the weights, and psi as it stood."""
        target = unwrap_parallel(model if model is not None else self.model)  # type: ignore[attr-defined]
        check_checkpoint(target, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, target)  # type: ignore[misc]
        callback = next(cb for cb in self.callback_handler.callbacks if isinstance(cb, ASOCallback))  # type: ignore[attr-defined]
        callback.restored = restore_coefficients(target, resume_from_checkpoint)


def check_trainable(tuner: ASOLoraModel) -> None:
    """Refuse to train what is merged or off, a task that is frozen, lacks its history, or shares no module with it."""
    task = tuner.current_task
    _refuse_merged_or_off(tuner)
    dependents = tuner.tasks.dependents(task)
    if dependents:
        raise ValueError(
            f"{task!r} is the history of {', '.join(map(repr, dependents))} and stays frozen. Activate the task that "
            "is to be trained with model.set_adapter(...), or add a new one with model.add_adapter(...)."
        )
    tuner.tasks.require([task])
    if tuner.peft_config[task].resolved_penalty_weight > 0:
        tuner.check_shared_modules()
    if not any(parameter.requires_grad for parameter in tuner.parameters()):
        raise ValueError(
            f"Nothing in the model trains: the adapter {task!r} was loaded for inference. Call "
            f"model.set_adapter({task!r}) (or load it with is_trainable=True)."
        )


def _refuse_merged_or_off(tuner: ASOLoraModel) -> None:
    """Adapters outside of the forward pass get no gradient from the task, and would follow the penalty alone."""
    if tuner.is_merged:
        raise ValueError(
            "The adapters are merged into the base weights, where they do not train. Call model.unmerge_adapter() "
            "first."
        )
    if any(layer.disable_adapters for layer in tuner.lora_layers().values()):
        raise ValueError(
            "The adapters are switched off, so that they do not train. Call model.base_model.enable_adapter_layers() "
            "first (or leave the disable_adapter() context)."
        )


def _refuse_zero_3(accelerator: Any) -> None:
    """DeepSpeed's ZeRO-3 leaves nothing of a weight in a process but in the module's own forward pass."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO-3 takes the weights apart, and the penalty and the attribution read them outside of the "
            "forward pass. Use ZeRO-2 or FSDP2, which shards the weights too (docs/distributed.md)."
        )


def unwrap_parallel(model: Any) -> Any:
    """The PEFT model inside torch.compile's or a data-parallel wrapper."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    return model


class ASOTrainer(ASOTrainerMixin, Trainer):
    """`transformers.Trainer` that trains the active ASO-LoRA task. See `ASOTrainerMixin`."""


class ASOSeq2SeqTrainer(ASOTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` that trains the active ASO-LoRA task. See `ASOTrainerMixin`."""
