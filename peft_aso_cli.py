"""`peft-aso` on the command line: inspect, verify, merge, export, push and report a chain on disk or on the Hub.

This module is outside of the package, which registers with PEFT when it is imported and so needs torch and seconds:
help, wrong arguments and `inspect` of a folder need none of it.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer
from safetensors import SafetensorError, safe_open

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
Rule = Annotated[
    str | None,
    typer.Option("--merge", help="How the tasks are merged: sum, running_mean, outside, ... (docs/methods.md)."),
]
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
        except (OSError, ValueError) as error:  # a ChainError is a ValueError
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
    """Show tasks, ranks, sizes, similarities and the hashes in chain.json."""
    tasks, rows = _overview(source, revision)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    base = next((task["base_model"] for task in tasks if task["base_model"]), None)
    total = sum(task["bytes"] for task in tasks) / 1e6
    title = f"{source}: {len(tasks)} tasks, {total:.1f} MB, base model {base or 'not named'}"
    return "\n".join([title, "", *lines]), {"source": source, "base_model": base, "tasks": tasks}, True


@command
def verify(source: Source, base: Shapes = None, revision: Revision = None, as_json: AsJson = False) -> Result:
    """Check hashes, finite values and that the history is complete; with --base, shapes too."""
    from peft_aso.chain.load import verify_chain

    places = _places(source, revision)
    bare = None if base is None else functools.partial(_without_weights, name=base)
    checks, problem = verify_chain(places, bare)
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
    source: Source, out: Out, base: Base = None, tasks: Tasks = None, dtype: Dtype = None, rule: Rule = None,
    revision: Revision = None, as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Write base model and tasks as one model folder."""
    _check_out(out)
    model, name, names = _loaded(source, base, tasks, revision)
    import torch
    import transformers

    from peft_aso import export_merged

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # the base model has none; ImportError in transformers 4
        tokenizer = None
    kind = None if dtype is None else getattr(torch, dtype)
    return _written(export_merged(model, out, tasks=names, dtype=kind, tokenizer=tokenizer, merge=rule))


@command
def export(
    source: Source, out: Out, base: Base = None, tasks: Tasks = None, max_rank: MaxRank = None, rule: Rule = None,
    revision: Revision = None, as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Write the sum of tasks as one stock LoRA adapter. Of the base model only the config is read."""
    _check_out(out)
    model, _, names = _loaded(source, base, tasks, revision, weights=False)
    from peft_aso import export_lora

    return _written(export_lora(model, out, tasks=names, max_rank=max_rank, merge=rule))


@command
def push(
    source: Source, repo: Target, base: Base = None, per_task: PerTask = False, no_merged: NoMerged = False,
    private: Private = False, revision: Revision = None, as_json: AsJson = False,
) -> Result:  # fmt: skip
    """Push a chain to the Hub."""
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(repo)
    model, _, _ = _loaded(source, base, None, revision)
    from peft_aso import push_chain

    commits = push_chain(model, repo, per_task=per_task, merged=not no_merged, private=private or None)
    lines = [f"{name}  {commit}" for name, commit in commits.items()]
    return "\n".join(lines or ["All tasks are on the Hub already."]), commits, True


@command
def report(source: Source, out: Out, revision: Revision = None, as_json: AsJson = False) -> Result:
    """Write a Markdown page with the picture of the similarities."""
    _check_out(out)
    tasks, rows = _overview(source, revision)
    from peft_aso.chain.hub import draw
    from peft_aso.chain.save import PICTURE, markdown

    out.mkdir(parents=True, exist_ok=True)
    picture = "No picture: there are no similarities, or matplotlib is not installed (peft-aso[plots])."
    if draw(tasks, out / PICTURE):
        picture = f"![similarity of the tasks]({PICTURE})"
    page = [f"# {source}: {len(tasks)} tasks", markdown(rows), picture]
    (out / "report.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return _written(out / "report.md", "report")


def _written(path: Path, key: str = "folder") -> Result:
    return f"Written: {path}", {key: str(path)}, True


def _check_out(out: Path) -> None:
    """Raise OSError if nothing can be written there; before a model is loaded."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    if is_new:
        out.rmdir()


def _overview(source: str, revision: str | None) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """What `inspect` prints of each task as JSON, and as a table whose first row is its head."""
    if revision is None:
        with suppress(OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError):
            return _described(_in_folder(Path(source)))
    places = _places(source, revision)  # the package reads every other source, and tells what is wrong
    from peft_aso.chain.load import in_order
    from peft_aso.chain.manifest import read_adapter

    adapters = in_order(map(read_adapter, places))
    for adapter in adapters:
        adapter.tensors()
    return _described(adapters)


def _in_folder(folder: Path) -> list[Any]:
    """The adapters in a folder as `save_chain` or PEFT writes it, oldest first; of any other folder some error."""
    is_chain = (folder / "chain.json").exists()
    found = [*folder.glob("adapter_config.json"), *sorted(folder.glob("[!.]*/adapter_config.json"))]
    entries: dict[Path, Any] = dict.fromkeys(path.parent for path in found)
    if is_chain:
        content = json.loads((folder / "chain.json").read_text(encoding="utf-8"))
        entries = {folder / entry["folder"]: entry for entry in content["tasks"]}
        is_known = content["format"] == "peft_aso chain" and content["format_version"] in (1, 2)
        if not is_known or any("repo_id" in entry for entry in entries.values()):
            raise ValueError("of a newer version, or with tasks in other repositories")
    adapters = []
    for path, entry in entries.items():
        config = SimpleNamespace(**json.loads((path / "adapter_config.json").read_text(encoding="utf-8")))
        if config.peft_type != "ASO_LORA" or config.combined:
            raise ValueError("a stock adapter, or a sum of tasks")
        place = SimpleNamespace(path=path, entry=entry, origin=None)
        adapters.append(SimpleNamespace(place=place, name=config.task_name, config=config, history=config.history))
    adapters.sort(key=lambda each: 0 if is_chain else len(each.history))
    known = [{each.name for each in adapters[:number]} for number in range(len(adapters))]
    if not adapters or not all({*each.history} <= names for each, names in zip(adapters, known, strict=True)):
        raise ValueError("no task, or a history that is not there")
    return adapters


def _described(adapters: Sequence[Any]) -> tuple[list[dict[str, Any]], list[list[str]]]:
    tasks: list[dict[str, Any]] = []
    rows = [["", "task", "rank", "weights", "MB", "most like (w)", "largest psi", "sha256", "from"]]
    for number, adapter in enumerate(adapters, start=1):
        config, place = adapter.config, adapter.place
        file = place.path / "adapter_model.safetensors"
        with safe_open(file, framework="numpy") as tensors:  # only its header is read
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys() if ".lora_" in key]  # noqa: SIM118
        origin = place.origin or getattr(config, "origin", None)
        task = {
            "task": adapter.name, "history": list(adapter.history), "rank": config.r,
            "sha256": place.entry and place.entry["sha256"], "weights": sum(map(math.prod, shapes)),
            "bytes": file.stat().st_size, "similarities": getattr(config, "similarities", None), "origin": origin,
            "soft_coefficients": getattr(config, "soft_coefficients", None),
            "base_model": config.base_model_name_or_path,
        }  # fmt: skip
        tasks.append(task)
        about = [number, task["task"], task["rank"], f"{task['weights']:,}", f"{task['bytes'] / 1e6:.1f}"]
        about += [_largest(task["similarities"]), _largest(task["soft_coefficients"]), (task["sha256"] or "")[:12]]
        rows.append([*map(str, about), f"{origin['repo_id']}@{origin['revision'][:7]}" if origin else ""])
    return tasks, rows


