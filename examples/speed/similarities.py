"""All similarities (Eq. 13) of 100 tasks over 352,256 neurons, against one sort of each vector."""

from __future__ import annotations

import torch
from scipy.stats import spearmanr

from peft_aso.attribution import similarity, similarity_matrix

from .bench import Bench
from .records import Record, Sameness
from .timing import in_turn


def similarities(bench: Bench) -> list[Record]:
    """One new vector against all stored ones, and all pairs."""
    count, neurons = bench.sizes.vectors, bench.sizes.neurons
    bench.say(f"similarities: {count} vectors of {neurons:,} neurons")
    vectors = _vectors(count, neurons, zeros=False).to(bench.device)
    new, stored = vectors[0], vectors[1:]

    def sort_each() -> None:
        for vector in vectors:
            torch.sort(vector)

    def one() -> torch.Tensor:
        return similarity(new, stored)

    def pairs() -> torch.Tensor:
        return similarity_matrix(vectors)

    checks = [_against_scipy(vectors, one()[None], [0]), _against_scipy(vectors, pairs()[:, 1:], [0, count // 2])]
    bench.say("similarities: timing")
    times = in_turn(one, pairs, sort_each, repeats=bench.sizes.repeats)
    tied = _vectors(count, neurons, zeros=True).to(bench.device)
    check_tied = _against_scipy(tied, similarity_matrix(tied)[:, 1:], [0, 1])
    tied_times = in_turn(lambda: similarity_matrix(tied), repeats=max(1, bench.sizes.repeats // 2))[0]
    shape = f"{neurons:,} neurons, {count} tasks, Spearman"
    return [
        Record(
            "similarity.one",
            "-",
            f"one new vector against {count - 1}, {shape}",
            "torch.sort of each vector",
            times[0],
            times[2],
            target=2,
            sameness=checks[:1],
        ),
        Record(
            "similarity.pairs",
            "-",
            f"all pairs, {shape}",
            "torch.sort of each vector",
            times[1],
            times[2],
            target=2,
            sameness=[checks[1], check_tied],
            notes={"all pairs of vectors that are zero at half of their neurons (ReLU), seconds": tied_times},
        ),
    ]


def _vectors(count: int, neurons: int, zeros: bool) -> torch.Tensor:
    """Random vectors that have something in common; as a ReLU leaves them, half of the entries are zero."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(neurons, generator=generator)
    vectors = torch.randn(count, neurons, generator=generator) + common
    return vectors.clamp_min(0) if zeros else vectors


def _against_scipy(vectors: torch.Tensor, found: torch.Tensor, rows: list[int]) -> Sameness:
    """`found[r]` holds w of vector r and vectors 1, 2, ...: the first and the last are computed by scipy."""
    values = vectors.cpu().numpy()
    differences = []
    for row in rows:
        for column in (0, len(values) - 2):
            w = spearmanr(values[row], values[column + 1]).statistic
            differences.append(abs(found[row, column].item() - float(w)))
    return Sameness("w, against scipy.stats.spearmanr", max(differences), 1e-6)
