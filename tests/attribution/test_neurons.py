"""Finding FFN neurons by structure, by a manual setting, and saying clearly when they cannot be found."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_aso.attribution import find_neurons, unwrap
from tests.tiny_models import ALL, FFN, HIDDEN, LAYERS, tiny

DOWN = {
    "llama": r"model\.layers\.\d\.mlp\.down_proj",
    "phi": r"model\.layers\.\d\.mlp\.fc2",
    "gpt2": r"transformer\.h\.\d\.mlp\.c_proj",
    "gpt_neox": r"gpt_neox\.layers\.\d\.mlp\.dense_4h_to_h",
    "gptj": r"transformer\.h\.\d\.mlp\.fc_out",
    "opt": r"model\.decoder\.layers\.\d\.fc2",
    "bloom": r"transformer\.h\.\d\.mlp\.dense_4h_to_h",
    "falcon": r"transformer\.h\.\d\.mlp\.dense_4h_to_h",
    "t5": r"(encoder|decoder)\.block\.\d\.layer\.\d\.DenseReluDense\.wo",
    "bart": r"model\.(encoder|decoder)\.layers\.\d\.fc2",
    "bert": r"bert\.encoder\.layer\.\d\.output\.dense",
    "roberta": r"roberta\.encoder\.layer\.\d\.output\.dense",
    "distilbert": r"distilbert\.transformer\.layer\.\d\.ffn\.lin2",
}
for like, names in {
    "llama": ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"),
    "t5": ("t5_v11", "mt5"),
    "bert": ("bert_mlm",),
}.items():
    DOWN.update(dict.fromkeys(names, DOWN[like]))


@pytest.mark.parametrize("name", ALL)
def test_found_by_structure(name: str) -> None:
    model = tiny(name)
    layers = find_neurons(model)
    size = 4 * HIDDEN if name == "bloom" else FFN
    assert len(layers) == (LAYERS + 2 if model.config.is_encoder_decoder else LAYERS)
    order = [module_name for module_name, _ in model.named_modules()]
    assert [order.index(layer.name) for layer in layers] == sorted(order.index(layer.name) for layer in layers)
    for layer in layers:
        assert re.fullmatch(DOWN[name], layer.name)
        assert model.get_submodule(layer.name) is layer.module
        assert layer.size == size
        assert layer.block is layer.blocks[layer.block_index]
        assert any(module is layer.module for module in layer.block.modules())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_stacks_of_an_encoder_decoder(name: str) -> None:
    layers = find_neurons(tiny(name))
    assert [(layer.stack, layer.block_index) for layer in layers] == [
        *(("encoder", index) for index in range(2)),
        *(("decoder", index) for index in range(LAYERS)),
    ]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "opt", "t5"])
def test_as_wide_as_the_hidden_size(name: str) -> None:
    width = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}.get(name, "intermediate_size")
    layers = find_neurons(tiny(name, **{width: HIDDEN}))
    assert all(re.fullmatch(DOWN[name], layer.name) for layer in layers)
    assert {layer.size for layer in layers} == {HIDDEN}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_an_adapter_on_the_ffn_is_the_neurons_wrapper(name: str) -> None:
    model = tiny(name)
    targets = [layer.name for layer in find_neurons(model)]
    others = {"llama": ["gate_proj"], "gpt2": ["mlp.c_fc"], "t5": ["wi"], "bert": ["intermediate.dense"]}[name]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[*targets, *others]))
    layers = find_neurons(wrapped)
    assert [layer.name for layer in layers] == targets
    for layer in layers:
        assert hasattr(layer.module, "base_layer")
        assert layer.size == FFN


def test_manual_settings() -> None:
    model = tiny("bert")
    assert [layer.name for layer in find_neurons(model, r"bert\.encoder\.layer\.[02]\.output\.dense")] == [
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.2.output.dense",
    ]
    # a suffix is what it is: attention's output.dense is matched too
    assert len(find_neurons(model, ["output.dense"])) == 2 * LAYERS
    assert len(find_neurons(model, ["intermediate.dense", "classifier"])) == LAYERS + 1
    head = find_neurons(model, ["classifier"])[0]
    assert head.block is None and head.block_index == -1


@pytest.mark.parametrize("setting", ["down_proj", ["dowm_proj"], r".*layers\.0", []])
def test_a_setting_that_matches_nothing(setting: Any) -> None:
    with pytest.raises(ValueError, match="matches no linear layer of LlamaForCausalLM"):
        find_neurons(tiny("llama"), setting)


def test_a_broken_expression() -> None:
    with pytest.raises(ValueError, match="not a regular expression"):
        find_neurons(tiny("llama"), "(")


def test_fused_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mixture of experts.*AttributionConfig\(neurons=\.\.\.\)"):
        find_neurons(tiny("mixtral"))


def test_experts_in_a_list_are_refused() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([Expert(), Expert()])

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    with pytest.raises(ValueError, match="layers.0.experts looks like a mixture of experts"):
        find_neurons(model)


def test_a_model_without_ffn_is_refused() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
    with pytest.raises(ValueError, match=r"no FFN down projection.*AttributionConfig\(neurons="):
        find_neurons(model)


def test_unwrap_in_whatever_order() -> None:
    model = tiny("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrap(model) is model
    assert unwrap(wrapped) is model
    assert unwrap(torch.compile(wrapped, backend="eager")) is model
    parallel = nn.Module()
    parallel.module = torch.compile(wrapped, backend="eager")
    assert unwrap(parallel) is model


def test_prompt_learning_is_refused() -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt-learning"):
        unwrap(get_peft_model(tiny("llama"), config))


def test_quantized_layers_count_by_their_widths() -> None:
    """Whatever says in_features and out_features is a linear layer: quantized ones are no nn.Linear."""

    class Packed(nn.Module):
        def __init__(self, width_in: int, width_out: int) -> None:
            super().__init__()
            self.in_features, self.out_features = width_in, width_out

    block = nn.ModuleDict({"gate_up": Packed(4, 16), "down": Packed(8, 4)})
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    model.config = SimpleNamespace(is_encoder_decoder=False)
    assert [(layer.name, layer.size) for layer in find_neurons(model)] == [("blocks.0.down", 8)]
