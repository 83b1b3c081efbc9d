"""The forward pass of a layer with a history, against a sum in loops; and what it sees of what is done in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_aso import ASOLoraConfig
from peft_aso.tuner.layer import adapters_in, low_rank, matrices_of
from tests.tiny_models import tiny, tiny_batch
from tests.tuner import chains
from tests.tuner.chains import CURRENT, HISTORY, TASKS, add, assert_close, chain, fill, first_layer, logits, summed

FORMS = ("auto", "stacked", "folded")


class Small(nn.Module):
    """One layer of each kind that can carry a history."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 5)
        self.conv1d = Conv1D(4, 5)  # transformers': a linear layer with a transposed weight
        self.conv = nn.Conv1d(3, 4, 2)
        self.conv2d = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(torch.tanh(self.linear(self.embedding(x))))  # (batch, 3, 4)
        return self.conv2d(self.conv(hidden).view(len(x), 2, 2, 3))


LAYERS = ["embedding", "linear", "conv1d", "conv", "conv2d"]


def small(form: str = "auto", seed: int = 0, **settings: Any) -> Any:
    """Three tasks of different ranks, scales and target modules on a `Small`."""
    tasks: list[dict[str, Any]] = [
        {"r": 3, "lora_alpha": 2},
        {"r": 1, "lora_alpha": 8, "use_rslora": True, "target_modules": LAYERS[:-1]},
        {"r": 2, "rank_pattern": {"linear": 4}, "alpha_pattern": {"conv": 32}, "lora_alpha": 5},
    ]
    model: Any = Small()
    for number, (task, more) in enumerate(zip(TASKS, tasks, strict=True)):
        values = {"target_modules": LAYERS, "history_form": form, **more, **settings}
        model = add(model, task, ASOLoraConfig(**values), seed + number)
    return model.eval()


def expected_output(layer: Any, x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """The base layer's output plus that of each adapter, one after the other."""
    output = layer.base_layer(x)
    for name in names:
        if name in layer.lora_embedding_A:
            update = layer.lora_embedding_A[name].T[x] @ layer.lora_embedding_B[name].T
        elif name in layer.lora_A:
            update = layer.lora_B[name](layer.lora_A[name](x))
        else:
            continue
        output = output + layer.scaling[name] * update
    return output


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["stacked", "folded"])
@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_layer_is_the_sum_in_loops(form: str, bias: bool, fresh_seed: int):
    model = small(form, fresh_seed, **({"lora_bias": True, "target_modules": LAYERS[1:]} if bias else {}))
    x = torch.randint(7, (2, 3))
    inputs = {
        "embedding": x, "linear": torch.randn(2, 3, 6), "conv1d": torch.randn(2, 3, 5),
        "conv": torch.randn(2, 3, 4), "conv2d": torch.randn(2, 2, 2, 3),
    }  # fmt: skip
    for name, layer in model.base_model.lora_layers().items():
        for number, task in enumerate(TASKS):
            with model.base_model.through(task):
                assert_close(layer(inputs[name]), expected_output(layer, inputs[name], TASKS[: number + 1]))
            with model.base_model.only(task):
                assert_close(layer(inputs[name]), expected_output(layer, inputs[name], (task,)))
    assert_close(model(x), copy.deepcopy(model).merge_and_unload()(x))


