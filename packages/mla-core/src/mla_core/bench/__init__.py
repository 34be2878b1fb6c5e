"""Benchmarks: correct first, then timed side by side, then written down as JSON lines.

Read in this order: `cases` names what is measured, `workload` draws its data, `contenders` are
those who compete, `timing` holds the clocks, `runner` puts them together and `rows` is the result.
Everything here needs torch alone; ``mla bench`` adds the progress bar and the plot.
"""

from __future__ import annotations

from mla_core.bench.cases import BenchCase, BenchSet, load_sets, parse_case
from mla_core.bench.contenders import Contender, Prepared
from mla_core.bench.rows import Row
from mla_core.bench.runner import Event, Settings, run

__all__ = [
    "BenchCase",
    "BenchSet",
    "Contender",
    "Event",
    "Prepared",
    "Row",
    "Settings",
    "load_sets",
    "parse_case",
    "run",
]
