"""Run the tests in several environments, oldest and newest versions, and print a table: `make compat`.

    python tests/compat.py [--only oldest,3.12] [--work .venv-compat] [--tests tests/tuner]

An environment whose Python is not on this machine is left out and named. Results are added to
docs/results/compat.json, from which the table in docs/compatibility.md is made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "compat.json"
SHOWN = ("torch", "transformers", "peft", "accelerate", "trl")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OLDEST = [each.replace(">=", "==") for each in (*PROJECT["dependencies"], *EXTRAS["plots"], *EXTRAS["trl"])]
# name -> Python, and what is installed besides the tests' own packages
ENVIRONMENTS: dict[str, tuple[str, list[str]]] = {
    "oldest": ("3.10", sorted(OLDEST, key=lambda each: not each.startswith("torch"))),
    "transformers 5.0": ("3.11", ["torch==2.13.0", "transformers==5.0.0", "peft", "accelerate==1.10.1", "trl==1.0.0"]),
    "transformers 5.20": (
        "3.11",
        ["torch==2.13.0", "transformers==5.20.0", "peft", "accelerate==1.14.0", "huggingface_hub==1.31.0"]
        + ["trl==1.14.0"],
    ),
    "3.10": ("3.10", ["torch", "transformers<5.22", "peft", "accelerate", "trl"]),
    "3.11": ("3.11", ["torch==2.13.0", "--constraint", str(ROOT / "constraints.txt"), *SHOWN[1:]]),
    **{version: (version, list(SHOWN)) for version in ("3.12", "3.13", "3.14")},
}
TEST_PACKAGES = ["captum", "datasets", "hypothesis", "matplotlib", "psutil", "pytest-xdist", "scipy", "typer"]


def find_python(version: str) -> str | None:
    """The interpreter of that version: on the PATH, or one of pyenv's."""
    homes = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    return shutil.which(f"python{version}") or (str(homes[-1]) if homes else None)


def make(folder: Path, python: str, wanted: list[str]) -> str:
    """An environment with these packages; returns its interpreter. One that exists is used as it is."""
    inside = str(folder / "bin" / "python")
    if (folder / "made").exists():
        return inside
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    install = [inside, "-m", "pip", "install", "--disable-pip-version-check"]
    for names in (wanted[:1], [*wanted, *TEST_PACKAGES]):  # torch before anything can require another build of it
        subprocess.run([*install, *names], check=True)
    (folder / "made").touch()
    return inside


def run(python: str, tests: list[str], log: Path) -> dict[str, Any]:
    """The installed versions, and how the fast tests came out; what they print goes into `log`."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {SHOWN!r}}}))"
    versions = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "auto", *tests]
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text()
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", text[-300:])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    return {**versions, **{name: int(count) for count, name in found}, "failures": failed, "exit": done.returncode}


def table(results: dict[str, Any]) -> str:
    rows = ["| environment | Python | " + " | ".join(SHOWN) + " | tests |", "|" + "---|" * (len(SHOWN) + 3)]
    for name, (version, _) in ENVIRONMENTS.items():
        found, cells, tests = results.get(name), [""] * len(SHOWN), "not run"
        if found is not None:
            cells = [found[package].split("+")[0] for package in SHOWN]
            counts = [f"{found[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if found.get(kind)]
            tests = f"{', '.join(counts)} ({found['date']})"
        rows.append(f"| {name} | {version} | {' | '.join(cells)} | {tests} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help="environments, separated by commas")
    parser.add_argument("--work", type=Path, default=ROOT / ".venv-compat")
    parser.add_argument("--tests", nargs="*", default=[], help="what pytest gets; results are not written down then")
    options = parser.parse_args()
    bad, results = False, json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in filter(None, options.only.split(",")):
        version, wanted = ENVIRONMENTS[name]
        python = find_python(version)
        if python is None:
            print(f"{name}: no Python {version} on this machine; left out", file=sys.stderr)
            continue
        found = run(make(options.work / name, python, wanted), options.tests, options.work / f"{name}.log")
        print(f"{name}: {found}", file=sys.stderr)
        bad = bad or found["exit"] != 0
        if not options.tests:
            results[name] = {"python": version, **found, "date": date.today().isoformat()}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
