"""The shipped example data keeps its promises: format, balance, no leak between train and test, no shortcuts.

No model and no torch here: the files are read as any user's loader would read them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from itertools import product
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"

TASKS: dict[str, list[str]] = {
    "topic": ["billing", "delivery", "account", "product"],
    "mood": ["angry", "neutral", "pleased"],
    "urgency": ["urgent", "routine"],
    "wish": ["refund", "exchange", "repair", "advice"],
}
SIZES = {"train": 80, "test": 40}
# The option words as stems, so that "refunded" and "urgently" are found too.
STEMS = {"urgency": ["urgen", "routine"], "wish": ["refund", "exchang", "repair", "advi[cs]"]}
CUE_TASKS = list(STEMS)
EVERY_SPLIT = list(product(TASKS, SIZES))
NEAR_DUPLICATE = 0.85
# Words that carry the meaning may lean to an option ("paid" to a refund), but none may come near to deciding it.
LARGEST_GAP = 0.5


@cache
def rows(task: str, split: str) -> list[dict[str, str]]:
    """The examples of one file, in its order."""
    text = (DATA / task / f"{split}.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def message(prompt: str) -> str:
    """What the customer wrote: the prompt without instruction line, "Message: " and "Answer:"."""
    return prompt.split("\n")[1].removeprefix("Message: ")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+|[0-9]+|[!?]", text.lower()))


def close_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Pairs of messages that difflib finds nearly equal; its cheap upper bounds go first, for speed."""
    found: list[tuple[str, str]] = []
    matcher = SequenceMatcher(autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    for place, left in enumerate(texts):
        matcher.set_seq2(left.lower())  # difflib indexes its second text once and keeps the index
        for right in texts[:place]:
            matcher.set_seq1(right.lower())
            if all(bound() >= NEAR_DUPLICATE for bound in bounds):
                found.append((left, right))
    return found


def gap(flags: list[bool], is_option: list[bool]) -> float:
    """How much more often the flag is set for one option than for the others: 0 says nothing, 1 or -1 decides."""
    inside = [flag for flag, mine in zip(flags, is_option, strict=True) if mine]
    outside = [flag for flag, mine in zip(flags, is_option, strict=True) if not mine]
    return sum(inside) / len(inside) - sum(outside) / len(outside)


def largest_gap(flags: list[bool], answers: list[str]) -> float:
    return max(abs(gap(flags, [answer == option for answer in answers])) for option in set(answers))


def test_there_are_these_four_tasks_and_no_other() -> None:
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == set(TASKS)
    for task in TASKS:
        assert {p.name for p in (DATA / task).iterdir()} == {"train.jsonl", "test.jsonl", "labels.json"}


@pytest.mark.parametrize("task", TASKS)
def test_labels_file_lists_the_options(task: str) -> None:
    assert json.loads((DATA / task / "labels.json").read_text(encoding="utf-8")) == TASKS[task]


@pytest.mark.parametrize(("task", "split"), EVERY_SPLIT)
def test_each_line_is_a_prompt_and_an_answer(task: str, split: str) -> None:
    options = TASKS[task]
    assert len(rows(task, split)) == SIZES[split]
    for row in rows(task, split):
        assert list(row) == ["prompt", "answer"]
        assert row["answer"] in options
        head, body, last = row["prompt"].split("\n")
        assert last == "Answer:"
        assert body.startswith("Message: ")
        assert all(re.search(rf"\b{option}\b", head) for option in options)


@pytest.mark.parametrize("task", TASKS)
def test_one_instruction_line_a_task(task: str) -> None:
    heads = {row["prompt"].split("\n")[0] for split in SIZES for row in rows(task, split)}
    assert len(heads) == 1


def test_instruction_lines_tell_the_tasks_apart() -> None:
    """The merged model gets no task label, so the prompt alone has to say which task it is."""
    assert len({rows(task, "train")[0]["prompt"].split("\n")[0] for task in TASKS}) == len(TASKS)


@pytest.mark.parametrize(("task", "split"), EVERY_SPLIT)
def test_options_are_balanced_and_mixed(task: str, split: str) -> None:
    answers = [row["answer"] for row in rows(task, split)]
    counts = Counter(answers)
    assert set(counts) == set(TASKS[task])
    assert max(counts.values()) - min(counts.values()) <= 1
    # not sorted by option: a loader that takes the first rows should meet every option
    assert set(answers[:16]) == set(TASKS[task])


@pytest.mark.parametrize(("task", "split"), EVERY_SPLIT)
def test_text_is_short_plain_and_clean(task: str, split: str) -> None:
    raw = (DATA / task / f"{split}.jsonl").read_bytes()
    assert raw.isascii() and raw.endswith(b"\n") and b"\r" not in raw and b"\t" not in raw
    for row in rows(task, split):
        assert 110 <= len(row["prompt"]) <= 230, row["prompt"]
        for line in row["prompt"].split("\n"):
            assert line == line.strip() and "  " not in line
        text = message(row["prompt"])
        assert len(text) >= 20, text
        # no contact data: no address, no link, no run of digits as long as a phone number
        assert not re.search(r"@|https?:|www\.|\d{5,}", text), text


@pytest.mark.parametrize("task", TASKS)
def test_no_two_messages_of_a_task_are_nearly_equal(task: str) -> None:
    texts = [message(row["prompt"]) for split in SIZES for row in rows(task, split)]
    assert len({text.lower() for text in texts}) == sum(SIZES.values())
    assert close_pairs(texts) == []


def test_the_check_for_near_duplicates_finds_one() -> None:
    kept = "Where can I leave the car when I visit you?"
    assert close_pairs([kept, "Is the bookcase tall?", "Where can I leave my car when I visit?"]) == [
        ("Where can I leave my car when I visit?", kept)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_no_two_messages_differ_in_numbers_only(task: str) -> None:
    texts = [message(row["prompt"]).lower() for split in SIZES for row in rows(task, split)]
    bare = Counter(re.sub(r"[0-9]+", "#", text) for text in texts)
    assert max(bare.values()) == 1


@pytest.mark.parametrize("task", CUE_TASKS)
def test_the_option_words_are_not_what_gives_the_answer(task: str) -> None:
    """At most a third of the messages use an option word, and some use that of another option."""
    examples = [row for split in SIZES for row in rows(task, split)]
    found = [{stem for stem in STEMS[task] if re.search(stem, message(row["prompt"]).lower())} for row in examples]
    assert sum(map(bool, found)) <= len(examples) / 3
    own = dict(zip(TASKS[task], STEMS[task], strict=True))
    misleading = [row for row, stems in zip(examples, found, strict=True) if stems - {own[row["answer"]]}]
    assert misleading


@pytest.mark.parametrize("task", CUE_TASKS)
def test_no_single_word_decides_the_option(task: str) -> None:
    examples = [row for split in SIZES for row in rows(task, split)]
    answers = [row["answer"] for row in examples]
    sets = [words(message(row["prompt"])) for row in examples]
    gaps = {word: largest_gap([word in found for found in sets], answers) for word in set().union(*sets)}
    assert max(gaps.values()) <= LARGEST_GAP, max(gaps, key=lambda word: gaps[word])


@pytest.mark.parametrize("task", CUE_TASKS)
def test_neither_length_nor_question_marks_decide_the_option(task: str) -> None:
    examples = [row for split in SIZES for row in rows(task, split)]
    answers = [row["answer"] for row in examples]
    texts = [message(row["prompt"]) for row in examples]
    assert largest_gap(["?" in text for text in texts], answers) <= 0.3
    for cut in {len(text) for text in texts}:
        assert largest_gap([len(text) <= cut for text in texts], answers) <= LARGEST_GAP


def test_the_gap_finds_a_word_that_decides() -> None:
    assert largest_gap([True, True, False, False], ["a", "a", "b", "b"]) == 1.0
    assert largest_gap([True, False, True, False], ["a", "a", "b", "b"]) == 0.0


def test_mood_is_not_told_by_punctuation_or_capitals() -> None:
    examples = [row for split in SIZES for row in rows("mood", split)]
    loud = Counter(row["answer"] for row in examples if "!" in message(row["prompt"]))
    asking = Counter(row["answer"] for row in examples if "?" in message(row["prompt"]))
    for option in TASKS["mood"]:
        assert 1 <= loud[option] <= 4
        assert asking[option] >= 2
    shouted = [row for row in examples if re.search(r"\b[A-Z]{3,}\b", message(row["prompt"]))]
    assert len(shouted) <= 2
