"""Running on a folded weight: the base weight is never touched, whatever is done to the model, bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft.utils import get_peft_model_state_dict
from torch.utils.checkpoint import checkpoint

from peft_aso.tuner.forms import FoldedHistory, StackedHistory, fold_obstacle
from peft_aso.tuner.layer import modules_outside
from peft_aso.tuner.linear import HistoryLinear, attach_history
from tests.tiny_models import tiny, tiny_batch
from tests.tuner.chains import TASKS, assert_is_sum, chain, config_for, copy_of, fill, logits, summed
from tests.tuner.test_forms import forms_held

HISTORY, CURRENT = TASKS[:-1], TASKS[-1]


def _base_weights(model: Any) -> dict[str, torch.Tensor]:
    """The base weights as tensors, with their identity."""
    return {name: value for name, value in model.named_parameters() if "lora_" not in name}


def _assert_untouched(model: Any, base: Any) -> None:
    """Every base weight is the base model's, bit for bit, and saved under the same names."""
    plain = {name.replace(".base_layer", ""): value for name, value in _base_weights(model.base_model.model).items()}
    expected = dict(base.named_parameters())
    assert plain.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(plain[name], value), name


def _folded(kind: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """A chain that has run, so that its history is folded."""
    base, model = chain(kind, **settings)
    logits(model)
    assert {type(held) for held in forms_held(model)} == {FoldedHistory}
    return base, model


def test_plain_linear_layers_only():
    _, model = chain("llama", target_modules=["q_proj", "embed_tokens"])
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in model.base_model.lora_layers().items()}
    assert kinds["q_proj"] is HistoryLinear and not issubclass(kinds["embed_tokens"], HistoryLinear)
    assert issubclass(HistoryLinear, Linear)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_base_weights_stay_as_they_are(kind: str):
    base, model = chain(kind, history_form="folded")
    before = _base_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(**tiny_batch(model)).loss.backward()
        optimizer.step()
    assert FoldedHistory in {type(held) for held in forms_held(model)}
    _assert_untouched(model, base)
    assert all(value is before[name] for name, value in _base_weights(model).items())
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model.unload()), logits(base))


def test_a_forward_pass_that_fails_leaves_nothing_behind():
    base, model = _folded()
    layers = list(model.base_model.lora_layers().values())
    layers[1].base_layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    layers[1].base_layer._forward_pre_hooks.clear()
    _assert_untouched(model, base)
    assert_is_sum(model, base, TASKS)


def test_hooks_of_the_base_layer_run():
    _, model = _folded()
    layer = next(iter(model.base_model.lora_layers().values()))
    seen: list[torch.Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output) or output * 0)
    x = torch.randn(2, 3, layer.in_features)
    zeroed = layer(x)
    handle.remove()
    own = layer.lora_B[CURRENT](layer.lora_A[CURRENT](x)) * layer.scaling[CURRENT]
    torch.testing.assert_close(zeroed, own)
    torch.testing.assert_close(seen[0] + own, layer(x))


