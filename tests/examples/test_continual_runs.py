"""Every method of the continual benchmark learns two tiny tasks on a tiny Llama and a tiny T5."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.examples.tiny_tasks import settings_of

METHODS = [
    "aso_lora", "o_lora", "inc_lora", "seq_lora", "seq_ft", "per_task_lora", "per_task_ft", "replay", "ewc", "lwf",
    "osf",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_tasks(
    benchmark: Any, data: Path, saved: dict[str, Path], method: str, name: str, tmp_path: Path
) -> None:
    settings = settings_of(benchmark, data, saved[name], tmp_path, method=method)
    results = benchmark("chain").run(settings)
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
    assert "AA" in text and "FWT" in text and str(tmp_path) in text


def test_a_run_in_bf16(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    runs = {
        precision: benchmark("chain").run(
            settings_of(benchmark, data, saved["llama"], tmp_path / precision, method="aso_lora", precision=precision)
        )
        for precision in ("float32", "bf16")
    }
    losses = {name: [each["loss"] for stage in run["stages"] for each in stage["log"]] for name, run in runs.items()}
    assert losses["bf16"] != losses["float32"] and losses["bf16"] == pytest.approx(losses["float32"], rel=0.05)


def test_the_command_line_is_the_settings(benchmark: Any) -> None:
    module = benchmark("settings")
    assert module.parse([]) == module.Settings()
    line = "--method o_lora --order 4 --penalty-weight 0.5 --target-modules q_proj,o_proj --full --seed 3"
    found = module.parse(line.split())
    assert found == module.Settings(
        method="o_lora", order="4", penalty_weight=(0.5,), target_modules=("q_proj", "o_proj"), full=True, seed=3
    )
    soft = ["--method", "inc_lora", "--init", "inputs_soft"]
    for wrong in (["--method", "x"], ["--penalty-weight", "a"], ["--order", "1", "--penalty-weight", "1,2"], soft):
        with pytest.raises(SystemExit):
            module.parse(wrong)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--method seq_lora --scope full", "--scope does nothing with --method seq_lora: it is for replay, ewc, lwf"),
        ("--method seq_ft --rank 4", "--rank does nothing with --method seq_ft"),
        ("--method osf --lr 0.1", "--lr does nothing with --method osf"),
        ("--method inc_lora --lr-full 0.1", "--lr-full does nothing with --method inc_lora"),
        ("--method inc_lora --penalty-weight 5", "--penalty-weight does nothing with --method inc_lora"),
        ("--method o_lora --penalty squared --similarity none", "--similarity does nothing with --method o_lora"),
        ("--method o_lora --fixed-a", "--fixed-a does nothing"),
        ("--method replay --replay 2", "--replay 2.0: give a number above 0, up to 1"),
        ("--test-limit 0", "--test-limit 0: give a number of 1 or more"),
        ("--batch-size 16 --micro-batch 3", "--micro-batch 3 does not divide --batch-size 16"),
        ("--epochs 0", "--epochs 0.0: give a number above 0"),
        ("--penalty-weight -1", "--penalty-weight .*: give a number of 0 or more"),
    ],
)
def test_options_that_do_nothing_or_cannot_be_are_refused(benchmark: Any, line: str, words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        benchmark("settings").parse(line.split())


def test_every_setting_of_a_run_is_written_down(benchmark: Any) -> None:
    module = benchmark("settings")
    written = module.Settings().chosen()
    named = {each.name for each in dataclasses.fields(module.Settings)}
    assert named - set(written) == {"out", "name", "references", "no_reference", "threads"}


def test_the_orders_are_table_4(benchmark: Any) -> None:
    orders = benchmark("orders")
    assert orders.order_of("1") == ("dbpedia", "amazon", "yahoo", "agnews")
    assert orders.order_of("2") == ("dbpedia", "amazon", "agnews", "yahoo")
    assert orders.order_of("3") == ("yahoo", "amazon", "agnews", "dbpedia")
    longer = {
        "4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
        "5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
        "6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    }
    assert {number: " ".join(orders.order_of(number)) for number in longer} == longer
    for wrong in ("7", "", "a,b,a"):
        with pytest.raises(SystemExit):
            orders.order_of(wrong)


def test_lambda_is_written_down_as_a_number(benchmark: Any) -> None:
    """And where it is not, it is the default of that time, whatever the default is now."""
    module = benchmark("settings")
    lines = {
        "": [0.05], "--penalty l1": [0.5], "--method o_lora": [0.5], "--fixed-a": [0.0], "--penalty-weight 0": [0.0],
        "--penalty-weight 3": [3.0], "--method inc_lora": None, "--method ewc": None,
    }  # fmt: skip
    chosen = {line: module.parse(line.split()).chosen() for line in lines}
    assert {line: settings["penalty_weight"] for line, settings in chosen.items()} == lines
    assert all(module.completed(settings) == settings for settings in chosen.values())
    first = {line: module.completed({**settings, "penalty_weight": None}) for line, settings in chosen.items()}
    assert {settings["penalty_weight"][0] for settings in first.values() if settings["penalty_weight"]} == {0.0, 0.5}
    assert first["--fixed-a"]["penalty_weight"] == [0.0] and first[""]["penalty_weight"] == [0.5]
    assert first["--method inc_lora"]["penalty_weight"] is None


@pytest.mark.parametrize("method", ["aso_lora", "seq_lora", "replay", "ewc", "lwf", "seq_ft", "osf"])
def test_a_run_that_was_stopped_goes_on(
    benchmark: Any, data: Path, saved: dict[str, Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first task, it comes to the same as one that was not."""
    whole = settings_of(benchmark, data, saved["llama"], tmp_path / "whole", method=method, no_reference=True)
    expected = benchmark("chain").run(whole)
    settings = settings_of(benchmark, data, saved["llama"], tmp_path / "cut", method=method, no_reference=True)
    chain = benchmark("chain")
    learn, calls = chain.learn, []

    def stopped(*args: Any) -> Any:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*args)

    monkeypatch.setattr(chain, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        chain.run(settings)
    found = chain.run(settings)
    assert calls == [0, 1, 1]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["correct"] == theirs["correct"]
        losses = [[each["loss"] for each in stage["log"]] for stage in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_only_the_new_task_is_tested_if_that_is_enough(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    three = tmp_path / "data"
    shutil.copytree(data, three)
    shutil.copytree(three / "signs", three / "more")
    settings = settings_of(
        benchmark, three, saved["llama"], tmp_path, order="signs,colors,more", method="seq_lora", no_reference=True
    )
    seen = benchmark("chain").run(dataclasses.replace(settings, name="seen"))
    new = benchmark("chain").run(dataclasses.replace(settings, name="new", tested="new"))
    assert [list(stage["correct"]) for stage in new["stages"]] == [["signs"], ["colors"], ["signs", "colors", "more"]]
    for ours, theirs in zip(new["stages"], seen["stages"], strict=True):
        assert ours["correct"].items() <= theirs["correct"].items()
    for way, found in new["summary"].items():
        assert found["matrix"][1][0] is None and found["AA"] == seen["summary"][way]["AA"]
        assert found["BWT"] == seen["summary"][way]["BWT"]


def test_a_folder_of_other_settings_is_refused(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(benchmark, data, saved["llama"], tmp_path, method="seq_lora", no_reference=True)
    before = benchmark("chain").run(settings)
    with pytest.raises(SystemExit, match="other settings .*epochs 1.0, not 2.0.*--name"):
        benchmark("chain").run(dataclasses.replace(settings, epochs=2.0))
    assert json.loads((Path(before["folder"]) / "results.json").read_text())["stages"] == before["stages"]
    again = benchmark("chain").run(settings)
    assert again["stages"] == before["stages"], "a finished run is not run again"


def test_a_finished_run_keeps_its_forward_transfer(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(benchmark, data, saved["llama"], tmp_path, method="seq_lora")
    benchmark("chain").run(dataclasses.replace(settings, no_reference=True))
    found = benchmark("chain").run(settings)
    assert "FWT" in found["summary"]["generate"], "it had none, and was asked for it"
    file = Path(found["folder"]) / "results.json"
    written = file.read_bytes()
    benchmark("chain").run(dataclasses.replace(settings, no_reference=True))
    assert file.read_bytes() == written


def test_what_auto_means_is_decided_once_for_a_run(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(
        benchmark, data, saved["llama"], tmp_path, method="seq_lora", no_reference=True, precision="auto"
    )
    for faster in (False, True):  # a busy machine, or another one
        monkeypatch.setattr(benchmark("training"), "bf16_is_faster", lambda faster=faster: faster)
        found = benchmark("chain").run(settings)
        assert found["settings"]["precision"] == "float32"
    with pytest.raises(SystemExit, match="precision 'float32', not 'bf16'"):
        benchmark("chain").run(dataclasses.replace(settings, precision="bf16"))


def test_several_gpus_are_refused_before_work_starts(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # the Trainer would take both, and twice the batch
    with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES=0"):
        benchmark("chain").run(settings_of(benchmark, data, saved["llama"], tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_a_number_ends_the_run(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(
        benchmark, data, saved["llama"], tmp_path, method="seq_ft", no_reference=True, lr_full=1e30, epochs=3.0
    )
    with pytest.raises(RuntimeError, match="colors: the loss is not a number any more; lower --lr"):
        benchmark("chain").run(settings)
    assert not list(tmp_path.rglob("stages/*.json")) and not list(tmp_path.rglob("state_*"))


def test_a_run_that_was_stopped_in_its_tests_does_not_train_again(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = benchmark("chain")
    expected = chain.run(settings_of(benchmark, data, saved["llama"], tmp_path / "whole", method="ewc"))
    settings = settings_of(benchmark, data, saved["llama"], tmp_path / "cut", method="ewc", no_reference=True)
    learn, answer, learned, asked = chain.learn, chain.answer, [], []

    def stopped(*args: Any) -> Any:
        asked.append(args[2].name)
        if len(asked) in (1, 4):  # in the tests of the first stage, and within those of the second
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(chain, "learn", lambda *args: learned.append(args[1].name) or learn(*args))
    monkeypatch.setattr(chain, "answer", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            chain.run(settings)
    found = chain.run(settings)
    assert learned == ["colors", "signs"]
    for ours, theirs in zip(found["stages"], expected["stages"], strict=True):
        assert ours["correct"] == theirs["correct"] and set(ours) == set(theirs)
        assert set(ours["seconds"]) == {"training", "testing"}


def test_lora_methods_begin_alike(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    """The same A, examples and dropout in the first stage, whatever comes later: differences are the methods'."""
    logs = []
    for method in ("inc_lora", "seq_lora", "replay", "ewc", "lwf", "per_task_lora"):
        settings = settings_of(
            benchmark, data, saved["llama"], tmp_path / method, method=method, no_reference=True, dropout=0.1
        )
        logs.append([entry["loss"] for entry in benchmark("chain").run(settings)["stages"][0]["log"]])
    assert all(log == pytest.approx(logs[0], rel=1e-4) for log in logs)


@pytest.mark.parametrize(("method", "weight"), [("ewc", "ewc_weight"), ("lwf", "lwf_weight")])
def test_what_a_method_adds_to_the_loss_is_trained_on(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, method: str, weight: str
) -> None:
    changes = {"method": method, "no_reference": True, "epochs": 4.0, "lr": 0.05}
    logs = {}
    for value in (0.0, 1e4):
        settings = settings_of(benchmark, data, saved["llama"], tmp_path / str(value), **{**changes, weight: value})
        logs[value] = [stage["log"] for stage in benchmark("chain").run(settings)["stages"]]
    first = [[entry["loss"] for entry in log[0]] for log in logs.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    free, held = logs[0.0][1], logs[1e4][1]
    assert all(entry["task_loss"] == pytest.approx(entry["loss"], rel=1e-4) for entry in free)
    assert held[-1]["loss"] > held[-1]["task_loss"] and held[-1]["task_loss"] > 1.05 * free[-1]["task_loss"]


def test_replay_trains_on_what_it_kept(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    steps = {}
    for method in ("seq_lora", "replay"):
        settings = settings_of(
            benchmark, data, saved["llama"], tmp_path, method=method, no_reference=True, batch_size=1, replay=0.2
        )
        steps[method] = [len(stage["log"]) for stage in benchmark("chain").run(settings)["stages"]]
    assert steps == {"seq_lora": [10, 10], "replay": [10, 12]}


def test_a_task_alone_knows_nothing_of_another(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    for method in ("per_task_lora", "per_task_ft"):
        logs = []
        for order in ("signs", "colors,signs"):
            settings = settings_of(
                benchmark, data, saved["llama"], tmp_path / order, method=method, order=order, lr_full=1e-2
            )
            logs.append([entry["loss"] for entry in benchmark("chain").run(settings)["stages"][-1]["log"]])
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_two_processes_at_one_run_are_refused(benchmark: Any, tmp_path: Path) -> None:
    results, chosen = benchmark("results"), benchmark("settings").Settings().chosen()
    with results.RunFolder(tmp_path, chosen), pytest.raises(SystemExit, match="another process.*--name"):
        results.RunFolder(tmp_path, chosen)
    with pytest.raises(SystemExit, match="other settings"):
        results.RunFolder(tmp_path, {**chosen, "seed": 1})
    with results.RunFolder(tmp_path, chosen) as again:  # neither of them holds it
        assert again.stages() == []


def test_the_first_stage_is_shared_where_it_is_the_same(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, learned = benchmark("chain"), []
    learn = chain.learn

    def counted(method: Any, task: Any, index: int, settings: Any) -> Any:
        learned.append((settings.name, index))
        return learn(method, task, index, settings)

    def run(name: str, out: str = "shared", **changes: Any) -> Any:
        settings = settings_of(benchmark, data, saved["llama"], tmp_path / out, name=name, no_reference=True)
        return chain.run(dataclasses.replace(settings, **changes))

    monkeypatch.setattr(chain, "learn", counted)
    run("inc", method="inc_lora")
    run("aso", method="aso_lora")
    run("hard", method="o_lora")
    stronger = run("stronger", method="aso_lora", penalty_weight=(5.0,), init="projected")
    run("stored", method="aso_lora", source="stored")
    run("longer", method="aso_lora", epochs=2.0)
    run("seq", method="seq_lora")
    run("small", method="inc_lora", l2_weight=1.0)
    run("inputs", method="inc_lora", init="inputs")
    run("outside", method="inc_lora", init="inputs_hard")
    firsts = [name for name, index in learned if index == 0]
    assert firsts[:5] == ["inc", "aso", "stored", "longer", "seq"], "no vectors, vectors, stored ones, other training"
    assert firsts[5:] == ["small", "inputs", "outside"], "another loss, and other examples for A"
    own = run("stronger", "own", method="aso_lora", penalty_weight=(5.0,), init="projected")
    for ours, theirs in zip(stronger["stages"], own["stages"], strict=True):
        assert ours["correct"] == theirs["correct"] and ours["psi"] == pytest.approx(theirs["psi"], rel=1e-4)
        assert [e["loss"] for e in ours["log"]] == pytest.approx([e["loss"] for e in theirs["log"]], rel=1e-4)


def test_tasks_learned_alone_are_run_once(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(benchmark, data, saved["llama"], tmp_path, method="per_task_lora")
    bound = benchmark("chain").run(settings)
    monkeypatch.setattr(benchmark("alone"), "learn", None)
    other = benchmark("chain").run(dataclasses.replace(settings, method="inc_lora"))
    for way, found in other["summary"].items():
        assert found["alone"] == bound["summary"][way]["matrix"][-1]


def test_data_is_limited_and_the_test_split_stays_shut(benchmark: Any, data: Path, tmp_path: Path) -> None:
    read, settings = benchmark("data").read_tasks, benchmark("settings").Settings
    (whole,) = read(["signs"], settings(data=str(data)))
    (held,) = read(["signs"], settings(data=str(data), validation=True))
    assert held.train == whole.train[:8] and held.test == whole.train[8:]
    (few,) = read(["signs"], settings(data=str(data), train_limit=3, test_limit=2))
    assert few.train == whole.train[:3] and few.test == whole.test[:2]
    with pytest.raises(SystemExit, match="no task shapes there"):
        read(["shapes"], settings(data=str(data)))
    broken = tmp_path / "signs"
    shutil.copytree(data / "signs", broken)
    (broken / "test.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"signs has no test\.jsonl"):
        read(["signs"], settings(data=str(tmp_path)))
    (broken / "test.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match=r"test\.jsonl, line 1, is no JSON"):
        read(["signs"], settings(data=str(tmp_path)))
    (broken / "labels.json").write_text('["maybe"]')
    (broken / "test.jsonl").write_text((broken / "train.jsonl").read_text())
    with pytest.raises(SystemExit, match="0 examples to train on and 0 to test on"):
        read(["signs"], settings(data=str(tmp_path)))


def test_tasks_of_the_hub_look_like_those_of_a_folder(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    prompt = hub.examples(hub.SOURCES["RTE"], [{**row, "label": 1}])[0][0]
    assert prompt == (
        'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the option.\n'
        "Option: entailment, contradiction \nsentence 1: <sentence1>\nsentence 2: <sentence2>\nAnswer:"
    )
    with pytest.raises(SystemExit, match="no task shapes"):
        hub.hub_task("shapes", full=False)


def test_without_the_hub_there_is_a_way_out(benchmark: Any) -> None:
    pytest.importorskip("datasets", reason="--data hub is for those who have the package datasets")
    with pytest.raises(SystemExit, match="could not be loaded.*--data a folder"):
        benchmark("hub").hub_task("RTE", full=False)


@pytest.mark.parametrize("jobs", [1, 2])
def test_several_runs_from_a_file(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], jobs: int
) -> None:
    module = benchmark("several")
    plan = tmp_path / "plan.txt"
    plan.write_text("# two runs, one of which fails\n--method seq_lora --order colors,signs\n\n--order shapes\n")
    more = ["--model", str(saved["llama"]), "--data", str(data), "--out", str(tmp_path / "out"), "--no-reference"]
    assert module.main([str(plan), *more, "--rank", "2", "--precision", "float32", "--jobs", str(jobs)]) == 1
    assert (tmp_path / "out" / "seq_lora-colors-signs-seed0" / "results.json").is_file()
    captured = capfd.readouterr()
    said = captured.out
    assert ("SeqLoRA, accuracy in percent" in said) == (jobs == 1), "a run beside others says nothing"
    assert "failed: --order shapes" in said and "no task shapes there" in said + captured.err
    for wrong in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(SystemExit, match="no such file"):
            module.lines_of(wrong, [])


def test_runs_beside_each_other_share_the_cores(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = benchmark("several").environment
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(2)["OMP_NUM_THREADS"] == "4" and environment(20)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in environment(1), "a run alone has them all"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(2)["OMP_NUM_THREADS"] == environment(1)["OMP_NUM_THREADS"] == "3", "the user's own word counts"


def test_the_plans_can_be_parsed(benchmark: Any) -> None:
    module, parse = benchmark("several"), benchmark("settings").parse
    plans = sorted(Path(module.__file__).with_name("plans").glob("*.txt"))
    assert plans and all(parse(line) for plan in plans for line in module.lines_of(plan, []))
