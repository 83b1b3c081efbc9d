"""Chains of tasks on disk and on the Hub: save, load, push, update, and export for programs without this package."""

from __future__ import annotations

from .export import export_lora, export_merged
from .hub import push_chain
from .load import load_chain, load_history, update_task
from .manifest import ChainError
from .save import remove_task, save_chain

__all__ = [
    "ChainError",
    "export_lora",
    "export_merged",
    "load_chain",
    "load_history",
    "push_chain",
    "remove_task",
    "save_chain",
    "update_task",
]
