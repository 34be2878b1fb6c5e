"""What scripts that time fused ops have alike: arguments, a table line by line, rows in a file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mla_core.bench.ceilings import measure
from mla_core.errors import MLAError

#: A heading, how what is below it is formatted, and the field of a result that it shows.
Column = tuple[str, str, str]

BYTES: tuple[Column, ...] = (("bytes", ">11", "bytes"), ("cold", ">4", "is_cold"))
ERROR: Column = ("error", ">8.1e", "error")
TIMES: tuple[Column, ...] = tuple(
    (title, ">9.2f", f"{name}_us")
    for title, name in (("us", "median"), ("p10", "p10"), ("p90", "p90"))
)
RATE: Column = ("GB/s", ">7.0f", "gbps")
SHARE: Column = ("share", ">6.1%", "share")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all scripts take."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", help="file to write the results to, one list")
    return made


def introduce(device: torch.device) -> float:
    """Print what measures, and return the best rate that it reads or copies at, in GB/s."""
    ceiling = measure(device, "bf16", megabytes=None if device.type == "cuda" else 16).gbps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {name}, {ceiling:.0f} GB/s at most")
    return ceiling


def fill(
    columns: Sequence[Column],
    cases: Iterable[tuple[Any, ...]],
    measured: Callable[..., Any],
    file: str | None,
) -> int:
    """Measure every case and print its line; return 1 when a case was wrong.

    Parameters
    ----------
    columns : sequence of (heading, format, field)
        The first ones show a case's own values, also where it fails: a case that raises an
        ``AssertionError`` is wrong, one that raises an ``MLAError`` is none of those that run.
    cases : iterable of tuples
    measured : callable
        Takes a case's values and returns a dataclass.
    file : str, optional
        Gets all results as one list.
    """
    print(" ".join(_cell(title, re.sub(r"\..*", "", spec)) for title, spec, _ in columns))
    results, is_right = [], True
    for case in cases:
        try:
            result = measured(*case)
        except (MLAError, AssertionError) as exc:
            start = [_cell(value, spec) for value, (_, spec, _) in zip(case, columns, strict=False)]
            print(*start, exc, flush=True)
            is_right = is_right and isinstance(exc, MLAError)
            continue
        results.append(asdict(result))
        print(" ".join(_cell(results[-1][field], spec) for _, spec, field in columns), flush=True)
    if file:
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(results, stream, indent=1)
    return 0 if is_right else 1


def _cell(value: Any, spec: str) -> str:
    """Format one value; None is left blank."""
    if isinstance(value, bool) or value is None:
        value, spec = {True: "yes", False: "no", None: ""}[value], re.sub(r"\..*", "", spec)
    return format(value, spec)
