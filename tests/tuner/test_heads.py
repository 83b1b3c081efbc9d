"""Heads that PEFT's classes for a task name by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertForQuestionAnswering, BertForTokenClassification

from peft_aso import ASOLoraConfig
from tests.tiny_models import tiny
from tests.tuner.chains import fill


def _base(kind: type) -> Any:
    torch.manual_seed(0)
    config = tiny("bert").config
    config.num_labels = 2  # a start and an end
    return kind(config).eval()


def _outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 11).reshape(2, 4)
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.start_logits


@pytest.mark.parametrize(
    "kind, task_type, head",
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_each_task_has_a_head_of_its_own(kind: type, task_type: str, head: str, tmp_path: Path):
    def settings(sort: type = ASOLoraConfig, **more: Any) -> Any:
        return sort(r=2, task_type=task_type, target_modules=["query", "value"], **more)

    stock = get_peft_model(_base(kind), settings(LoraConfig), "one")
    model = get_peft_model(_base(kind), settings(), "one")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in stock.named_parameters() if parameter.requires_grad]
    assert any(f"{head}.modules_to_save.one" in name for name in trained)
    model.add_adapter("two", settings())
    model.set_adapter("two")
    fill(model, ["one", "two"])
    expected = {}
    for task in ("two", "one"):
        model.set_adapter(task)
        expected[task] = _outputs(model)
    assert not torch.allclose(expected["one"], expected["two"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_base(kind), tmp_path / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "two", adapter_name="two")
    for task, logits in expected.items():
        loaded.set_adapter(task)
        assert torch.equal(_outputs(loaded), logits)


def test_a_head_that_the_user_named_is_named_once():
    settings = ASOLoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(_base(BertForTokenClassification), settings, "one")
    assert sorted(model.peft_config["one"].modules_to_save) == ["classifier", "score"]
