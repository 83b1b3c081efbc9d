"""A step over what trains is the Trainer's own step over everything."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from peft_aso import ASOSeq2SeqTrainer, ASOTrainer
from peft_aso.training.trained import TrainedOnlyMixin, TrainedPart
from tests.training.tools import TinyTask, arguments, chain, randomize, train, weights


class PlainWays(ASOTrainer):
    """The plain twin: all walks are the Trainer's."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._trained = None
        self._operations = {}
        return super(TrainedOnlyMixin, self).train(*args, **kwargs)


class Look(TrainerCallback):
    """Calls a function with the model once, in the second step, when there are gradients."""

    def __init__(self, see: Any) -> None:
        self.see = see

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.see(model)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}])
def test_the_same_weights_norms_and_operations_as_all_walks_over_everything(
    tmp_path: Path, settings: dict[str, Any], fresh_seed: int
) -> None:
    results = []
    for kind in (ASOTrainer, PlainWays):
        model = chain(tasks=("one", "two", "new"))
        randomize(model, "new", seed=fresh_seed % 2**31)
        trainer = train(model, tmp_path, kind=kind, include_num_input_tokens_seen="all", **settings)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(norms) == 4 and all(norm > 0 for norm in norms)
        results.append((weights(model, "new"), norms, trainer.state.total_flos))
    (ours, norms, operations), (plain, plain_norms, plain_operations) = results
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert norms == plain_norms and operations == plain_operations > 0


@pytest.mark.parametrize(("kind", "name"), [(ASOTrainer, "llama"), (ASOSeq2SeqTrainer, "t5")])
def test_both_trainers_take_the_short_way_and_leave_nothing_behind(tmp_path: Path, kind: type, name: str) -> None:
    assert issubclass(kind, TrainedOnlyMixin) and issubclass(kind, (Trainer, Seq2SeqTrainer))
    model = chain(name)
    seen = []
    trainer = train(model, tmp_path / "before", kind=kind)
    trainer.add_callback(Look(lambda inner: seen.append(inner.zero_grad.__self__)))
    trainer.train()
    assert isinstance(seen[0], TrainedPart)
    assert set(seen[0].parameters()) == {each for each in model.parameters() if each.requires_grad}
    assert "zero_grad" not in model.__dict__ and trainer._trained is None


def test_the_model_that_a_run_makes_takes_the_short_way_too(tmp_path: Path) -> None:
    made, seen = [], []

    def init() -> Any:
        made.append(chain())
        return made[-1]

    def see(inner: Any) -> None:
        part = inner.zero_grad.__self__
        seen.append((part, part.model, set(part.parameters())))

    trainer = ASOTrainer(model_init=init, args=arguments(tmp_path), train_dataset=TinyTask(chain()))
    trainer.add_callback(Look(see))
    for _ in range(2):
        trainer.train()
        part, model, parameters = seen[-1]
        assert isinstance(part, TrainedPart) and model is made[-1]
        assert parameters == {each for each in model.parameters() if each.requires_grad}
    assert len(made) == 3 and not any("zero_grad" in model.__dict__ for model in made)


def test_nothing_is_left_behind_after_an_error_and_own_methods_come_back(tmp_path: Path) -> None:
    model = chain()
    calls = []
    model.zero_grad = lambda *_: calls.append("own")
    trainer = train(model, tmp_path)
    assert calls == []

    def fail(_: Any) -> None:
        raise RuntimeError("stop here")

    trainer.add_callback(Look(fail))
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.train()
    model.zero_grad()
    assert calls == ["own"]


def test_a_copy_made_in_training_clears_its_own_gradients(tmp_path: Path) -> None:
    model = chain()
    copies = []

    def take(inner: Any) -> None:
        copies.append((copy.deepcopy(inner), pickle.loads(pickle.dumps(inner.zero_grad.__self__))))

    trainer = train(model, tmp_path)
    trainer.add_callback(Look(take))
    trainer.train()
    other, part = copies[0]
    assert part.optimizer is None
    own = [each for each in model.parameters() if each.requires_grad]
    theirs = [each for each in other.parameters() if each.requires_grad]
    for each in own + theirs:
        each.grad = torch.ones_like(each)
    other.zero_grad()
    assert all(each.grad is None for each in theirs)
    assert all(each.grad is not None for each in own)


def test_parameters_that_the_optimizer_gets_later_are_seen() -> None:
    model = chain()
    part = TrainedPart(model)
    first = list(part.parameters())
    late = next(each for each in model.parameters() if not each.requires_grad)
    late.requires_grad_(True)
    part.optimizer = torch.optim.SGD(first, lr=0.1)
    assert late not in set(part.parameters())
    part.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    assert set(part.parameters()) == {*first, late}
    part.zero_grad(set_to_none=False)
    assert torch.equal(late.grad, torch.zeros_like(late))
    part.zero_grad()
    assert late.grad is None
