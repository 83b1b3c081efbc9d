"""Every method of the continual benchmark learns two tiny tasks on a tiny Llama and a tiny T5."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_aso import load_chain
from tests.examples.tiny_tasks import settings_of

LORA = ["aso_lora", "o_lora", "inc_lora", "seq_lora", "per_task_lora"]
METHODS = [*LORA, "seq_ft", "per_task_ft", "replay", "ewc", "lwf", "osf"]


@pytest.fixture
def run(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> Any:
    """Runs a method on the two tasks and returns its record; no tasks learned alone unless wanted."""

    def run(method: str, model: str = "llama", out: str = "runs", **changes: Any) -> dict[str, Any]:
        settings = settings_of(benchmark, data, saved[model], tmp_path / out, method=method, **changes)
        found: dict[str, Any] = benchmark("chain").run(settings)
        return found

    return run


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_tasks(
    benchmark: Any, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, name: str
) -> None:
    assert set(METHODS) == set(benchmark("methods").METHODS)
    scope = {"scope": "full"} if (method, name) == ("ewc", "t5") else {}
    rates = {"lr": 1e-2, "lr_full": 3e-2 if method == "osf" else 1e-3, "ewc_weight": 1.0}
    found = run(method, name, epochs=4.0, no_reference=method != "replay", **rates, **scope)
    assert [stage["task"] for stage in found["stages"]] == ["colors", "signs"]
    for stage, names in zip(found["stages"], (["colors"], ["colors", "signs"]), strict=True):
        assert list(stage["correct"]) == names
        for ways in stage["correct"].values():
            assert set(ways) == {"generate", "options", "calibrated"}
            assert all(len(answers) == 6 and set(answers) <= {"0", "1"} for answers in ways.values())
    if method.startswith("per_task"):
        assert found["stages"][0]["correct"]["colors"] == found["stages"][1]["correct"]["colors"]
    else:
        losses = [stage["log"]["loss"] for stage in found["stages"]]
        assert all(len(each) in (8, 12) and each[-1] < each[0] for each in losses), "it learns"
    assert (found["alone"] is not None) == (method == "replay" or method.startswith("per_task"))
    (file,) = (tmp_path / "runs").glob("*seed0*/results.json")
    assert json.loads(file.read_text()) == found
    report = benchmark("table").report(found)
    assert report.count("AA ") == 4 and report.count("FWT") == (1 if found["alone"] is None else 4), "and in the note"


def test_a_run_is_merged_in_other_ways(benchmark: Any, run: Any, tmp_path: Path) -> None:
    """The sum is what was tested in the run; other ways are the merged models of the chain on disk."""
    made = run("aso_lora", epochs=8.0, lr=3e-2, directions=4, tested="new")
    (folder,) = (tmp_path / "runs").iterdir()
    merge_run = benchmark("merging").merge_run
    total, soft = merge_run(folder, ["sum", "soft_regmean"])
    assert [stage["correct"] for stage in total["stages"]] == [stage["correct"] for stage in made["stages"]]
    assert json.loads((folder.with_name(f"{folder.name}-soft_regmean") / "results.json").read_text()) == soft
    assert soft["settings"]["merge"] == "soft_regmean" and set(soft["stages"][1]["correct"]) == {"colors", "signs"}
    direct = run("aso_lora", epochs=8.0, lr=3e-2, directions=4, merge="soft_regmean", tested="new", out="direct")
    assert direct["stages"][1]["correct"] == soft["stages"][1]["correct"]


def test_the_readmes_method_can_be_added(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = Path(__file__).parents[2] / "examples" / "continual_benchmark" / "README.md"
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    names = {
        "dataclass": dataclass,
        "field": field,
        "torch": torch,
        "SeqLoRA": benchmark("methods.sequential").SeqLoRA,
    }
    exec(compile(code, str(readme), "exec"), names)
    monkeypatch.setitem(benchmark("methods").METHODS, "l2", names["L2"])
    usual = settings_of(benchmark, data, saved["llama"], tmp_path, method="l2", lr=1e-2)
    settings = dataclass(frozen=True)(type("Settings", (type(usual), names["L2Settings"]), {}))
    run = benchmark("chain").run
    free = run(settings(**{**asdict(usual), "anchor_weight": 0.0, "name": "free"}))
    held = run(settings(**{**asdict(usual), "anchor_weight": 100.0, "name": "held"}))
    losses = [[stage["log"]["loss"][-1] for stage in found["stages"]] for found in (free, held)]
    assert losses[0][0] == losses[1][0] and losses[0][1] < losses[1][1], "it acts from the second task on"


def test_the_command_line_is_the_settings(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = benchmark("settings")
    assert module.parse([]) == module.Settings()
    line = "--method o_lora --order 4 --penalty-weight 0.5 --target-modules q_proj,o_proj --full --seed 3"
    assert module.parse(line.split()) == module.Settings(
        method="o_lora", order="4", penalty_weight=0.5, target_modules="q_proj,o_proj", full=True, seed=3
    )
    for wrong, words in {
        "--method seq_lora --scope full": "--scope does nothing with --method seq_lora",
        "--method o_lora --similarity none": "--similarity does nothing",
        "--method none": "invalid choice",
        "--penalty-wait 5": "unknown arguments",
    }.items():
        with pytest.raises(SystemExit):
            module.parse(wrong.split())
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--micro-batch 3 does not divide"):
        module.parse(["--micro-batch", "3"])
    recorded = module.Settings(method="ewc", name="x").recorded()
    assert recorded["ewc_weight"] == 1000 and not {"name", "out", "penalty_weight", "lwf_weight"} & set(recorded)
    weights = {"aso_lora": 0.05, "o_lora": 0.5}
    assert {name: module.Settings(method=name).recorded()["penalty_weight"] for name in weights} == weights
    assert module.Settings(fixed_a=True).recorded()["penalty_weight"] == 0


@pytest.mark.parametrize("method", ["aso_lora", "seq_lora", "replay", "ewc", "lwf", "osf"])
def test_a_run_that_was_stopped_goes_on(
    benchmark: Any, run: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second task's training, it comes to the same as one that was not."""
    expected, chain = run(method, out="complete"), benchmark("chain")
    learn, learned = chain.learn, []

    def stopping(*args: Any) -> Any:
        learned.append(args[1].name)
        if len(learned) == 2:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(chain, "learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(method)
    found = run(method)
    assert learned == ["colors", "signs", "signs"]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["correct"] == theirs["correct"]
        assert ours["log"]["loss"] == pytest.approx(theirs["log"]["loss"], rel=1e-3)
    with pytest.raises(SystemExit, match="another epochs.*--name"):
        run(method, epochs=2.0)
    monkeypatch.setattr(chain, "learn", None)
    assert run(method) == found, "a finished run is not run again"


def test_tasks_learned_alone_are_shared(benchmark: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, learned = benchmark("chain"), []
    learn = chain.learn
    monkeypatch.setattr(chain, "learn", lambda *args: (learned.append(args[1].name), learn(*args))[1])
    bound = run("per_task_lora")
    assert learned == ["colors", "signs"]
    assert run("seq_lora", no_reference=False)["alone"] == bound["alone"] and len(learned) == 4
    run("seq_lora", name="slower", lr=1e-4, no_reference=False)
    assert len(learned) == 8, "other training, other references"


def test_earlier_tasks_can_be_tested_at_the_end_alone(run: Any) -> None:
    found = run("seq_lora", order="signs,colors", tested="new", score="options")
    assert [list(stage["correct"]) for stage in found["stages"]] == [["signs"], ["signs", "colors"]]
    assert list(found["stages"][0]["correct"]["signs"]) == ["options", "calibrated"]


def test_a_can_stay_as_it_starts(run: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    run("aso_lora", name="fixed", init="inputs_hard", fixed_a=True, similarity="none")
    folder = tmp_path / "runs" / "fixed" / "state_2" / "chain"
    model = load_chain(AutoModelForCausalLM.from_pretrained(saved["llama"]), folder)
    for layer in model.base_model.lora_layers(["signs"]).values():
        new, old = layer.lora_A["signs"].weight, layer.lora_A["colors"].weight
        assert (new @ old.T).abs().max() < 1e-5 and layer.lora_B["signs"].weight.any()


def test_the_orders_are_table_4(benchmark: Any) -> None:
    data = benchmark("data")
    assert data.order_of("3") == ("yahoo", "amazon", "agnews", "dbpedia") and data.short(data.order_of("3")) == "3"
    assert data.order_of("b, a") == ("b", "a") and data.short(("b", "a")) == "b-a"
    assert all(set(data.ORDERS[order]) == set(data.ORDERS["4"]) for order in "56") and len(data.ORDERS["4"]) == 15
    for wrong in ("7", "a,a", ","):
        with pytest.raises(SystemExit, match="--order"):
            data.order_of(wrong)


def test_data_is_limited_and_validation_does_not_read_the_test_split(benchmark: Any, data: Path) -> None:
    read, settings = benchmark("data").read_tasks, benchmark("settings").Settings
    (complete,) = read(["signs"], settings(data=str(data)))
    (named,), (usual,) = (read(["signs"], settings(data=str(data), named=each)) for each in (True, False))
    assert [f"Task:signs\nDataset:signs\n{prompt}" for prompt, _ in usual.test] == [prompt for prompt, _ in named.test]
    (held,) = read(["signs"], settings(data=str(data), validation=True))
    assert held.train == complete.train[:8] and held.test == complete.train[8:]
    (few,) = read(["signs"], settings(data=str(data), train_limit=3, test_limit=2))
    assert few.train == complete.train[:3] and few.test == complete.test[:2]
    with pytest.raises(SystemExit, match="no task shapes there"):
        read(["shapes"], settings(data=str(data)))


def test_tasks_of_the_hub_look_like_those_of_a_folder(benchmark: Any) -> None:
    """The rows are made up; their columns are those of the datasets' cards."""
    hub = benchmark("hub")
    assert set(hub.SOURCES) == set(benchmark("data").ORDERS["4"])
    columns = (
        "title content text question_title question_content best_answer premise hypothesis word sentence1 sentence2 "
        "question choice1 choice2 question1 question2 passage sentence paragraph answer"
    )
    row = {name: f"<{name}>" for name in columns.split()}
    for name, source in hub.SOURCES.items():
        rows = [{**row, source.label: 0}, {**row, source.label: len(source.options) - 1}, {**row, source.label: -1}]
        found = hub.examples(source, rows)
        assert [answer for _, answer in found] == [source.options[0], source.options[-1]], name
        assert all(prompt.endswith("\nAnswer:") and "<" in prompt for prompt, _ in found)
    assert hub.examples(hub.SOURCES["RTE"], [{**row, "label": 1}])[0][0] == (
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n'
        "Option: entailment, contradiction \nsentence 1: <sentence1>\nsentence 2: <sentence2>\nAnswer:"
    )
