"""What a training loop does with all parameters of a model, done with those that train.

100 tasks with two target modules in 30 layers have 12,000 matrices, most of them frozen. A walk over them takes 40 to
70 ms on a CPU, and the Trainer takes three in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

# here the gradients belong to the wrapper, and it has its own ways with them
_OWN_WAYS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class TrainedPart:
    """The parameters of a model that train, and those that its optimizer gets later.

    Stands in for the model where the Trainer wants its `parameters()` or its `zero_grad()`. Parameters are looked for
    at the first use; one that starts to train afterwards is seen if the optimizer has it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer: Any = None
        self._found: dict[nn.Parameter, None] = {}  # a set in the model's order
        self._before: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A model that is copied or pickled in training takes this along, but not the optimizer."""
        return {**self.__dict__, "optimizer": None, "_before": {}}

    def parameters(self) -> Iterator[nn.Parameter]:
        """As the model's, without those that do not train."""
        if not self._found:
            wanted = [each for each in self.model.parameters() if each.requires_grad or each.grad is not None]
            self._found = dict.fromkeys(wanted)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            self._found.update(dict.fromkeys(group["params"]))
        return iter(list(self._found))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the model's."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)

    def stand_in(self) -> None:
        """Let the model's `zero_grad` come here."""
        held = self.model.__dict__
        self._before = {name: held[name] for name in ("zero_grad",) if name in held}
        held["zero_grad"] = self.zero_grad

    def step_back(self) -> None:
        """Give the model its own `zero_grad` again."""
        del self.model.__dict__["zero_grad"]
        self.model.__dict__.update(self._before)

    def follow(self, model: nn.Module) -> None:
        """Stand in for another model, which takes the place of the first in the middle of `train` (`model_init`)."""
        self.step_back()
        self.model, self._found = model, {}
        self.stand_in()


@contextmanager
def clearing_only(part: TrainedPart) -> Iterator[None]:
    """Inside the context `zero_grad` of the part's model goes to the part."""
    part.stand_in()
    try:
        yield
    finally:
        part.step_back()


class TrainedOnlyMixin:
    """A `transformers.Trainer` whose step does not become slower with the number of frozen adapters.

    The norm of the gradients is taken, and they are cleared, over the parameters that train, and operations are
    counted once a run. Sharded training (FSDP, DeepSpeed) keeps the Trainer's own ways.
    """

    _trained: TrainedPart | None = None
    _operations: dict[str, float]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        self._operations = {}
        if self.accelerator.distributed_type in _OWN_WAYS:  # type: ignore[attr-defined]
            return super().train(*args, **kwargs)  # type: ignore[misc]
        self._trained = TrainedPart(self.model)  # type: ignore[attr-defined]
        try:
            with clearing_only(self._trained):
                return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._trained = None

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        if self._trained is not None:
            self._trained.follow(model)
        return model

    def _for_gradients(self, model: nn.Module) -> Any:
        if self._trained is None:
            return model
        self._trained.optimizer = self.optimizer  # type: ignore[attr-defined]
        return self._trained

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._for_gradients(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._for_gradients(model), grad_norm=grad_norm)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """As the Trainer's: proportional to the size of the main input, and counted once."""
        name = getattr(self.model, "main_input_name", "input_ids")  # type: ignore[attr-defined]
        main = inputs.get(name)
        if not torch.is_tensor(main) or main.numel() == 0 or self._trained is None:
            return super().floating_point_ops(inputs)  # type: ignore[misc]
        if name not in self._operations:
            self._operations[name] = super().floating_point_ops(inputs) / main.numel()  # type: ignore[misc]
        return self._operations[name] * main.numel()
