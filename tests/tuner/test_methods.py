"""Every registered penalty, start of A and way to merge: trained, saved, loaded, merged and exported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from peft_aso import (
    ASOSeq2SeqTrainer,
    ASOTrainer,
    AttributionConfig,
    export_lora,
    load_chain,
    save_chain,
    update_input_memory,
)
from peft_aso.tuner.low_rank import MERGES, LowRank, register_merge, sum_updates
from peft_aso.tuner.penalties import PENALTIES
from peft_aso.tuner.starts import STARTS, needs_history_inputs
from tests.tiny_models import tiny, tiny_batch
from tests.tuner import chains
from tests.tuner.chains import CURRENT, HISTORY, TASKS, assert_close, assert_is_sum, chain, config_for, copy_of, logits

METHODS = [("penalty", each) for each in PENALTIES]
METHODS += [("project_init", each) for each in STARTS] + [("merge", each) for each in MERGES]


def train(model: Any, folder: Path) -> list[float]:
    """Three steps; returns the penalties that were logged."""
    batch = tiny_batch(model, batch_size=8)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    kinds: Any = (ASOTrainer, TrainingArguments)
    if model.config.is_encoder_decoder:
        kinds = (ASOSeq2SeqTrainer, Seq2SeqTrainingArguments)
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "logging_steps": 1, "disable_tqdm": True}
    trainer = kinds[0](model=model, args=kinds[1](output_dir=str(folder), **settings), train_dataset=rows)
    trainer.train()
    return [entry["orthogonality_penalty"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(("setting", "name"), METHODS)
def test_a_registered_method_from_training_to_export(setting: str, name: str, kind: str, tmp_path: Path):
    base, model = chain(kind, HISTORY)
    config = config_for(kind, attribution=AttributionConfig(steps=2, probe_size=4), **{setting: name})
    model.add_adapter(CURRENT, config)
    for task in HISTORY:
        update_input_memory(model, [tiny_batch(model, batch_size=8)], adapter=task, directions=5)
    model.set_adapter(CURRENT)
    start, history = copy_of(model, [CURRENT]), copy_of(model, HISTORY)
    logged = train(model, tmp_path / "run")
    assert logged and all(0 <= value < float("inf") for value in logged)
    if setting == "project_init" and not needs_history_inputs(name):
        assert logged[0] < 0.1 * logged[-1] or logged[0] < 1e-2, "it starts outside of the history's span"
    chains.assert_frozen(model, HISTORY, history)
    assert all(not torch.equal(value, start[key]) for key, value in chains.parameters_of(model, CURRENT).items())
    chains.fill(model, [CURRENT], seed=5)  # a few steps hardly move it
    assert_is_sum(model.eval(), base, TASKS)

    save_chain(model, tmp_path / "chain")
    loaded = load_chain(tiny(kind), tmp_path / "chain")
    assert getattr(loaded.peft_config[CURRENT], setting) == name
    assert loaded.base_model.soft_coefficients == model.base_model.soft_coefficients
    assert torch.equal(logits(loaded), logits(model))

    export_lora(loaded, tmp_path / "export")
    stock = PeftModel.from_pretrained(tiny(kind), tmp_path / "export").eval()
    assert stock.peft_config["default"].peft_type == "LORA"
    merged = loaded.merge_and_unload()
    assert_close(logits(stock), logits(merged), 1e-3)
    if setting != "merge" or name == "sum":
        assert_close(logits(merged), logits(model), 1e-3)


def test_the_sum_of_low_rank_updates(fresh_seed: int):
    updates = [LowRank(torch.randn(r, 6), torch.randn(5, r), scale) for r, scale in ((2, 0.5), (3, -2.0), (1, 4.0))]
    total = sum_updates(updates)
    assert MERGES["sum"] is sum_updates and (total.A.shape, total.B.shape) == ((6, 6), (5, 6))
    assert_close(total.delta(), torch.stack([each.scale * each.B @ each.A for each in updates]).sum(0))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merge_of_ones_own(monkeypatch: pytest.MonkeyPatch, kind: str):
    """It takes effect in the merged model, and the forward pass stays the sum that the task was trained on."""
    monkeypatch.setitem(MERGES, "mean", None)  # taken out again at the end

    @register_merge("mean")
    def mean(updates: Sequence[LowRank], psi: torch.Tensor) -> LowRank:
        return replace(sum_updates(updates), scale=1 / len(updates))

    base, model = chain(kind, HISTORY)
    chains.add(model, CURRENT, config_for(kind, merge="mean"), seed=2)
    assert_is_sum(model.eval(), base, TASKS)
    expected = copy.deepcopy(base)
    for name, layer in model.base_model.lora_layers().items():
        expected.get_submodule(name).weight.data += sum(layer.get_delta_weight(task) for task in TASKS) / 3
    model.merge_adapter()
    assert_close(logits(model), logits(expected))
    model.unmerge_adapter()
    assert_is_sum(model, base, TASKS)
    model.set_adapter("amazon")  # each task has its own way
    before = logits(model)
    model.merge_adapter()
    assert_close(logits(model), before)
    model.unmerge_adapter()
    model.set_adapter(CURRENT)
    chains.assert_merged(model.merge_and_unload(), expected)
