"""A finished run of adapters, to be looked at: its settings, its chain, and tables of what is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .settings import Settings, completed


def finished_chain(run: Path) -> tuple[Settings, Path]:
    """The settings of a finished run of aso_lora, o_lora or inc_lora, and the folder of its chain.

    Raises:
        SystemExit: it is no such run.
    """
    file = run / "settings.json"
    chains = sorted(run.glob("state_*/chain"))
    if not (file.is_file() and chains and (run / "results.json").is_file()):
        raise SystemExit(f"{run} is no finished run of aso_lora, o_lora or inc_lora.")
    given = completed(json.loads(file.read_text(encoding="utf-8")))
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Settings(**chosen), chains[-1]


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    heads = list(rows[0])
    cells = [[_cell(row[head]) for head in heads] for row in rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *cells]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
