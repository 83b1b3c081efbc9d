"""A chain on a quantized base: the sum is right, it trains, psi is found, stock PEFT loads the export; on the CPU.

`make test-optional` runs these in an environment that has bitsandbytes and torchao.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_aso import (
    ASOLoraConfig,
    ASOTrainer,
    AttributionConfig,
    ChainError,
    HistoryError,
    export_lora,
    export_merged,
    load_chain,
    save_chain,
)
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import TinyTask, arguments, randomize


@pytest.fixture(params=["4 bit", "8 bit", "int8"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Loads the same quantized model anew each time it is called."""
    if request.param == "int8":
        kind = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig
        config: Any = TorchAoConfig(kind())
    else:
        pytest.importorskip("bitsandbytes")
        bits = {"load_in_8bit": True} if request.param == "8 bit" else {"load_in_4bit": True}
        config = BitsAndBytesConfig(**bits, bnb_4bit_compute_dtype=torch.float32)
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map="cpu"
    )


def settings(**more: Any) -> ASOLoraConfig:
    attribution = AttributionConfig(steps=4, probe_size=2, refresh=2)
    return ASOLoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", attribution=attribution, **more
    )


def chain(model: Any) -> Any:
    model = get_peft_model(model, settings(), adapter_name="first")
    model.add_adapter("second", settings())
    model.set_adapter("second")
    for seed, task in enumerate(("first", "second")):
        randomize(model, task, seed)
    return model.eval()


def values(model: Any) -> dict[str, torch.Tensor]:
    """All weights; torchao's own kind of tensor as the numbers that it stands for."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: t.dequantize() if type(t).__name__ == "Int8Tensor" else t.clone() for name, t in found.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**tiny_batch(model)).logits.float()


def test_the_sum_is_the_base_and_both_adapters_wherever_it_is_loaded(base: Any, tmp_path: Path) -> None:
    model, bare = chain(base()), base()
    for name, layer in model.base_model.lora_layers().items():

        def add(module: Any, inputs: Any, output: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            for task in ("first", "second"):
                A, B = layer.lora_A[task].weight, layer.lora_B[task].weight
                output = output + layer.scaling[task] * inputs[0] @ A.T @ B.T
            return output

        bare.get_submodule(name).register_forward_hook(add)
    found = logits(model)
    torch.testing.assert_close(found, logits(bare), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits(load_chain(base(), save_chain(model, tmp_path / "chain"))), found)
    served = PeftModel.from_pretrained(base(), export_lora(model, tmp_path / "served"))
    torch.testing.assert_close(logits(served), found, atol=1e-3, rtol=1e-3)


def test_it_trains_with_psi(base: Any, tmp_path: Path) -> None:
    model = chain(base())
    before = values(model)
    trainer = ASOTrainer(model=model, args=arguments(tmp_path, max_steps=4), train_dataset=TinyTask(base(), seed=1))
    trainer.train()
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved and all(".second." in name for name in moved), "the base and the history stay"
    assert 0 < model.base_model.soft_coefficients["first"] < 2
    assert all(entry["orthogonality_penalty"] > 0 for entry in trainer.state.log_history if "task_loss" in entry)


def test_what_a_quantized_weight_cannot_do_is_refused_with_the_reason(base: Any, tmp_path: Path) -> None:
    model = chain(base())
    with pytest.raises(ChainError, match="float32"):
        export_merged(model, tmp_path / "merged")
    model.add_adapter("third", settings(history_form="folded"))
    with pytest.raises(HistoryError, match="cannot be folded.*quantized weight"):
        model.set_adapter("third")
