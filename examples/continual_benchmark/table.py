"""Finished runs as tables, from compressed files and folders of runs.

python examples/continual_benchmark/table.py runs/continual_benchmark                     # AA by order: Tables 1, 2, 7
python examples/continual_benchmark/table.py runs/continual_benchmark --shape tasks       # task by task: Tables 3, 8
python examples/continual_benchmark/table.py runs/continual_benchmark --shape measures    # AA, FM, BWT, FWT
python examples/continual_benchmark/table.py runs/continual_benchmark --shape penalties   # soft, hard and no penalty
python examples/continual_benchmark/table.py runs/continual_benchmark --against inc_lora  # paired differences
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/

from continual_benchmark.data import short
from continual_benchmark.records import Record, read_records
from continual_benchmark.scores import MEASURES, WAYS, cached, difference, matrices, shown, ways_of
from continual_benchmark.settings import Settings, lambda_of

Rows = list[list[str]]
LEAST_FORGOTTEN = 2  # points of FM below which a share of it means nothing
# settings that say how much was run: runs that differ here are not compared
SCALE = ("model", "data", "full", "train_limit", "test_limit", "validation", "epochs", "batch_size")
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="table.py", description="Finished runs as tables.")
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="compressed files, or folders of runs")
    add("--shape", choices=list(SHAPES), default="orders",
        help="AA by order; accuracy by task; AA, FM, BWT and FWT of each run; runs with a penalty less the same run "
        "without, and soft less hard; how much of FM is a shift of preference among answers; w of pairs of tasks and "
        "what learning one did to the other; how far the spans of two A and of two B overlap; settings")  # fmt: skip
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="of runs' names")
    add("--way", choices=WAYS, default="generate", help="how answers were scored")
    add("--against", metavar="METHOD", help="instead: paired differences to this method, or to the run of this name")
    add("--measure", choices=MEASURES, default="AA", help="of the differences")
    return parser.parse_args(arguments)


def table(options: argparse.Namespace) -> Rows:
    """The rows of the table, the first of them its head."""
    runs = read_records(options.paths, options.only)
    return (by_difference if options.against else SHAPES[options.shape])(runs, options)


def order_of(run: Record) -> str:
    return short(run["tasks"])


def value_of(run: Record, name: str) -> Any:
    """A setting; the default where the run's method does not have it."""
    return run["settings"].get(name, _DEFAULTS.get(name))


_DEFAULTS = asdict(Settings())


def label(run: Record, runs: Sequence[Record]) -> str:
    """The method, and the settings that set it apart from others here that have them."""
    apart = []
    for name, value in run["settings"].items():
        usual = lambda_of({**run["settings"], name: None}) if name == "penalty_weight" else _DEFAULTS.get(name)
        others = {str(each["settings"].get(name, usual)) for each in runs}
        named = len(others) > 1 or name == "penalty_weight"
        if named and name not in ("method", "seed", "order", "score") and value != usual:
            apart.append(f"{name.replace('_', ' ').replace('penalty weight', 'lambda')} {_value(value)}")
    return run["title"] + (f" ({', '.join(apart)})" if apart else "")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "all linear layers" if value == ALL_LINEAR else f"{value:g}" if isinstance(value, float) else str(value)


def by_orders(runs: list[Record], options: argparse.Namespace) -> Rows:
    """Methods down, orders across, the mean over the orders last; seeds as mean and deviation."""
    comparable(runs)
    orders = sorted({order_of(run) for run in runs})
    rows = [["", *(_order(order) for order in orders), "Avg."]]
    for name in dict.fromkeys(label(run, runs) for run in runs):
        cells = []
        for order in orders:
            own = [run for run in runs if (label(run, runs), order_of(run)) == (name, order)]
            cells.append([float(cached(run, options.way, "AA")[0]) for run in own if options.way in ways_of(run)])
        average = f"{statistics.mean(map(statistics.mean, cells)):.1f}" if all(cells) else "-"
        rows.append([name, *map(_spread, cells), average])
    return rows


