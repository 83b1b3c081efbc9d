"""What the orthogonality penalty costs (Eq. 7): against the step that it is part of, and against O-LoRA's loop."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapters import chain_of, lora_weights, task_name
from .bench import Bench
from .records import Record, Sameness
from .steps import step_batch, step_of
from .timing import in_turn, relative, repeated


def penalty_of(model: Any) -> Callable[[], torch.Tensor]:
    """The penalty and its gradient; returns the value, and leaves the gradient in the parameters."""
    return _with_gradient(model, model.base_model.orthogonality_penalty)


def _with_gradient(model: nn.Module, penalty: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`penalty` and its gradient in the trained parameters, which are cleared without a walk over the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> torch.Tensor:
        for parameter in trained:
            parameter.grad = None
        value = penalty()
        value.backward()
        return value.detach()

    return run


def in_the_step(bench: Bench) -> list[Record]:
    """The penalty and its gradient at T = 100, against the whole step without them."""
    tasks = bench.sizes.tasks
    bench.say(f"penalty, T = {tasks}: making the chain, comparing with the plain sum in float64")
    model = chain_of(bench.adapters(), tasks)
    penalty, step = penalty_of(model), step_of(model, step_batch(bench), penalty=False)
    checks = _against_plain(model, penalty, tasks)
    bench.say(f"penalty, T = {tasks}: timing")
    step()
    theirs = repeated(step, bench.sizes.repeats)
    ours = repeated(penalty, 4 * bench.sizes.repeats)
    theirs += repeated(step, bench.sizes.repeats, warm_up=0)
    return [
        Record(
            "penalty.step",
            bench.subject.label,
            f"penalty (squared) and its gradient, T = {tasks}, all modules",
            f"the training step without it, batch {bench.sizes.batch} x {bench.sizes.tokens} tokens",
            ours,
            theirs,
            target=0.02,
            sameness=checks,
        )
    ]


def _against_plain(model: Any, penalty: Callable[[], torch.Tensor], tasks: int) -> list[Sameness]:
    """Value and gradient against Eq. 7 written as loops, in float64, psi = 1."""
    value = penalty()
    current = {name: own for name, own in model.named_parameters() if f"lora_A.{task_name(tasks - 1)}." in name}
    doubles = {name: own.detach().double().requires_grad_() for name, own in current.items()}
    weights = lora_weights(model)
    plain = torch.zeros((), dtype=torch.float64, device=value.device)
    for name, own in doubles.items():
        for old in range(tasks - 1):
            earlier = weights[name.replace(f"lora_A.{task_name(tasks - 1)}.", f"lora_A.{task_name(old)}.")]
            plain = plain + (earlier.double() @ own.T).square().sum()
    plain.backward()
    ours = torch.cat([own.grad.flatten() for own in current.values()])
    theirs = torch.cat([own.grad.flatten() for own in doubles.values() if own.grad is not None])
    return [
        Sameness("value, against loops over tasks and modules in float64", relative(value, plain), 1e-5),
        Sameness("gradient, likewise, against its largest entry", relative(ours, theirs), 1e-5),
    ]


def olora_loop(model: nn.Module) -> torch.Tensor:
    """The penalty as the O-LoRA code computes it: pairs of parameter names, found by a loop within a loop."""
    total: Any = 0.0
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            for other, current in model.named_parameters():
                if "loranew_A" in other and name.split("lora_A")[0] == other.split("loranew_A")[0]:
                    total = total + torch.abs(torch.mm(parameter, current.T)).sum()
                    break
    return total


def named_loop(model: nn.Module, new: str) -> torch.Tensor:
    """The same loop where each earlier task is an adapter with a name, as PEFT keeps them today."""
    total: Any = 0.0
    for name, parameter in model.named_parameters():
        if ".lora_A." in name and f".lora_A.{new}." not in name:
            for other, current in model.named_parameters():
                if f".lora_A.{new}." in other and name.split(".lora_A.")[0] == other.split(".lora_A.")[0]:
                    total = total + torch.abs(torch.mm(parameter, current.T)).sum()
                    break
    return total


def olora_model(bench: Bench, chain: Any, tasks: int) -> nn.Module:
    """The base model with the modules that O-LoRA's copy of PEFT puts into it, under its names and in its order.

    Per target module: dropout, the stacked history (`lora_A`, `lora_B`), the new adapter (`loranew_A`, `loranew_B`)
    and two empty containers for embeddings; the model two wrappers deep. It is not run: its parameters, and what a
    walk over its modules takes, are all that matters.
    """
    weights = lora_weights(chain)
    model = bench.subject.fresh().requires_grad_(False)
    last = task_name(tasks - 1)
    for name in [name for name in weights if f".lora_A.{last}." in name]:
        place = name.split("base_model.model.", 1)[1].split(".lora_A.")[0]
        module = model.get_submodule(place)
        module.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.1)})
        own = {
            matrix: [weights[name.replace(f"lora_A.{last}.", f"{matrix}.{task_name(t)}.")] for t in range(tasks)]
            for matrix in ("lora_A", "lora_B")
        }
        for dim, (matrix, parts) in enumerate(own.items()):
            setattr(module, matrix, _named(torch.cat(parts[:-1], dim), trains=False))
        for matrix, parts in own.items():
            setattr(module, matrix.replace("lora", "loranew"), _named(parts[-1], trains=True))
        module.lora_embedding_A, module.lora_embedding_B = nn.ParameterDict({}), nn.ParameterDict({})
    return nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})


def _named(weight: torch.Tensor, trains: bool) -> nn.ModuleDict:
    """A weight where PEFT keeps it: `<module>.default.weight`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(copy.deepcopy(weight), requires_grad=trains)
    return nn.ModuleDict({"default": linear})


