"""`peft-aso` on the command line: inspect, verify, merge, export, push and report a chain on disk or on the Hub."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from transformers import PreTrainedModel

from .chain import ChainError, export_lora, export_merged, load_chain, push_chain
from .chain.export import PREFIX
from .chain.hub import PICTURE, Access, draw, find, is_on_hub, markdown, most_like
from .chain.load import check_fit, in_order
from .chain.manifest import AdapterFile, Place, mismatch, read_adapter
from .tuner.adapter_file import weights_hash
from .tuner.history import chain_obstacles

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
Result = tuple[str, Any, bool]  # text, the same for JSON, and whether all is well

app = typer.Typer(
    help="Inspect, verify, merge, export, push and report a chain of tasks on disk or on the Hub.",
    epilog="Exit status: 0 all is well, 1 something is wrong (the message tells what), 2 wrong arguments.",
    add_completion=False,
    no_args_is_help=True,
)

Source = Annotated[str, typer.Argument(help="A chain's folder, or a repository on the Hub (user/chain).")]
Target = Annotated[str, typer.Argument(help="Repository to push to (user/chain).")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Base = Annotated[str | None, typer.Option(help="Base model, a folder or id. Default: the one that the chain names.")]
Shapes = Annotated[str | None, typer.Option("--base", help="Base model, to check the shapes against its config.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks to add up, with commas. Default: the newest and its history.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Type of what is written. Default: the base model's."),
]
MaxRank = Annotated[int | None, typer.Option(help="Cut to this rank by SVD; the error is logged.")]
PerTask = Annotated[bool, typer.Option("--per-task", help="One repository for each task, REPO-TASK.")]
NoMerged = Annotated[bool, typer.Option("--no-merged", help="Leave out the sum as one adapter.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]


def command(function: Callable[..., Result]) -> Callable[..., None]:
    """A command that prints the text or the JSON of its result, and leaves with its status."""

    @functools.wraps(function)
    def run(**options: Any) -> None:
        as_json = options["as_json"]
        try:
            text, values, is_well = function(**options)
        except (ChainError, OSError, ValueError) as error:
            text, values, is_well = f"error: {error}", {"error": str(error)}, False
        file = sys.stdout if is_well or as_json else sys.stderr
        print(json.dumps(values, indent=2) if as_json else text, file=file)
        raise typer.Exit(0 if is_well else 1)

    return app.command()(run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something is wrong, 2 for wrong arguments."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="peft-aso")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@command
def inspect(source: Source, revision: Revision = None, as_json: AsJson = False) -> Result:
    """Show tasks, ranks, sizes, similarities and hashes."""
    tasks, table = _overview(source, revision)
    base = next((task["base_model"] for task in tasks if task["base_model"]), None)
    total = sum(task["bytes"] for task in tasks) / 1e6
    title = f"{source}: {len(tasks)} tasks, {total:.1f} MB, base model {base or 'not named'}"
    return f"{title}\n\n{table}", {"source": source, "base_model": base, "tasks": tasks}, True


@command
def verify(source: Source, base: Shapes = None, revision: Revision = None, as_json: AsJson = False) -> Result:
    """Check hashes, finite values and that the history is complete; with --base, shapes too."""
    places, adapters, checks = _places(source, revision), [], dict[str, str]()
    for place in places:  # every task is checked, whatever is wrong with the others
        task = place.entry["task"] if place.entry else place.path.name
        checks[task] = ""
        try:
            adapter = read_adapter(place)
            adapters.append(adapter)
            tensors = adapter.tensors()
            for reason in chain_obstacles(adapter.config) if len(places) > 1 else ():
                raise ChainError(f"it cannot be part of a chain: {reason}")
            if base is not None:
                check_fit(adapter, tensors, _without_weights(adapter, base))
            checks[task] = mismatch(adapter, tensors) or ""
        except ChainError as error:
            checks[task] = str(error)
    problem = ""
    try:
        if not any(checks.values()):
            in_order(adapters)
    except ChainError as error:
        problem = str(error)
    shapes = f", shapes as in {base}" if base is not None else ""
    lines = [
        f"WRONG   {task}: {found}" if found else f"ok      {task}: finite{shapes}" for task, found in checks.items()
    ]
    lines += [f"WRONG   {problem}"] if problem else []
    lines += [] if any(place.entry for place in places) else ["note    no chain.json: hashes cannot be compared"]
    is_well = not problem and not any(checks.values())
    return "\n".join(lines), {"well": is_well, "tasks": checks, "chain": problem}, is_well


@command
def merge(
    source: Source, out: Out, base: Base = None, tasks: Tasks = None, dtype: Dtype = None, revision: Revision = None,
    as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Write base model and tasks as one model folder."""
    model, name = _loaded(source, base, revision)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # the base model has none; ImportError in transformers 4
        tokenizer = None
    kind = None if dtype is None else getattr(torch, dtype)
    return _written(export_merged(model, out, tasks=_names(tasks), dtype=kind, tokenizer=tokenizer))


