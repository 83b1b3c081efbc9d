"""Sharded weights in one process: what is whole when, and put back. (training/test_distributed.py has two.)"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from peft_aso.sharding import Rows, gathered, here, is_sharded, may_shard, whole

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded() -> nn.Sequential:
    """Two layers, each sharded for itself, the last one's weight tied to the first's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_where_nothing_is_sharded_nothing_happens() -> None:
    model = nn.Linear(3, 2)
    before = dict(model._parameters)
    assert not may_shard()
    with gathered(model):
        assert all(model._parameters[name] is weight for name, weight in before.items())
    weight = model.weight
    assert whole(weight) is weight and here(weight) is weight and not is_sharded(weight)
    rows = Rows({"one": weight})
    assert rows.matrices["one"] is weight
    share = weight.sum()
    assert rows.total(share) is share
    assert Rows({}).matrices == {}


def test_weights_are_whole_inside_and_as_before_outside(group: None) -> None:
    model = sharded()
    x = torch.randn(3, 4)
    expected = model(x).detach()
    weights, hooks = dict(model[0]._parameters), list(model[0]._forward_pre_hooks.items())
    assert is_sharded(model[0].weight)
    with pytest.raises(ZeroDivisionError), gathered(model):
        assert type(model[0].weight) is nn.Parameter and model[0].weight.requires_grad
        assert not model[0]._forward_pre_hooks
        torch.testing.assert_close(model[1](model[0](x)), expected)  # part by part
        with gathered(model):  # once is enough
            assert type(model[0].weight) is nn.Parameter
        raise ZeroDivisionError
    assert all(model[0]._parameters[name] is weight for name, weight in weights.items())
    assert list(model[0]._forward_pre_hooks.items()) == hooks
    torch.testing.assert_close(model(x), expected)


def test_hooks_of_others_stay_and_keep_their_order(group: None) -> None:
    model = sharded()
    seen: list[str] = []
    for name in ("first", "last"):
        model[0].register_forward_pre_hook(lambda *_, name=name: seen.append(name), prepend=name == "first")
    order = list(model[0]._forward_pre_hooks)
    with gathered(model):
        model[0](torch.zeros(1, 4))
    assert seen == ["first", "last"] and list(model[0]._forward_pre_hooks) == order
    with gathered(model):
        came = model[0].register_forward_pre_hook(lambda *_: None)
        del model[0]._forward_pre_hooks[order[0]]
    assert list(model[0]._forward_pre_hooks) == [*order[1:], came.id], "what came or went inside stays so"


def test_rows_of_sharded_matrices_have_their_gradient_in_the_shard(group: None) -> None:
    model = sharded()
    weight = model[0].weight
    rows = Rows({"one": weight, "two": model[1].weight})
    assert not any(is_sharded(matrix) for matrix in rows.matrices.values())
    total = rows.total(sum(matrix.square().sum() for matrix in rows.matrices.values()))  # type: ignore[arg-type]
    torch.testing.assert_close(total.item(), sum(here(layer.weight).square().sum().item() for layer in model))
    total.backward()
    torch.testing.assert_close(here(weight.grad), 2 * here(weight).detach())
    mixed = Rows({"one": weight, "plain": torch.ones(2, 4)})  # they make no sum of the same kind
    assert not is_sharded(mixed.matrices["one"]) and mixed.total(total) is total
