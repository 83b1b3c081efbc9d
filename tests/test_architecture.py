"""The layout of docs/architecture.md, read from the source: imports point downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "peft_aso"
# Every module, lowest first: it imports what stands in an earlier row or left of a "<" before it, and nothing else of
# ours. A package's `__init__.py` comes right after its modules.
ORDER = """
sharding, metrics < plots
attribution: config, vector < quadrature, similarity, neurons < answer < integrated_gradients, shared_attention < fast
tuner: low_rank < penalties, starts < config, history, adapter_file < layer < model < loading
registration
training: coefficients < inputs < callback < trainer
chain: manifest < save, export < hub < load
"""
LEVELS: dict[str, int] = {}
for row in ORDER.strip().splitlines():
    package, _, modules = row.rpartition(": ")
    for names in [*modules.split(" < "), *([""] if package else [])]:
        level = max(LEVELS.values(), default=0) + 1
        LEVELS |= {f"{package}.{name}".strip("."): level for name in names.split(", ")}
# What a module or package may not know of other libraries.
FORBIDDEN = {
    "attribution": {"peft", "huggingface_hub"},
    "metrics": {"torch", "transformers", "peft", "matplotlib"},
    "plots": {"torch", "transformers", "peft"},
    **dict.fromkeys(("sharding", "tuner.low_rank", "tuner.penalties", "tuner.starts"), {"transformers", "peft"}),
}
PUBLIC = {PACKAGE, f"{PACKAGE}.attribution", f"{PACKAGE}.metrics", f"{PACKAGE}.plots"}
MAX_LINES = 800
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK"]) + r")\b")


def files(folders: str) -> list[Path]:
    return [path for folder in folders.split() for path in sorted((ROOT / folder).rglob("*.py"))]


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(source: str, path: Path) -> Iterator[str]:
    """The dotted names that a source file at `path` imports, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.parents[node.level - 1].relative_to(ROOT).parts if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    found = []
    module = ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    assert module in LEVELS, "give the module its place in ORDER"
    for name in imports(source, path):
        top, _, rest = name.partition(".")
        if top in FORBIDDEN.get(module, FORBIDDEN.get(module.split(".")[0], ())):
            found.append(f"{module} may not know {top}")
        if top == PACKAGE and rest != "__version__":
            known = [rest.rsplit(".", cut)[0] for cut in range(rest.count(".") + 1)]  # the longest that is a module
            other = next((part for part in known if part in LEVELS), None)
            if other is None or LEVELS[other] >= LEVELS[module]:
                found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("path", sorted({*files(PACKAGE)} - {ROOT / PACKAGE / "__init__.py"}), ids=ids)
def test_imports_point_downwards(path: Path) -> None:
    assert broken_rules(path, path.read_text()) == []


@pytest.mark.parametrize(
    "statement",
    ["import peft_aso.chain", "from ..training import ASOTrainer", "from .. import chain", "from . import model"]
    + ["from peft_aso import ASOTrainer", "from .model import tuner_of", "def f():\n    from ..chain import save"],
)
def test_the_rule_sees_each_kind_of_import(statement: str) -> None:
    layer, vector = (ROOT / PACKAGE / name for name in ("tuner/layer.py", "attribution/vector.py"))
    assert len(broken_rules(layer, statement)) == 1
    below = "from .. import __version__\nfrom ..attribution import find_neurons\nfrom . import config\nimport peft"
    assert broken_rules(layer, below) == []
    assert len(broken_rules(vector, "import peft.tuners")) == 1


@pytest.mark.parametrize("path", files(f"{PACKAGE} examples tests"), ids=ids)
def test_a_file_has_a_docstring_is_finished_and_not_too_long(path: Path) -> None:
    source = path.read_text()
    empty_marker = path.name == "__init__.py" and not source.strip() and path.is_relative_to(ROOT / "tests")
    assert empty_marker or ast.get_docstring(ast.parse(source))
    assert UNFINISHED.search(source) is None
    assert len(source.splitlines()) <= MAX_LINES


def test_examples_use_public_names_only() -> None:
    for path in files("examples"):
        for name in imports(path.read_text(), path):
            if name.split(".")[0] == PACKAGE:
                module, _, last = name.rpartition(".")
                assert name in PUBLIC or (module in PUBLIC and not last.startswith("_")), f"{path}: {name}"
