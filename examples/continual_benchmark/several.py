"""Several runs one after another, from a file with the arguments of one run a line.

    python examples/continual_benchmark/several.py FILE --data ../shared/cl_benchmark

FILE is for instance examples/continual_benchmark/plans/methods.txt. What comes after it is added to every line.
Finished runs are left out, so that a queue that was stopped goes on; a run that fails is said at the end, and the
others go on. One run at a time: two share the cores and take longer than one after the other.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

RUN = Path(__file__).with_name("run.py")


def lines_of(file: Path, more: Sequence[str]) -> list[list[str]]:
    """The arguments of each run; empty lines and what follows a # are left out.

    Raises:
        SystemExit: no such file, or no run in it.
    """
    if not file.is_file():
        raise SystemExit(f"{file}: no such file. Give one with the arguments of one run a line.")
    found = [shlex.split(line, comments=True) for line in file.read_text(encoding="utf-8").splitlines()]
    runs = [[*line, *more] for line in found if line]
    if not runs:
        raise SystemExit(f"{file} has no runs.")
    return runs


def main(arguments: Sequence[str]) -> int:
    """Run them; how many failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    runs = lines_of(Path(arguments[0]), arguments[1:])
    failed, started = [], time.time()
    for number, run in enumerate(runs, start=1):
        print(f"\n##### Run {number} of {len(runs)}: {shlex.join(run)}", flush=True)
        if subprocess.run([sys.executable, str(RUN), *run], check=False).returncode:
            failed.append(shlex.join(run))
        spent = time.time() - started
        print(f"##### {number} of {len(runs)} done, {spent / 60:.0f} minutes so far", flush=True)
    for run_ in failed:
        print(f"failed: {run_}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
