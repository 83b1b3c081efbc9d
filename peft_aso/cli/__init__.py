"""`peft-aso` on the command line: look at a chain, check it, merge, export, push and report it."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
