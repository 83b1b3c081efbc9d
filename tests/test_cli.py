"""Every command of `peft-aso`, on chains on disk and on the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_aso import ChainError, export_merged, push_chain, save_chain
from peft_aso_cli import main
from tests.chain.chains import change_weights, content, edit, entries, load, logits, make_chain
from tests.chain.conftest import hub  # noqa: F401
from tests.chain.server import Hub
from tests.tiny_models import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A chain's folder; its base model is in the folder `base` beside it."""
    model = make_chain()
    for task, similarities in {"second": {"first": 0.25}, "third": {"first": 0.5, "second": 0.125}}.items():
        model.peft_config[task].similarities = similarities
        model.peft_config[task].soft_coefficients = {old: 1 - w for old, w in similarities.items()}
    tiny("llama").save_pretrained(tmp_path / "base")
    return save_chain(model, tmp_path / "chain")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out if "--json" in arguments else captured.out + captured.err


def test_inspect(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "inspect", chain)
    assert code == 0 and "3 tasks" in text and "first (0.50)" in text
    code, text = run(capsys, "inspect", chain, "--json")
    tasks = {task["task"]: task for task in json.loads(text)["tasks"]}
    assert code == 0 and list(tasks) == ["first", "second", "third"]
    assert all(task["sha256"] == entries(chain)[name]["sha256"] for name, task in tasks.items())
    weights = load_file(chain / "first" / "adapter_model.safetensors")
    assert tasks["first"]["weights"] == sum(tensor.numel() for tensor in weights.values())
    assert tasks["third"]["history"] == ["first", "second"] and tasks["third"]["soft_coefficients"]["second"] == 0.875


