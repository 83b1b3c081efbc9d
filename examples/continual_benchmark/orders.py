"""The task orders of the paper (Table 4), by number; any other order by the names of its tasks."""

from __future__ import annotations

from collections.abc import Sequence

ORDERS: dict[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "agnews"),
    "2": ("dbpedia", "amazon", "agnews", "yahoo"),
    "3": ("yahoo", "amazon", "agnews", "dbpedia"),
    "4": (
        "MNLI", "CB", "WiC", "COPA", "QQP", "BoolQA", "RTE", "IMDB", "yelp", "amazon", "SST-2", "dbpedia", "agnews",
        "MultiRC", "yahoo",
    ),
    "5": (
        "MultiRC", "BoolQA", "WiC", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews", "yelp",
        "amazon", "yahoo",
    ),
    "6": (
        "yelp", "amazon", "MNLI", "CB", "COPA", "QQP", "RTE", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo", "MultiRC",
        "BoolQA", "WiC",
    ),
}  # fmt: skip


def order_of(text: str) -> tuple[str, ...]:
    """The tasks of an order: its number, or names with commas between them.

    Raises:
        SystemExit: a number that there is not, a task named twice, or no name at all.
    """
    if text in ORDERS:
        return ORDERS[text]
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names or (len(names) == 1 and names[0].isdigit()):
        raise SystemExit(f"--order {text}: give one of {', '.join(ORDERS)}, or task names with commas between them.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SystemExit(f"--order: {', '.join(twice)} stands there twice; a task is learned once.")
    return names


def short(names: Sequence[str]) -> str:
    """The number of an order, or its names with hyphens, for a folder's name."""
    known = {tasks: number for number, tasks in ORDERS.items()}
    return known.get(tuple(names)) or "-".join(names)
