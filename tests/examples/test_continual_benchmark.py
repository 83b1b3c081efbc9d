"""Every method of the continual benchmark learns two tiny tasks on a tiny Llama and a tiny T5."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [
    "what", "color", "is", "the", "sky", "grass", "sun", "night", "answer", "yes", "no", "good", "bad", "blue",
    "green",
]  # fmt: skip
TASKS = {"colors": ["blue", "green"], "signs": ["yes", "no"]}
METHODS = [
    "aso_lora", "o_lora", "inc_lora", "seq_lora", "seq_ft", "per_task_lora", "per_task_ft", "replay", "ewc", "lwf",
    "osf",
]  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """Imports a module of the benchmark by name, as run.py does it."""
    sys.path.insert(0, str(EXAMPLES))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f"continual_benchmark.{name}")
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("continual_benchmark", "tasks"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks whose answer is in the prompt."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, options in TASKS.items():
        folder = root / name
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(options))
        for split, count in (("train", 10), ("test", 6)):
            rows = []
            for _ in range(count):
                picked = torch.randint(0, len(WORDS), (4,), generator=generator).tolist()
                answer = options[int(torch.randint(0, 2, (1,), generator=generator))]
                rows.append({"prompt": " ".join([*(WORDS[i] for i in picked), answer, "answer"]), "answer": answer})
            (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama and a tiny T5 on disk, each with a tokenizer of whole words."""
    found = {}
    for name in ("llama", "t5"):
        folder = tmp_path_factory.mktemp(name)
        layers = {"num_layers": 2, "num_decoder_layers": 2} if name == "t5" else {}  # `generate` wants as many of both
        tiny(name, **layers).save_pretrained(folder)
        vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        found[name] = folder
    return found


def settings_of(benchmark: Any, data: Path, model: Path, out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "order": "colors,signs", "model": str(model), "data": str(data), "out": out, "batch_size": 5, "rank": 2,
        "score": "both", "precision": "float32", "probe": 2, "steps": 4, "refresh": 1, "replay": 0.2,
        "ewc_examples": 3, "dropout": 0.0,
    }  # fmt: skip
    return benchmark("settings").Settings(**{**given, **changes})


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_two_tasks(
    benchmark: Any, data: Path, saved: dict[str, Path], method: str, name: str, tmp_path: Path
) -> None:
    settings = settings_of(benchmark, data, saved[name], tmp_path, method=method)
    results = benchmark("chain").run(settings)
    assert [stage["task"] for stage in results["stages"]] == ["colors", "signs"]
    for way in ("generate", "options"):
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


def test_the_command_line_is_the_settings(benchmark: Any) -> None:
    module = benchmark("settings")
    assert module.parse([]) == module.Settings()
    line = "--method o_lora --order 4 --penalty-weight 0.5 --target-modules q_proj,o_proj --full --seed 3"
    found = module.parse(line.split())
    assert found == module.Settings(
        method="o_lora", order="4", penalty_weight=(0.5,), target_modules=("q_proj", "o_proj"), full=True, seed=3
    )
    for wrong in (["--method", "x"], ["--penalty-weight", "a"], ["--order", "1", "--penalty-weight", "1,2"]):
        with pytest.raises(SystemExit):
            module.parse(wrong)


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
    longer = [orders.order_of(number) for number in ("4", "5", "6")]
    assert len({frozenset(tasks) for tasks in longer}) == 1 and all(len(tasks) == 15 for tasks in longer)
    assert [tasks[0] for tasks in longer] == ["MNLI", "MultiRC", "yelp"]
    assert [tasks[-1] for tasks in longer] == ["yahoo", "yahoo", "WiC"]
    for wrong in ("7", "", "a,b,a"):
        with pytest.raises(SystemExit):
            orders.order_of(wrong)


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
    with pytest.raises(SystemExit, match="0 to test on"):
        read(["signs"], settings(data=str(data), test_limit=0))


def tiny_method(benchmark: Any, saved: dict[str, Path], name: str, **changes: Any) -> Any:
    module = benchmark("settings")
    load = sys.modules["tasks"].load_model
    settings = module.Settings(method=name, rank=2, dropout=0.0, batch_size=5, precision="float32", **changes)
    return benchmark("methods").METHODS[name](*load(str(saved["llama"])), settings), settings


