"""Which examples of a batch go together, so that a pass runs few positions that count for nothing.

A window is as long as the longest answer in it, and every position of it is run steps x layers times. Examples whose
answers are equally long, or nearly so, share a pass.
"""

from __future__ import annotations

import torch

from .answer import Answer
from .replay import take

# positions of padding that a pass may have, of all its positions
_WASTE = 0.1


def alike(answer: Answer, stack: str) -> list[torch.Tensor]:
    """The examples of a batch in groups of nearly equal answers, as indices `(E,)`; longest first.

    Args:
        stack: whose positions are run; positions between the first and the last that is labelled count.
    """
    chosen = answer.positions[stack]
    if stack == "encoder" or answer.kind not in ("causal", "seq2seq"):
        return [torch.arange(len(chosen), device=chosen.device)]
    columns = torch.arange(1, chosen.shape[1] + 1, device=chosen.device)
    last = (chosen * columns).amax(1)
    first = chosen.shape[1] + 1 - (chosen * columns.flip(0)).amax(1)
    lengths = (last - first + 1).tolist()
    groups: list[list[int]] = []
    longest, used = 0, 0
    for length in sorted(set(lengths), reverse=True):
        equal = [index for index, other in enumerate(lengths) if other == length]
        used += length * len(equal)
        if not groups or used < (1 - _WASTE) * longest * (len(groups[-1]) + len(equal)):
            groups.append([])
            longest, used = length, length * len(equal)
        groups[-1] += equal
    return [torch.tensor(sorted(group), device=chosen.device) for group in groups]


def of_examples(
    inputs: dict[str, torch.Tensor], answer: Answer, rows: torch.Tensor
) -> tuple[dict[str, torch.Tensor], Answer]:
    """The part of a batch with these examples."""
    size = len(answer.targets)
    if len(rows) == size:
        return inputs, answer
    positions = {stack: mask[rows] for stack, mask in answer.positions.items()}
    return take(inputs, rows, size), Answer(answer.kind, answer.targets[rows], positions)
