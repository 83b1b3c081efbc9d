"""Chains of random adapters as files, in two shapes with the same weights: ASO_LORA's and stock LoRA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from peft_aso import ASOLoraConfig, load_chain

from .models import Subject

# B of a random adapter: its update is seen in the logits, and a hundred of them leave the model a model
SPREAD = 2e-3


class AdapterFolder:
    """Writes random adapters below one folder when they are first asked for.

    Args:
        folder: where to.
        subject: the model that they fit.
        rank: of all of them; alpha is four times the rank, as in the paper.
    """

    def __init__(self, folder: Path, subject: Subject, rank: int) -> None:
        self.folder = folder
        self.subject = subject
        self.rank = rank
        model = get_peft_model(subject.fresh(), self._config(LoraConfig))
        self._targets = model.peft_config["default"].target_modules
        self._shapes = {key: value.shape for key, value in get_peft_model_state_dict(model).items()}

    def _config(self, config_class: type, **changes: Any) -> Any:
        settings = {"r": self.rank, "lora_alpha": 4 * self.rank, "task_type": self.subject.task_type}
        return config_class(**settings, **changes)

    def stock(self, index: int) -> Path:
        """The folder of adapter `index` as stock LoRA."""
        return self._write(f"stock-{index}", index, self._config(LoraConfig, target_modules=self._targets))

    def aso(self, index: int, **changes: Any) -> Path:
        """The folder of adapter `index` with all before it as its history; `changes` are fields of its config."""
        config = self._config(
            ASOLoraConfig,
            target_modules=self._targets,
            task_name=task_name(index),
            history=[task_name(old) for old in range(index)],
            **changes,
        )
        suffix = "".join(f"-{name}-{getattr(value, 'source', value)}" for name, value in sorted(changes.items()))
        return self._write(f"aso-{index}{suffix}", index, config)

    def _write(self, name: str, index: int, config: Any) -> Path:
        path = self.folder / name
        if not path.exists():
            path.mkdir(parents=True)
            config.inference_mode = True
            config.save_pretrained(str(path))
            save_file(self._weights(index), path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        weights = {}
        for key, shape in self._shapes.items():
            spread = SPREAD if "lora_B" in key else (3 * shape[1]) ** -0.5  # PEFT's own start of A
            weights[key] = torch.randn(shape, generator=generator) * spread
        return weights


def task_name(index: int) -> str:
    """Tasks are called task0, task1 and so on."""
    return f"task{index}"


def chain_of(folder: AdapterFolder, tasks: int, **changes: Any) -> Any:
    """A chain of `tasks` random adapters on a fresh model; the newest trains, with `changes` in its config."""
    sources = [folder.aso(index) for index in range(tasks - 1)] + [folder.aso(tasks - 1, **changes)]
    return load_chain(folder.subject.fresh(), sources, trainable=True)


def stock_loaded(folder: AdapterFolder, tasks: int, base: Any) -> Any:
    """The same adapters in stock PEFT, loaded one after another; the first is active."""
    model: Any = PeftModel.from_pretrained(base, folder.stock(0), adapter_name=task_name(0), is_trainable=True)
    for index in range(1, tasks):
        model.load_adapter(folder.stock(index), task_name(index), is_trainable=True)
    return model


def all_active(model: Any, tasks: int) -> Any:
    """Stock PEFT with all its adapters in the forward pass; the newest trains."""
    names = [task_name(index) for index in range(tasks)]
    model.base_model.set_adapter(names)
    for name in names[:-1]:
        model.set_requires_grad(name, False)
    return model


def stock_chain_of(folder: AdapterFolder, tasks: int) -> Any:
    """The same adapters in stock PEFT, on a fresh model, all active, the newest trains."""
    return all_active(stock_loaded(folder, tasks, folder.subject.fresh()), tasks)


def plain_of(folder: AdapterFolder, index: int = 0) -> Any:
    """Stock PEFT with adapter `index` alone: no history."""
    return PeftModel.from_pretrained(
        folder.subject.fresh(), folder.stock(index), adapter_name=task_name(index), is_trainable=True
    )


def lora_weights(model: Any) -> dict[str, torch.Tensor]:
    """All adapters' matrices by name."""
    return {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
