"""Benchmarks from a checkout: ``mla bench``, with results kept under ``benchmarks/results``.

    python benchmarks/run.py --set cpu
    python benchmarks/run.py decode/bf16/h16/q1/b8/s4096/p64 --contenders reference,sdpa_loop

Works without an installation of the command line's extras; ``--out`` overrides the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mla_core.cli.main import main

if __name__ == "__main__":
    results = Path(__file__).resolve().parent / "results"
    sys.exit(main(["bench", "--out", str(results), *sys.argv[1:]]))
