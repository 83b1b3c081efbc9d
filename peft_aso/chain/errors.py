"""The one error of this package: a chain on disk that cannot be read, loaded, saved or exported."""

from __future__ import annotations

import warnings


class ChainError(ValueError):
    """A chain of tasks cannot be read, loaded, saved or exported. The message says why and what to do."""


def warn_or_raise(message: str, strict: bool) -> None:
    """A `ChainError` if strict, else a warning."""
    if strict:
        raise ChainError(message)
    warnings.warn(message, stacklevel=5)
