"""Learn an order of tasks with one method, test all of them after each, and print the results.

    python examples/continual_benchmark/run.py --method aso_lora --order 1 --data ../shared/cl_benchmark
    python examples/continual_benchmark/run.py --help

Stopped, it goes on after the last finished task when started again with the same settings.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/: the package, and tasks.py
    from continual_benchmark.chain import run
    from continual_benchmark.settings import parse
    from continual_benchmark.table import report

    settings = parse()
    for name in ("transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(report(run(settings)))
