"""remove_task: by either name, never out of merged weights, and psi of the others stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_aso import ChainError, remove_task
from tests.chain.chains import logits, make_chain
from tests.tiny_models import tiny


def test_by_the_adapters_name() -> None:
    model = make_chain(tasks={"default": {"task_name": "mood"}, "second": {}})
    remove_task(model, "default")
    assert list(model.peft_config) == ["second"] and model.base_model.history == ()
    assert model.peft_config["second"].history == []
    same = make_chain(tasks={"default": {"task_name": "mood"}, "second": {}})
    remove_task(same, "mood")
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize("task", ["first", "third"])
def test_not_out_of_merged_weights(task: str) -> None:
    model = make_chain()
    before = logits(model)
    configs = {name: config.to_dict() for name, config in model.peft_config.items()}
    model.merge_adapter()
    with pytest.raises(ChainError, match=r"merged .*unmerge_adapter\(\) first"):
        remove_task(model, task)
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == configs
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    remove_task(model, task)
    assert task not in model.peft_config


def test_psi_of_later_tasks_stays() -> None:
    model = make_chain()
    model.base_model.set_soft_coefficients({"first": 0.25, "second": 0.75})
    before = model.base_model.orthogonality_penalty().item()
    remove_task(model, "second")
    assert model.base_model.soft_coefficients == {"first": 0.25} == model.peft_config["third"].soft_coefficients
    left = model.base_model.orthogonality_penalty().item()
    assert left == pytest.approx(0.25**2 * pairwise(model, "first"), rel=1e-4)
    assert left < before


def pairwise(model: Any, task: str) -> float:
    """Eq. 7 for one earlier task with psi = 1, written out."""
    return sum(
        (layer.lora_A[task].weight @ layer.lora_A["third"].weight.T).square().sum().item()
        for layer in model.base_model.lora_layers().values()
    )


def test_base_weights_are_the_bases() -> None:
    torch.manual_seed(0)
    plain = tiny("llama").eval()
    model = make_chain()
    remove_task(model, "second")
    assert torch.equal(logits(model.unload()), logits(plain))