def test_parts_of_a_layer():
    model = small()
    layers = model.base_model.lora_layers()
    assert list(layers) == LAYERS and list(model.base_model.lora_layers(["amazon"])) == LAYERS[:-1]
    assert adapters_in(layers["conv2d"], ["imdb", *TASKS]) == ["dbpedia", CURRENT]
    assert [each.shape for each in matrices_of(layers["embedding"], "dbpedia")] == [(3, 7), (6, 3)]
    assert [each.shape for each in matrices_of(layers["conv2d"], "dbpedia")] == [(3, 2, 3, 3), (3, 3, 1, 1)]
    update = low_rank(layers["conv2d"], CURRENT)
    assert (update.A.shape, update.B.shape, update.scale) == ((2, 18), (3, 2), 2.5) and not update.A.requires_grad
    assert low_rank(layers["embedding"], "amazon").scale == 8.0, "alpha / sqrt(r)"
    assert low_rank(layers["linear"], CURRENT).scale == 5 / 4 and low_rank(layers["conv"], CURRENT).scale == 16.0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_and_dropout(form: str, fresh_seed: int):
    """Gradients are those of the sum. With the current adapter at zero, no mask is drawn: dropout acts on it only."""
    base, model = chain("llama", seed=fresh_seed, history_form=form)
    _, alone = chain("llama", [CURRENT], base=summed(base, model, HISTORY))
    alone.load_state_dict({name: value for name, value in model.state_dict().items() if CURRENT in name}, strict=False)
    found, expected = (chains.gradients(each, each.train()(**tiny_batch(each)).loss) for each in (model, alone))
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    base, model = chain("llama", lora_dropout=0.5, history_form=form)
    for layer in model.train().base_model.lora_layers().values():
        layer.lora_B[CURRENT].weight.data.zero_()
    first = logits(model)
    assert torch.equal(first, logits(model))
    assert_close(first, logits(summed(base, model, HISTORY)))
    fill(model, [CURRENT])
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_base_weight_is_never_written_to(kind: str):
    base, model = chain(kind, history_form="folded")
    held = {name: value for name, value in model.named_parameters() if "lora_" not in name}
    for _ in range(2):
        optimizer_step(model)
    stop = Mock(side_effect=KeyboardInterrupt)  # a pass that stops half-way
    _, second, *_ = model.base_model.lora_layers().values()
    with second.base_layer.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
        logits(model)
    logits(model)
    for name, value in held.items():
        original = base.get_parameter(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        assert torch.equal(value, original) and model.get_parameter(name) is value, name
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model.unload()), logits(base))


def test_tied_base_weights():
    """An output head that is tied to the embedding has the history; the embedding does not."""
    base = tiny("llama", tie_word_embeddings=True)
    _, model = chain("llama", base=base, target_modules=["q_proj", "lm_head"])
    head, x = first_layer(model, "lm_head"), torch.randn(2, 16)
    assert_close(head(x), expected_output(head, x, TASKS))
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert head.base_layer.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS], ids=["one", "three"])
@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_tied_weights_merge_into_the_unmerged_model(targets: list[str], tasks: tuple[str, ...], tmp_path: Path):
    """Merged in place, one tied weight would take the updates of both modules."""
    base = tiny("llama", tie_word_embeddings=True)
    _, model = chain("llama", tasks, base=base, target_modules=targets)
    expected = logits(model)
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert_close(logits(model), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert_close(logits(type(merged).from_pretrained(tmp_path)), expected)
    assert not torch.allclose(logits(base), expected, atol=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, form: str, fresh_seed: int):
    base, model = chain("llama", base=tiny("llama").to(dtype), history_form=form, seed=fresh_seed)
    found = logits(model)
    assert found.dtype == dtype
    with model.base_model.folded():  # nothing is rounded
        assert form == "folded" or torch.equal(logits(model), found)
    expected = logits(summed(base.float(), model.float(), TASKS))
    # a number is right to eps / 2 in each of some forty sums; without the history all of it would differ
    assert (found.float() - expected).norm() < 20 * torch.finfo(dtype).eps * expected.norm()


class Quantized(nn.Linear):
    """A linear layer with 8-bit weights, as quantization backends have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def test_quantized_and_offloaded_weights(fresh_seed: int):
    base = tiny("llama")
    for name, module in list(base.named_modules()):
        if name.endswith(("q_proj", "v_proj", "down_proj")):
            base.set_submodule(name, Quantized(module.in_features, module.out_features, bias=False))
            weight = (module.weight.detach() * 100).round().clamp(-127, 127).to(torch.int8)
            base.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    layer = first_layer(chain("llama", base=base, seed=fresh_seed)[1])
    x = torch.randn(2, 3, layer.in_features)
    assert_close(layer(x), expected_output(layer, x, TASKS))
    assert layer.base_layer.weight.dtype == torch.int8
    _, model = chain("llama")
    expected = logits(model)
    for layer in model.base_model.lora_layers().values():
        add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu", offload=True, weights_map=None))
    assert first_layer(model).base_layer.weight.is_meta
    assert_close(logits(model), expected)


def reload(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    for low in (False, True):
        load_state(model, part="dbpedia")
        logits(model)  # on the changed history
        for task in HISTORY:
            model.load_adapter(path / task, adapter_name=task, low_cpu_mem_usage=low)


def load_state(model: Any, path: Path | None = None, part: str = "lora_", **settings: Any) -> None:
    values = {name: value * 1.5 if part in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(values, **settings)


def exchange_scales(model: Any, path: Path) -> None:
    """Through a layer's methods, and as rescale_adapter_scale does."""
    for layer in model.base_model.lora_layers().values():
        layer.set_scale("dbpedia", 3.0)
        layer.scale_layer(2.0)
        layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}


