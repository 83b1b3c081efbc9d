"""Chains of tasks on the disk: read, load, save, and export as one stock LoRA adapter."""

from __future__ import annotations

from .errors import ChainError
from .export import export_lora
from .merged import export_merged
from .removing import remove_task
from .saving import save_chain

__all__ = ["ChainError", "export_lora", "export_merged", "remove_task", "save_chain"]
