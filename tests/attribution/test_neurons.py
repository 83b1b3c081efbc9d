"""Finding FFN neurons by structure, by a manual setting, and the errors where they cannot be found."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from peft_aso.attribution import find_neurons, unwrap
from tests.tiny_models import ALL, FFN, HIDDEN, LAYERS, tiny

DOWN = {
    **dict.fromkeys(ALL, r"model\.layers\.\d\.mlp\.down_proj"),
    "phi": r"model\.layers\.\d\.mlp\.fc2",
    "gpt2": r"transformer\.h\.\d\.mlp\.c_proj",
    "gpt_neox": r"gpt_neox\.layers\.\d\.mlp\.dense_4h_to_h",
    "gptj": r"transformer\.h\.\d\.mlp\.fc_out",
    "opt": r"model\.decoder\.layers\.\d\.fc2",
    "bart": r"model\.(encoder|decoder)\.layers\.\d\.fc2",
    "roberta": r"roberta\.encoder\.layer\.\d\.output\.dense",
    "distilbert": r"distilbert\.transformer\.layer\.\d\.ffn\.lin2",
    **dict.fromkeys(("bloom", "falcon"), r"transformer\.h\.\d\.mlp\.dense_4h_to_h"),
    **dict.fromkeys(("t5", "t5_v11", "mt5"), r"(encoder|decoder)\.block\.\d\.layer\.\d\.DenseReluDense\.wo"),
    **dict.fromkeys(("bert", "bert_mlm"), r"bert\.encoder\.layer\.\d\.output\.dense"),
}


@pytest.mark.parametrize("name", ALL)
def test_found_by_structure(name: str) -> None:
    model = tiny(name)
    layers = find_neurons(model)
    assert len(layers) == (LAYERS + 2 if model.config.is_encoder_decoder else LAYERS)
    found = {layer.name for layer in layers}
    assert [layer.name for layer in layers] == [each for each, _ in model.named_modules() if each in found]
    for layer in layers:
        assert re.fullmatch(DOWN[name], layer.name)
        assert model.get_submodule(layer.name) is layer.module
        assert layer.size == (4 * HIDDEN if name == "bloom" else FFN)
        assert layer.block is layer.blocks[layer.block_index]
        assert any(module is layer.module for module in layer.block.modules())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_stacks_of_an_encoder_decoder(name: str) -> None:
    model = tiny(name)
    both = [(layer.stack, layer.block_index) for layer in find_neurons(model)]
    assert both == [("encoder", 0), ("encoder", 1), *(("decoder", index) for index in range(LAYERS))]
    assert [layer.stack for layer in find_neurons(model, stacks="encoder")] == ["encoder"] * 2
    with pytest.raises(ValueError, match="no FFN neurons in a stack 'encoder'"):
        find_neurons(tiny("llama"), stacks="encoder")


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "opt", "t5"])
def test_as_wide_as_the_hidden_size(name: str) -> None:
    width = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}.get(name, "intermediate_size")
    for layer in find_neurons(tiny(name, **{width: HIDDEN})):
        assert re.fullmatch(DOWN[name], layer.name) and layer.size == HIDDEN


def test_manual_settings() -> None:
    model = tiny("bert")
    names = [layer.name for layer in find_neurons(model, r"bert\.encoder\.layer\.[02]\.output\.dense")]
    assert names == [f"bert.encoder.layer.{index}.output.dense" for index in (0, 2)]
    # a suffix matches attention's output.dense too
    assert len(find_neurons(model, ["output.dense"])) == 2 * LAYERS
    assert len(find_neurons(model, ["intermediate.dense", "classifier"])) == LAYERS + 1
    head = find_neurons(model, ["classifier"])[0]
    assert head.block is None and head.block_index == -1


def test_settings_that_match_nothing() -> None:
    nothing = "matches no linear layer of LlamaForCausalLM"
    messages = {("dowm_proj",): nothing, (): nothing, "down_proj": nothing, r".*layers\.0": nothing}
    for setting, message in {**messages, "(": "not a regular expression"}.items():
        with pytest.raises(ValueError, match=message):
            find_neurons(tiny("llama"), setting if isinstance(setting, str) else list(setting))


def with_block(block: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


def test_experts_and_blocks_without_ffn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mixture of experts.*setting `neurons` of AttributionConfig"):
        find_neurons(tiny("mixtral"))
    experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
    with pytest.raises(ValueError, match="layers.0.experts looks like a mixture of experts"):
        find_neurons(with_block(nn.ModuleDict({"experts": experts})))
    with pytest.raises(ValueError, match=r"no FFN down projection.*setting `neurons` of AttributionConfig"):
        find_neurons(with_block(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))


def test_unwrap_in_whatever_order() -> None:
    model = tiny("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    compiled = torch.compile(wrapped, backend="eager")
    for each in (model, wrapped, compiled, nn.DataParallel(compiled)):
        assert unwrap(each) is model
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt-learning"):
        unwrap(get_peft_model(tiny("llama"), config))


def test_quantized_layers_count_by_their_widths() -> None:
    """Whatever has in_features and out_features is a linear layer: quantized ones are no nn.Linear."""

    gate_up, down = nn.Identity(), nn.Identity()
    gate_up.in_features, gate_up.out_features, down.in_features, down.out_features = 4, 16, 8, 4
    model = with_block(nn.ModuleDict({"gate_up": gate_up, "down": down}))
    assert [(layer.name, layer.size) for layer in find_neurons(model)] == [("layers.0.down", 8)]
