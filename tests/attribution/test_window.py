"""The fast way against the plain one, on every architecture and on unusual batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from peft_aso.attribution import AttributionVector, integrated_gradients
from tests.attribution.reference import largest_gap
from tests.tiny_models import ALL, SEQ2SEQ, tiny, tiny_batch

Batch = dict[str, torch.Tensor]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", [*ALL, "llama_classifier"])
def test_fast_is_plain(name: str, padding: str, fresh_seed: int) -> None:
    model = tiny(name, seed=fresh_seed)
    batch = tiny_batch(model, 4, seed=fresh_seed, padding=padding, prompt=(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = integrated_gradients(model, batch, steps=3, method="fast")
    plain = integrated_gradients(model, batch, steps=3, method="plain")
    assert largest_gap(fast.values, plain.values) <= 1e-4
    assert torch.allclose(fast.log_probability, plain.log_probability, atol=1e-4)
    assert fast.layout == plain.layout


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_fast_is_plain_with_eager_attention(name: str) -> None:
    model = tiny(name, attn_implementation="eager")
    batch = tiny_batch(model, 3, padding="left")
    fast = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(fast.values, integrated_gradients(model, batch, steps=3, method="plain").values) <= 1e-4


def interrupted_answer(batch: Batch) -> Batch:
    """Two labelled spans with an unlabelled token between them, as in a dialogue of two turns."""
    ids = torch.randint(3, 64, (2, 12))
    labels = torch.full_like(ids, -100)
    labels[:, 5:7], labels[0, 9:11], labels[1, 8] = ids[:, 5:7], ids[0, 9:11], ids[1, 8]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def no_prompt(batch: Batch) -> Batch:
    """One row whose first token already predicts the answer, beside one with a prompt."""
    ids = torch.randint(3, 64, (2, 6))
    labels = ids.clone()
    labels[0, 0], labels[1, :4] = -100, -100
    return {"input_ids": ids, "labels": labels}


def own_positions(batch: Batch) -> Batch:
    return {
        **batch,
        "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 3,
    }


def embedded(batch: Batch) -> Batch:
    ids = batch.pop("input_ids")
    generator = torch.Generator().manual_seed(0)
    return {**batch, "inputs_embeds": torch.randn(*ids.shape, 16, generator=generator)}


@pytest.mark.parametrize("change", [interrupted_answer, no_prompt, own_positions, embedded])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unusual_causal_batches(name: str, change: Callable[[Batch], Batch]) -> None:
    model = tiny(name)
    batch = change(tiny_batch(model, 2))
    fast = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(fast.values, integrated_gradients(model, batch, steps=3, method="plain").values) <= 1e-4


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_with_a_prompt_of_its_own(name: str) -> None:
    model = tiny(name)
    batch = tiny_batch(model, 2)
    ids = torch.randint(3, 64, (2, 6))
    batch["decoder_input_ids"] = ids
    batch["decoder_attention_mask"] = torch.ones_like(ids)
    batch["labels"] = torch.full_like(ids, -100)
    batch["labels"][0, 3:5], batch["labels"][1, 4:6] = 7, 9
    fast = integrated_gradients(model, batch, steps=3, method="fast")
    assert largest_gap(fast.values, integrated_gradients(model, batch, steps=3, method="plain").values) <= 1e-4


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("max_rows", [1, 4, 7])
def test_rows_at_once_do_not_matter(name: str, max_rows: int) -> None:
    model = tiny(name)
    batch = tiny_batch(model, 3)
    whole = integrated_gradients(model, batch, steps=5)
    split = integrated_gradients(model, batch, steps=5, max_rows=max_rows)
    assert largest_gap(split.values, whole.values) <= 1e-5


def test_examples_do_not_see_each_other() -> None:
    model = tiny("llama")
    batch = tiny_batch(model, 4)
    whole = integrated_gradients(model, batch, steps=3)
    apart = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    single = AttributionVector.cat([integrated_gradients(model, one, steps=3) for one in apart])
    assert largest_gap(single.values, whole.values) <= 1e-4


def test_the_window_is_all_that_runs() -> None:
    """What makes the fast way fast: blocks below are skipped, and only the answer's positions pass
    through."""
    model = tiny("llama")
    # prompts of eight tokens with answers of two and one: alone in one pass each, of two with equal answers in one
    batch = {name: tensor[[0, 0]] for name, tensor in tiny_batch(model, 2, seed=1, prompt=(8, 8)).items()}
    integrated_gradients(model, batch, steps=2)  # the self-check is done
    shapes: list[list[tuple[int, int]]] = [[], [], []]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape[:2])))
        for block, seen in zip(model.model.layers, shapes, strict=True)
    ]
    integrated_gradients(model, batch, steps=4, method="fast")
    integrated_gradients(model, batch, steps=4, method="fast", max_rows=8)
    for hook in hooks:
        hook.remove()
    # the prompt, and the recording, which is the fourth step; a sweep that grows by 2 examples x 3 steps at each block
    assert [seen[:3] for seen in shapes] == [[(2, 7), (2, 2), (6 * up, 2)] for up in (1, 2, 3)]
    # room for one layer at a time: a pass for each layer, from it upwards
    assert [seen[3:] for seen in shapes] == [[(2, 7), (2, 2), *[(6, 2)] * up] for up in (1, 2, 3)]
