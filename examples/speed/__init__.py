"""The benchmark behind every number in docs/performance.md; `benchmark.py` is its command."""