def by_tasks(runs: list[Record], options: argparse.Namespace) -> Rows:
    """For each order its tasks across: accuracy after the last."""
    comparable(runs)
    rows: Rows = []
    for order in sorted({order_of(run) for run in runs}):
        here = [run for run in runs if order_of(run) == order and options.way in ways_of(run)]
        rows += [[_order(order), *here[0]["tasks"]]] if here else []
        for name in dict.fromkeys(label(run, runs) for run in here):
            last = [matrices(run, options.way, 0)[0][0, -1] for run in here if label(run, runs) == name]
            rows.append([name, *(_spread(list(values)) for values in zip(*last, strict=True))])
    return rows


def by_measures(runs: list[Record], options: argparse.Namespace) -> Rows:
    """One run a row: the four measures with 95% intervals over test questions."""
    rows = [["run", "", "order", "seed", *MEASURES]]
    for run in runs:
        cells = [shown(cached(run, options.way, name)) for name in MEASURES]
        rows.append([run["name"], label(run, runs), order_of(run), str(value_of(run, "seed")), *cells])
    return rows


def by_difference(runs: list[Record], options: argparse.Namespace) -> Rows:
    """A measure less that of another method (or run, by name) on the same order and seed, in every way of scoring;
    then means over orders and seeds."""
    rows = [[f"{options.measure} less that of {options.against}", "orders", "seed", *WAYS]]
    peers = [run for run in runs if options.against in (run["settings"]["method"], run["name"])]
    alike: dict[Any, list[tuple[Record, Record]]] = {}
    for run, peer in ((run, peer) for run in runs for peer in peers if peer is not run):
        same_scale = all(value_of(run, name) == value_of(peer, name) for name in (*SCALE, "seed"))
        if same_scale and run["tasks"] == peer["tasks"]:
            name = f"{label(run, runs)} to {label(peer, runs)}"
            alike.setdefault((name, frozenset(run["tasks"])), []).append((run, peer))
    single = [(name, [pair]) for (name, _), pairs in alike.items() for pair in pairs]
    for name, pairs in [*single, *((name, pairs) for (name, _), pairs in alike.items() if len(pairs) > 1)]:
        orders = _brief([run for run, _ in pairs])
        seed = str(value_of(pairs[0][0], "seed")) if len(pairs) == 1 else ""
        rows.append([name, orders, seed, *(_mean_gap(pairs, way, orders, options.measure) for way in WAYS)])
    if len(rows) == 1:
        raise SystemExit(f"--against {options.against}: no run of it on the same order and seed as another.")
    return rows


def by_penalties(runs: list[Record], options: argparse.Namespace) -> Rows:
    """For each kind of training and penalty, means over its orders: AA less that of the same run without a penalty (by
    `--way`, and calibrated), and of soft orthogonality less that of hard."""
    rows = [["training", "questions", "penalty", "orders", "AA", "to none", "calibrated: to none", "soft to hard"]]
    groups: dict[Any, list[tuple[Record, Record, Record | None]]] = {}
    for run in runs:
        penalty = _penalty(run)
        none = next((each for each in runs if penalty and not _penalty(each) and _same_training(run, each)), None)
        if penalty and none:
            kind, hard = penalty
            twins = [
                each for each in runs if not hard and _penalty(each) == (kind, True) and _same_training(run, each)
            ]
            questions = "validation" if value_of(run, "validation") else "test"
            key = (_training(run), questions, f"{'hard' if hard else 'soft'}, {kind}", frozenset(run["tasks"]))
            groups.setdefault(key, []).append((run, none, twins[0] if twins else None))
    for (training, questions, penalty, _), found in sorted(
        groups.items(), key=lambda item: (item[0][0] != "default", item[0][:3])
    ):
        to_none, to_hard = [each[:2] for each in found], [(run, hard) for run, _, hard in found if hard]
        values = [cached(run, options.way, "AA") for run, _, _ in found]
        orders = _brief([run for run, _, _ in found])
        cells = [_mean_gap(to_none, way, orders) for way in (options.way, "calibrated")]
        cells.append(_mean_gap(to_hard, options.way, orders))
        mean = f"{statistics.mean(float(each[0]) for each in values if each is not None):.1f}"
        rows.append([training, questions, penalty, orders, mean, *cells])
    return rows


