"""A kept value is made again exactly when its key changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_aso.tuner import kept
from peft_aso.tuner.kept import Kept, give_back, tensor_state


def test_it_is_made_once_a_key():
    kept: Kept[int] = Kept()
    calls = iter(range(10))
    assert [kept.get("a", lambda: next(calls)), kept.get("a", lambda: next(calls))] == [0, 0]
    assert [kept.get("b", lambda: next(calls)), kept.get("a", lambda: next(calls))] == [1, 2]
    kept.clear()
    assert kept.get("a", lambda: next(calls)) == 3


def test_copies_and_pickles_are_empty():
    kept: Kept[int] = Kept()
    kept.get("a", lambda: 1)
    for again in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept)), copy.copy(kept)):
        assert again.get("a", lambda: 2) == 2
    assert kept.get("a", lambda: 3) == 1


def test_what_is_made_in_inference_mode_can_be_trained_through():
    kept: Kept[torch.Tensor] = Kept()
    weight = torch.ones(2, 2)
    with torch.inference_mode():
        made = kept.get("a", lambda: weight * 2)
    x = torch.ones(2, requires_grad=True)
    (x @ made).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 4.0))


def test_the_state_of_a_tensor():
    parameter = nn.Parameter(torch.randn(3, 4))
    before = tensor_state(parameter)
    assert tensor_state(parameter) == before == tensor_state(parameter.detach())
    assert tensor_state(nn.Parameter(parameter.detach().clone())) != before
    assert tensor_state(parameter[1:]) != before
    with torch.no_grad():
        parameter.mul_(1)
    assert tensor_state(parameter) != before


def test_a_state_keeps_its_address_from_being_given_to_another_tensor():
    """Weights that went to another dtype and back may lie where they lay before, with other values."""
    parameter = nn.Parameter(torch.randn(64, 64))
    before, address = tensor_state(parameter), parameter.data_ptr()
    later = []
    for _ in range(50):
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
        later.append(parameter.data)
        assert tensor_state(parameter) != before
    assert address not in {tensor.data_ptr() for tensor in later}


def test_tensors_made_in_inference_mode_have_a_state():
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert tensor_state(tensor) == tensor_state(tensor)


def test_freed_pages_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back()  # on this platform, whatever it is
    calls: list[int] = []
    library = type("Library", (), {"malloc_trim": staticmethod(calls.append)})
    monkeypatch.setattr(kept.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(kept.sys, "platform", "linux")
    give_back()
    monkeypatch.setattr(kept.sys, "platform", "darwin")
    give_back()
    assert calls == [0]
