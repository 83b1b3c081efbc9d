"""Finished runs in the shape of the paper's tables.

python examples/continual_benchmark/table.py runs/continual_benchmark                    # Tables 1, 2, 7: AA by order
python examples/continual_benchmark/table.py runs/continual_benchmark --shape tasks      # Tables 3, 8: task by task
python examples/continual_benchmark/table.py runs/continual_benchmark --shape errors     # what wrong answers are
python examples/continual_benchmark/table.py runs/continual_benchmark --shape pairs      # w beside what was forgotten
python examples/continual_benchmark/table.py runs/continual_benchmark --shape penalties  # soft, hard and no penalty
python examples/continual_benchmark/table.py runs/continual_benchmark --shape preferences  # FM: a preference?
python examples/continual_benchmark/table.py runs/continual_benchmark --against inc_lora # paired differences
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from continual_benchmark.collect import Run, comparable, hard_twin, penalty_of, read_runs, same_place, without_penalty
from continual_benchmark.orders import order_of
from continual_benchmark.paper import AVERAGE_ACCURACY, PER_TASK
from continual_benchmark.scores import WAYS, all_tested, changes, mean_difference, wrong_answers

Rows = list[list[str]]
LEAST_FORGOTTEN = 2  # points of FM below which a share of it means nothing


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="table.py", description="Finished runs in the shape of the paper's tables.")
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="results folders, or folders that hold them")
    add("--shape", choices=list(SHAPES), default="orders",
        help="AA by order (Tables 1, 2, 7), accuracy by task (3, 8), AA, FM, BWT and FWT of each run, what its "
        "wrong answers are, w of each pair of tasks beside what learning one did to the other, each run with a "
        "penalty beside the same without, and soft beside hard, or what of FM is a shift of preference")  # fmt: skip
    add("--way", choices=WAYS, default="generate", help="how answers were scored")
    add("--against", metavar="METHOD", help="instead: difference to this method, paired 95%% intervals")
    add("--measure", choices=["AA", "FM", "BWT", "FWT"], default="AA", help="of a difference: in what")
    add("--after", metavar="N", type=int, help="with --against: as it stood after N tasks, instead of after all")
    add("--paper", choices=sorted(AVERAGE_ACCURACY), help="the paper's numbers for this model beside ours")
    add("--latex", action="store_true", help="LaTeX instead of Markdown")
    options = parser.parse_args(arguments)
    if options.after is not None and not options.against:
        parser.error("--after goes with --against")
    return options


def table(options: argparse.Namespace) -> str:
    """The table as text."""
    read = read_runs(options.folders)
    runs = [run for run in read if options.way in run.results["summary"]]
    if not runs:
        raise SystemExit(f"No run there was scored by --way {options.way}.")
    for run in (each for each in read if each not in runs):
        print(f"Left out, not scored by --way {options.way}: {run.path}", file=sys.stderr)
    comparable(runs)
    rows = (by_difference if options.against else SHAPES[options.shape])(runs, options)
    rows[0][0] = rows[0][0] or f"by --way {options.way}"
    return latex(rows) if options.latex else markdown(rows)


def by_order(runs: list[Run], options: argparse.Namespace) -> Rows:
    """Methods down, orders across, the mean over the orders last."""
    way, paper = options.way, options.paper
    orders = sorted({run.order for run in runs})
    rows = [["", *(_order(order) for order in orders), "Avg."]]
    for label in dict.fromkeys(run.label for run in runs):
        cells = [
            [run.number(way, "AA") or 0.0 for run in runs if (run.label, run.order) == (label, o)] for o in orders
        ]
        rows.append([label, *(spread(values) for values in cells), _average(cells)])
    if paper:
        for name, numbers in AVERAGE_ACCURACY[paper].items():
            theirs = [numbers[int(order) - 1] if order.isdigit() else None for order in orders]
            average = _average([[] if value is None else [value] for value in theirs])
            rows.append([f"{name}, {paper} in the paper", *map(_cell, theirs), average])
    return rows


def by_task(runs: list[Run], options: argparse.Namespace) -> Rows:
    """For each order its tasks across, as they stand after the last."""
    way, paper = options.way, options.paper
    rows: Rows = []
    for order in sorted({run.order for run in runs}):
        here = [run for run in runs if run.order == order]
        rows.append([f"{_order(order)}, {way}", *here[0].results["tasks"]])
        for label in dict.fromkeys(run.label for run in here):
            last = [run.results["summary"][way]["matrix"][-1] for run in here if run.label == label]
            rows.append([label, *(spread(list(values)) for values in zip(*last, strict=True))])
        if paper and order in ("1", "2", "3") and list(order_of(order)) == here[0].results["tasks"]:
            for name, theirs in PER_TASK[paper].items():
                rows.append([f"{name}, {paper} in the paper", *map(_cell, theirs[int(order) - 1])])
    return rows


def by_measure(runs: list[Run], options: argparse.Namespace) -> Rows:
    """One run a row: the four numbers with their intervals over test examples."""
    names = ("AA", "FM", "BWT", "FWT")
    rows = [["", "order", "seed", *names]]
    for run in runs:
        found = run.results["summary"][options.way]
        cells = ["-" if name not in found else _between(found[name], found["95%"][name]) for name in names]
        rows.append([run.label, run.order, str(run.settings["seed"]), *cells])
    return rows


def by_error(runs: list[Run], options: argparse.Namespace) -> Rows:
    """Of each task's answers after the last stage, in percent: another option of it, one of another task, neither."""
    rows: Rows = []
    for order in sorted({run.order for run in runs}):
        here = [run for run in runs if run.order == order]
        names = here[0].results["tasks"]
        rows.append([f"{_order(order)}: own, another's, neither", *names])
        for run in here:
            found = wrong_answers(run.results)
            shares = [" + ".join(f"{each:.1f}" for each in found[name]) if found else "-" for name in names]
            rows.append([run.label, *shares])
    return rows


