"""Every command of `peft-aso`, on chains on disk and on the Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from peft_aso import ASOLoraConfig, ChainError, export_merged, load_chain, push_chain, save_chain
from peft_aso.chain.reading import AdapterFile
from peft_aso.cli import main
from peft_aso.cli.bases import model_class
from tests.chain.chains import make_chain
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.server import Hub
from tests.tiny_models import tiny, tiny_batch


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A chain's folder, its base model's folder, and the chain itself."""
    model = make_chain()
    for task, similarities in {"second": {"first": 0.25}, "third": {"first": 0.5, "second": 0.125}}.items():
        config = model.peft_config[task]
        config.similarities = similarities
        config.soft_coefficients = {old: 1 - w for old, w in similarities.items()}
    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path / "base")
    return save_chain(model, tmp_path / "chain"), tmp_path / "base", model


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out if "--json" in arguments else captured.out + captured.err


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**tiny_batch(model)).logits


def test_inspect(places: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chain, _, model = places
    code, text = said(capsys, "inspect", chain)
    assert code == 0 and "3 tasks" in text and "first (0.50)" in text
    code, text = said(capsys, "inspect", chain, "--json")
    tasks = json.loads(text)["tasks"]
    assert code == 0 and [task["task"] for task in tasks] == ["first", "second", "third"]
    manifest = json.loads((chain / "chain.json").read_text())["tasks"]
    assert [task["sha256"] for task in tasks] == [entry["sha256"] for entry in manifest]
    weights = load_file(chain / "first" / "adapter_model.safetensors")
    assert tasks[0]["weights"] == sum(tensor.numel() for tensor in weights.values())
    assert tasks[2]["history"] == ["first", "second"] and tasks[2]["soft_coefficients"]["second"] == 0.875


def test_verify_finds_what_is_wrong(places: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chain, base, _ = places
    code, text = said(capsys, "verify", chain, "--base", base)
    assert code == 0 and text.count("ok ") == 3
    torch.manual_seed(0)
    tiny("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    code, text = said(capsys, "verify", chain, "--base", tmp_path / "wide")
    assert code == 1 and text.count("WRONG") == 3
    file = chain / "second" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, file)
    code, text = said(capsys, "verify", chain, "--json")
    found = json.loads(text)
    assert code == 1 and not found["well"] and "sha256" in found["tasks"]["second"][0] and not found["tasks"]["first"]
    save_file({**weights, name: weights[name] * float("nan")}, file)
    assert "NaN" in said(capsys, "verify", chain)[1]
    file.write_bytes(b"broken")
    assert "truncated" in said(capsys, "verify", chain)[1]


def test_verify_finds_configs_that_do_not_belong_to_the_weights(
    places: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    chain, base, _ = places
    path = chain / "second" / "adapter_config.json"
    values = json.loads(path.read_text())
    for change, words in (
        ({"r": 7}, "and 7 in its config"), ({"lora_alpha": 800}, "scale {'lora_alpha': 800"),
        ({"use_dora": True}, "cannot be part of a chain"), ({"lora_alpha": "big"}, "lora_alpha='big'"),
        ({"target_modules": 5}, "target_modules=5"), ({"similarities": {"first": "x"}}, "similarities="),
    ):  # fmt: skip
        path.write_text(json.dumps({**values, **change}))
        code, text = said(capsys, "verify", chain, "--base", base)
        assert code == 1 and words in text
        with pytest.raises(ChainError):
            load_chain(AutoModelForCausalLM.from_pretrained(base), chain)


def test_verify_looks_at_every_task(
    places: Any,
    capsys: pytest.CaptureFixture[str],
    hub: Hub,  # noqa: F811
) -> None:
    chain, base, model = places
    push_chain(model, "user/chain", merged=False)
    file = chain / "third" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    hub.put("user/chain", {"third/adapter_model.safetensors": file.read_bytes(), "first/adapter_config.json": b"{"})
    (chain / "first" / "adapter_config.json").write_text("{")
    for source in (chain, "user/chain"):
        code, text = said(capsys, "verify", source, "--base", base)
        lines = [line for line in text.splitlines() if line.startswith(("ok ", "WRONG ", "note "))]
        assert code == 1 and [line.split()[0] for line in lines] == ["ok", "WRONG", "WRONG"]
        assert "second" in lines[0] and "sha256" in lines[1] and "third" in lines[1]
        assert "first: " in lines[2] and "not valid JSON" in lines[2]
        assert set(json.loads(said(capsys, "verify", source, "--json")[1])["tasks"]) == {"first", "second", "third"}
    for task in ("second", "third"):
        (chain / task / "adapter_config.json").write_text("{")
    code, text = said(capsys, "verify", chain, "--base", base)
    assert code == 1 and text.count("WRONG") == 3


def test_what_is_no_part_of_the_chain_is_said(places: Any, capsys: pytest.CaptureFixture[str], hub: Hub) -> None:  # noqa: F811
    chain, base, _ = places
    new = make_chain(tasks={"mood": {}, "topic": {}}, seed=1)
    save_chain(new, chain)
    later = make_chain(tasks={"mood": {}, "topic": {}, "later": {}}, seed=1)
    later.save_pretrained(str(chain), selected_adapters=["later"])
    code, text = said(capsys, "verify", chain)
    lines = text.splitlines()
    assert code == 0 and "mood: finite, hash and history as listed" in text
    assert [line for line in lines if "later" in line] == ["ok      later: finite, not listed in chain.json"]
    assert [line.split()[1] for line in lines if "left out" in line] == ["first:", "second:", "third:"]
    assert json.loads(said(capsys, "verify", chain, "--json")[1])["left_out"] == ["first", "second", "third"]
    code, text = said(capsys, "inspect", chain)
    assert code == 0 and "3 tasks" in text and "later: not listed" in text and text.count("left out") == 3
    found = json.loads(said(capsys, "inspect", chain, "--json")[1])
    assert [(task["task"], task["listed"]) for task in found["tasks"]] == [
        ("mood", True), ("topic", True), ("later", False)
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="left out"):
        assert said(capsys, "push", chain, "user/chain", "--base", base)[0] == 0
    pushed = [entry["task"] for entry in json.loads(hub.files("user/chain")["chain.json"])["tasks"]]
    assert pushed == ["mood", "topic", "later"] and not any(
        path.startswith("first/") for path in hub.files("user/chain")
    )


def test_a_chain_that_was_trained_without_a_task_type(
    places: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, base, _ = places
    model = make_chain(tasks={"first": {"task_type": None}, "second": {"task_type": None}})
    chain = save_chain(model, tmp_path / "untyped")
    assert said(capsys, "verify", chain, "--base", base)[0] == 0
    assert said(capsys, "merge", chain, "--base", base, "--out", tmp_path / "merged")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    assert said(capsys, "export", chain, "--base", base, "--out", tmp_path / "served")[0] == 0
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "served")
    torch.testing.assert_close(logits(served), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("named", ["AutoModel", "set_seed", "os", "__doc__", 3, None])
def test_only_models_of_transformers_are_taken_from_a_config(named: object) -> None:
    adapter = AdapterFile(
        Path("x"), "x", ASOLoraConfig(auto_mapping={"base_model_class": named, "parent_library": "os"})
    )
    assert model_class([adapter]) is AutoModel


def test_merge_export_and_report(places: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chain, base, model = places
    assert said(capsys, "merge", chain, "--base", base, "--out", tmp_path / "merged")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    out = tmp_path / "served"
    assert said(capsys, "export", chain, "--base", base, "--out", out, "--tasks", "first,third")[0] == 0
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    both = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "both", tasks=["first", "third"]))
    torch.testing.assert_close(logits(served), logits(both), atol=1e-4, rtol=1e-4)
    assert said(capsys, "report", chain, "--out", tmp_path / "report")[0] == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "similarity.png" in page and (tmp_path / "report" / "similarity.png").stat().st_size > 1000
    assert "| 3 | third |" in page


def test_from_and_to_the_hub(places: Any, hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # noqa: F811
    chain, base, model = places
    code, text = said(capsys, "push", chain, "user/chain", "--base", base, "--private", "--json")
    assert code == 0 and json.loads(text) == {"user/chain": hub.repos["user/chain"].head.oid}
    assert hub.repos["user/chain"].private
    code, text = said(capsys, "inspect", "user/chain")
    assert code == 0 and f"user/chain@{hub.repos['user/chain'].head.oid[:7]}" in text
    assert said(capsys, "verify", "user/chain")[0] == 0
    push_chain(model, "user/tasks", per_task=True)
    code, text = said(capsys, "verify", "user/tasks-third")
    assert code == 0 and text.count("ok ") == 3


def test_what_goes_wrong_is_said_and_has_a_status(
    places: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chain, _, _ = places
    for arguments in (
        ("inspect", tmp_path / "none"),
        ("merge", chain, "--out", tmp_path / "out"),
        ("export", chain, "--out", tmp_path / "out", "--base", tmp_path / "no-model"),
        ("inspect", chain, "--revision", "main"),
    ):
        code, text = said(capsys, *arguments)
        assert code == 1 and "error: " in text
    code, text = said(capsys, "inspect", tmp_path / "none", "--json")
    assert code == 1 and "error" in json.loads(text)
    with pytest.raises(SystemExit) as stopped:
        main(["merge", str(chain)])
    assert stopped.value.code == 2


def test_the_program_and_its_help() -> None:
    program = Path(sys.executable).with_name("peft-aso")
    commands = [[sys.executable, "-m", "peft_aso.cli", "--help"]]
    if program.exists():
        commands.append([str(program), "--help"])
    for command in commands:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "examples:" in text and "exit status" in text
        assert all(name in text for name in ("inspect", "verify", "merge", "export", "push", "report"))