def test_verify(chain: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, hub: Hub) -> None:  # noqa: F811
    push_chain(load(chain), "user/chain", merged=False)
    tiny("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    for source in (chain, "user/chain"):
        code, text = run(capsys, "verify", source, "--base", tmp_path / "base")
        assert code == 0 and text.count("ok ") == 3
    code, text = run(capsys, "verify", chain, "--base", tmp_path / "wide")
    assert code == 1 and text.count("WRONG") == 3
    change_weights(chain / "third")
    (chain / "first" / "adapter_config.json").write_text("{")
    third = (chain / "third" / "adapter_model.safetensors").read_bytes()
    hub.put("user/chain", {"third/adapter_model.safetensors": third, "first/adapter_config.json": b"{"})
    for source in (chain, "user/chain"):
        code, text = run(capsys, "verify", source)
        lines = {line.split()[1][:-1]: line for line in text.splitlines() if line.startswith(("ok ", "WRONG "))}
        assert code == 1 and list(lines) == ["first", "second", "third"], "every task is checked"
        assert "not valid JSON" in lines["first"] and lines["second"].startswith("ok") and "sha256" in lines["third"]
        found = json.loads(run(capsys, "verify", source, "--json")[1])
        assert not found["well"] and not found["tasks"]["second"] and found["tasks"]["third"]
    edit(chain / "second", dict(lora_alpha=800))
    assert "another scale" in run(capsys, "verify", chain)[1]
    edit(chain / "second", dict(use_dora=True))
    assert "cannot be part of a chain" in run(capsys, "verify", chain)[1]
    edit(chain / "second", lambda weights: next(iter(weights.values())).fill_(float("nan")))
    assert "NaN" in run(capsys, "verify", chain)[1]


def test_merge_and_export(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a task type, the class that the chain was trained in."""
    model = make_chain(tasks={name: {"task_type": None} for name in ("first", "second", "third")})
    chain, base, out = save_chain(model, tmp_path / "chain"), tmp_path / "base", tmp_path / "served"
    tiny("llama").save_pretrained(base)
    assert run(capsys, "merge", chain, "--base", base, "--out", tmp_path / "merged", "--dtype", "float32")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")  # a sum of LoRA matrices needs no weights of the base
    assert run(capsys, "export", chain, "--base", tmp_path / "config", "--out", out, "--tasks", "first,third")[0] == 0
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    both = AutoModelForCausalLM.from_pretrained(export_merged(model, tmp_path / "both", tasks=["first", "third"]))
    torch.testing.assert_close(logits(served), logits(both), atol=1e-4, rtol=1e-4)


def test_the_base_model_is_no_place_for_the_merged_one(chain: Path, tmp_path: Path, capsys: Any) -> None:
    """A base model that is itself an export would be taken for an earlier export."""
    export_merged(make_chain(seed=9), tmp_path / "own")
    before = content(tmp_path / "own")
    for base in (tmp_path / "base", tmp_path / "own"):
        code, text = run(capsys, "merge", chain, "--base", base, "--out", base)
        assert code == 1 and "error: " in text and "holds" in text
    assert content(tmp_path / "own") == before


@pytest.mark.parametrize(
    "damage",
    [
        *({name: value} for name, value in (("history_hashes", {"first": "0" * 64}), ("target_modules", "("))),
        *({name: value} for name, value in (("lora_dropout", None), ("rank_pattern", [1]), ("similarities", [1]))),
        *({name: value} for name, value in (("task_name", "layers"), ("base_model_name_or_path", 3), ("r", 10**9))),
    ],
    ids=str,
)
def test_verify_reports_what_load_chain_refuses(chain: Path, tmp_path: Path, capsys: Any, damage: Any) -> None:
    (chain / "chain.json").unlink()
    edit(chain / "third", damage)
    with pytest.raises(ChainError):
        load(chain)
    for command in (("verify", chain, "--base", tmp_path / "base"), ("inspect", chain)):
        code, text = run(capsys, *command)
        assert command[0] == "inspect" or code == 1 and "WRONG" in text


def test_only_models_of_transformers_are_taken_from_a_config(chain: Path, tmp_path: Path, capsys: Any) -> None:
    for named in ("set_seed", "os", "__doc__", 3):
        for task in ("first", "second", "third"):
            edit(chain / task, dict(task_type=None, auto_mapping={"base_model_class": named, "parent_library": "os"}))
        code, text = run(capsys, "verify", chain, "--base", tmp_path / "base")
        assert code == 1 and "does not fit this model" in text, "as AutoModel has it"


def test_report_and_push(chain: Path, hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # noqa: F811
    assert run(capsys, "report", chain, "--out", tmp_path / "report")[0] == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "similarity.png" in page and (tmp_path / "report" / "similarity.png").stat().st_size > 1000
    assert "second (0.88)" in page
    code, text = run(capsys, "push", chain, "user/chain", "--base", tmp_path / "base", "--private", "--json")
    assert code == 0 and json.loads(text) == {"user/chain": hub.repos["user/chain"].head}
    assert hub.repos["user/chain"].private
    code, text = run(capsys, "inspect", "user/chain")
    assert code == 0 and f"user/chain@{hub.repos['user/chain'].head[:7]}" in text
    push_chain(load(chain), "user/tasks", per_task=True)
    code, text = run(capsys, "verify", "user/tasks-third")
    assert code == 0 and text.count("ok ") == 3


def test_what_goes_wrong_has_a_status(chain: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (
        ("inspect", tmp_path / "none"),
        ("merge", chain, "--out", tmp_path / "out"),
        ("export", chain, "--out", tmp_path / "out", "--base", tmp_path / "no-model"),
        ("inspect", chain, "--revision", "main"),
    ):
        code, text = run(capsys, *arguments)
        assert code == 1 and "error: " in text
    code, text = run(capsys, "inspect", tmp_path / "none", "--json")
    assert code == 1 and "error" in json.loads(text)
    assert run(capsys, "merge", chain)[0] == 2


def test_help_and_inspect_start_without_torch(chain: Path, tmp_path: Path, hub: Hub, capsys: Any) -> None:  # noqa: F811
    """And show the same of a folder as the package's own reader of a chain on the Hub."""

    def start(*arguments: Any) -> str:
        blocked = "import sys; sys.modules |= dict.fromkeys(('torch', 'peft', 'transformers'))"
        code = f"{blocked}; import peft_aso_cli; sys.exit(peft_aso_cli.main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert all(name in start("--help") for name in ("inspect", "verify", "merge", "export", "push", "report", "Exit"))
    push_chain(load(chain), "user/chain", merged=False)
    on_hub = json.loads(run(capsys, "inspect", "user/chain", "--json")[1])["tasks"]
    assert all(task.pop("origin")["repo_id"] == "user/chain" for task in on_hub)
    found = json.loads(start("inspect", chain, "--json"))["tasks"]
    assert [{key: task[key] for key in on_hub[0] if key != "bytes"} for task in found] == [
        {key: value for key, value in task.items() if key != "bytes"} for task in on_hub
    ]
    (chain / "chain.json").unlink()  # as PEFT saves it
    assert json.loads(start("inspect", chain, "--json"))["tasks"] == [{**task, "sha256": None} for task in found]


def test_arguments_are_checked_before_a_model_is_loaded(
    chain: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    for command in ("merge", "export"):
        code, text = run(capsys, command, chain, "--out", tmp_path / "file")
        assert code == 1 and "file" in text
        code, text = run(capsys, command, chain, "--out", tmp_path / "out", "--tasks", "first,thrid")
        assert code == 1 and "no task 'thrid'" in text and "'third'" in text
    code, text = run(capsys, "push", chain, "user/chain/more")
    assert code == 1 and "user/chain/more" in text
    assert not (tmp_path / "out").exists()