def test_ewc_is_the_brute_force_penalty(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    method, settings = tiny_method(benchmark, saved, "ewc", ewc_examples=4, ewc_weight=7.0)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    dataset = sys.modules["tasks"].AnswerDataset
    expected = []
    for task in tasks:
        with torch.no_grad():
            for weight in method.trained().values():
                weight.add_(0.1 * torch.randn_like(weight))
        rows = dataset(task.train, method.tokenizer, False)
        squares = {name: torch.zeros_like(weight) for name, weight in method.trained().items()}
        for index in range(4):
            ids, labels = (torch.tensor([rows[index][key]]) for key in ("input_ids", "labels"))
            logs = torch.log_softmax(method.model(input_ids=ids).logits[:, :-1], -1)
            target = labels[:, 1:]
            answer = logs.gather(-1, target.clamp(min=0)[..., None])[..., 0][target != -100].sum()
            method.model.zero_grad()
            answer.backward()
            for name, weight in method.trained().items():
                squares[name] += weight.grad**2 / 4
        anchors = {name: weight.detach().clone() for name, weight in method.trained().items()}
        method.end_task(task, rows)
        expected.append((squares, anchors))
    with torch.no_grad():
        for weight in method.trained().values():
            weight.add_(0.1 * torch.randn_like(weight))
    penalty = sum(
        (squares[name] * (weight - anchors[name]) ** 2).sum()
        for squares, anchors in expected
        for name, weight in method.trained().items()
    )
    assert method.training_loss({}, None).item() == pytest.approx(3.5 * penalty.item(), rel=1e-3)


def test_replay_keeps_its_part_and_no_more(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    method, settings = tiny_method(benchmark, saved, "replay", replay=0.2)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    assert method.training_rows(tasks[0]) == tasks[0].train
    method.end_task(tasks[0], None)
    assert len(method.kept) == 2 and set(method.kept) <= set(tasks[0].train)
    assert method.training_rows(tasks[1]) == tasks[1].train + method.kept
    method.end_task(tasks[1], None)
    assert len(method.kept) == 4


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_the_teacher_of_lwf_is_the_model_before_the_task_and_stays(
    benchmark: Any, data: Path, saved: dict[str, Path], scope: str
) -> None:
    method, settings = tiny_method(benchmark, saved, "lwf", scope=scope)
    tasks = benchmark("data").read_tasks(list(TASKS), dataclasses.replace(settings, data=str(data)))
    ids = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 5, 6]])}
    method.start_task(tasks[0], 0)
    assert method.training_loss(inputs, method.model(**inputs)) is None
    before = method.model(**inputs).logits.detach()
    method.start_task(tasks[1], 1)
    assert float(method.training_loss(inputs, method.model(**inputs))) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for weight in method.trained().values():
            weight.add_(0.1 * torch.randn_like(weight))
    assert torch.equal(method.teacher(**inputs).logits, before)
    assert not any(weight.requires_grad for weight in method.teacher.parameters())
    outputs = method.model(**inputs)
    loss = method.training_loss(inputs, outputs)
    heat = settings.lwf_temperature
    theirs, ours = (torch.softmax(each[:, 1:3].double() / heat, -1) for each in (before, outputs.logits))
    expected = (theirs * (theirs / ours).log()).sum(-1).mean() * heat**2
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_options_are_scored_as_one_after_another(
    benchmark: Any, data: Path, saved: dict[str, Path], name: str
) -> None:
    evaluation, tasks = benchmark("evaluation"), sys.modules["tasks"]
    model, tokenizer = tasks.load_model(str(saved[name]))
    task = tasks.read_task(data / "signs")
    task.options = ["yes", "no good", "what is the sky"]
    found = evaluation.likeliest(model.eval(), tokenizer, task)
    for (prompt, _), chosen in zip(task.test, found, strict=True):
        sums = []
        for option in task.options:
            answer = torch.tensor([tokenizer(option, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]])
            ids = torch.tensor([tokenizer(prompt).input_ids])
            if name == "t5":
                logits = model(input_ids=ids, labels=answer).logits
            else:
                logits = model(input_ids=torch.cat([ids, answer], 1)).logits[:, ids.shape[1] - 1 : -1]
            sums.append(float(torch.log_softmax(logits, -1).gather(-1, answer[..., None]).sum()))
        assert chosen == task.options[sums.index(max(sums))]


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


