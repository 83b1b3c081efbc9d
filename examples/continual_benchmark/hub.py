"""The 15 tasks from public datasets on the Hub, put into prompts and answers of the same form as the task folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tasks import Task

Row = dict[str, Any]
# what the paper's small and full splits hold
SMALL, FULL = (500, 100), (2000, 1000)
_SEED = 0

TOPIC = "What is the topic of the following paragraph? Choose one from the option."
SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
RELATION = (
    'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.'
)
SAME = 'Whether the "first sentence" and the "second sentence" have the same meaning? Choose one from the option.'
BOOLEAN = "According to the following passage, is the question true or false? Choose one from the option."
READING = (
    "According to the following passage and question, is the candidate answer true or false? Choose one from the "
    "option."
)
SENSE = (
    "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one from "
    "the option."
)
STARS = ("very negative", "negative", "neutral", "positive", "very positive")
NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Source:
    """Where a task comes from and how a row becomes a prompt.

    Attributes:
        path, config, train, test: of `datasets.load_dataset`.
        options: by the number in column `label`.
        instruction: the first line of a prompt; None where `text` writes the whole one.
        text: what comes between the options and "Answer:".
    """

    path: str
    config: str | None
    train: str
    test: str
    options: tuple[str, ...]
    instruction: str | None
    text: Callable[[Row], str]
    label: str = "label"


def _pair(first: str, second: str, names: tuple[str, str] = ("sentence 1", "sentence 2")) -> Callable[[Row], str]:
    return lambda row: f"{names[0]}: {row[first]}\n{names[1]}: {row[second]}"


def _copa(row: Row) -> str:
    return (
        f'Which sentence is the {row["question"]} of "{row["premise"]}"? Choose one between A and B.\n'
        f"A: {row['choice1']}\nB: {row['choice2']}"
    )


GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
SOURCES: dict[str, Source] = {
    "dbpedia": Source(
        "fancyzhx/dbpedia_14", None, "train", "test",
        ("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
         "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
        TOPIC, lambda row: f"Title: {row['title']}\nText: {row['content']}",
    ),
    "amazon": Source(
        "SetFit/amazon_reviews_multi_en", None, "train", "test", STARS, SENTIMENT, lambda row: f"Text: {row['text']}",
    ),
    "yahoo": Source(
        "community-datasets/yahoo_answers_topics", None, "train", "test",
        ("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet",
         "Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
        TOPIC,
        lambda row: f"Question: {row['question_title']} {row['question_content']}\nAnswer: {row['best_answer']}",
        "topic",
    ),
    "agnews": Source(
        "fancyzhx/ag_news", None, "train", "test", ("World", "Sports", "Business", "Science or Technology"), TOPIC,
        lambda row: f"Text: {row['text']}",
    ),
    "MNLI": Source(GLUE, "mnli", "train", "validation_matched", NLI, RELATION, _pair("premise", "hypothesis")),
    "CB": Source(
        SUPERGLUE, "cb", "train", "validation", ("entailment", "contradiction", "neutral"), RELATION,
        _pair("premise", "hypothesis"),
    ),
    "WiC": Source(
        SUPERGLUE, "wic", "train", "validation", ("False", "True"), SENSE,
        lambda row: f"word: {row['word']}\n{row['sentence1']}\n{row['sentence2']}",
    ),
    "COPA": Source(SUPERGLUE, "copa", "train", "validation", ("A", "B"), None, _copa),
    "QQP": Source(
        GLUE, "qqp", "train", "validation", ("False", "True"), SAME,
        _pair("question1", "question2", ("first sentence", "second sentence")),
    ),
    "BoolQA": Source(
        SUPERGLUE, "boolq", "train", "validation", ("False", "True"), BOOLEAN,
        _pair("question", "passage", ("question", "passage")),
    ),
    "RTE": Source(
        GLUE, "rte", "train", "validation", ("entailment", "contradiction"), RELATION, _pair("sentence1", "sentence2"),
    ),
    "IMDB": Source(
        "stanfordnlp/imdb", None, "train", "test", ("Bad", "Good"), SENTIMENT, lambda row: str(row["text"]),
    ),
    "yelp": Source(
        "Yelp/yelp_review_full", None, "train", "test", STARS, SENTIMENT, lambda row: f"Text: {row['text']}",
    ),
    "SST-2": Source(
        GLUE, "sst2", "train", "validation", ("Bad", "Good"), SENTIMENT, lambda row: f"Text: {row['sentence']}",
    ),
    "MultiRC": Source(
        SUPERGLUE, "multirc", "train", "validation", ("False", "True"), READING,
        lambda row: f"paragraph: {row['paragraph']}\nquestion: {row['question']}\ncandidate answer: {row['answer']}",
    ),
}  # fmt: skip


def hub_task(name: str, full: bool) -> Task:
    """A task with as many examples as the paper's splits, drawn from the Hub's with a fixed seed.

    Raises:
        SystemExit: no such task, the package datasets is missing, or the Hub cannot be reached.
    """
    if name not in SOURCES:
        raise SystemExit(f"--data hub: no task {name}; there are {', '.join(SOURCES)}.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise SystemExit("--data hub needs the package datasets: pip install datasets.") from None
    source = SOURCES[name]
    sizes = FULL if full else SMALL
    parts = []
    for split, size in zip((source.train, source.test), sizes, strict=True):
        try:
            rows = load_dataset(source.path, source.config, split=split)
        except Exception as error:  # whatever stands between here and the Hub
            raise SystemExit(
                f"{name}: {source.path} could not be loaded ({type(error).__name__}: {error}). Without the Hub, give "
                "--data a folder of task folders (examples/data/README.md)."
            ) from error
        parts.append(examples(source, rows.shuffle(seed=_SEED).select(range(min(size, len(rows))))))
    seen = {prompt for prompt, _ in parts[0]}
    return Task(name, list(source.options), parts[0], [row for row in parts[1] if row[0] not in seen])


def examples(source: Source, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Prompts and answers; rows without a label are left out."""
    head = "" if source.instruction is None else f"{source.instruction}\nOption: {', '.join(source.options)} \n"
    return [
        (f"{head}{source.text(row)}\nAnswer:", source.options[row[source.label]])
        for row in rows
        if row[source.label] is not None and row[source.label] >= 0
    ]
