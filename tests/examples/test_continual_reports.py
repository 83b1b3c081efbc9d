"""Tables, figures and intervals of the continual benchmark, and where forgetting comes from."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from peft_aso import AttributionConfig, load_chain, update_coefficients
from tests.examples.tiny_tasks import TASKS, settings_of


@pytest.fixture(scope="module")
def finished(benchmark: Any, data: Path, saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: three methods, and one of them with a second seed."""
    out = tmp_path_factory.mktemp("finished")
    for method, seed in (("aso_lora", 0), ("inc_lora", 0), ("inc_lora", 1), ("o_lora", 0)):
        settings = settings_of(
            benchmark, data, saved["llama"], out, method=method, seed=seed, granularity="layer", refresh=0.5
        )
        benchmark("chain").run(settings)
    return out


def write_run(finished: Path, into: Path, name: str, method: str, right: int, **settings: Any) -> dict[str, Any]:
    """A run of this method that had the first so many test questions right after its last stage, and was set so."""
    results: dict[str, Any] = json.loads(next(finished.glob(f"{method}*seed0/results.json")).read_text())
    for ways in results["stages"][-1]["correct"].values():
        ways.update({way: [place < right for place in range(len(each))] for way, each in ways.items()})
    results["settings"] |= settings
    stages = [stage["correct"] for stage in results["stages"]]
    for way, found in results["summary"].items():
        found["AA"] = 100 * sum(sum(each[way]) / len(each[way]) for each in stages[-1].values()) / len(stages[-1])
    (into / name).mkdir()
    (into / name / "results.json").write_text(json.dumps(results))
    return results


def test_tables_have_the_papers_shape(benchmark: Any, finished: Path) -> None:
    module = benchmark("table")

    def rows(*more: str) -> list[list[str]]:
        lines = module.table(module.parse([str(finished), *more])).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    found = rows()
    assert found[0] == ["by --way generate", "colors-signs", "Avg."]
    assert [row[0] for row in found[2:]] == ["ASO-LoRA", "IncLoRA", "O-LoRA"]
    results = [json.loads(path.read_text()) for path in sorted(finished.glob("inc_lora*/results.json"))]
    values = [each["summary"]["generate"]["AA"] for each in results]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert found[3][1] == f"{sum(values) / 2:.1f} ± {deviation:.1f}"
    tasks = rows("--shape", "tasks", "--way", "options")
    assert tasks[0] == ["colors-signs, options", "colors", "signs"]
    matrix = results[0]["summary"]["generate"]["matrix"]
    measures = rows("--shape", "measures")
    assert len(measures) == 2 + 4 and measures[3][3].startswith(f"{sum(matrix[-1]) / 2:.1f} (")
    against = rows("--against", "inc_lora")
    assert {(row[0], row[2]) for row in against[2:]} == {("ASO-LoRA", "0"), ("O-LoRA", "0")}
    assert module.table(module.parse([str(finished), "--latex"])).startswith(r"\begin{tabular}{lcc}")
    assert rows("--against", "inc_lora", "--after", "2")[2:] == against[2:]
    first = rows("--against", "inc_lora", "--after", "1")
    assert first[0][3] == "difference in AA after 1 task" and {row[3] for row in first[2:]} == {"+0.0 (+0.0 to +0.0)"}
    assert {row[3] for row in rows("--against", "inc_lora", "--after", "1", "--measure", "FM")[2:]} == {"-"}
    assert all(row[3] != "-" for row in rows("--against", "inc_lora", "--measure", "FM")[2:])
    with pytest.raises(SystemExit, match="no run of it"):
        rows("--against", "osf")
    with pytest.raises(SystemExit, match="has 2 tasks"):
        rows("--against", "inc_lora", "--after", "3")