def against_the_loop(bench: Bench) -> list[Record]:
    """The L1 penalty with psi = 1 at T = 15 against O-LoRA's loop; the squared form beside it."""
    tasks = bench.sizes.loop_tasks
    bench.say(f"penalty, T = {tasks}, against the O-LoRA loop: making both, comparing them")
    chain = chain_of(bench.adapters(), tasks, penalty="l1")
    squared = chain_of(bench.adapters(), tasks)
    peer = olora_model(bench, chain, tasks)
    ours, loop = penalty_of(chain), _with_gradient(peer, lambda: olora_loop(peer))
    named = _with_gradient(chain, lambda: named_loop(chain, task_name(tasks - 1)))
    checks = [Sameness("value, against the loop's", relative(ours(), loop()), 1e-5)]
    checks.append(Sameness("gradient, against its largest entry", relative(_gradients(chain), _gradients(peer)), 1e-5))
    bench.say(f"penalty, T = {tasks}: timing")
    checks.append(Sameness("value, against the loop over named adapters", relative(ours(), named()), 1e-5))
    times = in_turn(ours, loop, penalty_of(squared), repeats=2 * bench.sizes.repeats)
    by_name = repeated(named, 2, warm_up=0)
    return [
        Record(
            "penalty.loop",
            bench.subject.label,
            f"penalty (l1, psi = 1) and its gradient, T = {tasks}",
            "the loop over pairs of parameter names, as in the O-LoRA code",
            times[0],
            times[1],
            bound="at least",
            target=20,
            sameness=checks,
            notes={
                "the loop with the history in named adapters, seconds": by_name,
                "times faster than that": statistics.median(by_name) / statistics.median(times[0]),
                "squared form, seconds": times[2],
                "squared form, times faster than the loop": statistics.median(times[1]) / statistics.median(times[2]),
            },
        )
    ]


def _gradients(model: nn.Module) -> torch.Tensor:
    """Of all matrices A, in the order of the modules."""
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "_A" in name and p.grad is not None])
