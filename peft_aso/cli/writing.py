"""Commands that put the chain on its base model: merge, export, push."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoTokenizer

from ..chain import ChainError, export_lora, export_merged
from ..hub import load_chain, push_chain
from .bases import load_base
from .reading import found_in

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """One plain model folder."""
    model, base = _loaded(options)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    folder = export_merged(model, options.out, tasks=options.tasks, dtype=dtype, tokenizer=_tokenizer(base))
    return f"Written: {folder}", {"folder": str(folder)}, True


def export(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """One stock LoRA adapter."""
    model, _ = _loaded(options)
    folder = export_lora(model, options.out, tasks=options.tasks, max_rank=options.max_rank)
    return f"Written: {folder}", {"folder": str(folder)}, True


def push(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """To the Hub."""
    model, _ = _loaded(options)
    commits = push_chain(
        model, options.repo, per_task=options.per_task, merged=not options.no_merged,
        private=True if options.private else None,
    )  # fmt: skip
    lines = [f"{repo}  {commit}" for repo, commit in commits.items()]
    return "\n".join(lines or ["All tasks are on the Hub already."]), commits, True


def _loaded(options: argparse.Namespace) -> tuple[Any, str]:
    adapters = found_in(options).adapters
    if not adapters:
        raise ChainError(f"There is no adapter in {options.source}.")
    base, name = load_base(adapters, options.base)
    return load_chain(base, options.source, revision=options.revision), name


def _tokenizer(base: str) -> Any:
    """The base model's, if it has one."""
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError):
        return None