def test_tables_have_the_papers_shape(benchmark: Any, finished: Path) -> None:
    module = benchmark("table")

    def rows(*more: str) -> list[list[str]]:
        lines = module.table(module.parse([str(finished), *more])).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    found = rows()
    assert found[0] == ["", "colors-signs", "Avg."]
    assert [row[0] for row in found[2:]] == ["ASO-LoRA", "IncLoRA", "O-LoRA"]
    results = [json.loads(path.read_text()) for path in sorted(finished.glob("inc_lora*/results.json"))]
    values = [each["summary"]["generate"]["AA"] for each in results]
    deviation = abs(values[0] - values[1]) / 2**0.5
    assert found[3][1] == f"{sum(values) / 2:.1f} ± {deviation:.1f}"
    tasks = rows("--shape", "tasks", "--way", "options")
    assert tasks[0] == ["colors-signs", "colors", "signs"]
    matrix = results[0]["summary"]["generate"]["matrix"]
    measures = rows("--shape", "measures")
    assert len(measures) == 2 + 4 and measures[3][3].startswith(f"{sum(matrix[-1]) / 2:.1f} (")
    against = rows("--against", "inc_lora")
    assert {(row[0], row[2]) for row in against[2:]} == {("ASO-LoRA", "0"), ("O-LoRA", "0")}
    assert module.table(module.parse([str(finished), "--latex"])).startswith(r"\begin{tabular}{lcc}")
    with pytest.raises(SystemExit, match="no run of it"):
        rows("--against", "osf")


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


def test_figures_with_the_numbers_behind_them(benchmark: Any, finished: Path, tmp_path: Path) -> None:
    module = benchmark("figures")
    files = module.draw(module.parse([str(finished), "--out", str(tmp_path)]))
    topics = {path.stem.removesuffix("_colors-signs") for path in files}
    assert topics == {
        "average_accuracy", "forgetting", "forward_transfer", "loss", "similarity", "psi", "psi_by_layer", "outputs",
    }  # fmt: skip
    assert {path.suffix for path in files} == {".png", ".svg", ".csv"} and len(files) == 3 * len(topics)
    assert all(path.stat().st_size > 0 for path in files)
    lines = (tmp_path / "average_accuracy_colors-signs.csv").read_text().splitlines()
    assert lines[0] == "run,stage,task,AA" and len(lines) == 1 + 4 * 2


def test_metrics_and_intervals_by_hand(benchmark: Any) -> None:
    scores = benchmark("scores")
    stages = [
        {"a": {"generate": [True, True, True, False]}},
        {"a": {"generate": [True, False, False, False]}, "b": {"generate": [True, True]}},
    ]
    alone = {"a": {"generate": [True] * 4}, "b": {"generate": [True, False]}}
    found = scores.summary(["a", "b"], stages, alone)["generate"]
    assert found["matrix"] == [[75.0, None], [25.0, 100.0]] and found["alone"] == [100.0, 50.0]
    assert (found["AA"], found["FM"], found["BWT"], found["FWT"]) == (62.5, 50.0, -50.0, 50.0)
    low, high = found["95%"]["AA"]
    assert 50 <= low < 62.5 < high <= 100
    run = {"tasks": ["a", "b"], "stages": [{"correct": each} for each in stages], "alone": alone}
    assert scores.difference(run, run, "generate") == (0.0, [0.0, 0.0])
    better = [stages[0], {**stages[1], "a": {"generate": [True, True, False, False]}}]
    gap, (low, high) = scores.difference({**run, "stages": [{"correct": e} for e in better]}, run, "generate")
    assert gap == 12.5 and 0 <= low < 12.5 < high


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