def test_saved_and_copied_models_have_the_base_weights(tmp_path: Path):
    base, model = _folded()
    before = logits(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = chain("llama", base=base)[1]
    fresh.load_state_dict(values)
    assert torch.equal(logits(fresh), before)
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert (tmp_path / "whole.pt").stat().st_size < 1.5 * len(pickle.dumps(chain("llama")[1]))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert forms_held(again) == [None] * len(forms_held(model))
        assert torch.equal(logits(again), before)
        fill(again, HISTORY, seed=5)
        assert_is_sum(again, base, TASKS)
        _assert_untouched(again, base)
    assert torch.equal(logits(model), before)
    assert not any("base_layer" in name for name in get_peft_model_state_dict(model, adapter_name=CURRENT))


def _change_base(model: Any) -> None:
    with torch.no_grad():
        for layer in model.base_model.lora_layers().values():
            layer.base_layer.weight.mul_(1.5)


def _exchange_base(model: Any) -> None:
    for layer in model.base_model.lora_layers().values():
        weight = layer.base_layer.weight
        layer.base_layer.weight = torch.nn.Parameter(weight.detach() * 1.5, requires_grad=False)


def _exchange_base_data(model: Any) -> None:
    for layer in model.base_model.lora_layers().values():
        layer.base_layer.weight.data = layer.base_layer.weight.data * 1.5


def _load_base(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 if "base_layer" in k else v for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [_change_base, _exchange_base, _exchange_base_data, _load_base])
def test_a_changed_base_weight_is_noticed(change: Callable[[Any], None]):
    base, model = _folded()
    before = logits(model)
    change(model)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for name in model.base_model.lora_layers():
            changed.get_submodule(name).weight.mul_(1.5)
    assert_is_sum(model, changed, TASKS)
    assert not torch.allclose(logits(model), before, atol=1e-3)


def test_another_dtype_and_back():
    base, model = _folded()
    model.double()
    assert forms_held(model) == [None] * len(forms_held(model))  # freed at once
    assert logits(model).dtype == torch.float64
    assert forms_held(model)[0].weight.dtype == torch.float64
    assert_is_sum(model.float(), base, TASKS)


def test_a_base_weight_that_trains_gets_its_gradient():
    _, model = _folded()
    layer = next(iter(model.base_model.lora_layers().values()))
    layer.base_layer.weight.requires_grad_(True)
    assert fold_obstacle(layer) == "its base weight trains"
    model(**tiny_batch(model)).loss.backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0
    assert isinstance(forms_held(model)[0], StackedHistory)


def test_a_replaced_forward_is_not_folded():
    """As accelerate's hooks do it: the base layer's own forward would run on its own weight."""
    base, model = _folded()
    for layer in model.base_model.lora_layers().values():
        layer.base_layer.forward = layer.base_layer.forward
        assert "forward has been replaced" in fold_obstacle(layer)
    assert_is_sum(model, base, TASKS)
    assert FoldedHistory not in {type(held) for held in forms_held(model)}


def test_accelerate_hooks():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    base, model = _folded()
    for layer in model.base_model.lora_layers().values():
        add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu", offload=True, weights_map=None))
    assert_is_sum_offloaded(model, base)


def assert_is_sum_offloaded(model: Any, base: Any) -> None:
    """The base weights are on the meta device between two passes."""
    layer = next(iter(model.base_model.lora_layers().values()))
    assert layer.base_layer.weight.is_meta and fold_obstacle(layer) is not None
    found = logits(model)
    _, plain = chain("llama", base=base)
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)


def test_tied_base_weights():
    """An output head that is tied to the embedding has the history; the embedding does not."""
    base = tiny("llama", tie_word_embeddings=True)
    _, model = chain("llama", base=base, target_modules=["q_proj", "lm_head"])
    head = model.base_model.lora_layers()["lm_head"]
    assert head.base_layer.weight is model.get_input_embeddings().weight
    ids = tiny_batch(model)["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), base.get_input_embeddings()(ids))
    x = torch.randn(2, head.in_features)
    expected = head.base_layer(x) + sum(head.scaling[n] * head.lora_B[n](head.lora_A[n](x)) for n in TASKS)
    torch.testing.assert_close(head(x), expected)
    assert isinstance(head.history_cache._held.form, FoldedHistory)
    assert head.base_layer.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool):
    _, model = _folded()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        layer = next(iter(model.base_model.lora_layers().values()))
        x = torch.linspace(-1, 1, layer.in_features).repeat(4, 1).requires_grad_()
        output = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        output.square().sum().backward()
        grads.append([x.grad, layer.lora_A[CURRENT].weight.grad, layer.lora_B[CURRENT].weight.grad])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_compiled_models_read_the_weights_themselves():
    base, model = chain("llama", history_form="folded")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, tiny_batch(model, batch_size=3)), logits(model))
    fill(model, HISTORY, seed=4)
    expected = logits(summed(base, model, TASKS))
    torch.testing.assert_close(logits(compiled, tiny_batch(model, batch_size=3)), expected, rtol=1e-4, atol=1e-4)


def test_a_single_adapter_with_dora_is_pefts_own():
    _, model = chain("llama", TASKS[:1], use_dora=True)
    layer = next(iter(model.base_model.lora_layers().values()))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(layer(x), Linear.forward(layer, x))
    assert forms_held(model)[0] is None