def _largest(values: dict[str, Any] | None) -> str:
    """The earlier task with the largest w or psi, and that (a mean, if each layer has its own); empty if none has."""
    means = {task: statistics.fmean(w) if isinstance(w, list) else w for task, w in (values or {}).items()}
    best = max(means, key=means.__getitem__, default=None)
    return "" if best is None else f"{best} ({means[best]:.2f})"


def _places(source: str, revision: str | None) -> list[Any]:
    from peft_aso.chain.hub import Access, find, is_on_hub

    if revision is not None and not is_on_hub(source):
        raise ValueError(f"--revision is for a repository on the Hub, and {source} is a folder or no such id.")
    return find(source, Access(revision=revision))


def _loaded(
    source: str, base: str | None, tasks: str | None, revision: str | None, weights: bool = True
) -> tuple[Any, str, list[str] | None]:
    """The chain on its base model (if not `weights`, without the weights), the base model's name, the wanted tasks."""
    places = _places(source, revision)
    import torch

    from peft_aso import load_chain
    from peft_aso.chain.export import PREFIX, base_name
    from peft_aso.chain.manifest import read_adapter, with_history

    adapters = [read_adapter(place) for place in places]
    names = None if tasks is None else [name for name in tasks.split(",") if name]
    with_history({adapter.name: adapter.history for adapter in adapters}, names)  # an unknown task is an error
    name = base or next(filter(None, (adapter.config.base_model_name_or_path for adapter in adapters)), None)
    if name is None:
        raise ValueError("The chain does not name its base model. Give one with --base.")
    if weights:
        model = _model_class(adapters[-1]).from_pretrained(name, dtype="auto")
    else:  # one number for each weight, and what the adapters have saved of the base model
        model = _without_weights(adapters[-1], name)
        saved = {base_name(key.removeprefix(PREFIX)): each for one in adapters for key, each in one.tensors().items()}
        empty = {key: torch.zeros((), dtype=each.dtype).expand(each.shape) for key, each in model.state_dict().items()}
        model.load_state_dict({key: saved.get(key, each) for key, each in empty.items()}, assign=True)
    return load_chain(model, source, revision=revision), name, names


def _without_weights(adapter: Any, name: str) -> Any:
    """The base model on the meta device; only its config is read."""
    import torch
    from transformers import AutoConfig, PreTrainedModel

    chosen, config = _model_class(adapter), AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        return chosen(config) if issubclass(chosen, PreTrainedModel) else chosen.from_config(config)


def _model_class(adapter: Any) -> Any:
    """The Auto class of an adapter's task type; without one the class that it was trained in."""
    import transformers

    from peft_aso.chain.save import AUTO_CLASSES

    config = adapter.config
    kind = getattr(config.task_type, "value", config.task_type)
    name = config.auto_mapping.get("base_model_class") if isinstance(config.auto_mapping, dict) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if kind not in AUTO_CLASSES and isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return getattr(transformers, AUTO_CLASSES.get(kind, "AutoModel"))


if __name__ == "__main__":
    sys.exit(main())
