"""`python benchmarks` is `python -m fastattn bench` that knows the peers and commit of this tree.

benchmarks/
    peers.csv              every known peer's time on one H100, for the column "x known"
    results/               JSON of the latest run on each card: header, rows
    report.py              makes RESULTS.md, README's numbers and the pictures from those files
    sdpa_comparison.ipynb  the comparison with PyTorch's SDPA as a notebook
    correctness.py         inputs that PyTorch's own attention gets wrong, and ours
    gpu_run.py             GPU tests and benchmarks in one call, on a machine without a network
"""

import pathlib
import sys

from fastattn.bench import cli

tree = pathlib.Path(__file__).resolve().parent.parent
sys.exit(cli.main(sys.argv[1:], "python benchmarks", tree))
