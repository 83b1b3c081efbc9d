"""Chains of tasks on the Hugging Face Hub: fetched with pinned revisions, pushed in one commit."""

from __future__ import annotations

from .loading import load_chain, load_history
from .pushing import push_chain
from .updating import update_task

__all__ = ["load_chain", "load_history", "push_chain", "update_task"]
