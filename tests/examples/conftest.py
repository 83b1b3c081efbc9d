"""What the tests of the continual benchmark share: its modules, two tiny tasks, and two tiny models on disk."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples.tiny_tasks import TASKS, WORDS
from tests.tiny_models import tiny
from tests.training.tools import tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """Imports a module of the continual benchmark by name, as run.py does it; `examples/` is on the path."""
    sys.path.insert(0, str(EXAMPLES))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f"continual_benchmark.{name}")
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("continual_benchmark", "speed", "tasks"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks whose answer is in the prompt."""
    root = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    for name, options in TASKS.items():
        folder = root / name
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(options))
        for split, count in (("train", 10), ("test", 6)):
            with (folder / f"{split}.jsonl").open("w") as file:
                for _ in range(count):
                    answer = draw.choice(options)
                    row = {"prompt": " ".join([*draw.choices(WORDS, k=4), answer, "answer"]), "answer": answer}
                    print(json.dumps(row), file=file)
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama and a tiny T5 on disk, each with a tokenizer of whole words."""
    found = {}
    for name in ("llama", "t5"):
        folder = tmp_path_factory.mktemp(name)
        # `generate` wants as many layers on both sides; dropout is drawn anew for each micro-batch
        changes = {"num_layers": 2, "num_decoder_layers": 2, "dropout_rate": 0.0} if name == "t5" else {}
        tiny(name, **changes).save_pretrained(folder)
        tokenizer(WORDS).save_pretrained(folder)
        found[name] = folder
    return found