def dtypes_and_merging(model: Any, path: Path) -> None:
    model.half().float()
    assert logits(model.double()).dtype == torch.float64
    model.float().merge_adapter()
    logits(model)
    model.unmerge_adapter()


def delete_and_add(model: Any, path: Path) -> None:
    """Adapters of the same names with other weights."""
    for task in TASKS[:0:-1]:
        model.delete_adapter(task)
    for number, task in enumerate(TASKS[1:]):
        add(model, task, chains.config_for(r=3), seed=7 + number)


def optimizer_step(model: Any, path: Path | None = None) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    model.train()(**tiny_batch(model)).loss.backward()
    optimizer.step()
    model.eval()


def other_form(model: Any, path: Path) -> None:
    config = model.peft_config[CURRENT]
    config.history_form = "stacked" if config.history_form == "folded" else "folded"
    model.set_adapter(CURRENT)


def by_hand(model: Any, path: Path) -> None:
    fill(model, HISTORY, seed=9)
    for layer in model.base_model.lora_layers().values():
        layer.scaling["amazon"] = 0.5
        layer.base_layer.weight.data.mul_(1.5)
    model.base_model.refresh_history()


CHANGES: dict[str, tuple[Callable[[Any, Path], None], bool]] = {  # and whether the logits are others afterwards
    "load_adapter": (reload, False),
    "load_state_dict": (load_state, True),
    "load_state_dict(assign=True)": (partial(load_state, assign=True), True),
    "load_state_dict of the base": (partial(load_state, part="base_layer"), True),
    "set_scale, scale_layer, scaling exchanged": (exchange_scales, True),
    "half, float, double, merge_adapter, unmerge_adapter": (dtypes_and_merging, False),
    "delete_adapter, add_adapter": (delete_and_add, True),
    "optimizer.step": (optimizer_step, True),
    "history_form": (other_form, False),
    "by hand, refresh_history": (by_hand, True),
}


@pytest.mark.filterwarnings("ignore:The active adapter")
@pytest.mark.parametrize("form", ["stacked", "folded", "inside folded()"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_forward_pass_sees_it(change: str, form: str, tmp_path: Path):
    inside = form == "inside folded()"
    base, model = chain("llama", base=tiny("llama").half().float(), history_form="stacked" if inside else form)
    call, differs = CHANGES[change]
    with model.base_model.folded():
        logits(model)
    before = logits(model)
    with model.base_model.folded() if inside else nullcontext():
        logits(model)
        call(model, tmp_path)
        found = logits(model)
    for name, layer in model.base_model.lora_layers().items():
        base.get_submodule(name).weight.data.copy_(layer.base_layer.weight)
    assert_close(found, logits(summed(base, model, TASKS)))
    chains.assert_is_sum(model, base, TASKS)
    assert torch.allclose(found, before, rtol=1e-2, atol=1e-2) != differs
    fresh = copy.deepcopy(model)
    assert_close(fresh.base_model.orthogonality_penalty(), model.base_model.orthogonality_penalty())
    chains.assert_merged(fresh.merge_and_unload(), summed(base, model, TASKS))
