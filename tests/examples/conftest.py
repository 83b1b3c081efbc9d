"""What the tests of the continual benchmark share: its modules, two tiny tasks, and two tiny models on disk."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.examples.tiny_tasks import TASKS, WORDS
from tests.tiny_models import tiny

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
    generator = torch.Generator().manual_seed(0)
    for name, options in TASKS.items():
        folder = root / name
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(options))
        for split, count in (("train", 10), ("test", 6)):
            rows = []
            for _ in range(count):
                picked = torch.randint(0, len(WORDS), (4,), generator=generator).tolist()
                answer = options[int(torch.randint(0, 2, (1,), generator=generator))]
                rows.append({"prompt": " ".join([*(WORDS[i] for i in picked), answer, "answer"]), "answer": answer})
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama and a tiny T5 on disk, each with a tokenizer of whole words."""
    found = {}
    for name in ("llama", "t5"):
        folder = tmp_path_factory.mktemp(name)
        layers = {"num_layers": 2, "num_decoder_layers": 2} if name == "t5" else {}  # `generate` wants as many of both
        tiny(name, **layers).save_pretrained(folder)
        vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        found[name] = folder
    return found
