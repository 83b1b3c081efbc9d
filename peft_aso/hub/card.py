"""The model card of a chain, or of one task of it: what it is, how to load it, how to go on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAGS = ["continual-learning", "lora", "peft", "peft-aso", "aso-lora"]
PICTURE = "similarity.png"
Entries = Sequence[Mapping[str, Any]]


def model_card(
    repo: str,
    entries: Entries,
    base_model: str | None,
    *,
    export: str | None = None,
    accuracy: Mapping[str, float] | None = None,
    picture: bool = False,
) -> str:
    """A README.md.

    Args:
        repo: the repository that it is for.
        entries: of the manifest, oldest first; the last one is the newest task.
        export: the folder with the stock LoRA adapter that is the sum of all.
        accuracy: of tasks, in percent.
        picture: whether there is a picture of the similarities beside it.
    """
    about = ModelCardData(
        base_model=base_model,
        base_model_relation="adapter",
        library_name="peft",
        tags=TAGS,
    )
    names = [entry["task"] for entry in entries]
    parts = [
        f"# {repo}",
        f"A chain of {len(names)} task{'s' * (len(names) != 1)}, learned one after another with ASO-LoRA "
        "([peft-aso](https://pypi.org/project/peft-aso/), [paper](https://aclanthology.org/2026.acl-long.842/)). Each "
        "task has its own LoRA adapter; the model is the base and the sum of all, without a task label.",
        _table(entries, accuracy or {}),
        _code(repo, base_model, names[-1]),
    ]
    if export is not None:
        parts.append(_served(repo, base_model, export))
    if picture:
        parts.append(f"![similarity of the tasks]({PICTURE})")
    return f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def check(card: str) -> None:
    """See that the metadata can be read again.

    Raises:
        ValueError: it cannot.
    """
    ModelCard(card, ignore_metadata_errors=False)


def _table(entries: Entries, accuracy: Mapping[str, float]) -> str:
    columns = ["", "task", "rank", "most like (w)", "weights"]
    if accuracy:
        columns.append("accuracy")
    rows = []
    for number, entry in enumerate(entries, start=1):
        place = f"`{entry['sha256'][:12]}`"
        if "repo_id" in entry:
            place += f" of [{entry['repo_id']}](https://huggingface.co/{entry['repo_id']}/tree/{entry['revision']})"
        row = [str(number), str(entry["task"]), str(entry["rank"]), most_like(entry), place]
        if accuracy:
            row.append(f"{accuracy[entry['task']]:.1f}" if entry["task"] in accuracy else "")
        rows.append(row)
    return markdown([columns, *rows])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def most_like(entry: Mapping[str, Any]) -> str:
    """The earlier task with the largest w, and that; empty where there is none."""
    values = {task: mean_of(value) for task, value in (entry.get("similarities") or {}).items()}
    if not values:
        return ""
    best = max(values, key=values.__getitem__)
    return f"{best} ({values[best]:.2f})"


def mean_of(value: Any) -> float:
    """A w or psi as one number: one for a task, or the mean of one a layer."""
    return sum(value) / len(value) if isinstance(value, list) else float(value)


def _code(repo: str, base_model: str | None, newest: str) -> str:
    base = base_model or "the base model"
    return f"""## Load it, and go on

```python
from peft_aso import ASOLoraConfig, ASOTrainer, load_chain, push_chain
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = load_chain(base, "{repo}")                # all tasks; the newest, {newest}, is active

model.add_adapter("new-task", ASOLoraConfig(task_type="CAUSAL_LM"))
model.set_adapter("new-task")                     # the tasks above are its history: active, frozen
ASOTrainer(model=model, args=args, train_dataset=data).train()
push_chain(model, "you/new-chain")
```"""


def _served(repo: str, base_model: str | None, export: str) -> str:
    base = base_model or "the base model"
    return f"""## Serve it without peft-aso

`{export}/` is one stock LoRA adapter, the sum of all tasks:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}", subfolder="{export}")
```"""
