"""The command: which lines run, on which models, and where their numbers go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import captum
import peft
import torch
import transformers

import peft_aso

from . import (
    attribution_lines,
    chains,
    folding,
    memory,
    penalty,
    probe_size,
    quadrature,
    similarities,
    steps,
    whole_task,
)
from .bench import Bench, sizes_from
from .models import Subject, load
from .records import Record, block, table

EXAMPLES = Path(__file__).resolve().parents[1]
GENERATES = frozenset({"causal", "seq2seq"})
ENCODES = frozenset({"seq2seq", "encoder"})
CAUSAL = frozenset({"causal"})


@dataclass(frozen=True)
class Line:
    """One measurement.

    Attributes:
        name: as `--only` takes it, whole or up to a dot.
        function: makes its records.
        kinds: the kinds of model it runs on.
        scope: "all": every model; "once": the first model only; "text": a model with a tokenizer; "growth": only
            with `--growth`, or by name.
    """

    name: str
    function: Callable[[Bench], list[Record]]
    kinds: frozenset[str]
    scope: str = "all"


LINES = (
    Line("step.two", steps.two_tasks, GENERATES),
    Line("step.hundred", steps.hundred_tasks, GENERATES),
    Line("penalty.step", penalty.in_the_step, GENERATES),
    Line("penalty.loop", penalty.against_the_loop, GENERATES),
    Line("attribution.one", attribution_lines.one_token, GENERATES),
    Line("attribution.packed", attribution_lines.packed, GENERATES),
    Line("attribution.encoder", attribution_lines.encoder, ENCODES),
    Line("attribution.operations", attribution_lines.operations, GENERATES),
    Line("quadrature", quadrature.quadrature, GENERATES, "text"),
    Line("quadrature.time", quadrature.time_of_adaptive, GENERATES, "text"),
    Line("folding", folding.folding, GENERATES, "text"),
    Line("memory", memory.peak_memory, GENERATES),
    Line("chain.load", chains.loading, GENERATES),
    Line("chain.merge", chains.merging, GENERATES),
    Line("similarity", similarities.similarities, GENERATES | ENCODES, "once"),
    Line("task", whole_task.whole_task, GENERATES),
    Line("probe", probe_size.probe_size, GENERATES, "text"),
    Line("growth.tasks", steps.growth_in_tasks, GENERATES, "growth"),
    Line("growth.rank", steps.growth_in_rank, GENERATES, "growth"),
    Line("growth.tokens", attribution_lines.growth_in_tokens, CAUSAL, "growth"),
    Line("growth.layers", attribution_lines.growth_in_layers, CAUSAL, "growth"),
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description="What the method costs, against its peers.")
    add = parser.add_argument
    add(
        "--model",
        default="smollm2,t5,bert",
        help="smollm2, t5, bert, llama-1b, folder or Hub id; comma-separated",
    )
    add("--only", help="lines, comma-separated, whole names or up to a dot: " + ", ".join(line.name for line in LINES))
    add("--growth", action="store_true", help="also: growth with tasks, rank, tokens and layers")
    add("--quick", action="store_true", help="tiny random models and sizes: a check that all runs; no numbers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 for llama-1b alone")
    add("--threads", type=int, help="of torch, on the CPU")
    add("--repeats", type=int, help="of each short measurement (5)")
    add("--batch", type=int, help="rows of a training step (8)")
    add("--tokens", type=int, help="tokens a row of a training step (64)")
    add("--prompt", type=int, help="tokens of an attributed prompt (128)")
    add("--examples", type=int, help="prompts attributed at once (8)")
    add("--captum-layers", type=_layers, help="how many layers Captum is timed on (5), or all")
    add("--quadrature-examples", type=int, help="prompts of each task (4)")
    add("--task-examples", type=int, help="training examples of the whole task (500)")
    add("--task-repeats", type=int, help="of the whole task (1)")
    add("--steps", type=int, help="m of Eq. 11, against Captum and in the whole task (20)")
    add("--probe-examples", type=int, help="examples of each task for the size of a probe (64)")
    add("--chain", type=Path, default=Path("runs/demo/chain"), help="of trained adapters, for quadrature and probe")
    add("--data", type=Path, default=EXAMPLES / "data", help="the tasks of that chain")
    add("--out", type=Path, default=Path("runs/speed.json"), help="JSON; pictures go into the folder of that name")
    return parser.parse_args(arguments)


def _layers(text: str) -> int | str:
    return text if text == "all" else int(text)


def chosen_lines(options: argparse.Namespace, subject: Subject, first: bool) -> list[Line]:
    """The lines that run on this model.

    Raises:
        SystemExit: a name in `--only` is none of a line.
    """
    names = options.only.split(",") if options.only else None
    if names is not None:
        unknown = [name for name in names if not any(_named(line, [name]) for line in LINES)]
        if unknown:
            known = ", ".join(line.name for line in LINES)
            raise SystemExit(f"--only: no line {', '.join(unknown)}; there are {known}")
    return [line for line in LINES if _runs(line, options, names, subject, first)]


def _runs(line: Line, options: argparse.Namespace, names: list[str] | None, subject: Subject, first: bool) -> bool:
    if subject.kind not in line.kinds or (line.scope == "once" and not first):
        return False
    if line.scope == "text" and subject.tokenizer is None and not options.quick:
        return False
    return _named(line, names) if names is not None else line.scope != "growth" or options.growth


def _named(line: Line, names: Sequence[str]) -> bool:
    return any(line.name == name or line.name.startswith(name + ".") for name in names)


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    modules = (torch, transformers, peft, captum, peft_aso)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory, GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Report:
    """The JSON file, written anew after each line."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.head = head
        self.records: list[Record] = []
        self.failures: list[dict[str, str]] = []

    def write(self) -> None:
        """Beside first, then in place: a run that is cut leaves a whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {**self.head, "records": [record.as_dict() for record in self.records], "failures": self.failures}
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def run_model(name: str, options: argparse.Namespace, report: Report, scratch: Path, first: bool) -> None:
    """All chosen lines of one model. A line that fails is reported, and the next one runs."""
    subject = load(name, options.device, options.dtype, options.quick)
    subject.model.requires_grad_(False)  # no side should record what nobody asks for
    bench = Bench(subject, sizes_from(options), scratch, options.out.with_suffix(""), options)
    for line in chosen_lines(options, subject, first):
        try:
            records = line.function(bench)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            report.failures.append({"line": line.name, "model": subject.label, "error": f"{error!r}"})
            records = []
        for record in records:
            print(block(record), flush=True)
        report.records += records
        report.write()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all lines ran and all sides computed the same, whatever the ratios."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    command = ["benchmark.py", *(arguments if arguments is not None else sys.argv[1:])]
    report = Report(options.out, {"command": command, "machine": machine(), "sizes": asdict(sizes_from(options))})
    print(json.dumps(report.head["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="peft-aso-speed-") as scratch:
        for index, name in enumerate(options.model.split(",")):
            run_model(name, options, report, Path(scratch), first=index == 0)
    print("\n" + table(report.records))
    different = [record.line for record in report.records if not all(check.same for check in record.sameness)]
    for name in different:
        print(f"{name}: the two sides do NOT compute the same; see above")
    for failure in report.failures:
        print(f"{failure['line']} [{failure['model']}] failed: {failure['error']}")
    print(f"Written to {options.out}")
    return 1 if report.failures or different else 0
