"""The commands and their arguments."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..chain import ChainError
from . import reading, writing

_TASKS = "tasks to add up, with commas, each without its history (default: the newest one and its history)"
# what a command returns: what it says as text, the same as JSON, and whether all is well
Result = tuple[str, Any, bool]

EXAMPLES = """\
examples:
  peft-aso inspect runs/demo/chain
  peft-aso inspect you/chain --revision 4f5c2a... --json
  peft-aso verify you/chain --base HuggingFaceTB/SmolLM2-135M-Instruct
  peft-aso merge you/chain --out merged --dtype bfloat16
  peft-aso export you/chain --out served --max-rank 64 --tasks mood,topic
  peft-aso push runs/demo/chain you/chain --private
  peft-aso report runs/demo/chain --out report

exit status: 0 all is well, 1 something is wrong (the message says what), 2 wrong arguments
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        prog="peft-aso",
        description="Look at a chain of tasks on disk or on the Hub, check it, merge, export, push and report it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], Result], help_: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
        found.add_argument("source", help="a chain's folder, or a repository on the Hub (user/chain)")
        found.add_argument("--revision", help="branch, tag or commit of the repository")
        found.add_argument("--json", action="store_true", help="print JSON instead of text")
        found.set_defaults(run=run)
        return found

    def base(found: argparse.ArgumentParser, help_: str) -> None:
        found.add_argument("--base", help=help_)

    def tasks(found: argparse.ArgumentParser) -> None:
        found.add_argument("--tasks", type=_names, help=_TASKS)

    own = "base model, a folder or Hub id (default: the one that the chain names)"
    command("inspect", reading.inspect, "show tasks, ranks, sizes, similarities and hashes")
    found = command(
        "verify",
        reading.verify,
        "check hashes, finite values and that the history is complete; with --base, shapes too",
    )
    base(found, "base model, to check the shapes against; only its config is read")
    found = command("merge", writing.merge, "write base model and tasks as one plain model folder")
    base(found, own)
    tasks(found)
    found.add_argument("--out", required=True, help="folder to write")
    found.add_argument("--dtype", choices=sorted(writing.DTYPES), help="type of what is written (default: the base's)")
    found = command("export", writing.export, "write the sum of tasks as one stock LoRA adapter")
    base(found, own)
    tasks(found)
    found.add_argument("--out", required=True, help="folder to write")
    found.add_argument("--max-rank", type=int, help="cut to this rank by SVD; the error is logged")
    found = command("push", writing.push, "push a chain to the Hub")
    base(found, own)
    found.add_argument("repo", help="repository to push to (user/chain)")
    found.add_argument("--per-task", action="store_true", help="one repository for each task, REPO-TASK")
    found.add_argument("--no-merged", action="store_true", help="leave out merged/, the sum as one adapter")
    found.add_argument("--private", action="store_true", help="where the repository is made: private")
    found = command("report", reading.report, "write a Markdown page with the picture of the similarities")
    found.add_argument("--out", required=True, help="folder to write")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something is wrong, 2 for wrong arguments."""
    options = parser().parse_args(arguments)
    try:
        text, values, well = options.run(options)
    except (ChainError, OSError, ValueError) as error:
        text, values, well = f"error: {error}", {"error": str(error)}, False
    stream = sys.stdout if well or options.json else sys.stderr
    print(json.dumps(values, indent=2) if options.json else text, file=stream)
    return 0 if well else 1


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
