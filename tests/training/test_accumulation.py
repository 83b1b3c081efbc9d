"""Losses of one's own under `ASOTrainerMixin`: accumulated as the stock Trainer does where that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import Trainer

from peft_aso import ASOTrainer, ASOTrainerMixin
from peft_aso.training.accumulation import counts_items
from tests.training.tools import TinyTask, chain, largest_difference, train, weights

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
WAYS = ((8, 1), (2, 4))


class Counting(Trainer):
    """As the documentation of transformers has it: a sum, divided by the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        total = cross_entropy(outputs.logits.flatten(0, -2), inputs["labels"].flatten(), reduction="sum")
        loss = total / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class CountingInTraining(Counting):
    """Counts in training only, as it may: in evaluation the Trainer does not accumulate."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class Popping(Trainer):
    """The weighted loss of the documentation, which takes the labels out of the inputs and ignores the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, label_smoothing=0.2)
        return (loss, outputs) if return_outputs else loss


class OwnCounting(ASOTrainerMixin, Counting):
    pass


class OwnCountingInTraining(ASOTrainerMixin, CountingInTraining):
    pass


class OwnPopping(ASOTrainerMixin, Popping):
    pass


class Divided(Popping):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs=return_outputs)
        return found / self.current_gradient_accumulation_steps


class OwnDivided(ASOTrainerMixin, Divided):
    pass


def trained(folder: Path, kind: type, name: str, batch: int, parts: int, **settings: Any) -> dict[str, torch.Tensor]:
    model = chain(name, penalty_weight=settings.pop("penalty_weight", 0.0), **settings)
    more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, **SGD}
    train(model, folder, TinyTask(model, size=32), kind, max_steps=2, **more)
    return weights(model, "second")


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize(("stock", "own"), [(Counting, OwnCounting), (CountingInTraining, OwnCountingInTraining)])
def test_a_loss_that_counts_is_not_divided_again(tmp_path: Path, name: str, stock: type, own: type) -> None:
    expected = trained(tmp_path, stock, name, 8, 1)
    assert largest_difference(expected, weights(chain(name), "second")) > 1e-3
    for batch, parts in WAYS:
        assert largest_difference(expected, trained(tmp_path, own, name, batch, parts)) < 1e-5


@pytest.mark.parametrize("own", [OwnPopping, OwnDivided])
def test_a_loss_may_take_the_labels_and_ignore_the_count(tmp_path: Path, own: type) -> None:
    expected = trained(tmp_path, Popping, "bert", 8, 1)
    assert largest_difference(expected, weights(chain("bert"), "second")) > 1e-3
    for batch, parts in WAYS:
        found = trained(tmp_path, own, "bert", batch, parts)
        assert largest_difference(expected, found) < 1e-5


def test_the_labels_are_popped_with_a_penalty_too(tmp_path: Path) -> None:
    whole, parts = (trained(tmp_path, OwnPopping, "bert", *way, penalty_weight=0.5, l2_weight=0.01) for way in WAYS)
    assert largest_difference(whole, parts) < 1e-5


def passes(folder: Path, model: Any, **settings: Any) -> int:
    """How often the model runs on a batch of the training; its size tells it from the probe."""
    calls = []
    hook = model.register_forward_hook(lambda *_, **__: calls.append(1))
    train(model, folder, TinyTask(model, size=32), max_steps=2, **settings)
    hook.remove()
    return len(calls)


def test_the_loss_is_looked_at_once_a_run_and_only_where_steps_have_parts(tmp_path: Path) -> None:
    assert passes(tmp_path, chain("bert", penalty_weight=0.0)) == 2
    assert passes(tmp_path, chain("bert", penalty_weight=0.0), gradient_accumulation_steps=3) == 2 * 3 + 2


def test_looking_at_the_loss_draws_no_random_number(tmp_path: Path) -> None:
    """With dropout the weights are those of a Trainer that is told and need not look."""

    class Told(ASOTrainer):
        def _mean_in_spite_of_count(self, *_: Any) -> bool:
            return True

    ways = [trained(tmp_path, kind, "bert", 2, 4, lora_dropout=0.3) for kind in (ASOTrainer, Told)]
    assert all(torch.equal(ways[0][name], ways[1][name]) for name in ways[1])


def test_a_micro_batch_without_labels_does_not_decide(tmp_path: Path) -> None:
    """The loss of nothing is 0 whatever the count: the next micro-batch tells."""

    class InOrder(ASOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    results = []
    for batch, parts in WAYS:
        model = chain("llama", penalty_weight=0.0)
        data = TinyTask(model, size=8)
        data.batch["labels"][::2] = -100
        order = torch.tensor([0, 2, 1, 4, 3, 6, 5, 7])
        data.batch = {name: value[order] for name, value in data.batch.items()}
        trainer = train(
            model, tmp_path, data, InOrder, max_steps=1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=parts, **SGD,
        )  # fmt: skip
        results.append(weights(model, "second"))
    assert trainer._ignores_item_count is False
    assert largest_difference(*results) < 1e-5


def test_dropout_and_an_auxiliary_term_do_not_hide_the_count(fresh_seed: int) -> None:
    values, count = {"x": torch.rand(64)}, torch.tensor(7)

    def noisy(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.dropout(inputs.pop("x"), 0.5, True).sum()

    before = torch.get_rng_state()
    assert counts_items(lambda inputs, items: noisy(inputs) / items + 5, values, count)
    assert not counts_items(lambda inputs, items: noisy(inputs), values, count)
    assert "x" in values and torch.equal(torch.get_rng_state(), before)