def _penalty(run: Record) -> tuple[str, bool] | None:
    """The kind of a run's penalty, with lambda and what else it is set to, and whether it is hard (psi = 1)."""
    settings = run["settings"]
    if not settings.get("penalty_weight"):
        return None
    published = settings["method"] == "o_lora"
    names = ("attribution_model", "aggregation", "granularity", "source", "refresh", "probe", "steps", "quadrature")
    words = ["L1" if published else {"l1": "L1", "squared": "squared"}[settings["penalty"]],
             f"lambda {settings['penalty_weight']:g}"]  # fmt: skip
    words += [f"{name} {settings[name]}" for name in names if name in settings and settings[name] != _DEFAULTS[name]]
    return ", ".join(words), published or settings["similarity"] == "none"


_TRAINING = ("rank", "alpha", "lr", "dropout", "precision", "target_modules", "epochs", "train_limit", "init",
             "fixed_a", "lr_a")  # fmt: skip


def _training(run: Record) -> str:
    """How a run was trained, where that is not the default; float32 and 500 examples are not named."""
    named = [
        _value(value) if name in ("target_modules", "precision") else f"{name.replace('_', ' ')} {_value(value)}"
        for name in _TRAINING
        if (value := value_of(run, name)) not in (_DEFAULTS.get(name), "float32", 500)
    ]
    return ", ".join(named) or "default"


def _same_training(run: Record, other: Record) -> bool:
    """Whether two runs are on one order and seed, and one in how they were trained."""
    names = {*SCALE, *_TRAINING, "seed", "max_tokens"}
    alike = all(value_of(run, name) == value_of(other, name) for name in names)
    return (
        alike and run["tasks"] == other["tasks"] and other["settings"]["method"] in ("aso_lora", "o_lora", "inc_lora")
    )


def _brief(runs: Sequence[Record]) -> str:
    """The numbers of their orders, or the first task of each."""
    return ", ".join(order_of(run) if order_of(run).isdigit() else f"{run['tasks'][0]} first" for run in runs)


def _mean_gap(pairs: Sequence[tuple[Record, Record]], way: str, orders: str, measure: str = "AA") -> str:
    """The mean difference of the pairs that were scored so; their orders after it where these are fewer."""
    scored = [pair for pair in pairs if difference([pair], way, measure) is not None]
    own = _brief([run for run, _ in scored])
    return shown(difference(scored, way, measure), "+") + (f", {own}" if own != orders else "") if scored else ""


def by_preferences(runs: list[Record], options: argparse.Namespace) -> Rows:
    """AA and FM as generated and calibrated, and how much of FM goes when a shift of preference is taken out."""
    rows, shares = [["run", "", "order", "AA", "FM", "calibrated: AA", "FM", "share of FM gone"]], []
    for run in (each for each in runs if ways_of(each) == list(WAYS)):
        values = [cached(run, way, name) for way in ("generate", "calibrated") for name in ("AA", "FM")]
        share = 100 * (1 - values[3][0] / values[1][0]) if values[1][0] >= LEAST_FORGOTTEN else None
        shares += [] if share is None else [share]
        cells = [f"{each[0]:.1f}" for each in values]
        rows.append([run["name"], label(run, runs), order_of(run), *cells, "" if share is None else f"{share:.0f}%"])
    if shares:
        middle = f"median {statistics.median(shares):.0f}% ({min(shares):.0f} to {max(shares):.0f}%)"
        rows.append([f"{len(shares)} runs with FM of {LEAST_FORGOTTEN} and more", *[""] * 6, middle])
    return rows


