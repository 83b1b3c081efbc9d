"""Learn a few tasks in sequence, keep what was learned, merge, export: the whole of peft-aso in one run.

    python examples/quickstart.py                                   # four support tasks on SmolLM2-135M
    python examples/quickstart.py --data ../shared/cl_benchmark --tasks dbpedia,amazon,agnews,BoolQA
    python examples/quickstart.py --model t5-small --data my/tasks  # any causal or encoder-decoder model

Ends with a table (accuracy of each task after each stage, for one model that is given no task label), the metrics of
continual learning, how similar the tasks were found to be, a picture of both, the chain of adapters on disk and one
stock LoRA adapter that is the sum of them all.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tasks import AnswerDataset, Task, accuracy, best_device, bf16_is_faster, load_model, read_task, task_names
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, TrainingArguments, set_seed

from peft_aso import (
    ASOLoraConfig,
    ASOSeq2SeqTrainer,
    ASOTrainer,
    AttributionConfig,
    export_lora,
    plots,
    save_chain,
)
from peft_aso.metrics import average_accuracy, backward_transfer, forgetting, forward_transfer

HERE = Path(__file__).parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder with one folder a task")
    parser.add_argument("--tasks", help="names, comma-separated, in the order to learn them (default: all)")
    parser.add_argument("--model", default="smollm2", help="folder or Hub id of a causal or seq2seq model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="where results are written")
    parser.add_argument("--train-limit", type=int, help="at most this many training examples a task")
    parser.add_argument("--test-limit", type=int, help="at most this many test examples a task")
    parser.add_argument("--epochs", type=float, default=2.5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--penalty", choices=["squared", "l1"], default="squared", help="form of the penalty (Eq. 7)")
    parser.add_argument("--penalty-weight", type=float, help="lambda of Eq. 7; 0: IncLoRA")
    parser.add_argument("--probe", type=int, default=4, help="examples on which attribution is computed")
    parser.add_argument("--steps", type=int, default=20, help="m of the integral (Eq. 11), adaptive")
    parser.add_argument("--refresh", type=float, default=0.34, help="fraction of a run between two refreshes of psi")
    parser.add_argument("--no-reference", action="store_true", help="skip training each task alone (no FWT then)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def attribution(args: argparse.Namespace) -> AttributionConfig:
    return AttributionConfig(probe_size=args.probe, refresh=args.refresh, quadrature="adaptive", steps=args.steps)


def settings(args: argparse.Namespace, seq2seq: bool, **changes: Any) -> ASOLoraConfig:
    return ASOLoraConfig(
        r=args.rank,
        lora_alpha=4 * args.rank,
        lora_dropout=0.1,
        task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        penalty=args.penalty,
        penalty_weight=args.penalty_weight,
        **{"attribution": attribution(args), **changes},
    )


def in_use(args: argparse.Namespace) -> dict[str, Any]:
    """The settings as they are written down: with numbers where the command left them to the defaults."""
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    lambda_ = settings(args, seq2seq=False).resolved_penalty_weight
    return {**chosen, "penalty_weight": lambda_, "precision": "bf16" if bf16_is_faster() else "float32"}


def train(model: Any, tokenizer: Any, task: Task, args: argparse.Namespace) -> None:
    """Train the active adapter on one task."""
    seq2seq = model.config.is_encoder_decoder
    arguments_class, trainer_class = (
        (Seq2SeqTrainingArguments, ASOSeq2SeqTrainer) if seq2seq else (TrainingArguments, ASOTrainer)
    )
    arguments = arguments_class(
        output_dir=str(args.out / "checkpoints" / task.name),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        bf16=bf16_is_faster(),
        use_cpu=best_device().type == "cpu",
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=AnswerDataset(task.train, tokenizer, seq2seq),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    trainer.train()


def learn_chain(model: Any, tokenizer: Any, tasks: list[Task], args: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """Learn the tasks one after another; returns the model, the accuracy matrix and each task's similarities."""
    matrix: list[list[float]] = []
    similarities: list[dict[str, float]] = []
    for stage, task in enumerate(tasks):
        print(
            f"\n=== Stage {stage + 1} of {len(tasks)}: learn {task.name} ({len(task.train)} examples) ===",
            flush=True,
        )
        started = time.time()
        config = settings(args, model.config.is_encoder_decoder)
        if stage == 0:
            model = get_peft_model(model, config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)
            model.set_adapter(task.name)  # trains; the tasks before it are its history: active, frozen
        train(model, tokenizer, task, args)
        row = [accuracy(model, tokenizer, seen, desc=f"test {seen.name}") for seen in tasks[: stage + 1]]
        matrix.append(row + [float("nan")] * (len(tasks) - stage - 1))
        similarities.append(model.peft_config[task.name].similarities or {})
        for old, psi in model.base_model.soft_coefficients.items():
            print(f"  similarity to {old}: {similarities[-1].get(old, 0.0):.2f}, so psi = {psi:.2f}")
        shown = ", ".join(f"{seen.name} {100 * value:.0f}%" for seen, value in zip(tasks, row, strict=False))
        print(f"  accuracy: {shown}   ({time.time() - started:.0f} s)")
    return model, matrix, similarities


