"""The paper's task orders (Table 4), and the tasks of a run: from a folder of task folders, or from the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import Task, read_task

if TYPE_CHECKING:
    from .settings import Settings

ORDERS = {
    number: tuple(names.split())
    for number, names in {
        "1": "dbpedia amazon yahoo agnews",
        "2": "dbpedia amazon agnews yahoo",
        "3": "yahoo amazon agnews dbpedia",
        "4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }.items()
}


# of each dataset, as the published prompts name it; the others are named like the dataset
KINDS = {
    name: kind
    for kind, names in {"TC": "dbpedia yahoo agnews", "SC": "amazon yelp IMDB SST-2", "NLI": "MNLI CB RTE"}.items()
    for name in names.split()
}


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
    if len(set(names)) < len(names):
        raise SystemExit(f"--order {text}: a task is learned once.")
    return names


def short(names: Sequence[str]) -> str:
    """The number of an order, or its names with hyphens, for a folder's name."""
    return next((number for number, order in ORDERS.items() if order == tuple(names)), "-".join(names))


def read_tasks(names: Sequence[str], settings: Settings) -> list[Task]:
    """The tasks in order, limited as the settings say.

    Raises:
        SystemExit: a task that is not there, a file that is not in the format, or no example left to test on.
    """
    root, found = Path(settings.data), []
    for name in names:
        if settings.data == "hub":
            from .hub import hub_task

            task = hub_task(name, settings.full)
        elif (root / name / "labels.json").is_file():
            task = read_task(root / name, full=settings.full)
        else:
            raise SystemExit(
                f"--data {root}: no task {name} there. Give the folder that holds one folder a task (its format: "
                "examples/data/README.md), or --data hub."
            )
        if settings.validation:  # train on the first four fifths of the training examples, test on the last
            cut = len(task.train) - len(task.train) // 5
            task = replace(task, train=task.train[:cut], test=task.train[cut:])
        task = replace(task, train=task.train[: settings.train_limit], test=task.test[: settings.test_limit])
        if settings.named:
            lines = f"Task:{KINDS.get(name, name)}\nDataset:{name}\n"
            train, test = ([(lines + prompt, answer) for prompt, answer in rows] for rows in (task.train, task.test))
            task = replace(task, train=train, test=test)
        if not task.train or not task.test:
            raise SystemExit(f"{name}: {len(task.train)} examples to train on and {len(task.test)} to test on.")
        found.append(task)
    return found
