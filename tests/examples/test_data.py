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


ROW = '{"prompt": "a", "answer": "yes"}'


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task's folder; one of three examples has an answer that is no option."""
    folder = tmp_path / "data" / "reply"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["yes", "no"]')
    rows = [{"prompt": "a", "answer": answer} for answer in ("yes", "perhaps", "no")]
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_examples_without_a_valid_answer_are_dropped_and_one_is_named(
    benchmark: Any, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.import_module("tasks").read_task(task, train_limit=1)
    assert (found.train, found.test) == ([("a", "yes")], [("a", "yes"), ("a", "no")])
    assert "reply/train: 1 examples without a valid answer dropped (such as 'perhaps')" in capsys.readouterr().out


def test_files_that_begin_with_a_byte_order_mark_are_read(benchmark: Any, task: Path) -> None:
    read_task = importlib.import_module("tasks").read_task
    found = read_task(task)
    for path in task.iterdir():
        path.write_text(path.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert read_task(task) == found


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("labels.json", None, "has no labels.json"),
        ("labels.json", "", "labels.json is empty"),
        ("labels.json", '{"yes": 0, "no": 1}', "labels.json is not a list of the options"),
        ("labels.json", '["Yes", "No"]', "train.jsonl is an option of"),
        ("test.jsonl", None, "has no test.jsonl"),
        ("test.jsonl", "\n\n", "test.jsonl is empty"),
        ("test.jsonl", ROW.encode("utf-16"), "test.jsonl is not UTF-8"),
        ("train.jsonl", f'{ROW}\n{{"prompt"', "train.jsonl, line 2, is not JSON"),
        ("train.jsonl", '{"prompt": "a"}', "train.jsonl, line 1: needs `prompt` and `answer`"),
        ("train.jsonl", '{"prompt": "a", "answer": 1}', "train.jsonl, line 1: needs `prompt` and `answer`"),
        ("train.jsonl", ROW.replace("yes", "maybe"), "['yes', 'no']: the first is 'maybe'"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named_with_the_line(
    benchmark: Any, task: Path, file: str, content: str | bytes | None, message: str
) -> None:
    (task / file).unlink()
    if content is not None:
        (task / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=re.escape(message)):
        importlib.import_module("tasks").read_task(task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "data", "--tasks", "reply,mod"], "There is no task 'mod' in data. There are: reply."),
        (["--data", "dtaa", "--tasks", "reply"], "There is no folder dtaa"),
        (["--data", "dtaa"], "There is no folder dtaa"),
        (["--data", "."], "has no task: a folder with labels.json"),
    ],
)
def test_a_typo_in_data_or_tasks_is_named(
    benchmark: Any, task: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task.parents[1])
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr("sys.argv", ["quickstart.py", *arguments])
    with pytest.raises(SystemExit, match=re.escape(message)):
        quickstart.main()