def learn_alone(base: Any, tokenizer: Any, tasks: list[Task], args: argparse.Namespace) -> list[float | None]:
    """The reference of forward transfer: each task but the first trained on the base model alone."""
    reference: list[float | None] = [None]
    no_attribution = AttributionConfig(similarity="none")
    for task in tasks[1:]:
        print(f"\n=== Reference: {task.name} alone ===", flush=True)
        config = settings(args, base.config.is_encoder_decoder, attribution=no_attribution)
        model = get_peft_model(base, config, adapter_name=task.name)
        train(model, tokenizer, task, args)
        reference.append(accuracy(model, tokenizer, task, desc=f"test {task.name}"))
        base = model.unload()
    return reference


def table(tasks: list[Task], matrix: list[list[float]], reference: list[float | None] | None) -> str:
    """The accuracy matrix as text, in percent."""
    width = max(12, *(len(task.name) + 2 for task in tasks))
    lines = ["after learning".ljust(18) + "".join(task.name.rjust(width) for task in tasks)]
    for task, row in zip(tasks, matrix, strict=True):
        cells = "".join(("" if value != value else f"{100 * value:.1f}").rjust(width) for value in row)
        lines.append(task.name.ljust(18) + cells)
    if reference is not None:
        cells = "".join(("-" if value is None else f"{100 * value:.1f}").rjust(width) for value in reference)
        lines.append("(each alone)".ljust(18) + cells)
    return "\n".join(lines)


def main() -> None:
    args = parse()
    for name in ("transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    set_seed(args.seed)
    started = time.time()
    names = args.tasks.split(",") if args.tasks else task_names(args.data)
    tasks = [read_task(args.data / name, args.train_limit, args.test_limit) for name in names]
    print(f"Tasks, in order: {', '.join(names)}. Model: {args.model}.", flush=True)
    model, tokenizer = load_model(args.model)
    base = None if args.no_reference else copy.deepcopy(model)

    model, matrix, similarities = learn_chain(model, tokenizer, tasks, args)
    reference = None if base is None else learn_alone(base, tokenizer, tasks, args)

    args.out.mkdir(parents=True, exist_ok=True)
    save_chain(model, args.out / "chain")
    served = export_lora(model, args.out / "served")
    merged = model.merge_and_unload()
    matrix[-1] = [accuracy(merged, tokenizer, task, desc=f"merged: {task.name}") for task in tasks]

    metrics = {"AA": average_accuracy(matrix), "FM": forgetting(matrix), "BWT": backward_transfer(matrix)}
    if reference is not None:
        metrics["FWT"] = forward_transfer(matrix, reference)
    grid = [[row.get(name, float("nan")) for name in names] for row in similarities]
    picture = plots.plot_overview(matrix, grid, names, args.out / "overview.png")
    results = {
        "tasks": names,
        "accuracy": [[value if value == value else None for value in row] for row in matrix],  # JSON has no nan
        "alone": reference,
        "metrics": metrics,
        "similarity": similarities,
        "settings": in_use(args),
        "seconds": round(time.time() - started),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    report(tasks, matrix, reference, metrics, similarities)
    print(f"\nPicture: {picture}\nChain of adapters: {args.out / 'chain'}  (load_chain reads it)")
    print(f"One stock LoRA adapter, the sum of all: {served}  (stock PEFT loads it, no plugin)")
    print(f"Numbers: {args.out / 'results.json'}\nTook {(time.time() - started) / 60:.1f} minutes.")


def report(
    tasks: list[Task],
    matrix: list[list[float]],
    reference: list[float | None] | None,
    metrics: dict[str, float],
    similarities: list[dict[str, float]],
) -> None:
    """Print the tables."""
    print("\nAccuracy in percent, no task label given; the last row is measured on the merged model\n")
    print(table(tasks, matrix, reference))
    print(
        "\n"
        + "   ".join(
            f"{name} {round(100 * value, 1) + 0.0:{'.1f' if name == 'AA' else '+.1f'}}"
            for name, value in metrics.items()
        )
    )
    print("(AA average accuracy, FM forgetting: lower is better, BWT backward and FWT forward transfer: higher is)")
    print("\nSimilarity w of each task to the earlier ones (psi = 1 - w holds them apart)")
    for task, row in zip(tasks[1:], similarities[1:], strict=True):
        print(f"  {task.name:16}" + "   ".join(f"{old} {value:.2f}" for old, value in row.items()))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
