"""Adapter folders that are unsafe, damaged or no adapters are refused, and the model is as before.

What is checked is in two JSON Schemas, against which saved chains are tested here.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from peft_aso import ASOLoraConfig, ChainError, load_chain, save_chain
from peft_aso.chain.load import verify_chain
from peft_aso.chain.manifest import ENTRY_TYPES, SETTING_TYPES, find_in_folder
from tests.chain.chains import edit, load, logits, make_chain, unchanged
from tests.tiny_models import tiny

DOCS = Path(__file__).parents[2] / "docs"

Spoil = Callable[[Path], object]


def check_refused(source: Any, message: str, base: Any = None) -> None:
    """The error is raised and the base model has not changed at all."""
    base = tiny("llama") if base is None else base
    with unchanged(base), pytest.raises(ChainError, match=f"(?s){message}"):
        load_chain(base, source)


def header(**tensor: Any) -> Spoil:
    text = json.dumps({"a.lora_A.weight": {"dtype": "F32", **tensor}}).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


def with_value(value: float, dtype: torch.dtype) -> Spoil:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: tensor.to(dtype) for name, tensor in weights.items()})
        weights[sorted(weights)[3]].view(-1)[-1] = value

    return lambda path: edit(path.parent, spoil)


HARM: list[tuple[Spoil | str | dict[str, Any], str]] = [
    (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated or damaged"),
    (lambda path: path.write_bytes(b""), "truncated or damaged"),
    (lambda path: path.write_bytes(os.urandom(2048)), "truncated or damaged"),
    (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + bytes(64)), "truncated or damaged"),
    (header(shape=[2**40, 2**20], data_offsets=[0, 64]), "truncated or damaged"),
    (header(shape=[4, 4], data_offsets=[2**50, 2**50 + 64]), "truncated or damaged"),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (lambda path: save_file({"something": torch.zeros(2)}, path), "holds no LoRA matrices"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
    (lambda path: path.unlink(), f"has no file {SAFETENSORS_WEIGHTS_NAME}"),
    (lambda path: path.symlink_to(path.rename(path.parents[2] / "away")), "leads out of its folder"),
    *((with_value(value, torch.float32), "NaN or Inf") for value in (float("nan"), float("inf"), -float("inf"))),
    (with_value(float("nan"), torch.bfloat16), "NaN or Inf"),
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[1]", "holds a list, not an object"),
    (" " * (17 * 2**20), "too many for its kind"),
    (dict(peft_type="IA3"), "peft_type 'IA3'"),
    (dict(peft_type=["LORA"]), "peft_type"),
    (dict(penalty="cubed"), "not a valid config.*cubed"),
    (dict(history="first"), r"not a valid config.*list\[str\]"),
    (dict(r=0, history_hashes=None), "its config is wrong.*third"),
    *((dict(r=r), "third.*is damaged: r=.*int") for r in ("2", None, True, 2.0)),
    (dict(r=10**9), "no matrix of rank 1000000000"),
    *((dict(lora_alpha=alpha), "third.*is damaged.*lora_alpha") for alpha in ("big", None, [1], True)),
    *(
        (dict(lora_alpha=alpha), "not valid JSON.*third|third.*not valid JSON")
        for alpha in (float("nan"), float("inf"))
    ),
    (dict(lora_dropout=None), "third.*is damaged.*lora_dropout"),
    (dict(use_rslora="no"), "third.*is damaged.*use_rslora"),
    (dict(target_modules=5), "third.*is damaged.*target_modules"),
    (dict(modules_to_save="lm_head"), "third.*is damaged.*modules_to_save"),
    (dict(rank_pattern=[1]), "third.*is damaged.*rank_pattern"),
    *((dict(similarities=values), "third.*is damaged") for values in ("x", [1], {"first": None}, {"first": "1"})),
    *((dict(history_hashes=values), "third.*is damaged") for values in ("x", [1], {"first": 3})),
    *((dict(origin=values), "third.*(is damaged|another origin)") for values in ("x", [1], {"repo_id": 1}, {})),
    (dict(base_model_name_or_path=["x"]), "third.*is damaged"),
    *((dict([(name, "(")]), "its config is wrong.*third") for name in ("target_modules", "exclude_modules")),
    (dict(rank_pattern={"(": 2}), "its config is wrong.*third"),
    (dict(megatron_config={"a": 1}, megatron_core="os"), "a module to import"),
    (dict(monteclora_config={"a": {"b": 1}}), "not a valid config"),
    *((with_value(1, dtype), f"holds .*{dtype}") for dtype in (torch.float8_e4m3fn, torch.int8, torch.bool)),
    *(
        (
            lambda path, name=name: (path.parent / name).unlink() or (path.parent / name).symlink_to(name),
            "regular file",
        )
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    ),
    *((dict(task_name=name), "cannot be the name of a task") for name in ("../up", "a/b", "a\\b", ".x", "..", "a\0b")),
]


@pytest.mark.parametrize(("spoil", "message"), HARM, ids=range(len(HARM)))
def test_files_that_are_damaged_or_mean_harm(folder: Path, spoil: Any, message: str) -> None:
    """Harm to the weights, or to the config: its whole text, or values in it."""
    if isinstance(spoil, str):
        (folder / "third" / CONFIG_NAME).write_text(spoil)
    elif isinstance(spoil, dict):
        edit(folder / "third", spoil)
    else:
        spoil(folder / "third" / SAFETENSORS_WEIGHTS_NAME)
    check_refused(folder, message)


def test_a_pickle_is_not_unpickled(folder: Path, tmp_path: Path) -> None:
    makes_a_folder = f"cos\nmkdir\n(V{tmp_path / 'made'}\ntR."  # a pickle, as text
    (folder / "first" / "adapter_model.bin").write_text(makes_a_folder)
    load(folder)  # there is safetensors too
    (folder / "first" / SAFETENSORS_WEIGHTS_NAME).unlink()
    check_refused(folder, "pickle .adapter_model.bin., which can run code")
    assert not (tmp_path / "made").exists()
    pickle.loads(makes_a_folder.encode())
    assert (tmp_path / "made").exists(), "what it would have done"


def test_links(folder: Path, tmp_path: Path) -> None:
    first = folder / "first"
    (first / SAFETENSORS_WEIGHTS_NAME).rename(first / "real")
    os.symlink("real", first / SAFETENSORS_WEIGHTS_NAME)
    load(folder)
    first.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", first)
    check_refused(folder, "leads out of its folder")
    load([first, folder / "second"])  # a folder that the user names is the user's choice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"folder": folder}, "cannot be the name") for folder in ("../../outside", "/etc", "..")),
        *(({"folder": folder}, "is not there") for folder in ("none", "a" * 5000)),
        ({"folder": "\ud800"}, "not valid JSON"),
        *(({name: 3}, "damaged") for name in ("folder", "similarities", "soft_coefficients", "repo_id")),
        *(({"task": task}, "cannot be the name") for task in ("../second", ".")),
        ({"history": "first"}, "damaged"),
        ({"sha256": None}, "damaged"),
        ({"repo_id": "../../x", "revision": "0" * 40}, "no valid repository"),
        ({"repo_id": "user/chain", "revision": "main"}, "no valid repository"),
        ({"task": "other", "history": []}, "another task second, and chain.json has other|which is not there"),
        (None, "not valid JSON"),
    ],
)
def test_chain_json_that_means_harm(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_chain(make_chain(), tmp_path / "chain")
    content = json.loads((folder / "chain.json").read_text())
    content["tasks"][1].update(change or {})
    (folder / "chain.json").write_text("[" * 100_000 if change is None else json.dumps(content))
    check_refused(folder, message)


def test_sources_that_are_none(folder: Path) -> None:
    (folder.parent / "none").mkdir()
    for source, message in (
        (folder / "missing", "There is no folder"),
        ("somebody/chain", "'somebody/chain' is no folder on this machine, and no repository"),
        (folder / "first" / CONFIG_NAME, "There is no folder"),
        ([], "list of folders and repositories is empty"),
        (folder.parent / "none", "There is no adapter in"),
    ):
        check_refused(source, message)


def test_a_chain_json_that_is_a_link_to_itself(tmp_path: Path) -> None:
    folder = save_chain(make_chain(), tmp_path / "chain")
    (folder / "chain.json").unlink()
    (folder / "chain.json").symlink_to("chain.json")
    check_refused(folder, "not a regular file")


# ---- any change of a config or of chain.json -----------------------------------------------------------------------


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a JSON value with a key or an index in it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from nodes(value[key])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
LEAVES |= st.sampled_from(
    ["(", "..", "\ud800", "a" * 300, "first", "third", "q_proj", "all-linear", "pissa", "eva", "all"]
)
LEAVES |= st.sampled_from(["SEQ_CLS", "LORA", "stacked", 0, 1, 2, 3, -1, 10**9, 2**63, 1e308, 1e-320])
JUNK = st.recursive(
    LEAVES, lambda each: st.lists(each, max_size=2) | st.dictionaries(st.text(max_size=5), each, max_size=2)
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    model = make_chain()
    model.base_model.set_soft_coefficients({"first": 0.5, "second": 0.25}, similarities={"first": 0.5, "second": 0.75})
    return save_chain(model, tmp_path_factory.mktemp("fuzz") / "chain"), logits(model)


@settings(max_examples=120)
@given(data=st.data())
def test_any_change_is_an_error_or_changes_nothing(saved: tuple[Path, torch.Tensor], data: st.DataObject) -> None:
    """Another value anywhere, or one that is taken out (but for a task of chain.json: then the chain is a shorter
    one). What `load_chain` refuses is reported by `verify`."""
    folder, expected = saved
    name = data.draw(
        st.sampled_from(["chain.json", *(f"{task}/{CONFIG_NAME}" for task in ("first", "second", "third"))])
    )
    before = (folder / name).read_text()
    content = json.loads(before)
    parent, key = data.draw(st.sampled_from(list(nodes(content))))
    if parent is not content.get("tasks") and data.draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = data.draw(JUNK)
    try:
        (folder / name).write_text(json.dumps(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                torch.testing.assert_close(logits(load(folder)), expected, atol=1e-5, rtol=1e-4)
            except ChainError:
                try:
                    with torch.device("meta"):
                        bare = type(tiny("llama"))(tiny("llama").config)
                    checks, problem = verify_chain(find_in_folder(folder), lambda adapter: copy.deepcopy(bare))
                except ChainError as error:
                    problem = str(error)
                assert problem or any(checks.values())
    finally:
        (folder / name).write_text(before)


# ---- the schemas ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
KINDS |= {"boolean": bool, "null": type(None)}


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> Iterator[str]:
    """What a JSON Schema refuses in a value: the keywords that the project's schemas have, and no others."""
    rules = {name: each for name, each in schema.items() if name not in ("description", "title", "$schema", "$defs")}
    if "$ref" in rules:
        yield from faults(value, root["$defs"][rules.pop("$ref").removeprefix("#/$defs/")], root, where)
    if (types := rules.pop("type", None)) is not None:
        found = [KINDS[name] for name in ([types] if isinstance(types, str) else types)]
        is_kind = any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind in found)
        if not is_kind:
            yield f"{where}: {value!r} is no {types}"
    if "const" in rules and value != rules.pop("const") or "enum" in rules and value not in rules.pop("enum"):
        yield f"{where}: {value!r}"
    low, high, pattern = rules.pop("minimum", None), rules.pop("maximum", None), rules.pop("pattern", None)
    if isinstance(value, (int, float)) and (low is not None and value < low or high is not None and value > high):
        yield f"{where}: {value!r} is out of range"
    if isinstance(value, str) and pattern is not None and not re.search(pattern, value):
        yield f"{where}: {value!r} does not match {pattern}"
    if (choices := rules.pop("anyOf", None)) and all([*faults(value, choice, root)] for choice in choices):
        yield f"{where}: {value!r} is none of {choices}"
    required, properties = rules.pop("required", []), rules.pop("properties", {})
    others, items = rules.pop("additionalProperties", {}), rules.pop("items", {})
    if isinstance(value, dict):
        yield from (f"{where}: no {name}" for name in required if name not in value)
        for name, each in value.items():
            yield from faults(each, properties.get(name, others), root, f"{where}/{name}")
    for index, each in enumerate(value if isinstance(value, list) else []):
        yield from faults(each, items, root, f"{where}/{index}")
    assert not rules, "a keyword that is not checked here"