def by_pairs(runs: list[Record], options: argparse.Namespace) -> Rows:
    """w of a later task to an earlier one at its end, and how much learning it changed the accuracy on that.

    Orders that begin alike have the same first pairs, which count once. The last row is the rank correlation.
    """
    pairs: dict[tuple[str, ...], tuple[float, float]] = {}
    for run in (each for each in runs if options.way in ways_of(each)):
        matrix = matrices(run, options.way, 0)[0][0]
        for later, earlier in itertools.product(range(1, len(run["tasks"])), range(len(run["tasks"]))):
            w = run["stages"][later].get("similarity", {}).get(run["tasks"][earlier])
            change = matrix[later, earlier] - matrix[later - 1, earlier]
            if w is not None and not numpy.isnan(change):
                key = (label(run, runs), *run["tasks"][: later + 1], run["tasks"][earlier])
                pairs.setdefault(key, (float(numpy.mean(w)), float(change)))
    rows = [["", "later", "earlier", "w", "change of the earlier"]]
    rows += [[key[0], key[-2], key[-1], f"{w:.2f}", f"{change:+.1f}"] for key, (w, change) in pairs.items()]
    if len(pairs) > 2:
        found = spearmanr(*zip(*pairs.values(), strict=True))
        rows.append(
            [f"{len(pairs)} pairs", "", "", "rank correlation", f"{found.statistic:+.2f} (p {found.pvalue:.2f})"]
        )
    return rows


def by_spans(runs: list[Record], options: argparse.Namespace) -> Rows:
    """Of runs whose adapters were measured: means over pairs of tasks, least to most, in percent."""
    names = {
        "rows of A shared": "span of a later A in that of an earlier A", "by chance": "by chance",
        "A on earlier inputs / on its own": "what a later A reads of earlier inputs, of that of its own",
        "BA on earlier inputs / on its own": "what B A does with them, of that with its own",
        "columns of B shared": "span of a later B in that of an earlier B", "by chance, B": "by chance",
    }  # fmt: skip
    rows = [["run", *names.values()]]
    for run in (each for each in runs if "spans" in each):
        cells = []
        for name in names:
            values = [100 * pair[name] for pair in run["spans"]]
            cells.append(f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        rows.append([run["name"], *cells])
    return rows


def by_commands(runs: list[Record], options: argparse.Namespace) -> Rows:
    """The settings of each run, as arguments of run.py where they are not the default."""
    rows = [["run", "arguments of run.py"]]
    for run in runs:
        chosen = [(f"--{name.replace('_', '-')}", value) for name, value in run["settings"].items()
                  if name != "method" and value != _DEFAULTS.get(name)]  # fmt: skip
        words = [name if value is True else f"{name} {value}" for name, value in chosen]
        rows.append([run["name"], f"--method {run['settings']['method']} {' '.join(words)}"])
    return rows


SHAPES = {
    "orders": by_orders, "tasks": by_tasks, "measures": by_measures, "penalties": by_penalties,
    "preferences": by_preferences, "pairs": by_pairs, "spans": by_spans, "commands": by_commands,
}  # fmt: skip


def comparable(runs: Sequence[Record]) -> None:
    """Refuse to put runs of different scale into one table.

    Raises:
        SystemExit: with what differs.
    """
    for name in SCALE:
        values = sorted({str(value_of(run, name)) for run in runs})
        if len(values) > 1:
            raise SystemExit(f"These runs differ in {name} ({', '.join(values)}): choose those that belong together.")


def _order(order: str) -> str:
    return f"Order {order}" if order.isdigit() else order


def _spread(values: list[float]) -> str:
    """The mean, and the deviation where there are several."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table; shorter ones are filled."""
    width = max(map(len, rows))
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * width, *lines[1:]])


def report(run: Record) -> str:
    """What a run prints when it is done: for each way of scoring the accuracy matrix and the measures."""
    parts = []
    for way in ways_of(run):
        matrix, alone = matrices(run, way, 0)
        rows = [[f"after learning ({way})", *run["tasks"]]]
        rows += [[task, *("" if numpy.isnan(v) else f"{v:.1f}" for v in row)]
                 for task, row in zip(run["tasks"], matrix[0], strict=True)]  # fmt: skip
        rows += [] if alone is None else [["(each alone)", *(f"{value:.1f}" for value in alone[0])]]
        measures = [
            f"{name} {shown(cached(run, way, name))}" for name in MEASURES if cached(run, way, name) is not None
        ]
        parts.append(markdown(rows) + "\n" + "   ".join(measures))
    note = "AA average accuracy, FM forgetting (lower is better), BWT backward and FWT forward transfer; 95% intervals"
    return "\n" + "\n\n".join(parts) + f"\n({note})"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    print(markdown(table(parse(arguments))))


if __name__ == "__main__":
    main()
