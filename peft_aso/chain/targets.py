"""Names that lead stock PEFT to just these modules of a model, and to no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from .errors import ChainError

_LONGEST_ENDING = 3  # parts of a module's name; beyond that the whole name is as good


def exact_targets(wanted: Iterable[str], modules: Sequence[str], config: Any) -> list[str] | str:
    """`target_modules` that match exactly the wanted modules: short endings if they do, else whole names.

    Args:
        wanted: names of modules.
        modules: names of all modules of the base model.
        config: the `LoraConfig` to be written; its target_modules is tried out and left at the result.

    Raises:
        ChainError: stock PEFT would leave a module out whatever the names (it lies in one of
            modules_to_save).
    """
    names = sorted(wanted)
    candidates: list[list[str] | str] = [
        sorted({".".join(name.split(".")[-parts:]) for name in names}) for parts in range(1, _LONGEST_ENDING + 1)
    ]
    candidates += [names, "|".join(re.escape(name) for name in names)]
    for candidate in candidates:
        config.target_modules = candidate if isinstance(candidate, str) else set(candidate)
        if {name for name in modules if name and check_target_module_exists(config, name)} == set(names):
            return candidate
    lost = [name for name in names if not check_target_module_exists(config, name)]
    raise ChainError(
        f"Stock PEFT does not put a LoRA adapter on {lost[0] if lost else names[0]}, which is in a module "
        f"that is saved as a whole (modules_to_save={config.modules_to_save}). Export tasks that do not mix "
        "the two."
    )
