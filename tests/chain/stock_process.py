"""Run by the export's tests in a process of its own: stock PEFT loads exports; peft_aso is never imported.

Usage: stock_process.py FOLDER..., each with a base model, its batch and an adapter; the results are in results.pt.
"""

from __future__ import annotations

import sys
import warnings

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer


def run(folder: str) -> dict[str, object]:
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    base = getattr(transformers, name).from_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, f"{folder}/served")
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        logits = model(**torch.load(f"{folder}/batch.pt", weights_only=True)).logits
    return {
        "logits": logits,
        "warnings": [str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)],
        "modules": sorted(layers),
        "scales": sorted({layer.scaling["default"] for layer in layers.values()}),
        "ranks": sorted({layer.r["default"] for layer in layers.values()}),
        "peft_type": str(model.peft_config["default"].peft_type.value),
    }


if __name__ == "__main__":
    torch.save({folder: run(folder) for folder in sys.argv[1:]}, "results.pt")
    assert not [name for name in sys.modules if name.split(".")[0] == "peft_aso"], "peft_aso was imported"
