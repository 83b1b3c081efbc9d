"""Sharded weights in one process: gathered inside, as before outside. (training/test_distributed.py has two.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from peft_aso.sharding import full_tensor, gathered, is_sharded, may_shard

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
needs_fsdp2 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's FSDP2 needs a GPU")


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded() -> nn.Sequential:
    """Two layers, each sharded for itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    mesh = init_device_mesh("cpu", (1,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    return model


def test_without_sharding_nothing_happens() -> None:
    model = nn.Linear(3, 2)
    before = dict(model.named_parameters())
    assert not may_shard()
    with gathered(model):
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert full_tensor(model.weight) is model.weight and not is_sharded(model.weight)


@needs_fsdp2
def test_weights_are_complete_inside_and_as_before_outside(group: None) -> None:
    model = sharded()
    x = torch.randn(3, 4)
    expected = model(x).detach()
    weights = dict(model.named_parameters())
    assert may_shard() and is_sharded(model[0].weight)
    with pytest.raises(ZeroDivisionError), gathered(model):
        assert type(model[0].weight) is nn.Parameter and model[0].weight.requires_grad
        torch.testing.assert_close(model[1](model[0](x)), expected)  # one module after another
        with gathered(model):  # a second time changes nothing
            assert type(model[0].weight) is nn.Parameter
        raise ZeroDivisionError
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()  # FSDP's own hooks are back: gradients are sharded like the weights
    assert is_sharded(model[0].weight.grad)


def test_a_tied_weight_stays_one_and_gradients_of_a_full_tensor_reach_the_shard(group: None) -> None:
    model = sharded()
    weight = model[1].weight = model[0].weight
    with gathered(model):
        assert model[1].weight is model[0].weight and not is_sharded(model[0].weight)
    assert model[1].weight is model[0].weight is weight and is_sharded(weight)
    full_tensor(weight).square().sum().backward()
    torch.testing.assert_close(full_tensor(weight.grad), 2 * full_tensor(weight).detach())


@needs_fsdp2
def test_hooks_of_others_stay_and_keep_their_order(group: None) -> None:
    model, seen = sharded(), []
    model[0].register_forward_pre_hook(lambda *_: seen.append("first"), prepend=True)
    model[0].register_forward_pre_hook(lambda *_: seen.append("last"))
    with gathered(model):
        model[0](torch.zeros(1, 4))
        model[0].register_forward_pre_hook(lambda *_: seen.append("new"))
    model(torch.zeros(1, 4))
    assert seen == ["first", "last", "first", "last", "new"]
