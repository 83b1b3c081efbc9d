"""Training: the step, the penalty in it, its peak memory, and a task from start to end."""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from peft_aso import ASOTrainer, AttributionConfig
from peft_aso.attribution import find_neurons

from .bench import Bench, logits, task_name
from .records import Record, in_turn, relative, seconds


def step_of(bench: Bench, model: Any, penalty: bool) -> Callable[[], None]:
    """One training step: forward, backward, AdamW; with lambda times the penalty in the loss, or without."""
    batch, trained = bench.step_batch(), [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    weight = model.active_peft_config.resolved_penalty_weight if penalty else 0.0
    model.train()

    def step() -> None:
        loss = model(**batch).loss
        if penalty:
            loss = loss + weight * model.base_model.orthogonality_penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_times(bench: Bench, ours: Any, theirs: Any) -> list[list[float]]:
    """Seconds of a step of both, in turn; with the penalty where the model has one."""
    steps = [step_of(bench, model, hasattr(model.base_model, "orthogonality_penalty")) for model in (ours, theirs)]
    return in_turn(*steps, repeats=bench.options.repeats)


def step_two(bench: Bench) -> list[Record]:
    """T = 2 with the penalty against stock PEFT LoRA without a history and a penalty."""
    ours, stock = bench.chain(2), bench.stock([1])
    checks = [bench.same_logits(ours, bench.stock([0, 1]), "against stock PEFT with both adapters active")]
    with ours.base_model.only(task_name(1)):
        checks.append(bench.same_logits(ours, stock, "the new adapter alone against stock PEFT"))
    times, what = step_times(bench, ours, stock), "training step, T = 2, with penalty"
    return [bench.record("step.two", what, "stock PEFT LoRA, no history", *times, target=1.05, sameness=checks)]


def step_hundred(bench: Bench) -> list[Record]:
    """T = 100 against T = 2: the history computed as by default, and stacked."""
    tasks, batch, records = bench.options.tasks, bench.step_batch(), []
    stock = bench.stock(range(tasks))
    expected = logits(stock, batch)
    stock.base_model.set_adapter([task_name(tasks - 1)])
    notes = {"what the history changes in the logits": relative(logits(stock, batch), expected)}
    del stock
    # the default folds in float32 only: half precision would round the history
    for name, target in (("auto", 1.05 if bench.exact else 1.15), ("stacked", 1.15)):
        ours, two = bench.chain(tasks, history_form=name), bench.chain(2, history_form=name)
        checks = [bench.same(logits(ours, batch), expected, "logits, against stock PEFT, all adapters active")]
        times, what = step_times(bench, ours, two), f"training step, T = {tasks}, with penalty, {name}"
        more: Any = {"target": target, "sameness": checks, "notes": notes}
        records.append(bench.record(f"step.hundred.{name}", what, "T = 2", *times, **more))
    return records


def growth_tasks(bench: Bench) -> list[Record]:
    """The step by number of tasks, against stock PEFT with all adapters active."""
    records = []
    for tasks in bench.options.growth_tasks:
        ours, stock = bench.chain(tasks), bench.stock(range(tasks))
        checks, times = [bench.same_logits(ours, stock, "all adapters active")], step_times(bench, ours, stock)
        what = f"training step, T = {tasks}, with penalty"
        records.append(bench.record("growth.tasks", what, "stock PEFT, no penalty", *times, sameness=checks, x=tasks))
    return records


def growth_rank(bench: Bench) -> list[Record]:
    """The step at T = 15 by rank, against T = 2 of the same rank."""
    records, tasks = [], bench.options.few_tasks
    for rank in bench.options.growth_rank:
        times = step_times(bench, bench.chain(tasks, rank=rank), bench.chain(2, rank=rank))
        what = f"training step, T = {tasks}, rank {rank}"
        records.append(bench.record("growth.rank", what, "T = 2", *times, x=rank))
    return records


def with_gradient(model: Any, penalty: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The value of a penalty; its gradient is left in the parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> torch.Tensor:
        for parameter in trained:
            parameter.grad = None
        value = penalty()
        value.backward()
        return value.detach()

    return run


def loop(model: Any, tasks: int, power: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Eq. 7 with psi = 1 (power 2), or O-LoRA's penalty (power 1), as a loop over modules and earlier tasks."""
    parameters, pairs = dict(model.named_parameters()), []
    for name in [name for name in parameters if f"lora_A.{task_name(tasks - 1)}." in name]:
        names = [name.replace(f".{task_name(tasks - 1)}.", f".{task_name(old)}.") for old in range(tasks - 1)]
        pairs += [(parameters[name], parameters[old].detach()) for old in names]

    def run() -> torch.Tensor:
        return torch.stack([(old.to(dtype) @ new.to(dtype).T).abs().pow(power).sum() for new, old in pairs]).sum()

    return run


def _checked_penalty(bench: Bench, tasks: int, power: int) -> tuple[Any, Callable[[], torch.Tensor], list[Any]]:
    """A chain, its penalty with gradient, and value and gradient against the loop in float64."""
    model = bench.chain(tasks, penalty="squared" if power == 2 else "l1")
    ours = with_gradient(model, model.base_model.orthogonality_penalty)
    found = []
    for run in (ours, with_gradient(model, loop(model, tasks, power, torch.float64))):
        value = run()
        found.append((value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    names = ("value, against a loop in float64", "gradient, likewise")
    return model, ours, [bench.same(*pair, 1e-5) for pair in zip(*found, names, strict=True)]


def penalty_step(bench: Bench) -> list[Record]:
    """The penalty and its gradient at T = 100, against the step without them."""
    tasks, repeats = bench.options.tasks, bench.options.repeats
    model, penalty, checks = _checked_penalty(bench, tasks, 2)
    step = step_of(bench, model, penalty=False)
    theirs = in_turn(step, repeats=repeats)[0]
    ours = in_turn(penalty, repeats=4 * repeats)[0]
    theirs += in_turn(step, repeats=repeats)[0]
    what, against = f"penalty (squared) and its gradient, T = {tasks}", "the training step without it"
    return [bench.record("penalty.step", what, against, ours, theirs, target=0.02, sameness=checks)]


def penalty_loop(bench: Bench) -> list[Record]:
    """O-LoRA's penalty and its gradient at T = 15, against a loop over modules and earlier tasks."""
    tasks = bench.options.few_tasks
    model, ours, checks = _checked_penalty(bench, tasks, 1)
    theirs = with_gradient(model, loop(model, tasks, 1, torch.float32))
    times = in_turn(ours, theirs, repeats=2 * bench.options.repeats)
    more: Any = {"bound": "at least", "target": 20, "sameness": checks}
    what, against = f"penalty (l1) and its gradient, T = {tasks}", "a loop over modules and tasks"
    return [bench.record("penalty.loop", what, against, *times, **more)]


def memory(bench: Bench) -> list[Record]:
    """Peak memory of training at T = 100, less the history's own bytes, against LoRA alone; a process for each run."""
    found: dict[int, list[tuple[int, int]]] = {1: [], bench.options.tasks: []}
    for _ in range(1 if bench.options.quick else 2):
        for tasks, into in found.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                into.append(process.submit(peak, bench.name, bench.options, bench.scratch, tasks).result())
    theirs, ours = ([float(bytes_ - history) for bytes_, history in each] for each in found.values())
    what = f"peak memory of training, T = {bench.options.tasks}, less the history's own bytes"
    more: Any = {"target": 1.05, "unit": "bytes", "notes": {"history, bytes": found[bench.options.tasks][0][1]}}
    return [bench.record("memory", what, "stock PEFT LoRA, no history", ours, theirs, **more)]


def peak(name: str, options: argparse.Namespace, scratch: Path, tasks: int) -> tuple[int, int]:
    """In a process alone: the peak of three steps, and the frozen adapters, in bytes.

    The peak counts from before the first step: what loading takes for a moment is not training's. On the CPU it is
    the largest resident size, on Linux only.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(name, options, scratch)
    model = bench.stock([0], bench.model) if tasks == 1 else bench.chain(tasks, bench.model)
    frozen = [p for key, p in model.named_parameters() if "lora_" in key and not p.requires_grad]
    step, cuda = step_of(bench, model, penalty=tasks > 1), options.device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # pages that loading left unused
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    for _ in range(3):
        step()
    lines = [] if cuda else Path("/proc/self/status").read_text().splitlines()
    resident = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    history = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    return torch.cuda.max_memory_allocated() if cuda else resident[0], history


def train(bench: Bench, model: Any, trainer_class: Any) -> float:
    """Seconds of one epoch on random examples, padded on the right, with answers of one token."""
    options, spread = bench.options, max(1, bench.options.task_tokens // 30)
    ids = bench.tokens((options.task_examples, options.task_tokens + spread), seed=11)
    ends = ids.shape[1] - torch.randint(2 * spread + 1, (len(ids), 1), generator=torch.Generator().manual_seed(12))
    places = torch.arange(ids.shape[1])
    mask, labels = (places < ends).long(), torch.where(places == ends - 1, ids, -100)
    names, rows = ("input_ids", "attention_mask", "labels"), zip(ids * mask, mask, labels, strict=True)
    arguments = transformers.TrainingArguments(
        str(bench.scratch / "run"), num_train_epochs=1, per_device_train_batch_size=options.task_batch, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=options.device == "cpu",
    )  # fmt: skip
    examples, collate = [dict(zip(names, row, strict=True)) for row in rows], transformers.default_data_collator
    trainer = trainer_class(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    return seconds(trainer.train)


def task(bench: Bench, source: str) -> list[Record]:
    """A task at T = 15 with `ASOTrainer`, stored or current vectors, against IncLoRA on stock PEFT."""
    options, tasks = bench.options, bench.options.few_tasks
    settings = AttributionConfig(steps=options.steps, probe_size=options.probe, source=source)  # type: ignore[arg-type]
    stock, chain = bench.stock(range(tasks)), bench.chain(tasks, attribution=settings)
    checks = [bench.same_logits(chain, stock, "before training")]
    if source == "stored":  # random vectors: their values change no time
        layout: list[list[Any]] = []
        for layer in find_neurons(chain):
            start = layout[-1][2] if layout else 0
            layout.append([layer.name, start, start + layer.size])
        for index in range(tasks - 1):
            chain.base_model.attribution[task_name(index)] = torch.randn(layout[-1][2])
            chain.peft_config[task_name(index)].attribution_layout = layout
    theirs = train(bench, stock, transformers.Trainer)
    ours = train(bench, chain, ASOTrainer)
    what = f"a task, T = {tasks}, {options.task_examples} examples, m = {options.steps}, {source} vectors"
    target = 1.10 if source == "stored" else 1.5 if options.device == "cpu" else 1.15
    more: Any = {"target": target, "sameness": checks}
    return [bench.record(f"task.{source}", what, "IncLoRA on stock PEFT", [ours], [theirs], **more)]
