"""What the method costs, against its peers, in one table with ratios, spread and targets.

    python examples/speed/benchmark.py                                  # SmolLM2-135M, a small random T5 and BERT
    python examples/speed/benchmark.py --device cuda --model smollm2,llama-1b
    python examples/speed/benchmark.py --only step,penalty --repeats 9 --out runs/steps.json
    python examples/speed/benchmark.py --quick                          # tiny random models: a check, no numbers

Ours and the peer (Captum, stock PEFT, the loop of the O-LoRA code, one matrix product, torch.sort) run in this
process, in turn, and are checked to compute the same thing; peak memory is taken in processes of its own. The JSON
file is written after each line, so that a run that is cut short leaves what it measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/: the package `speed`, and tasks.py
    from speed.command import main

    sys.exit(main())
