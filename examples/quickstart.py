"""Learn tasks in sequence, with one adapter for all of them (stock PEFT) and with a chain of adapters (peft-aso).

    python examples/quickstart.py                                   # four support tasks on SmolLM2-135M
    python examples/quickstart.py --data FOLDER --tasks dbpedia,amazon --model t5-small

Prints what each way remembers, and writes a picture, the numbers, the chain, and its sum as one stock LoRA adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import transformers
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from tasks import (
    AnswerDataset,
    ProgressBar,
    Task,
    best_device,
    bf16_is_faster,
    generated_answers,
    load_model,
    read_task,
    task_names,
)
from transformers import DataCollatorForSeq2Seq, ProgressCallback, Trainer, TrainingArguments, set_seed

from peft_aso import ASOLoraConfig, ASOTrainer, AttributionConfig, export_lora, plots, save_chain
from peft_aso.metrics import average_accuracy, backward_transfer, forgetting

SINGLE, CHAIN = "one adapter for all tasks", "chain of adapters, merged"
Stages = list[list[str]]  # after each stage what `test` returns
STAR = {"color": "#009E73", "marker": "*", "ms": 11, "ls": "", "clip_on": False}
LINES = {SINGLE: {"color": "#D55E00", "marker": "s", "ls": "--"}, CHAIN: {"color": "#0072B2", "marker": "o"}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="a folder of task folders")
    parser.add_argument("--tasks", help="names, comma-separated, in the order to learn them (default: all)")
    parser.add_argument("--model", default="smollm2", help="folder or Hub id of a causal or seq2seq model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where results are written")
    parser.add_argument("--train-limit", type=int, help="at most this many training examples per task")
    parser.add_argument("--test-limit", type=int, help="at most this many test examples per task")
    parser.add_argument("--epochs", type=float, default=1.6)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def lora(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    task_type = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    return {"r": args.rank, "lora_alpha": 4 * args.rank, "lora_dropout": 0.1, "task_type": task_type}


def learn_with_one_adapter(base: Any, tokenizer: Any, tasks: list[Task], args: argparse.Namespace) -> Stages:
    """Stock PEFT: one adapter, trained on task after task."""
    model = get_peft_model(base, LoraConfig(**lora(base, args)))
    stages = []
    for task in tasks:
        print(f"\n{SINGLE}, stage {len(stages) + 1} of {len(tasks)}: {task.name}", flush=True)
        train(Trainer, model, tokenizer, task, args)
        stages.append(test(model, tokenizer, tasks[: len(stages) + 1]))
    model.unload()  # the base model is as before
    return stages


def learn_with_a_chain(base: Any, tokenizer: Any, tasks: list[Task], args: argparse.Namespace) -> tuple[Stages, Any]:
    """peft-aso: an adapter per task, on top of the earlier ones; merged for each test. Returns the model, too."""
    model, stages = None, []
    for task in tasks:
        print(f"\n{CHAIN}, stage {len(stages) + 1} of {len(tasks)}: {task.name}", flush=True)
        attribution = AttributionConfig(probe_size=4, steps=5, refresh=0.5)  # fewer examples, less often: for a CPU
        config = ASOLoraConfig(**lora(base, args), merge="soft_regmean", attribution=attribution)
        if model is None:
            model = get_peft_model(base, config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)
            model.set_adapter(task.name)  # trains; the tasks before it are its history: active and frozen
        train(ASOTrainer, model, tokenizer, task, args)
        merged = copy.deepcopy(model).merge_and_unload()  # one model for all tasks so far, without a task's name
        stages.append(test(merged, tokenizer, tasks[: len(stages) + 1]))
    return stages, model


def test_each_model(model: Any, tokenizer: Any, tasks: list[Task]) -> list[str]:
    """What `test` returns, where each task is answered by the model as it was after that task."""
    print(f"\n{CHAIN}, each task by the model after it (model.base_model.through)", flush=True)
    found = []
    for task in tasks:
        with model.base_model.through(task.name):
            found += test(model, tokenizer, [task])
    return found


def train(trainer_class: type[Trainer], model: Any, tokenizer: Any, task: Task, args: argparse.Namespace) -> None:
    """Train the active adapter on one task."""
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            bf16=bf16_is_faster(),
            use_cpu=best_device().type == "cpu",
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=AnswerDataset(task.train, tokenizer, model.config.is_encoder_decoder),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.train()


def test(model: Any, tokenizer: Any, tasks: list[Task]) -> list[str]:
    """For each task a string with a character per question: 1 if the generated answer is right, 0 if not."""
    found = []
    for task in tasks:
        answers = generated_answers(model, tokenizer, task, desc=f"test {task.name}")
        right = [given.strip() == answer.strip() for given, (_, answer) in zip(answers, task.test, strict=True)]
        found.append("".join(str(int(each)) for each in right))
        print(f"  {task.name}: {sum(right)} of {len(right)} right", flush=True)
    return found


def accuracy(stages: Stages) -> list[list[float | None]]:
    """The accuracy matrix of `peft_aso.metrics`, in percent: row the stage, column the task, None if not tested."""
    rows = [[100 * right.count("1") / len(right) for right in row] for row in stages]
    return [row + [None] * (len(rows) - len(row)) for row in rows]


def scores(matrix: Any) -> tuple[float, float, float]:
    """AA, FM and BWT."""
    return average_accuracy(matrix), forgetting(matrix), backward_transfer(matrix)


def report(names: list[str], matrices: dict[str, Any], named: list[float], similarities: dict[str, Any]) -> None:
    """Print the tables."""
    width = max(9, *(len(name) + 2 for name in names))
    print("\nAccuracy (%)".ljust(29) + "".join(name.rjust(width) for name in (*names, "AA", "FM", "BWT")))
    for way, matrix in matrices.items():
        learned = [row[stage] for stage, row in enumerate(matrix)]
        rows = {"  right after learning": learned, "  at the end": [*matrix[-1], *scores(matrix)]}
        if way == CHAIN:
            rows["  at the end, task named"] = [*named, *scores([*matrix[:-1], named])]
        print(way)
        for when, row in rows.items():
            print(when.ljust(28) + "".join(f"{round(value, 1) + 0.0:{width}.1f}" for value in row))
    print(
        "(AA: average at the end. FM: forgetting. BWT: backward transfer. Task named: by the model after that task.)"
    )
    print("\nSimilarity w of each task to the earlier ones (the penalty on a pair has the weight psi = 1 - w)")
    for task, row in similarities.items():
        print(task.ljust(width) + "   ".join(f"{old} {value:.2f}" for old, value in row.items()))


def draw(names: list[str], matrices: dict[str, Any], named: list[float], similarities: Any, path: Path) -> None:
    """The picture: accuracy of each task after each stage, and the similarity of each pair."""
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *plots.cjk_fonts()], "axes.titlesize": 10}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[3, 2])
        rows = math.isqrt(len(names))
        axes = left.subplots(rows, math.ceil(len(names) / rows), sharex=True, sharey=True, squeeze=False)
        for task, ax in enumerate(axes.flat[: len(names)]):
            for way, matrix in matrices.items():
                ax.plot(range(task + 1, len(names) + 1), [row[task] for row in matrix[task:]], label=way, **LINES[way])
            ax.plot(len(names), named[task], label="task named", **STAR)
            ax.set(title=f"{task + 1}. {names[task]}", xticks=range(1, len(names) + 1), ylim=(0, 105))
            ax.grid(axis="y", alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in axes.flat[len(names) :]:
            ax.remove()
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
        left.supxlabel("number of tasks learned", fontsize=10)
        left.supylabel("accuracy (%)", fontsize=10)
        plots.plot_similarity(similarities, names, ax=right.subplots())
        figure.savefig(path, dpi=160)


def main() -> None:
    args = parse()
    started = time.time()
    names = [name.strip() for name in args.tasks.split(",")] if args.tasks else task_names(args.data)
    tasks = [read_task(args.data / name, args.train_limit, args.test_limit) for name in names]
    print(f"Tasks, in order: {', '.join(names)}. Model: {args.model}.", flush=True)
    base, tokenizer = load_model(args.model)

    set_seed(args.seed)
    right = {SINGLE: learn_with_one_adapter(base, tokenizer, tasks, args)}
    set_seed(args.seed)  # both ways start with the same weights
    right[CHAIN], model = learn_with_a_chain(base, tokenizer, tasks, args)
    right_named = test_each_model(model, tokenizer, tasks)
    matrices, named = {way: accuracy(stages) for way, stages in right.items()}, accuracy([right_named])[0]
    similarities = {name: model.peft_config[name].similarities for name in names[1:]}

    save_chain(model, args.out / "chain")
    export_lora(model, args.out / "served")
    draw(names, matrices, named, similarities, args.out / "demo.png")
    results = {
        "tasks": names,
        "settings": {name: value for name, value in vars(args).items() if name not in ("data", "tasks", "out")},
        "precision": "bf16" if bf16_is_faster() else "float32",
        "machine": f"{best_device()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft)},
        "right": right,
        "right, task named": right_named,
        "accuracy": matrices,
        "similarity": similarities,
        "seconds": round(time.time() - started),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report(names, matrices, named, similarities)
    print(f"""
Picture and numbers: {args.out / "demo.png"}, {args.out / "results.json"}. Took {results["seconds"]} seconds.

What next, in Python: from examples.tasks import load_model; base, tokenizer = load_model("{args.model}")
  learn another task      model = peft_aso.load_chain(base, "{args.out / "chain"}")
  serve with stock PEFT   model = peft.PeftModel.from_pretrained(base, "{args.out / "served"}")
  your own tasks          make demo DEMO_ARGS="--data FOLDER"   (the format: examples/data/README.md)""")


if __name__ == "__main__":
    logging.captureWarnings(True)
    logging.disable(logging.WARNING)
    main()
