"""Commands that need no base model: inspect, verify, report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..chain.errors import ChainError
from ..chain.fitting import BaseView, check_fit
from ..chain.manifest import scale_of, weights_hash
from ..chain.order import in_order
from ..chain.reading import AdapterFile
from ..hub.card import PICTURE, markdown, mean_of, most_like
from ..hub.fetching import Access, Fetched, fetch, is_on_hub
from ..hub.pushing import draw
from ..tuner.history import chain_obstacles
from ..tuner.persistence import ATTRIBUTION_KEY
from .bases import without_weights

_NOT_LISTED = "not listed in chain.json"
_LEFT_OUT = "in the folder, and no part of the chain that was saved there last: left out"


def found_in(options: argparse.Namespace, damaged: dict[str, str] | None = None) -> Fetched:
    """The chain that the arguments name, on the disk now; `damaged` as in `fetch`.

    Raises:
        ValueError: a revision of a folder.
    """
    if options.revision is not None and not is_on_hub(options.source):
        raise ValueError(f"--revision is for a repository on the Hub, and {options.source} is a folder or no such id.")
    return fetch(options.source, Access(revision=options.revision), None, strict=True, damaged=damaged)


def inspect(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """Tasks, ranks, sizes, similarities, hashes."""
    found = found_in(options)
    tasks = [_about(adapter, found.manifest) for adapter in in_order(found.adapters)]
    base = next((task["base_model"] for task in tasks if task["base_model"]), None)
    rows = [["", "task", "rank", "weights", "MB", "most like (w)", "sha256", "from"]]
    for number, task in enumerate(tasks, start=1):
        origin = task["origin"] or {}
        place = f"{origin['repo_id']}@{origin['revision'][:7]}" if origin else ""
        rows.append(
            [str(number), task["task"], str(task["rank"]), f"{task['weights']:,}", f"{task['bytes'] / 1e6:.1f}",
             most_like(task), task["sha256"][:12], place]
        )  # fmt: skip
    size = sum(task["bytes"] for task in tasks) / 1e6
    title = f"{options.source}: {len(tasks)} tasks, {size:.1f} MB, base model {base or 'not named'}"
    notes = [f"{task['task']}: {_NOT_LISTED}" for task in tasks if found.manifest and not task["listed"]]
    notes += [f"{folder}: {_LEFT_OUT}" for folder in found.left_out]
    values = {"source": options.source, "base_model": base, "tasks": tasks, "left_out": found.left_out}
    return "\n".join([f"{title}\n\n{table(rows)}", *([""] if notes else []), *notes]), values, True


def _about(adapter: AdapterFile, manifest: Mapping[str, Any]) -> dict[str, Any]:
    weights = adapter.weights()
    config = adapter.config
    own = {name: tensor for name, tensor in weights.items() if name != ATTRIBUTION_KEY}
    return {
        "task": adapter.name,
        "listed": adapter.name in manifest,
        "history": adapter.history,
        "rank": config.r,
        "weights": sum(tensor.numel() for tensor in own.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        "similarities": None if adapter.is_stock else config.similarities,
        "soft_coefficients": None if adapter.is_stock else config.soft_coefficients,
        "sha256": weights_hash(weights),
        "base_model": config.base_model_name_or_path,
        "origin": None if adapter.is_stock else config.origin,
    }


def verify(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """Hashes, finite values, shapes, history: every task is looked at, whatever is wrong with the others."""
    damaged: dict[str, str] = {}
    found = found_in(options, damaged)
    against = options.base is not None and bool(found.adapters)
    view = BaseView.of(without_weights(found.adapters, options.base)) if against else None
    summed = len(found.adapters) > 1
    checks = {
        adapter.name: _problems(adapter, found.manifest.get(adapter.name), view, summed) for adapter in found.adapters
    }
    checks.update({task: [problem] for task, problem in damaged.items()})
    whole = [f"{task!r} is listed in chain.json and is not there" for task in found.manifest if task not in checks]
    try:
        if not damaged:  # whose histories are not known
            in_order(found.adapters)
    except ChainError as error:
        whole.append(str(error))
    well = not whole and not any(checks.values())
    compared = {task: ", hash and history as listed" for task in found.manifest}
    if found.manifest:
        compared.update({task: f", {_NOT_LISTED}" for task in checks if task not in compared})
    shapes = f", shapes as in {options.base}" if against else ""
    lines = [f"ok      {task}: finite{compared.get(task, '')}{shapes}" for task, bad in checks.items() if not bad]
    lines += [f"WRONG   {task}: {problem}" for task, bad in checks.items() for problem in bad]
    lines += [f"WRONG   {problem}" for problem in whole]
    lines += [f"note    {folder}: {_LEFT_OUT}" for folder in found.left_out]
    if not found.manifest:
        lines.append("note    there is no chain.json: hashes cannot be compared")
    return "\n".join(lines), {"well": well, "tasks": checks, "chain": whole, "left_out": found.left_out}, well


def _problems(adapter: AdapterFile, entry: Mapping[str, Any] | None, view: BaseView | None, summed: bool) -> list[str]:
    try:
        weights = adapter.weights()
        obstacle = next(iter(chain_obstacles(adapter.config)), None)
        if summed and obstacle is not None:
            return [f"it cannot be part of a chain: {obstacle}"]
        if view is not None:
            check_fit(adapter, weights, view)
    except ChainError as error:
        return [str(error)]
    found: list[str] = []
    if entry is None:
        return found
    scale = scale_of(adapter.config)
    if entry.get("scale", scale) != scale:
        found.append(f"scale {scale}, and chain.json says {entry['scale']}")
    digest = weights_hash(weights)
    if digest != entry["sha256"]:
        found.append(f"sha256 {digest}, and chain.json says {entry['sha256']}")
    if adapter.history != list(entry["history"]):
        found.append(f"history {adapter.history}, and chain.json says {entry['history']}")
    return found


def report(options: argparse.Namespace) -> tuple[str, Any, bool]:
    """A Markdown page and the picture of the similarities."""
    text, values, _ = inspect(options)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    entries = values["tasks"]
    picture = draw(entries, out / PICTURE)
    title = text.split("\n", 1)[0]
    rows = [["", "task", "rank", "weights", "history", "psi", "sha256"]]
    for number, task in enumerate(entries, start=1):
        psi = ", ".join(f"{old} {mean_of(value):.2f}" for old, value in (task["soft_coefficients"] or {}).items())
        row = [number, task["task"], task["rank"], f"{task['weights']:,}", ", ".join(task["history"]), psi]
        rows.append([*map(str, row), f"`{task['sha256'][:12]}`"])
    page = [f"# {title}", markdown(rows)]
    if picture:
        page.append(f"![similarity of the tasks]({PICTURE})")
    else:
        page.append("No picture: the chain has no similarities, or matplotlib is not installed (peft-aso[plots]).")
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return f"Written: {out / 'report.md'}", {"report": str(out / "report.md"), "picture": picture}, True


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width each, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
