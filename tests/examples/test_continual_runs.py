"""Every method of the continual benchmark learns two tiny tasks on a tiny Llama and a tiny T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from peft_aso import load_chain
from tests.examples.tiny_tasks import settings_of

LORA = ["aso_lora", "o_lora", "inc_lora", "seq_lora", "per_task_lora"]
METHODS = [*LORA, "seq_ft", "per_task_ft", "replay", "ewc", "lwf", "osf"]


@pytest.fixture
def run(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> Any:
    """Runs a method on the two tasks and returns its results; no tasks learned alone unless wanted."""

    def run(method: str, model: str = "llama", out: str = "runs", **changes: Any) -> dict[str, Any]:
        changes = {"no_reference": True, "method": method, **changes}
        settings = settings_of(benchmark, data, saved[model], tmp_path / out, **changes)
        found: dict[str, Any] = benchmark("chain").run(settings)
        return found

    return run


def losses(results: dict[str, Any], stage: int) -> list[float]:
    return [entry["loss"] for entry in results["stages"][stage]["log"]]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_tasks(benchmark: Any, run: Any, method: str, name: str) -> None:
    results = run(method, name, no_reference=False)
    assert [stage["task"] for stage in results["stages"]] == ["colors", "signs"]
    for way in ("generate", "options", "calibrated"):
        found = results["summary"][way]
        matrix = found["matrix"]
        assert matrix[0][0] is not None and matrix[0][1] is None and None not in matrix[1]
        assert found["AA"] == pytest.approx(sum(matrix[1]) / 2)
        assert all(low <= found[measure] <= high for measure, (low, high) in found["95%"].items())
        if method.startswith("per_task"):
            assert found["FM"] == 0 and found["alone"] == matrix[1]
    assert json.loads((Path(results["folder"]) / "results.json").read_text())["stages"] == results["stages"]
    text = benchmark("report").report(results)
    assert "AA" in text and "FWT" in text and results["folder"] in text


def test_the_command_line_is_the_settings(benchmark: Any) -> None:
    module = benchmark("settings")
    assert module.parse([]) == module.Settings()
    line = "--method o_lora --order 4 --penalty-weight 0.5 --target-modules q_proj,o_proj --full --seed 3"
    found = module.parse(line.split())
    assert found == module.Settings(
        method="o_lora", order="4", penalty_weight=(0.5,), target_modules=("q_proj", "o_proj"), full=True, seed=3
    )
    for wrong in ("--method seq_lora --scope full", "--method replay --replay 2", "--fixed-a --penalty-weight 5"):
        with pytest.raises(SystemExit, match="--"):
            module.parse(wrong.split())
    several = benchmark("several")
    plans = sorted(Path(several.__file__).with_name("plans").glob("*.txt"))
    assert plans and all(module.parse(line) for plan in plans for line in several.lines_of(plan, []))


def test_the_orders_are_table_4(benchmark: Any) -> None:
    orders = benchmark("orders")
    table = {
        "1": "dbpedia amazon yahoo agnews",
        "2": "dbpedia amazon agnews yahoo",
        "3": "yahoo amazon agnews dbpedia",
        "4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }
    assert {number: " ".join(orders.order_of(number)) for number in table} == table


@pytest.mark.parametrize("method", ["aso_lora", "seq_lora", "ewc", "lwf", "osf"])
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
    assert losses(found, 1) == pytest.approx(losses(expected, 1), rel=1e-3)
    with pytest.raises(SystemExit, match="other settings .*epochs 1.0, not 2.0.*--name"):
        run(method, epochs=2.0)
    monkeypatch.setattr(chain, "learn", None)
    assert run(method)["stages"] == found["stages"], "a finished run is not run again"


def test_a_can_stay_as_it_starts(run: Any, saved: dict[str, Path]) -> None:
    first, second = (stage["log"] for stage in run("aso_lora", lr_a=0.0, diagnose=True, similarity="none")["stages"])
    assert all(entry["penalty_gradient"] == 0 for entry in first)
    assert all(entry["penalty_gradient"] > 0 for entry in second)
    penalties = [entry["orthogonality_penalty"] for entry in second]
    assert penalties[0] > 0 and penalties == pytest.approx([penalties[0]] * len(penalties), rel=1e-4), "psi is fixed"
    fixed = run("aso_lora", name="fixed", init="inputs_hard", fixed_a=True, similarity="none")
    folder = Path(fixed["folder"]) / "state_02" / "chain"
    model = load_chain(AutoModelForCausalLM.from_pretrained(saved["llama"]), folder)
    for layer in model.base_model.lora_layers(["signs"]).values():
        new, old = layer.lora_A["signs"].weight, layer.lora_A["colors"].weight
        assert (new @ old.T).abs().max() < 1e-5 and layer.lora_B["signs"].weight.any()


def test_what_is_the_same_in_two_runs_is_run_once(benchmark: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, learned = benchmark("chain"), []
    learn = chain.learn

    def counted(method: Any, task: Any, index: int, settings: Any) -> Any:
        learned.append((settings.name, index))
        return learn(method, task, index, settings)

    monkeypatch.setattr(chain, "learn", counted)
    run("inc_lora", name="inc")
    run("o_lora", name="hard")
    run("aso_lora", name="aso")
    shared = run("aso_lora", name="strong", penalty_weight=(5.0,), init="projected")
    run("aso_lora", name="longer", epochs=2.0)
    assert [name for name, index in learned if index == 0] == ["inc", "aso", "longer"], "the first stages"
    own = run("aso_lora", out="own", name="strong", penalty_weight=(5.0,), init="projected")
    for stage, (ours, theirs) in enumerate(zip(shared["stages"], own["stages"], strict=True)):
        assert ours["correct"] == theirs["correct"] and ours["psi"] == pytest.approx(theirs["psi"], rel=1e-4)
        assert losses(shared, stage) == pytest.approx(losses(own, stage), rel=1e-4)


def test_data_is_limited_and_validation_leaves_the_test_split_alone(benchmark: Any, data: Path) -> None:
    read, settings = benchmark("data").read_tasks, benchmark("settings").Settings
    (complete,) = read(["signs"], settings(data=str(data)))
    (held,) = read(["signs"], settings(data=str(data), validation=True))
    assert held.train == complete.train[:8] and held.test == complete.train[8:]
    (few,) = read(["signs"], settings(data=str(data), train_limit=3, test_limit=2))
    assert few.train == complete.train[:3] and few.test == complete.test[:2]
    with pytest.raises(SystemExit, match="no task shapes there"):
        read(["shapes"], settings(data=str(data)))


def test_tasks_of_the_hub_look_like_those_of_a_folder(benchmark: Any) -> None:
    """The rows are made up; their columns are those of the datasets' cards."""
    hub = benchmark("hub")
    assert set(hub.SOURCES) == set(benchmark("orders").ORDERS["4"])
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


def test_several_runs_from_a_file(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.txt"
    plan.write_text("# two runs, one of which fails\n--method seq_lora --order colors,signs\n\n--order shapes\n")
    more = f"--model {saved['llama']} --data {data} --out {tmp_path} --rank 2 --precision float32 --no-reference"
    assert benchmark("several").main([str(plan), *more.split()]) == 1
    assert (tmp_path / "seq_lora-colors-signs-seed0" / "results.json").is_file()
