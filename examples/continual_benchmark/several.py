"""Several runs one after another, from a file with the arguments of one run a line.

    python examples/continual_benchmark/several.py FILE --data ../shared/cl_benchmark

FILE is for instance examples/continual_benchmark/plans/methods.txt. What comes after it is added to every line.
Finished runs are left out, so that a queue that was stopped goes on; a run that fails is said at the end, and the
others go on. One run at a time, unless `--jobs 4` says otherwise: a GPU has room for several. On a CPU the jobs share
the cores, each with threads of its own (`OMP_NUM_THREADS`, if set, decides): about as many runs an hour, less in each
other's way, at 2 to 4 GiB each. Tasks learned alone are shared: runs beside each other wait for them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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


def environment(jobs: int) -> dict[str, str]:
    """Of each of so many runs beside each other: its share of the cores, since threads in each other's way wait."""
    share = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(share), **os.environ} if jobs > 1 else dict(os.environ)


def run_one(run: Sequence[str], jobs: int) -> int:
    """Run it; its exit status. One beside others says nothing unless it fails."""
    quiet = jobs > 1
    done = subprocess.run(
        [sys.executable, str(RUN), *run], check=False, text=True, stdin=subprocess.DEVNULL, env=environment(jobs),
        stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT if quiet else None,
    )  # fmt: skip
    if quiet and done.returncode:
        print(done.stdout[-4000:])
    return done.returncode


def main(arguments: Sequence[str]) -> int:
    """Run them; how many failed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    parser = argparse.ArgumentParser(prog="several.py", add_help=False, allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    options, more = parser.parse_known_args(arguments)
    runs = lines_of(options.file, more)
    failed, done, started = [], 0, time.time()

    def one(number: int, run: list[str]) -> None:
        nonlocal done
        print(f"\n##### Run {number} of {len(runs)}: {shlex.join(run)}", flush=True)
        if run_one(run, options.jobs):
            failed.append(shlex.join(run))
        done += 1
        print(f"##### {done} of {len(runs)} done, {(time.time() - started) / 60:.0f} minutes so far", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, range(1, len(runs) + 1), runs))
    for run_ in failed:
        print(f"failed: {run_}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