def by_pair(runs: list[Run], options: argparse.Namespace) -> Rows:
    """Of runs with a w: each pair of tasks, the later one's last w, and what learning that did to the earlier one.

    Orders that begin alike have the same first pairs, which count once: as the first of these runs has them. The rank
    correlation is that of each kind of run, since two kinds on one order are not independent.

    Raises:
        SystemExit: fewer than three pairs.
    """
    pairs: dict[tuple[Any, ...], tuple[float, float, list[float]]] = {}
    orders: dict[tuple[Any, ...], list[str]] = {}
    for run in runs:
        similarity = {stage["task"]: stage.get("similarity") or {} for stage in run.results["stages"]}
        for (later, earlier), (change, interval) in changes(run.results, options.way).items():
            if earlier in similarity[later]:
                w = float(numpy.mean(similarity[later][earlier]))
                names = run.results["tasks"]
                pair = (run.label, run.settings["seed"], *names[: names.index(later) + 1], earlier)
                pairs.setdefault(pair, (w, change, interval))
                orders.setdefault(pair, []).append(run.order)
    if len(pairs) < 3:
        raise SystemExit("--shape pairs: no runs there with a w whose earlier tasks were tested after each stage.")
    rows = [["", "order", "later", "earlier", "w", "change of the earlier"]]
    for pair, (w, change, interval) in pairs.items():
        rows.append([pair[0], " and ".join(orders[pair]), *pair[-2:], f"{w:.2f}", _between(change, interval, "+")])
    for label in dict.fromkeys(pair[0] for pair in pairs):
        own = [found[:2] for pair, found in pairs.items() if pair[0] == label]
        if len(own) > 2:
            found = spearmanr(*zip(*own, strict=True))
            rank = f"rank correlation {found.statistic:+.2f} (p {found.pvalue:.2f}, {len(own)} pairs)"
            rows.append([label, "all", "", "", "", rank])
    return rows


def by_preference(runs: list[Run], options: argparse.Namespace) -> Rows:
    """Each run's mean accuracy right after a task's own stage, AA and FM as generated, and how much of FM goes when a
    shift of preference among answers is taken out (calibrated).

    Raises:
        SystemExit: no run there was scored in all ways.
    """
    rows = [["", "order", "seed", "own", "AA", "FM", "options: FM", "calibrated: own", "AA", "FM", "FM gone"]]
    shares = []
    for run in (each for each in runs if set(WAYS) <= set(each.results["summary"]) and each.number("generate", "FM")):
        said, options_, known = (run.results["summary"][way] for way in WAYS)
        own = [statistics.mean(row[place] for place, row in enumerate(each["matrix"])) for each in (said, known)]
        gone = 100 * (1 - known["FM"] / said["FM"])
        shares += [gone] * (said["FM"] >= LEAST_FORGOTTEN)
        cells = [own[0], said["AA"], said["FM"], options_["FM"], own[1], known["AA"], known["FM"]]
        share = f"{gone:.0f}%" if said["FM"] >= LEAST_FORGOTTEN else ""
        rows.append([run.label, run.order, str(run.settings["seed"]), *map(_cell, cells), share])
    if len(rows) == 1:
        raise SystemExit("--shape preferences: no run there has answers scored in all ways (`run.py --score both`).")
    if shares:
        middle = f"median {statistics.median(shares):.0f}% ({min(shares):.0f} to {max(shares):.0f}%)"
        rows.append([f"{len(shares)} runs with FM of {LEAST_FORGOTTEN} and more", *[""] * 9, middle])
    return rows


def by_penalty(runs: list[Run], options: argparse.Namespace) -> Rows:
    """Each run with a penalty less the same run without, and a soft one less the hard one of the same form and lambda.

    Where there are several orders of the same tasks, or several seeds, the mean over them comes last.

    Raises:
        SystemExit: no run there has a penalty and its like without.
    """
    rows = [["", "order", "seed", "without", "with", f"{options.measure}: to none", "soft to hard"]]
    alike: dict[Any, list[tuple[Run, Run, Run | None]]] = {}
    for run in runs:
        none = without_penalty(run, runs) if penalty_of(run) else None
        if none is not None:
            trio = run, none, hard_twin(run, runs)
            values = [_cell(each.number(options.way, options.measure)) for each in (none, run)]
            rows.append([run.label, run.order, str(run.settings["seed"]), *values, *_both(options, trio)])
            alike.setdefault((run.label, frozenset(run.results["tasks"])), []).append(trio)
    if len(rows) == 1:
        raise SystemExit("--shape penalties: no run there has a penalty, and beside it IncLoRA set alike.")
    for (label, _), trios in alike.items():
        if len(trios) > 1:
            rows.append([label, f"mean of {len(trios)}", "", "", "", *_both(options, *trios)])
    return rows