def started(benchmark: Any, data: Path, saved: dict[str, Path], name: str = "llama", **changes: Any) -> Any:
    """ASO-LoRA about to learn the second task, the first adapter being random."""
    module = benchmark("settings")
    given = {"rank": 2, "dropout": 0.0, "precision": "float32", "probe": 2, "steps": 4, "batch_size": 5, **changes}
    settings = module.Settings(method="aso_lora", data=str(data), **given)
    load = sys.modules["tasks"].load_model
    method = benchmark("methods").METHODS["aso_lora"](*load(str(saved[name])), settings)
    first, second = benchmark("data").read_tasks(list(TASKS), settings)
    method.start_task(first, 0)
    with torch.no_grad():
        for weight in method.trained().values():
            weight.normal_()
    method.start_task(second, 1)
    return method, second, settings


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_starts_from_the_inputs(benchmark: Any, data: Path, saved: dict[str, Path], name: str) -> None:
    method, task, _ = started(benchmark, data, saved, name, init="inputs")
    (layer,) = [
        module
        for path, module in method.model.named_modules()
        if path.endswith("encoder.block.0.layer.0.SelfAttention.q" if name == "t5" else "layers.1.self_attn.q_proj")
    ]
    rows: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach().flatten(0, 1)))
    method.model.eval()
    with torch.no_grad():
        for batch in method.few_batches(task):
            for index in range(len(batch["input_ids"])):
                length = int(batch["attention_mask"][index].sum())
                one = {key: batch[key][index : index + 1, :length] for key in ("input_ids", "attention_mask")}
                method.model(**one, **({"labels": batch["labels"][index : index + 1]} if name == "t5" else {}))
    hook.remove()
    directions = torch.linalg.svd(torch.cat(rows).double(), full_matrices=False).Vh[:2]
    found = layer.lora_A["signs"].weight.detach().double()
    torch.testing.assert_close(found @ found.T, torch.eye(2).double(), atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(found @ directions.T).min() > 0.999, "the same plane"


def test_a_starts_out_of_the_historys_way(benchmark: Any, data: Path, saved: dict[str, Path]) -> None:
    for init, exactly in (("inputs_hard", True), ("projected", True), ("inputs_soft", False), ("default", False)):
        method, _, _ = started(benchmark, data, saved, init=init)
        layers = benchmark("methods.directions").layers_with(method.model, "signs")
        overlaps = [layer.lora_A["signs"].weight @ layer.lora_A["colors"].weight.T for layer in layers.values()]
        assert (max(float(each.abs().max()) for each in overlaps) < 1e-4) == exactly, init


def test_what_soft_projection_leaves(benchmark: Any) -> None:
    without = benchmark("methods.directions").without
    inputs, rows = torch.randn(50, 6).double(), torch.randn(2, 6).double()
    moment = inputs.T @ inputs
    torch.testing.assert_close(without(moment, rows, 0.0), moment)
    gone = without(moment, rows, 1.0)
    assert float((gone @ rows.T).abs().max()) < 1e-9
    projector = torch.linalg.pinv(rows) @ rows
    half = inputs - 0.5 * inputs @ projector
    torch.testing.assert_close(without(moment, rows, 0.5), half.T @ half)


def test_a_can_stay_and_the_penaltys_gradient_is_logged(
    benchmark: Any, data: Path, saved: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(
        benchmark, data, saved["llama"], tmp_path, lr_a=0.0, diagnose=True, similarity="none", no_reference=True
    )
    results = benchmark("chain").run(settings)
    first, second = (stage["log"] for stage in results["stages"])
    assert all(entry["penalty_gradient"] == 0 for entry in first)
    assert all(entry["penalty_gradient"] > 0 for entry in second)
    penalties = [entry["orthogonality_penalty"] for entry in second]
    assert penalties[0] > 0 and penalties == pytest.approx([penalties[0]] * len(penalties), rel=1e-4), "psi is fixed"


def test_why(benchmark: Any, finished: Path) -> None:
    module = benchmark("why")
    run = next(finished.glob("inc_lora*seed0"))
    found = module.main(module.parse([str(run)]))
    assert json.loads((run / "why.json").read_text()) == found
    (pair,) = found["geometry"]
    assert (pair["later"], pair["earlier"]) == ("signs", "colors") and 0 <= pair["rows of A shared"] <= 1
    untouched = found["taken out"][0]
    last = json.loads((run / "results.json").read_text())["summary"]["generate"]["matrix"][-1]
    assert [untouched[name] for name in TASKS] == pytest.approx(last)
    with pytest.raises(SystemExit, match="no finished run"):
        module.main(module.parse([str(finished)]))


def test_shared_spans_and_energy(benchmark: Any) -> None:
    module = benchmark("why")
    a = torch.randn(6, 2).double()
    assert module.shared(a, a @ torch.randn(2, 2).double()) == pytest.approx(1)
    assert module.shared(torch.eye(6)[:, :2], torch.eye(6)[:, 2:4]) == pytest.approx(0)
    inputs, matrix = torch.randn(40, 6).double(), torch.randn(3, 6).double()
    expected = float((inputs @ matrix.T).pow(2).sum())
    assert module.energy(matrix, inputs.T @ inputs) == pytest.approx(expected)
