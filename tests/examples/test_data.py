"""The shipped example data: format, balance, no leak between train and test, no shortcuts."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
TASKS: dict[str, list[str]] = {
    "topic": ["billing", "delivery", "account", "product"],
    "mood": ["angry", "neutral", "pleased"],
    "urgency": ["urgent", "routine"],
    "wish": ["refund", "exchange", "repair", "advice"],
}
SIZES = {"train": 80, "test": 40}
# the option words as stems, so that "refunded" and "urgently" are found too
STEMS = {"urgency": ["urgen", "routine"], "wish": ["refund", "exchang", "repair", "advi[cs]"]}
NEAR_DUPLICATE = 0.85
LARGEST_GAP = 0.5  # a word may lean to an option ("paid" to a refund), but none decides it


@cache
def rows(task: str, split: str) -> list[dict[str, str]]:
    text = (DATA / task / f"{split}.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def instruction(task: str) -> str:
    return rows(task, "train")[0]["prompt"].split("\n")[0]


def messages(task: str) -> dict[str, str]:
    """What the customers wrote in both splits, the prompts' second lines, and the answers."""
    examples = [row for split in SIZES for row in rows(task, split)]
    return {row["prompt"].split("\n")[1].removeprefix("Message: "): row["answer"] for row in examples}


def nearly_equal(left: str, right: str) -> bool:
    matcher = SequenceMatcher(None, left.lower(), right.lower(), autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # the cheap upper bounds first
    return all(bound() >= NEAR_DUPLICATE for bound in bounds)


def largest_gap(flags: list[bool], answers: Sequence[str]) -> float:
    """How much more often the flag is set for one option than for the others: 0 tells nothing, 1 decides."""
    flag, answer = np.array(flags), np.array(answers)
    return max(abs(flag[answer == option].mean() - flag[answer != option].mean()) for option in set(answers))


def test_instruction_lines_tell_the_tasks_apart() -> None:
    """The merged model gets no task label, so the prompt alone has to tell which task it is."""
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == set(TASKS)
    assert len(set(map(instruction, TASKS))) == len(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_each_line_is_a_prompt_and_an_answer(task: str) -> None:
    assert json.loads((DATA / task / "labels.json").read_text(encoding="utf-8")) == TASKS[task]
    for split, size in SIZES.items():
        raw = (DATA / task / f"{split}.jsonl").read_bytes()
        assert raw.isascii() and raw.endswith(b"\n") and b"\r" not in raw and b"\t" not in raw
        answers = [row["answer"] for row in rows(task, split)]
        counts = Counter(answers)
        assert len(answers) == size and set(counts) == set(answers[:16]) == set(TASKS[task]), "mixed"
        assert max(counts.values()) - min(counts.values()) <= 1, "balanced"
        for row in rows(task, split):
            head, body, last = row["prompt"].split("\n")
            assert list(row) == ["prompt", "answer"] and last == "Answer:" and body.startswith("Message: ")
            assert head == instruction(task)
            assert all(re.search(rf"\b{option}\b", head) for option in TASKS[task])
            assert 110 <= len(row["prompt"]) <= 230 and len(body) >= 29
            assert not re.search(r"  |@|https?:|www\.|\d{5,}", body), "clean, and no contact data"


@pytest.mark.parametrize("task", TASKS)
def test_no_two_messages_of_a_task_are_nearly_equal(task: str) -> None:
    texts = list(messages(task))
    assert len(texts) == sum(SIZES.values())
    assert not [pair for pair in combinations(texts, 2) if nearly_equal(*pair)]
    assert len({re.sub(r"[0-9]+", "#", text.lower()) for text in texts}) == len(texts), "nor differ in numbers only"
    assert nearly_equal("Where can I leave the car when I visit you?", "Where can I leave my car when I visit?")


@pytest.mark.parametrize("task", STEMS)
def test_no_shortcut_gives_the_answer(task: str) -> None:
    """No word, no length and no question mark decides the option; option words are rare and some mislead."""
    texts, answers = zip(*messages(task).items(), strict=True)
    stems = [{stem for stem in STEMS[task] if re.search(stem, text.lower())} for text in texts]
    own = dict(zip(TASKS[task], STEMS[task], strict=True))
    assert sum(map(bool, stems)) <= len(texts) / 3
    assert any(found - {own[answer]} for found, answer in zip(stems, answers, strict=True))
    words = [set(re.findall(r"[a-z]+|[0-9]+|[!?]", text.lower())) for text in texts]
    gaps = {word: largest_gap([word in found for found in words], answers) for word in set().union(*words)}
    assert max(gaps.values()) <= LARGEST_GAP, max(gaps, key=lambda word: gaps[word])
    assert largest_gap(["?" in text for text in texts], answers) <= 0.3
    for cut in map(len, texts[1:]):
        assert largest_gap([len(text) <= cut for text in texts], answers) <= LARGEST_GAP
    assert largest_gap([True, True, False, False], ["a", "a", "b", "b"]) == 1.0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.json", None, "has no labels.json"),
        ("test.jsonl", None, "has no test.jsonl"),
        ("train.jsonl", '{"prompt": "a", "answer": "yes"}\n{"prompt"', "train.jsonl, line 2, is not JSON"),
        ("train.jsonl", '{"prompt": "a"}', "train.jsonl, line 1: needs `prompt` and `answer`"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named_with_the_line(
    benchmark: Any, tmp_path: Path, file: str, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    read_task = importlib.import_module("tasks").read_task
    (tmp_path / "labels.json").write_text('["yes", "no"]')
    rows = [{"prompt": "a", "answer": answer} for answer in ("yes", "perhaps", "no")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = read_task(tmp_path, train_limit=1)
    assert (task.train, task.test) == ([("a", "yes")], [("a", "yes"), ("a", "no")])
    assert "1 examples without a valid answer dropped" in capsys.readouterr().out
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit, match=re.escape(message)):
        read_task(tmp_path)