def _both(options: argparse.Namespace, *trios: tuple[Run, Run, Run | None]) -> list[str]:
    """What a run has more than the one without a penalty, and than the hard one where each of these has one."""
    hard = [(run, twin) for run, _, twin in trios if twin is not None]
    to_hard = _difference(hard, options) if len(hard) == len(trios) else ""
    return [_difference([(run, none) for run, none, _ in trios], options), to_hard]


def by_difference(runs: list[Run], options: argparse.Namespace) -> Rows:
    """One measure less that of another method on the same order and seed, on the same test examples.

    Where there are several orders of the same tasks, or several seeds, the mean over them comes last.

    Raises:
        SystemExit: nothing to compare, or fewer tasks than asked for.
    """
    after = "" if options.after is None else f" after {options.after} task{'s' * (options.after != 1)}"
    rows = [["", "order", "seed", f"difference in {options.measure}{after}"]]
    alike: dict[Any, list[tuple[Run, Run]]] = {}
    several = len({run.label for run in runs if run.settings["method"] == options.against}) > 1
    for run in runs:
        peers = [other for other in runs if other.settings["method"] == options.against and same_place(run, other)]
        for peer in peers:
            if peer is not run:
                beside = f" to {peer.label}" if several else ""
                cell = _difference([(run, peer)], options) + beside
                rows.append([run.label, run.order, str(run.settings["seed"]), cell])
                alike.setdefault((run.label, beside, frozenset(run.results["tasks"])), []).append((run, peer))
    if len(rows) == 1:
        raise SystemExit(f"--against {options.against}: no run of it on the same order and seed as another.")
    for (label, beside, _), pairs in alike.items():
        if len(pairs) > 1 and options.after is None:
            rows.append([label, f"mean of {len(pairs)}", "", _difference(pairs, options) + beside])
    return rows


SHAPES = {
    "orders": by_order, "tasks": by_task, "measures": by_measure, "errors": by_error, "pairs": by_pair,
    "penalties": by_penalty, "preferences": by_preference,
}  # fmt: skip


def _difference(pairs: list[tuple[Run, Run]], options: argparse.Namespace) -> str:
    for run, _ in pairs:
        stages = len(run.results["stages"])
        if options.after is not None and not 1 <= options.after <= stages:
            raise SystemExit(f"--after {options.after}: {run.path} has {stages} tasks.")
    each_run = [each for pair in pairs for each in pair]
    known = all(options.measure in each.results["summary"][options.way] for each in each_run)
    tested = options.after is None or all(all_tested(each.results, options.after) for each in each_run)
    unlike = options.measure == "FM" and any(run.settings["tested"] != peer.settings["tested"] for run, peer in pairs)
    if not (known and tested) or unlike or (options.after == 1 and options.measure != "AA"):
        return "-"  # FM and BWT are of two tasks and more, FWT needs each task learned alone, FM the same tests
    both = [(run.results, peer.results) for run, peer in pairs]
    return _between(*mean_difference(both, options.way, options.measure, options.after), "+")


def _order(order: str) -> str:
    return f"Order {order}" if order.isdigit() else order


def spread(values: list[Any]) -> str:
    """The mean, and the deviation where there are several."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def _average(cells: list[list[float]]) -> str:
    return f"{statistics.mean(statistics.mean(values) for values in cells):.1f}" if all(cells) else "-"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _between(value: float, interval: Sequence[float], sign: str = "") -> str:
    return f"{value:{sign}.1f} ({interval[0]:{sign}.1f} to {interval[1]:{sign}.1f})"


def markdown(rows: Rows) -> str:
    """A Markdown table; rows that are shorter are filled."""
    width = max(len(row) for row in rows)
    filled = [row + [""] * (width - len(row)) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in filled]
    return "\n".join([lines[0], "|" + "---|" * width, *lines[1:]])


def latex(rows: Rows) -> str:
    """A LaTeX tabular."""
    width = max(len(row) for row in rows)
    marks = {"%": r"\%", "_": r"\_", "±": r"$\pm$", "&": r"\&"}

    def cell(text: str) -> str:
        return "".join(marks.get(letter, letter) for letter in text)

    lines = [" & ".join(map(cell, row + [""] * (width - len(row)))) + r" \\" for row in rows]
    return "\n".join([rf"\begin{{tabular}}{{l{'c' * (width - 1)}}}", r"\hline", lines[0], r"\hline", *lines[1:],
                      r"\hline", r"\end{tabular}"])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    print(table(parse(arguments)))


if __name__ == "__main__":
    main()
