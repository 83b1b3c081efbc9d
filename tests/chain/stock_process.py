"""Run by the export's tests in a process of its own: stock PEFT loads an export; peft_aso is never imported.

Usage: stock_process.py JOBS OUT, where JOBS is a JSON list of `[folder with base model and batch, adapter
folder]`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer


def run(base_folder: str, adapter: str) -> dict[str, object]:
    description = json.loads(Path(base_folder, "description.json").read_text())
    base = getattr(transformers, description["class"])
    base = base(base.config_class(**description["config"]))
    base.load_state_dict(torch.load(Path(base_folder, "weights.pt"), weights_only=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base.eval(), adapter)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        logits = model(**torch.load(Path(base_folder, "batch.pt"), weights_only=True)).logits
    return {
        "logits": logits,
        "warnings": [str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)],
        "modules": sorted(layers),
        "scales": sorted({layer.scaling["default"] for layer in layers.values()}),
        "ranks": sorted({layer.r["default"] for layer in layers.values()}),
        "peft_type": str(model.peft_config["default"].peft_type.value),
    }


if __name__ == "__main__":
    results = [run(*job) for job in json.loads(Path(sys.argv[1]).read_text())]
    assert not [name for name in sys.modules if name.split(".")[0] == "peft_aso"], "peft_aso was imported"
    torch.save(results, sys.argv[2])
