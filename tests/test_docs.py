"""The documents: links resolve, code runs, commands and settings exist, and the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig
from typer.main import get_command

import peft_aso
from peft_aso import ASOLoraConfig, AttributionConfig, LowRank, attribution
from peft_aso.tuner.low_rank import MERGES
from peft_aso.tuner.penalties import PENALTIES
from peft_aso.tuner.starts import STARTS
from peft_aso_cli import app
from tests.chain.chains import stock_adapter
from tests.tiny_models import tiny, tiny_batch
from tests.training.tools import QUICK, TinyTask, arguments, chain, randomize, weights

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# document with Python code -> the test that runs it
RUN_BY = {
    "README.md": "tests/test_docs.py",
    "docs/architecture.md": "tests/test_docs.py",
    "docs/distributed.md": "tests/training/test_distributed.py",
    "docs/guide.md": "tests/test_docs.py",
    "docs/hub.md": "tests/chain/test_hub.py",
    "docs/methods.md": "tests/test_docs.py",
    "docs/serving.md": "tests/test_serving.py",
    "docs/settings.md": "tests/test_docs.py",
    "examples/continual_benchmark/README.md": "tests/examples/test_continual_runs.py",
}


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(document: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.S | re.M)


def run(document: str, names: dict[str, Any]) -> dict[str, Any]:
    """The namespace after all Python blocks of a document."""
    for number, code in enumerate(blocks(document), start=1):
        exec(compile(code, f"{document}, block {number}", "exec"), names)
    return names


# ---- links and commands ------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document, those in code left out."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "http://")):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= targets
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    in_blocks = [line for block in blocks(ids(path), "bash") for line in block.splitlines()]
    for line in [*in_blocks, *re.findall(r"`([^`\n]+)`", text)]:
        if line.startswith("peft-aso ") and "--help" not in line:
            name, *words = shlex.split(line, comments=True)[1:]
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line
    for script in re.findall(r"python ((?:examples|tests)/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script


# ---- code --------------------------------------------------------------------------------------------------


def test_every_document_with_code_has_a_test_that_runs_it() -> None:
    assert {ids(path) for path in DOCUMENTS if blocks(ids(path))} == set(RUN_BY)
    for document, test in RUN_BY.items():
        assert f'"{Path(document).name}"' in (ROOT / test).read_text() or f'"{document}"' in (ROOT / test).read_text()


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "run", max_steps=2)
    data = {"dbpedia": TinyTask(base), "amazon": TinyTask(base, seed=1)}
    names = run("README.md", {"name": str(tmp_path / "base"), "args": args, **data})
    merged, batch = names["merged"], tiny_batch(base)
    with torch.no_grad():
        difference = merged(**batch).logits - base(**batch).logits
    assert type(merged) is type(base) and difference.abs().max() > 1e-3
    assert (tmp_path / "served" / "adapter_model.safetensors").is_file()
    assert names["model"].peft_config["amazon"].history == ["dbpedia"]


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stock_adapter(tmp_path / "stock-lora")
    model = chain(tasks=("mood", "topic"), penalty_weight=0.5)
    mood, topic = weights(model, "mood"), weights(model, "topic")
    names = run("docs/guide.md", {"model": model, "batches": [tiny_batch(model, seed=seed) for seed in range(12)]})
    changed = weights(model, "topic")
    assert all(torch.equal(weight, mood[name]) for name, weight in weights(model, "mood").items())
    assert not any(torch.equal(weight, topic[name]) for name, weight in changed.items())
    w = model.peft_config["topic"].similarities
    assert model.base_model.soft_coefficients == {"mood": pytest.approx(1 - w["mood"], abs=1e-6)} and w["mood"] < 0.999
    torch.testing.assert_close(names["after_mood"], names["mood_alone"])  # the first task has no history
    assert list(names["model"].peft_config) == ["mood", "topic", "stock"]
    assert names["model"].base_model.current_task == "topic"


def test_the_code_in_the_methods_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stock_adapter(tmp_path / "somebody" / "lora")
    model = chain(tasks=("dbpedia", "amazon"))
    layers = model.base_model.lora_layers()
    names = run("docs/methods.md", {"model": model, "batches": [tiny_batch(model)]})
    configs = [each for each in names.values() if isinstance(each, ASOLoraConfig)]
    assert len(configs) == 13 and names["config"].resolved_input_directions == 32
    assert all("plain" in layer.task_inputs for layer in layers.values())
    text = (ROOT / "docs/methods.md").read_text()
    for registry in (PENALTIES, STARTS, MERGES):
        assert all(re.search(rf"^\| `{name}`", text, re.M) for name in registry), "each method has its row"


def test_the_penalty_in_the_architecture_is_what_it_says(monkeypatch: pytest.MonkeyPatch, fresh_seed: int) -> None:
    monkeypatch.setitem(PENALTIES, "cosine", None)  # what is registered is removed again
    names = run("docs/architecture.md", {})
    new, *old = (LowRank(torch.randn(2, 5), torch.randn(3, 2)) for _ in range(3))
    psi = torch.tensor([0.25, 1.5])
    expected = sum(
        p * torch.cosine_similarity(row, other, dim=0) ** 2
        for p, earlier in zip(psi, old, strict=True)
        for row in new.A
        for other in earlier.A
    )
    torch.testing.assert_close(names["cosine"](new, old, psi), expected)
    model = chain(penalty=names["config"].penalty)
    assert 0 < model.base_model.orthogonality_penalty() < torch.inf
    assert names["config"].resolved_penalty_weight == 0.5


# ---- settings ----------------------------------------------------------------------------------------------


def test_the_settings_page_has_every_field_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.+)", text, re.M)
    shown = {name: eval(default, {"AttributionConfig": AttributionConfig}) for name, default, _ in rows}
    of_lora = {each.name for each in fields(LoraConfig)}
    configs = {each.name: ASOLoraConfig() for each in fields(ASOLoraConfig) if each.name not in of_lora}
    configs |= {each.name: AttributionConfig() for each in fields(AttributionConfig)}  # type: ignore[misc]
    assert shown == {name: getattr(config, name) for name, config in configs.items()} and len(rows) == len(shown)
    helps = {each.name: each.metadata["help"] for kind in (ASOLoraConfig, AttributionConfig) for each in fields(kind)}
    assert all(helps[name] for name in shown)
    for kind in (ASOLoraConfig, AttributionConfig):
        for name, hint in get_type_hints(kind).items():
            if name in shown and get_origin(hint) is Literal:
                (line,) = (row for field, _, row in rows if field == name)
                missing = [choice for choice in get_args(hint) if f'"{choice}"' not in line and shown[name] != choice]
                assert missing == [], name


def test_the_family_in_the_settings(fresh_seed: int) -> None:
    names = run("docs/settings.md", {})
    assert names["aso_lora"].resolved_penalty_weight == 0.05 and names["aso_lora"].attribution == AttributionConfig()
    for kind, penalised in {"paper": True, "olora": True, "inclora": False, "from_inputs": False}.items():
        config = names[kind]
        given = {"penalty": config.penalty, "penalty_weight": config.penalty_weight, "train_a": config.train_a}
        model = chain(**given, attribution=QUICK if kind == "paper" else config.attribution)
        randomize(model, "second", seed=2)  # of an untrained task psi is 1
        peft_aso.update_coefficients(model, [tiny_batch(model)])
        old, new = (weights(model, task) for task in ("first", "second"))
        psi = model.base_model.soft_coefficients["first"]
        assert psi == 1.0 if kind in ("olora", "inclora") else psi != 1.0
        products = [psi * (old[n.replace(".second.", ".first.")] @ new[n].T) for n in new if "lora_A" in n]
        value = sum(each.abs().sum() if kind == "olora" else each.square().sum() for each in products)
        torch.testing.assert_close(model.base_model.orthogonality_penalty().detach(), value)
        assert (model.peft_config["second"].resolved_penalty_weight > 0) == penalised
    assert names["lora"].history == [] and names["paper"].attribution.quadrature == "riemann"


# ---- the site ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="no mkdocs: make env")
def test_the_site_builds_and_its_reference_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = set(re.findall(r'id="([\w.]+)"', (tmp_path / "api" / "index.html").read_text()))
    for module in (peft_aso, attribution):
        for name in set(module.__all__) - {"metrics", "plots"}:
            home = getattr(getattr(module, name), "__module__", "")  # where it is defined
            assert {f"peft_aso.{name}", f"{module.__name__}.{name}", f"{home}.{name}"} & reference, name
    for module in (peft_aso.metrics, peft_aso.plots):
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
        public = {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
        assert public and public <= reference, sorted(public - reference)
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page.read_text()), page
