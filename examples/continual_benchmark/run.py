"""Learn an order of tasks with one method, and print its row of the paper's table.

    python examples/continual_benchmark/run.py --method aso_lora --order 1 --data ../shared/cl_benchmark
    python examples/continual_benchmark/run.py --method inc_lora --order dbpedia,agnews --train-limit 100
    python examples/continual_benchmark/run.py --help

Stopped, it goes on where it was when started again with the same settings.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/: the package, and tasks.py
    from continual_benchmark.chain import run
    from continual_benchmark.report import report
    from continual_benchmark.settings import parse

    settings = parse()
    for name in ("transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(report(run(settings)))