@command
def export(
    source: Source, out: Out, base: Base = None, tasks: Tasks = None, max_rank: MaxRank = None,
    revision: Revision = None, as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Write the sum of tasks as one stock LoRA adapter."""
    model, _ = _loaded(source, base, revision)
    return _written(export_lora(model, out, tasks=_names(tasks), max_rank=max_rank))


@command
def push(
    source: Source, repo: Target, base: Base = None, per_task: PerTask = False, no_merged: NoMerged = False,
    private: Private = False, revision: Revision = None, as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Push a chain to the Hub."""
    model, _ = _loaded(source, base, revision)
    commits = push_chain(model, repo, per_task=per_task, merged=not no_merged, private=private or None)
    lines = [f"{name}  {commit}" for name, commit in commits.items()]
    return "\n".join(lines or ["All tasks are on the Hub already."]), commits, True


@command
def report(source: Source, out: Out, revision: Revision = None, as_json: AsJson = False) -> Result:
    """Write a Markdown page with the picture of the similarities."""
    tasks, table = _overview(source, revision)
    out.mkdir(parents=True, exist_ok=True)
    picture = "No picture: there are no similarities, or matplotlib is not installed (peft-aso[plots])."
    if draw(tasks, out / PICTURE):
        picture = f"![similarity of the tasks]({PICTURE})"
    page = [f"# {source}: {len(tasks)} tasks", table, picture]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return _written(out / "report.md", "report")


def _written(path: Path, key: str = "folder") -> Result:
    return f"Written: {path}", {key: str(path)}, True


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def _places(source: str, revision: str | None) -> list[Place]:
    if revision is not None and not is_on_hub(source):
        raise ValueError(f"--revision is for a repository on the Hub, and {source} is a folder or no such id.")
    return find(source, Access(revision=revision))


def _overview(source: str, revision: str | None) -> tuple[list[dict[str, Any]], str]:
    """What `inspect` prints of each task as JSON, and as a table."""
    tasks = []
    rows = [["", "task", "rank", "weights", "MB", "most like (w)", "largest psi", "sha256", "from"]]
    for number, adapter in enumerate(in_order(map(read_adapter, _places(source, revision))), start=1):
        tensors, config = adapter.tensors(), adapter.config
        origin = adapter.place.origin or getattr(config, "origin", None)
        task = {
            "task": adapter.name, "history": adapter.history, "rank": config.r,
            "sha256": weights_hash(tensors, config),
            "weights": sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(PREFIX)),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            "similarities": getattr(config, "similarities", None), "origin": origin,
            "soft_coefficients": getattr(config, "soft_coefficients", None),
            "base_model": config.base_model_name_or_path,
        }  # fmt: skip
        tasks.append(task)
        about = [number, task["task"], task["rank"], f"{task['weights']:,}", f"{task['bytes'] / 1e6:.1f}"]
        about += [most_like(task["similarities"]), most_like(task["soft_coefficients"]), f"`{task['sha256'][:12]}`"]
        rows.append([*map(str, about), f"{origin['repo_id']}@{origin['revision'][:7]}" if origin else ""])
    return tasks, markdown(rows)


def _loaded(source: str, base: str | None, revision: str | None) -> tuple[Any, str]:
    """The chain on its base model, and the base model's name."""
    adapters = [read_adapter(place) for place in _places(source, revision)]
    named = (adapter.config.base_model_name_or_path for adapter in adapters)
    name = base or next(filter(None, named), None)
    if name is None:
        raise ChainError("The chain does not name its base model. Give one with --base.")
    model = _model_class(adapters[-1]).from_pretrained(name, dtype="auto")
    return load_chain(model, source, revision=revision), name


def _without_weights(adapter: AdapterFile, name: str) -> Any:
    """The base model on the meta device; only its config is read."""
    chosen, config = _model_class(adapter), transformers.AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return chosen(config) if issubclass(chosen, PreTrainedModel) else chosen.from_config(config)


def _model_class(adapter: AdapterFile) -> Any:
    """The Auto class of an adapter's task type; without one the class that it was trained in."""
    config = adapter.config
    kind = getattr(config.task_type, "value", config.task_type)
    name = config.auto_mapping.get("base_model_class") if isinstance(config.auto_mapping, dict) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if kind not in _CLASSES and isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return getattr(transformers, _CLASSES.get(kind, "AutoModel"))


if __name__ == "__main__":
    sys.exit(main())
