"""A model that is not what it seems is noticed, and runs the plain way."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from peft_aso.attribution import integrated_gradients
from tests.attribution.reference import largest_gap
from tests.tiny_models import tiny, tiny_batch

Batch = dict[str, torch.Tensor]

MODULE = sys.modules["peft_aso.attribution.integrated_gradients"]


class LookAhead(LlamaAttention):
    """Attention that sees what is to come: the prompt is then not independent of the answer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)


class Forgetful(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("this attention keeps no cache")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [(LookAhead, "differ by .* of the largest"), (Forgetful, "RuntimeError: this attention keeps no cache")],
)
def test_a_model_that_is_not_what_it_seems_falls_back(attention: type[nn.Module], reason: str) -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.__class__ = attention
    batch = tiny_batch(model, 2)
    with pytest.warns(UserWarning, match=f"plain way.*{reason}"):
        vector = integrated_gradients(model, batch, steps=3)
    plain = integrated_gradients(model, batch, steps=3, method="plain")
    assert torch.equal(vector.values, plain.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once a model
        integrated_gradients(model, batch, steps=3)
    with pytest.raises(ValueError, match=f"did not pass its self-check on LlamaForCausalLM: .*{reason}"):
        integrated_gradients(model, batch, steps=3, method="fast")


def test_the_self_check_runs_once_and_again_for_left_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    calls: list[int] = []
    original = MODULE.compare
    monkeypatch.setattr(MODULE, "compare", lambda *args: calls.append(1) or original(*args))
    for padding, expected in (("right", 1), ("right", 1), ("left", 2), ("left", 2), ("right", 2)):
        integrated_gradients(model, tiny_batch(model, 2, padding=padding), steps=2)
        assert len(calls) == expected


def test_the_self_check_looks_at_an_example_with_a_prompt() -> None:
    """BLOOM's attention cannot share prompts, which an example without a prompt does not show."""
    model = tiny("bloom")
    ids = torch.randint(3, 64, (2, 9))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    mask[0, :7] = 0
    labels[0, 8:], labels[1, 7:] = ids[0, 8:], ids[1, 7:]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    fast = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(fast.values, integrated_gradients(model, batch, steps=3, method="plain").values) <= 1e-4


def test_a_mask_with_holes_is_run_the_plain_way() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 1, prompt=(6, 6))
    batch["attention_mask"][0, 2] = 0
    with pytest.warns(UserWarning, match="of this batch runs the plain way: .*holes"):
        vector = integrated_gradients(model, batch, steps=3)
    assert torch.equal(vector.values, integrated_gradients(model, batch, steps=3, method="plain").values)
    with pytest.raises(ValueError, match="holes"):
        integrated_gradients(model, batch, steps=3, method="fast")
    integrated_gradients(model, tiny_batch(model, 2), steps=3, method="fast")  # of that batch, not of the model
