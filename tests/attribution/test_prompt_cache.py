"""A cache that is read by many rows and written by none."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from peft_aso.attribution.prompt_cache import empty_prompt, floats_per_row, read_only


def prompt(batch: int = 2, length: int = 5) -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(batch, 3, length, 4), torch.randn(batch, 3, length, 4), layer)
    return cache


@pytest.mark.parametrize("batch", [1, 2])
def test_update_shows_the_prompt_and_keeps_nothing(batch: int) -> None:
    original = prompt(batch)
    rows = torch.tensor([0, 0, batch - 1, batch - 1])
    cache = read_only(original, rows)
    for _ in range(2):
        new_keys, new_values = torch.randn(4, 3, 2, 4), torch.randn(4, 3, 2, 4)
        keys, values = cache.update(new_keys, new_values, 1)
        assert torch.equal(keys, torch.cat([original.layers[1].keys[rows], new_keys], 2))
        assert torch.equal(values, torch.cat([original.layers[1].values[rows], new_values], 2))
        assert cache.get_seq_length() == 5 and original.get_seq_length() == 5
        assert cache.get_mask_sizes(2, 0) == (7, 0)


def test_read_only_of_read_only_picks_from_the_examples() -> None:
    original = prompt()
    once = read_only(read_only(original, torch.tensor([1, 1, 1])), torch.tensor([0, 1]))
    assert torch.equal(once.layers[0].keys, original.layers[0].keys)


def test_an_empty_prompt_gives_back_what_it_is_given() -> None:
    cache = read_only(empty_prompt(encoder_decoder=False), torch.tensor([0]))
    keys, values = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    shown = cache.update(keys, values, 0)
    assert shown[0] is keys and shown[1] is values
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0)


def test_cross_attention_is_already_there() -> None:
    original = EncoderDecoderCache(prompt(length=2), prompt(length=7))
    cache = read_only(original, torch.tensor([1]))
    assert cache.is_updated == {0: True, 1: True}
    assert torch.equal(cache.cross_attention_cache.layers[0].keys, original.cross_attention_cache.layers[0].keys[1:])
    assert cache.get_seq_length() == 2


def test_size_of_a_row() -> None:
    assert floats_per_row(prompt()) == 2 * 2 * 3 * 5 * 4
    assert floats_per_row(EncoderDecoderCache(prompt(), prompt())) == 2 * 2 * 2 * 3 * 5 * 4


def test_running_states_are_no_prompt() -> None:
    cache = Cache(layers=[object()])
    with pytest.raises(TypeError, match="keeps a running state"):
        read_only(cache, torch.tensor([0]))