def schema_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / f"{name}.schema.json").read_text())
    return found


def test_saved_chains_fit_the_schemas_and_damaged_ones_do_not(saved: tuple[Path, torch.Tensor]) -> None:
    chain, adapter = schema_of("chain"), schema_of("adapter_config")
    content = json.loads((saved[0] / "chain.json").read_text())
    configs = [json.loads((saved[0] / task / CONFIG_NAME).read_text()) for task in ("first", "second", "third")]
    assert not [*faults(content, chain, chain)] and not [
        fault for c in configs for fault in faults(c, adapter, adapter)
    ]
    entry, settings_of = chain["properties"]["tasks"]["items"]["properties"], adapter["properties"]
    assert set(entry) == set(ENTRY_TYPES) == {*content["tasks"][0], "repo_id", "revision"}
    ours = {field.name for field in fields(ASOLoraConfig)} - {field.name for field in fields(LoraConfig)}
    assert set(settings_of) == ours | set(SETTING_TYPES) | {"peft_type"} and ours <= set(configs[0])
    for values in (*({name: 3} for name in ("task", "folder", "history", "sha256", "similarities")), {"sha256": "x"}):
        damaged = copy.deepcopy(content)
        damaged["tasks"][1].update(values)
        assert [*faults(damaged, chain, chain)], values
    for values in (dict(r="2"), dict(train_a="no"), dict(history="first"), dict(origin={}), dict(similarities=[1])):
        assert [*faults({**configs[2], **values}, adapter, adapter)], values
