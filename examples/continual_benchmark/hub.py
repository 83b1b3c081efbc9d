"""The 15 tasks from public datasets on the Hub, put into prompts and answers like those of the task folders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks import Task

SMALL, FULL = (500, 100), (2000, 1000)  # training and test examples of the paper's small and full splits
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
GLUE, SUPERGLUE = "nyu-mll/glue", "aps/super_glue"
PREMISE = "sentence 1: {premise}\nsentence 2: {hypothesis}"


@dataclass(frozen=True)
class Source:
    """Where a task comes from and how a row becomes a prompt.

    Attributes:
        path, config, train, test: of `datasets.load_dataset`.
        options: by the number in column `label`.
        instruction: the first line of a prompt; None where `text` is all of it.
        text: what comes between the options and "Answer:", with the names of columns in braces.
    """

    path: str
    config: str | None
    train: str
    test: str
    options: tuple[str, ...]
    instruction: str | None
    text: str
    label: str = "label"


SOURCES: dict[str, Source] = {
    "dbpedia": Source(
        "fancyzhx/dbpedia_14", None, "train", "test",
        ("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
         "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
        TOPIC, "Title: {title}\nText: {content}",
    ),
    "amazon": Source(
        "SetFit/amazon_reviews_multi_en", None, "train", "test", STARS, SENTIMENT, "Text: {text}",
    ),
    "yahoo": Source(
        "community-datasets/yahoo_answers_topics", None, "train", "test",
        ("Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet",
         "Sports", "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government"),
        TOPIC, "Question: {question_title} {question_content}\nAnswer: {best_answer}", "topic",
    ),
    "agnews": Source(
        "fancyzhx/ag_news", None, "train", "test", ("World", "Sports", "Business", "Science or Technology"), TOPIC,
        "Text: {text}",
    ),
    "MNLI": Source(GLUE, "mnli", "train", "validation_matched", NLI, RELATION, PREMISE),
    "CB": Source(
        SUPERGLUE, "cb", "train", "validation", ("entailment", "contradiction", "neutral"), RELATION, PREMISE,
    ),
    "WiC": Source(
        SUPERGLUE, "wic", "train", "validation", ("False", "True"), SENSE, "word: {word}\n{sentence1}\n{sentence2}",
    ),
    "COPA": Source(
        SUPERGLUE, "copa", "train", "validation", ("A", "B"), None,
        'Which sentence is the {question} of "{premise}"? Choose one between A and B.\nA: {choice1}\nB: {choice2}',
    ),
    "QQP": Source(
        GLUE, "qqp", "train", "validation", ("False", "True"), SAME,
        "first sentence: {question1}\nsecond sentence: {question2}",
    ),
    "BoolQA": Source(
        SUPERGLUE, "boolq", "train", "validation", ("False", "True"), BOOLEAN,
        "question: {question}\npassage: {passage}",
    ),
    "RTE": Source(
        GLUE, "rte", "train", "validation", ("entailment", "contradiction"), RELATION,
        "sentence 1: {sentence1}\nsentence 2: {sentence2}",
    ),
    "IMDB": Source("stanfordnlp/imdb", None, "train", "test", ("Bad", "Good"), SENTIMENT, "{text}"),
    "yelp": Source("Yelp/yelp_review_full", None, "train", "test", STARS, SENTIMENT, "Text: {text}"),
    "SST-2": Source(GLUE, "sst2", "train", "validation", ("Bad", "Good"), SENTIMENT, "Text: {sentence}"),
    "MultiRC": Source(
        SUPERGLUE, "multirc", "train", "validation", ("False", "True"), READING,
        "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}",
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
    source, parts = SOURCES[name], []
    for split, size in zip((source.train, source.test), FULL if full else SMALL, strict=True):
        try:
            rows = load_dataset(source.path, source.config, split=split)
        except Exception as error:  # no network, no such data set, and others
            raise SystemExit(
                f"{name}: {source.path} could not be loaded ({type(error).__name__}: {error}). Without the Hub, give "
                "--data a folder of task folders (examples/data/README.md)."
            ) from error
        parts.append(examples(source, rows.shuffle(seed=0).select(range(min(size, len(rows))))))
    seen = {prompt for prompt, _ in parts[0]}
    return Task(name, list(source.options), parts[0], [row for row in parts[1] if row[0] not in seen])


def examples(source: Source, rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Prompts and answers; rows without a label are left out."""
    head = "" if source.instruction is None else f"{source.instruction}\nOption: {', '.join(source.options)} \n"
    return [
        (f"{head}{source.text.format(**row)}\nAnswer:", source.options[row[source.label]])
        for row in rows
        if row[source.label] is not None and row[source.label] >= 0
    ]
