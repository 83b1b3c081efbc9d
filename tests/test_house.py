"""The house's rules, read from the source: arrows point downwards, rooms are small, doors have a sign."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "peft_aso"
# The floor of every room (docs/design.md). A new file or folder of the package gets its floor here.
FLOORS = {
    "attribution": 1,
    "metrics": 1,
    "plots": 1,
    "sharding": 1,
    "tuner": 2,
    "chain": 3,
    "training": 3,
    "registration": 3,
    "hub": 4,
    "cli": 5,
}
# What a room may not know, beside the floors above it.
FORBIDDEN = {
    "attribution": {"peft", "huggingface_hub"},
    "metrics": {"torch", "transformers", "peft", "matplotlib"},
    "plots": {"torch", "transformers", "peft"},
    "sharding": {"transformers", "peft"},
}
# What examples may import of ours: the contract.
PUBLIC_MODULES = {PACKAGE, f"{PACKAGE}.attribution", f"{PACKAGE}.metrics", f"{PACKAGE}.plots"}
MAX_LINES = 500
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that a source file imports, relative ones resolved, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                here = parts if is_package else parts[:-1]
                above = here[: len(here) - (node.level - 1)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return list(imports(path.read_text(), ".".join(parts[: len(parts) - is_package]), is_package))


def broken_rules(room: str, imported: list[str]) -> list[str]:
    """What a file of this room imports that it should not."""
    found = []
    for name in imported:
        top, _, rest = name.partition(".")
        if top in FORBIDDEN.get(room, ()):
            found.append(f"{room} may not know {top}")
        if top == PACKAGE and rest != "__version__":
            other = rest.split(".")[0]
            if other not in FLOORS:
                found.append(f"{name} is on no floor: import from the room that defines it")
            elif FLOORS[other] > FLOORS[room]:
                found.append(f"{room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


ROOMS = [path for path in python_files(PACKAGE) if path != ROOT / PACKAGE / "__init__.py"]
SOURCES = python_files(PACKAGE, "examples", "tests")


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in ROOMS}
    assert rooms <= set(FLOORS), f"no floor for {sorted(rooms - set(FLOORS))}: add it to FLOORS"
    assert {"attribution", "metrics", "plots", "tuner"} <= rooms


@pytest.mark.parametrize("path", ROOMS, ids=names(ROOMS))
def test_arrows_point_downwards(path: Path) -> None:
    assert broken_rules(room_of(path), imports_of(path)) == []


@pytest.mark.parametrize(
    ("source", "room", "count"),
    [
        ("import peft_aso.tuner.model", "attribution", 1),
        ("from peft_aso.training import ASOTrainer", "tuner", 1),
        ("from ..chain import manifest", "tuner", 1),
        ("from .. import training", "tuner", 1),
        ("from peft_aso import ASOTrainer", "tuner", 1),
        ("def f():\n    from ..tuner import model", "attribution", 1),
        ("import peft.tuners", "attribution", 1),
        ("from .. import __version__", "tuner", 0),
        ("from ..attribution import find_neurons", "tuner", 0),
        ("from . import config", "tuner", 0),
        ("from ..training import coefficients", "chain", 0),
    ],
)
def test_the_rule_sees_each_kind_of_import(source: str, room: str, count: int) -> None:
    assert len(broken_rules(room, list(imports(source, f"peft_aso.{room}.file", False)))) == count


def test_orthogonality_knows_torch_and_nothing_else() -> None:
    imported = {name.split(".")[0] for name in imports_of(ROOT / PACKAGE / "tuner" / "orthogonality.py")}
    assert "torch" in imported
    assert imported - {"torch"} <= set(sys.stdlib_module_names)


def test_examples_use_public_names_only() -> None:
    for path in python_files("examples"):
        for name in imports_of(path):
            if name.split(".")[0] == PACKAGE:
                module, _, last = name.rpartition(".")
                assert name in PUBLIC_MODULES or module in PUBLIC_MODULES, f"{path}: {name}"
                assert not last.startswith("_") or last == "__version__", f"{path}: {name}"


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_a_file_is_small_and_says_what_it_is(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    empty_marker = path.name == "__init__.py" and not source.strip() and path.is_relative_to(ROOT / "tests")
    assert empty_marker or ast.get_docstring(ast.parse(source)), "no docstring"


def test_nothing_is_left_unfinished() -> None:
    texts = [ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run")]
    texts += [path for folder in (".", "docs", "examples") for path in (ROOT / folder).glob("*.md")]
    for path in [*SOURCES, *texts]:
        marked = UNFINISHED.search(path.read_text())
        assert marked is None, f"{path}: {marked.group()}"


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document, those in code left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for at in ("docs", "examples") for path in (ROOT / at).rglob("*.md"))])


@pytest.mark.parametrize("path", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "http://")):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), f"{path}: {target}"
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{path}: {target}"