def test_several_threads_share_one_model():
    """A pass of one thread may not see the folded weight of another as its base weight."""
    base, model = _folded()
    expected = logits(model)
    plain = logits(base)
    wrong: list[str] = []

    def run() -> None:
        for _ in range(20):
            for layer in model.base_model.lora_layers().values():
                layer.history_cache.clear()
            if not torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4):
                wrong.append("logits")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _assert_untouched(model, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert not wrong


def test_the_training_mode_reaches_every_part():
    """The short way through an adapter's parts leaves the same flags as torch's own."""
    _, model = chain("llama", lora_dropout=0.5)
    odd = torch.nn.Sequential(torch.nn.Dropout(0.5))
    for layer in model.base_model.lora_layers().values():
        layer.lora_dropout["dbpedia"] = odd
        layer.lora_dropout[CURRENT].train()
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
        layer = next(iter(model.base_model.lora_layers().values()))
        assert layer.train(not mode) is layer
        assert {module.training for module in layer.modules()} == {not mode}


def test_nothing_of_the_history_is_alive_after_the_layer_is_gone():
    _, model = _folded()
    weights = [weakref.ref(held.weight) for held in forms_held(model)]
    del model
    gc.collect()
    assert all(reference() is None for reference in weights)


def test_layers_without_a_history_yet_run_as_pefts():
    """Between PEFT's making of a layer and the attaching of the history."""
    _, model = chain("llama", TASKS[:1])
    layer = next(iter(model.base_model.lora_layers().values()))
    x, tasks = torch.randn(2, layer.in_features), layer.task_history
    expected = layer(x)
    del layer.__dict__["task_history"]
    assert torch.equal(layer(x), expected)
    attach_history(layer, tasks)
    assert torch.equal(layer(x), expected)


def test_isolated_training_and_evaluation_in_turn():
    base, model = chain("llama", forward_history="isolated", history_form="folded")
    for _ in range(2):
        assert_is_sum(model.train(), base, [CURRENT])
        assert_is_sum(model.eval(), base, TASKS)


def test_a_scale_for_a_while_is_noticed():
    """Diffusers and PEFT's rescale_adapter_scale exchange the whole table of scales."""
    base, model = _folded()
    for layer in model.base_model.lora_layers().values():
        layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}
    assert_is_sum(model, base, TASKS)


def test_training_on_a_folded_history_changes_the_current_task_only():
    _, model = _folded()
    values = copy_of(model, HISTORY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(**tiny_batch(model)).loss.backward()
    optimizer.step()
    for name, value in copy_of(model, HISTORY).items():
        assert torch.equal(value, values[name])


def test_other_ranks_and_targets_a_task():
    base, model = chain("llama", TASKS[:1])
    model.add_adapter("amazon", config_for("llama", r=5, target_modules=["q_proj", "k_proj"]))
    model.add_adapter(CURRENT, config_for("llama", r=1, target_modules=["k_proj", "down_proj"]))
    model.set_adapter(CURRENT)
    fill(model, TASKS)
    assert_is_sum(model, base, TASKS)


def test_the_modules_are_named_as_torch_names_them():
    """The short way through an adapter's parts, with a module that is there twice and one with parts of its own."""
    _, model = chain("llama", lora_dropout=0.5)
    layer = next(iter(model.base_model.lora_layers().values()))
    for shared in (False, True):
        if shared:
            layer.lora_dropout["dbpedia"] = layer.lora_dropout[CURRENT]
            layer.lora_A["amazon"] = layer.lora_A["dbpedia"]
        for remove_duplicate in (True, False):
            expected = list(torch.nn.Module.named_modules(layer, None, "a.b", remove_duplicate))
            assert list(layer.named_modules(None, "a.b", remove_duplicate)) == expected
    layer.lora_dropout[CURRENT] = torch.nn.Sequential(torch.nn.Dropout(0.5))
    assert list(layer.named_modules()) == list(torch.nn.Module.named_modules(layer))
    assert list(layer.named_modules({layer})) == []
    assert list(layer.named_modules({layer.lora_A})) == list(torch.nn.Module.named_modules(layer, {layer.lora_A}))


def test_the_modules_outside_of_the_adapters():
    _, model = chain("bert", target_modules=["query", "value", "word_embeddings"])
    within = tuple(f"{name}.lora_" for name in model.base_model.lora_layers())
    named = model.base_model.model.named_modules()
    expected = [(name, module) for name, module in named if not name.startswith(within)]
    assert list(modules_outside(model.base_model.model)) == expected
