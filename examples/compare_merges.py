"""Which way to merge a chain of adapters? Test all of them on the chain's tasks; nothing is trained.

python examples/compare_merges.py runs/demo/chain                                  # after `make demo`
python examples/compare_merges.py CHAIN --data FOLDER --model NAME --split train   # to choose by training examples
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from tasks import accuracy, best_device, load_model, read_task

from peft_aso import MERGES, MissingInputsError, load_chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chain", type=Path, help="a folder of save_chain")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="a folder of task folders")
    parser.add_argument("--model", default="smollm2", help="folder or Hub id of the base model")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="which examples are answered")
    parser.add_argument("--limit", type=int, help="at most this many examples a task")
    args = parser.parse_args()
    base, tokenizer = load_model(args.model)
    model = load_chain(base.to(best_device()), args.chain)
    names = [*model.base_model.history, model.base_model.current_task]
    tasks = [read_task(args.data / name, args.limit, args.limit) for name in names]
    for task in tasks:
        task.test = task.test if args.split == "test" else task.train
    width = max(9, *(len(name) + 2 for name in names))
    print("Accuracy (%)".ljust(16) + "".join(name.rjust(width) for name in (*names, "mean")))
    for rule in MERGES:
        try:
            merged = copy.deepcopy(model).merge_and_unload(merge=rule)
        except MissingInputsError as error:
            print(f"{rule.ljust(16)}  {error}")
            continue
        found = [100 * accuracy(merged, tokenizer, task) for task in tasks]
        print(
            rule.ljust(16) + "".join(f"{value:{width}.1f}" for value in (*found, sum(found) / len(found))), flush=True
        )


if __name__ == "__main__":
    main()