def test_a_run_is_called_by_what_is_unusual_in_it(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    results = json.loads(next(finished.glob("aso_lora*/results.json")).read_text())
    looked_at = {"score": "options", "diagnose": True}
    unusual = {"penalty_weight": [5.0], "init": "inputs", "fixed_a": True}
    other = {"method": "osf", "tested": "new", "lr": 0.5, "replay": 0.5, "penalty_weight": None}
    hard = {"method": "o_lora", "penalty_weight": [0.5], "seed": 9}
    changes = {"plain": {}, "looked at": looked_at, "other": unusual, "osf": other, "hard": hard}
    for name, more in changes.items():
        (tmp_path / name).mkdir()
        changed = {**results, "settings": {**results["settings"], **more}}
        (tmp_path / name / "results.json").write_text(json.dumps(changed))
    labels = {run.path.name: run.label for run in benchmark("collect").read_runs([tmp_path])}
    assert labels["plain"] == labels["looked at"] == "ASO-LoRA"
    assert labels["other"] == "ASO-LoRA (init inputs, fixed a yes, penalty weight 5)"
    assert labels["osf"] == "ASO-LoRA (tested new, lr 0.5)", "what all methods have; not a setting of Replay's"
    assert labels["hard"] == "ASO-LoRA", "0.5 is what the L1 form usually has"
    with pytest.raises(SystemExit, match="are the same run: leave one out"):
        benchmark("table").main([str(tmp_path)])


def test_the_papers_numbers_stand_beside_ours(benchmark: Any, finished: Path) -> None:
    paper = benchmark("paper")
    for numbers in paper.AVERAGE_ACCURACY.values():
        assert all(len(each) == 6 for each in numbers.values())
    aso = paper.AVERAGE_ACCURACY["t5-large"]["ASO-LoRA"]
    assert sum(aso[:3]) / 3 == pytest.approx(77.0, abs=0.06) and sum(aso[3:]) / 3 == pytest.approx(72.8, abs=0.06)
    for numbers in paper.PER_TASK["t5-large"].values():
        assert len(numbers) == 3
    for method in ("IncLoRA", "O-LoRA", "ASO-LoRA"):  # Table 3 adds up to Table 1, Table 8 to Table 2
        for model, by_task in paper.PER_TASK.items():
            averages = [sum(each) / 4 for each in by_task[method]]
            assert averages == pytest.approx(paper.AVERAGE_ACCURACY[model][method][:3], abs=0.35)
    module = benchmark("table")
    assert "ASO-LoRA, t5-large in the paper" in module.table(module.parse([str(finished), "--paper", "t5-large"]))


def test_a_zero_in_the_paper_is_a_number(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    text = next(finished.glob("inc_lora*seed0/results.json")).read_text()
    (model,) = (name for name, rows in benchmark("paper").AVERAGE_ACCURACY.items() if rows["SeqLoRA"][3] == 0)
    results = json.loads(text)
    results["tasks"] = list(benchmark("orders").order_of("4"))
    (tmp_path / "results.json").write_text(json.dumps(results))
    module = benchmark("table")
    lines = module.table(module.parse([str(tmp_path), "--paper", model])).splitlines()
    assert [line.split("|")[2:4] for line in lines if line.startswith("| SeqLoRA")] == [[" 0.0 ", " 0.0 "]]


def test_runs_that_tested_only_the_new_task(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    """They have no average within, and not the same forgetting, and say so."""
    table, figures = benchmark("table"), benchmark("figures")
    for name in ("inc_lora", "aso_lora", "o_lora"):
        results = json.loads(next(finished.glob(f"{name}*seed0/results.json")).read_text())
        first, second = results["stages"]
        between = {**second, "correct": {"signs": second["correct"]["signs"]}}
        last = {**second, "task": "more", "correct": {**second["correct"], "more": second["correct"]["signs"]}}
        results |= {"tasks": ["colors", "signs", "more"], "alone": None, "stages": [first, between, last]}
        results["settings"]["tested"] = "new"
        if name == "o_lora":
            between["correct"], results["settings"]["tested"] = second["correct"], "seen"
        results["summary"] = benchmark("scores").summary(
            results["tasks"], [each["correct"] for each in results["stages"]], None
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))

    def cells(*more: str) -> dict[str, str]:
        text = table.table(table.parse([str(tmp_path), "--against", "inc_lora", *more]))
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
        return {row[0].split()[0]: row[3] for row in rows}

    assert all(cell != "-" for cell in cells().values())
    assert set(cells("--after", "2").values()) == {"-"} and "-" not in cells("--after", "1").values()
    forgetting = cells("--measure", "FM")
    assert forgetting["ASO-LoRA"] != "-" and forgetting["O-LoRA"] == "-"
    figures.draw(figures.parse([str(tmp_path), "--out", str(tmp_path / "figures")]))
    lines = (tmp_path / "figures" / "average_accuracy_colors-signs-more.csv").read_text().splitlines()[1:]
    stages = {name: [line.split(",")[1] for line in lines if line.startswith(name)] for name in ("IncLoRA", "O-LoRA")}
    assert stages == {"IncLoRA": ["1", "3"], "O-LoRA": ["1", "2", "3"]}


def test_figures_with_the_numbers_behind_them(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("figures")
    files = module.draw(module.parse([str(finished), "--out", str(tmp_path)]))
    topics = {path.stem.removesuffix("_colors-signs") for path in files}
    assert topics == {
        "average_accuracy", "forgetting", "forward_transfer", "loss", "similarity", "psi", "psi_by_step",
        "psi_by_layer", "outputs", "penalties",
    }  # fmt: skip
    assert {path.suffix for path in files} == {".png", ".svg", ".csv"} and len(files) == 3 * len(topics)
    assert all(path.stat().st_size > 0 for path in files)
    lines = (tmp_path / "average_accuracy_colors-signs.csv").read_text().splitlines()
    assert lines[0] == "run,stage,task,AA" and len(lines) == 1 + 4 * 2
    with_psi = {line.split(",")[0] for line in (tmp_path / "psi_colors-signs.csv").read_text().splitlines()[1:]}
    assert with_psi and all("ASO-LoRA" in name for name in with_psi)  # not IncLoRA, whose psi is 1 and nobody's
    with (tmp_path / "psi_by_step_colors-signs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"].split(",")[0] for row in rows} == {name.strip('"') for name in with_psi}
    of_one = [int(row["step"]) for row in rows if row["run"] == rows[0]["run"]]
    assert of_one == list(range(1, 1 + len(of_one)))


def test_accuracy_over_the_penaltys_weight(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    """Beside the run that differs in nothing but the penalty, where there are several weights."""
    figures, scores = benchmark("figures"), benchmark("scores")
    write = functools.partial(write_run, finished, tmp_path)
    none = write("none", "inc_lora", 3, diagnose=False)
    write("wide", "inc_lora", 0, rank=64)
    usual = write("usual", "aso_lora", 2)
    for place, weight in enumerate((None, [5.0])):  # as it was written down when 0.5 was the default
        write(f"earlier {place}", "aso_lora", 1, penalty_weight=weight, alpha=2)
    write("earlier none", "inc_lora", 3, alpha=2)
    strong = write("strong", "aso_lora", 1, penalty_weight=[50.0], diagnose=True)
    write("by task", "aso_lora", 0, penalty_weight=[1.0, 2.0])
    write("one weight", "aso_lora", 0, penalty="l1")
    for place, weight in enumerate((1.0, 2.0)):
        write(f"alone {place}", "aso_lora", 0, penalty_weight=[weight], alpha=1)  # no IncLoRA with this alpha
    figures.draw(figures.parse([str(tmp_path), "--out", str(tmp_path / "figures")]))
    with (tmp_path / "figures" / "penalty_weight_colors-signs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rank = none["settings"]["rank"]  # named because one run has another
    kind, earlier = f"ASO-LoRA (rank {rank})", f"ASO-LoRA (rank {rank}, alpha 2)"
    found = [(row["run"], float(row["lambda"])) for row in rows]
    assert sorted(found) == [(kind, 0.05), (kind, 50.0), (earlier, 0.5), (earlier, 5.0)]
    for row, run in zip((row for row in rows if row["run"] == kind), (usual, strong), strict=True):
        gap, (low, high) = scores.difference(run, none, "generate")
        assert [float(row[key]) for key in ("difference", "low", "high")] == [gap, low, high] and low <= gap < 0


def test_soft_beside_hard_and_none(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    """Each penalty beside the run that differs in nothing else; with two seeds, the mean last."""
    module, scores = benchmark("table"), benchmark("scores")
    write = functools.partial(write_run, finished, tmp_path)
    none, soft, hard = (
        write(name, method, right, **settings)
        for name, method, right, settings in (
            ("none", "inc_lora", 3, {}),
            ("soft", "aso_lora", 2, {"penalty": "l1", "penalty_weight": [0.5]}),
            ("hard", "o_lora", 1, {"penalty_weight": [0.5]}),
        )
    )
    write("none again", "inc_lora", 1, seed=1)
    write("soft again", "aso_lora", 2, seed=1, penalty="l1", penalty_weight=[0.5])
    write("hard, squared", "aso_lora", 0, similarity="none")  # of another form: not the soft one's twin
    write("no lambda", "aso_lora", 0, penalty_weight=[0.0])
    write("other", "aso_lora", 0, alpha=1)  # no IncLoRA with this alpha
    start = write("start", "aso_lora", 2, init="inputs_hard", penalty_weight=[0.0])  # none, with another start of A
    pushed = write("pushed", "aso_lora", 1, init="inputs_hard", penalty_weight=[5.0])
    lines = module.table(module.parse([str(tmp_path), "--shape", "penalties"])).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def gap(*pairs: tuple[Any, Any]) -> str:
        value, (low, high) = scores.mean_difference(pairs, "generate")
        return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"

    count = len(next(iter(none["stages"][-1]["correct"].values()))["generate"])
    shown = [f"{100 * right / count:.1f}" for right in (3, 2)]
    found = {(row[0], row[2]): row[3:] for row in rows[2:]}
    name = "ASO-LoRA (penalty l1)"
    assert found[name, "0"] == [*shown, gap((soft, none)), gap((soft, hard))]
    assert found["O-LoRA", "0"][2:] == [gap((hard, none)), ""]
    assert found["ASO-LoRA (similarity none)", "0"][3] == ""
    assert rows[-1][:2] == [name, "mean of 2"] and rows[-1][6] == "", "one of them has no hard twin"
    ones = [float(found[name, seed][2].split()[0]) for seed in "01"]
    assert ones[0] < 0 < ones[1] and float(rows[-1][5].split()[0]) == pytest.approx(sum(ones) / 2, abs=0.11)
    assert found["ASO-LoRA (init inputs_hard, penalty weight 5)", "0"][2:] == [gap((pushed, start)), ""]
    assert len(rows) == 2 + 5 + 1
    figures = benchmark("figures")
    figures.draw(figures.parse([str(tmp_path), "--out", str(tmp_path / "figures")]))
    with (tmp_path / "figures" / "penalties_colors-signs.csv").open(encoding="utf-8", newline="") as file:
        drawn = {row["run"]: row for row in csv.DictReader(file)}
    assert {name: row["psi"] for name, row in drawn.items()} == {
        f"{name}, seed 0": "soft", f"{name}, seed 1": "soft", "O-LoRA, seed 0": "1 (hard)",
        "ASO-LoRA (similarity none), seed 0": "1 (hard)",
        "ASO-LoRA (init inputs_hard, penalty weight 5), seed 0": "soft",
    }  # fmt: skip
    value, ends = scores.difference(soft, none, "generate")
    assert [float(drawn[f"{name}, seed 0"][key]) for key in ("difference", "low", "high")] == [value, *ends]
    with pytest.raises(SystemExit):  # its columns of accuracy are those at the end
        module.parse([str(tmp_path), "--shape", "penalties", "--after", "1"])
    with pytest.raises(SystemExit, match="no run there has a penalty"):
        module.table(module.parse([str(tmp_path / "none"), "--shape", "penalties"]))


def test_every_line_of_a_figure_looks_different(benchmark: Any) -> None:
    axes = matplotlib.figure.Figure(layout="constrained").subplots()
    rows = [{"run": f"run {run}", "step": step, "loss": 1.0} for run in range(25) for step in (1, 2)]
    benchmark("figures")._lines(axes, rows)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(axes.lines) == 25
    axes = matplotlib.figure.Figure(layout="constrained").subplots()
    pairs = [(run, task) for run in ("soft", "hard") for task in range(12)]
    same = {"earlier": "x", "psi": 0.5}
    benchmark("figures")._pairs(axes, [{"run": run, "task": task, "step": 1, **same} for run, task in pairs])
    seen = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert [color for color, _ in seen[:12]] == [color for color, _ in seen[12:]], "a pair keeps its colour"
    assert len(set(seen)) == 24


def test_differences_have_a_mean_over_orders(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("table")
    for name, label in (("aso_lora", "soft"), ("inc_lora", "none")):
        text = (next(finished.glob(f"{name}*seed0")) / "results.json").read_text()
        swapped = text.replace("colors", "other").replace("signs", "colors").replace("other", "signs")
        for order, each in (("one", text), ("two", swapped)):
            (tmp_path / f"{label}-{order}").mkdir()
            (tmp_path / f"{label}-{order}" / "results.json").write_text(each)
    lines = module.table(module.parse([str(tmp_path), "--against", "inc_lora"])).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] for row in rows] == [
        ["ASO-LoRA", "colors-signs"], ["ASO-LoRA", "signs-colors"], ["ASO-LoRA", "mean of 2"],
    ]  # fmt: skip
    values = [float(row[3].split()[0]) for row in rows]
    assert values[2] == pytest.approx(sum(values[:2]) / 2, abs=0.11)


def test_w_beside_what_a_later_task_did_to_an_earlier_one(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("table")
    with pytest.raises(SystemExit, match="--shape pairs: no runs"):
        module.table(module.parse([str(finished), "--shape", "pairs"]))  # one pair a run, two of the runs with a w
    results = json.loads(next(finished.glob("aso_lora*/results.json")).read_text())

    def answers(right: int) -> dict[str, list[bool]]:
        return {"generate": [True] * right + [False] * (10 - right)}

    results["tasks"] = ["a", "b", "c"]
    results["stages"] = [
        {"task": "a", "correct": {"a": answers(9)}, "similarity": {}},
        {"task": "b", "correct": {"a": answers(5), "b": answers(8)}, "similarity": {"a": [0.1, 0.3]}},  # two layers
        {"task": "c", "correct": {"a": answers(6), "b": answers(8)}, "similarity": {"a": 0.5, "b": 0.4}},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = module.table(module.parse([str(tmp_path), "--shape", "pairs"])).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in lines[2:]]
    assert [row[:3] for row in rows[:3]] == [["b", "a", "0.20"], ["c", "a", "0.50"], ["c", "b", "0.40"]]
    assert [float(row[3].split()[0]) for row in rows[:3]] == [-40, 10, 0]
    low, high = (float(each) for each in rows[0][3].split("(")[1].rstrip(")").split(" to "))
    assert low < -40 < high <= 0 and "+0.0 (+0.0 to +0.0)" in rows[2][3]
    assert rows[3][3].startswith("rank correlation +1.00") and "3 pairs" in rows[3][3]
    (tmp_path / "again").mkdir()  # another order, which begins alike
    begun = json.loads(json.dumps(results).replace('"c"', '"d"'))
    (tmp_path / "again" / "results.json").write_text(json.dumps(begun))
    lines = module.table(module.parse([str(tmp_path), "--shape", "pairs"])).splitlines()
    assert "5 pairs" in lines[-1] and "| a-b-d and a-b-c | b | a |" in "\n".join(lines)
    (tmp_path / "strong").mkdir()  # another kind of run counts for itself
    stronger = {**results, "settings": {**results["settings"], "penalty_weight": [5.0]}}
    (tmp_path / "strong" / "results.json").write_text(json.dumps(stronger))
    lines = module.table(module.parse([str(tmp_path), "--shape", "pairs"])).splitlines()
    counts = {line.split("|")[1].strip(): line.rsplit(",", 1)[1] for line in lines if "rank correlation" in line}
    assert counts == {"ASO-LoRA": " 5 pairs) |", "ASO-LoRA (penalty weight 5)": " 3 pairs) |"}


def test_how_much_of_forgetting_is_a_preference(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("table")
    results = json.loads(next(finished.glob("inc_lora*seed0/results.json")).read_text())
    numbers = {
        "one": {"generate": (90, 60, 70, 30), "options": (90, 66, 70, 24), "calibrated": (92, 80, 72, 12)},
        "two": {"generate": (90, 81, 70, 9), "options": (90, 84, 70, 6), "calibrated": (90, 90, 70, 0)},
        "little": {"generate": (90, 89, 70, 1), "options": (90, 90, 70, 0), "calibrated": (90, 90, 70, 0)},
    }
    for seed, (name, ways) in enumerate(numbers.items()):
        for way, (first, then, second, forgotten) in ways.items():
            matrix = [[first, None], [then, second]]
            results["summary"][way] |= {"matrix": matrix, "AA": (then + second) / 2, "FM": forgotten}
        results["settings"]["seed"] = seed
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    lines = module.table(module.parse([str(tmp_path), "--shape", "preferences"])).splitlines()[2:]
    rows = {row[2]: row[3:] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert rows["0"] == ["80.0", "65.0", "30.0", "24.0", "82.0", "76.0", "12.0", "60%"]
    assert rows["1"][-1] == "100%" and rows["2"][-1] == "", "a share of a point means nothing"
    assert rows[""][-1] == "median 80% (60 to 100%)" and lines[-1].startswith("| 2 runs with FM of 2 and more")
    del results["summary"]["calibrated"]
    (tmp_path / "one" / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="scored in all ways"):
        module.table(module.parse([str(tmp_path / "one"), "--shape", "preferences"]))


def test_wrong_answers_by_order(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    results = json.loads(next(finished.glob("aso_lora*/results.json")).read_text())
    last = results["summary"]["generate"]["matrix"][-1]
    turned = {**results, "tasks": results["tasks"][::-1]}  # another order, whose columns stand the other way
    for name, each in (("a", results), ("b", turned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(each))
    module = benchmark("table")
    lines = module.table(module.parse([str(tmp_path), "--shape", "errors"])).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines]
    assert (rows[0], rows[3]) == (results["tasks"], turned["tasks"]) and last[0] != last[1]
    for row, right in ((rows[2], last), (rows[4], last[::-1])):
        assert [100 - sum(map(float, cell.split("+"))) for cell in row] == pytest.approx(right, abs=0.2)


def test_why(benchmark: Any, finished: Path) -> None:
    module = benchmark("why")
    run = next(finished.glob("inc_lora*seed0"))
    found = module.main(module.parse([str(run)]))
    assert json.loads((run / "why.json").read_text()) == found
    (pair,) = found["geometry"]
    assert (pair["later"], pair["earlier"]) == ("signs", "colors") and 0 <= pair["rows of A shared"] <= 1
    untouched = found["taken out"][0]
    summary = json.loads((run / "results.json").read_text())["summary"]
    assert [untouched[name] for name in TASKS] == pytest.approx(summary["generate"]["matrix"][-1])
    for way in ("generate", "options", "calibrated"):
        assert untouched[f"AA, {way}"] == pytest.approx(summary[way]["AA"])
        assert untouched[f"FM, {way}"] == pytest.approx(summary[way]["FM"])
        assert untouched[f"change of FM, {way}"] == [0, 0, 0]
    with pytest.raises(SystemExit, match="no finished run"):
        module.main(module.parse([str(finished)]))


def test_psi_of_each_reading_is_that_of_the_package(benchmark: Any, finished: Path, saved: dict[str, Path]) -> None:
    """Which takes one reading at a time, from an adapter's settings."""
    module, chosen = benchmark("psi"), benchmark("finished").finished_chain
    run = next(finished.glob("aso_lora*seed0"))
    rows = module.main(module.parse([str(run), "--examples", "3"]))
    assert json.loads((run / "psi.json").read_text()) == rows and len(rows) == 24
    assert len({row["signs to colors"] for row in rows}) > 12, "readings differ"
    settings, folder = chosen(run)
    base, tokenizer = benchmark("chain").load_model(str(saved["llama"]))
    model = load_chain(base, folder)
    (task,) = benchmark("data").read_tasks(["signs"], settings)
    task.train = task.train[:3]
    batches = benchmark("methods.adapters").ASOLoRA(base, tokenizer, settings).few_batches(task)
    for row in rows:
        reading = {name: value for name, value in row.items() if " " not in name}
        model.peft_config["signs"].attribution = AttributionConfig(**reading)
        psi = update_coefficients(model, batches).soft_coefficients
        assert psi == {"colors": pytest.approx(row["signs to colors"], abs=1e-5)}, reading
    with pytest.raises(SystemExit, match="no finished run"):
        chosen(finished)
