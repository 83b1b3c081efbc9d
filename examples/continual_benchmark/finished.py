"""A finished run of adapters, to be looked at: its tasks and its model as they were, and tables of what is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from tasks import Task, best_device, load_model

from peft_aso import load_chain

from .data import read_tasks
from .methods.adapters import ASOLoRA
from .results import read_json
from .settings import Settings, completed


class Finished(NamedTuple):
    """What a finished run of adapters ended with; the model is in eval mode."""

    results: dict[str, Any]
    settings: Settings
    tasks: list[Task]
    model: Any
    method: ASOLoRA


def open_run(run: Path) -> Finished:
    """Load what a finished run of aso_lora, o_lora or inc_lora ended with.

    Raises:
        SystemExit: it is no such run.
    """
    settings, folder = finished_chain(run)
    results = read_json(run / "results.json")
    tasks = read_tasks(results["tasks"], settings)
    base, tokenizer = load_model(settings.model)
    model = load_chain(base.to(best_device()), folder).eval()
    return Finished(results, settings, tasks, model, ASOLoRA(base, tokenizer, settings))


def finished_chain(run: Path) -> tuple[Settings, Path]:
    """The settings of a finished run of aso_lora, o_lora or inc_lora, and the folder of its chain.

    Raises:
        SystemExit: it is no such run.
    """
    saved, chains = read_json(run / "settings.json"), sorted(run.glob("state_*/chain"))
    if saved is None or not chains or not (run / "results.json").is_file():
        raise SystemExit(f"{run} is no finished run of aso_lora, o_lora or inc_lora.")
    chosen = {name: tuple(value) if isinstance(value, list) else value for name, value in completed(saved).items()}
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
