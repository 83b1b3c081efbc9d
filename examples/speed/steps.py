"""What a training step costs: with one frozen adapter against stock PEFT, and with 99 against one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .adapters import chain_of, plain_of, stock_chain_of, task_name
from .batches import Batch, training
from .bench import Bench
from .records import Record, Sameness
from .timing import in_turn, relative


def step_of(model: Any, batch: Batch, penalty: bool) -> Callable[[], None]:
    """One training step: forward, backward, AdamW; with lambda times the penalty in the loss, or without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """In eval mode, which dropout has no part in."""
    return model.eval()(**batch).logits


def same_logits(bench: Bench, ours: Any, theirs: Any, batch: Batch, of: str) -> Sameness:
    """Whether two models compute the same."""
    difference = relative(logits_of(ours, batch), logits_of(theirs, batch))
    return Sameness(f"logits, {of}, against the largest", difference, bench.logits_limit)


def step_batch(bench: Bench) -> Batch:
    return training(bench.subject, bench.sizes.batch, bench.sizes.tokens)


def two_tasks(bench: Bench) -> list[Record]:
    """T = 2 with the penalty against stock PEFT LoRA without a history and without a penalty."""
    batch = step_batch(bench)
    folder = bench.adapters()
    bench.say("step, T = 2, against stock PEFT without history: making both, comparing them")
    ours, stock = chain_of(folder, 2), plain_of(folder, 1)
    both = stock_chain_of(folder, 2)
    checks = [same_logits(bench, ours, both, batch, "T = 2 against stock PEFT with both adapters active")]
    del both
    with ours.base_model.only(task_name(1)):
        checks.append(same_logits(bench, ours, stock, batch, "the new adapter alone against stock PEFT"))
    bench.say("step, T = 2: timing")
    times = in_turn(step_of(ours, batch, True), step_of(stock, batch, False), repeats=bench.sizes.repeats)
    return [
        Record(
            "step.two",
            bench.subject.label,
            f"training step, T = 2, penalty included, {_shape(bench)}",
            "stock PEFT LoRA, no history, no penalty",
            times[0],
            times[1],
            target=1.05,
            sameness=checks,
        )
    ]


def hundred_tasks(bench: Bench) -> list[Record]:
    """T = 100 against T = 2: the history computed as by default, and stacked."""
    batch = step_batch(bench)
    expected, moved = _all_active(bench, bench.sizes.tasks, batch)
    folds = 1.05 if bench.exact else 1.15  # a half-precision base is not folded: its rounding would take the sum
    records = []
    for form, target in (("auto", folds), ("stacked", 1.15)):
        records.append(_hundred(bench, form, batch, expected))
        records[-1].target = target
        records[-1].notes["what the history changes in the logits, against the largest"] = moved
    return records


def _hundred(bench: Bench, form: str, batch: Batch, expected: torch.Tensor) -> Record:
    """One form at T = 100; where nothing is folded, T = 2 is stacked, the cheapest for a single adapter."""
    tasks, small = bench.sizes.tasks, "auto" if form == "auto" else "stacked"
    bench.say(f"step, T = {tasks}, history_form {form}: making it")
    two = chain_of(bench.adapters(), 2, history_form=small)
    many = chain_of(bench.adapters(), tasks, history_form=form)
    of = f"logits, T = {tasks} against stock PEFT with all adapters active, against the largest"
    check = Sameness(of, relative(logits_of(many, batch), expected), bench.logits_limit)
    bench.say(f"step, T = {tasks}, history_form {form}: timing")
    times = in_turn(step_of(many, batch, True), step_of(two, batch, True), repeats=bench.sizes.repeats)
    return Record(
        f"step.hundred.{form}",
        bench.subject.label,
        f"training step, T = {tasks} ({tasks - 1} frozen, rank {bench.sizes.rank}, {form}), {_shape(bench)}",
        f"T = 2, history_form {small!r}",
        times[0],
        times[1],
        sameness=[check],
    )


def _all_active(bench: Bench, tasks: int, batch: Batch) -> tuple[torch.Tensor, float]:
    """Stock PEFT's logits with all adapters active, and how far the history alone moves them."""
    bench.say(f"step, T = {tasks}: stock PEFT loads the adapters one after another, for comparison")
    stock = stock_chain_of(bench.adapters(), tasks)
    reference = logits_of(stock, batch)
    stock.base_model.set_adapter([task_name(tasks - 1)])
    return reference, relative(logits_of(stock, batch), reference)


def growth_in_tasks(bench: Bench) -> list[Record]:
    """The step for T in `sizes.growth_tasks`, ours against stock PEFT with all adapters active."""
    batch = step_batch(bench)
    records = []
    for tasks in bench.sizes.growth_tasks:
        bench.say(f"growth of the step: T = {tasks}")
        ours, stock = chain_of(bench.adapters(), tasks), stock_chain_of(bench.adapters(), tasks)
        check = same_logits(bench, ours, stock, batch, f"T = {tasks}")
        times = in_turn(step_of(ours, batch, True), step_of(stock, batch, False), repeats=bench.sizes.repeats)
        what = f"training step, T = {tasks}, rank {bench.sizes.rank}, penalty included, {_shape(bench)}"
        against = "stock PEFT, all adapters active, no penalty"
        records.append(
            Record("growth.tasks", bench.subject.label, what, against, times[0], times[1], sameness=[check])
        )
    return records


def growth_in_rank(bench: Bench) -> list[Record]:
    """The step at T = 15 for each rank in `sizes.growth_ranks`, against T = 2 of the same rank."""
    batch, tasks = step_batch(bench), bench.sizes.loop_tasks
    records = []
    for rank in bench.sizes.growth_ranks:
        bench.say(f"growth of the step: rank {rank}")
        many, two = chain_of(bench.adapters(rank), tasks), chain_of(bench.adapters(rank), 2)
        times = in_turn(step_of(many, batch, True), step_of(two, batch, True), repeats=bench.sizes.repeats)
        what = f"training step, T = {tasks}, rank {rank}, penalty included, {_shape(bench)}"
        notes = {"seconds, T = 2": statistics.median(times[1])}
        against = "T = 2, same rank"
        records.append(Record("growth.rank", bench.subject.label, what, against, times[0], times[1], notes=notes))
    return records


def _shape(bench: Bench) -> str:
    return f"batch {bench.sizes.batch} x {bench.sizes.tokens} tokens"
