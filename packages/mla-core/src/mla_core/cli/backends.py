"""List every registered backend with its status, and the cause when it cannot be used."""

from __future__ import annotations

import argparse
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import torch

from mla_core import registry
from mla_core.arch import arch_of
from mla_core.cli.console import make_console, print_table
from mla_core.registry import Record
from mla_core.select import probe_failure

_WIDTH_FOR_DESCRIPTION = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--arch", help="ask the probes about this architecture (default: here)")


def run(options: argparse.Namespace) -> int:
    """Print the table; 0 if at least one backend can be used."""
    arch = options.arch or local_arch()
    console = make_console()
    records = registry.records()
    statuses = {record.name: status(record, arch) for record in records}
    columns = ["name", "distribution", "priority", "status", "rows", "description"]
    if console.width < _WIDTH_FOR_DESCRIPTION:
        columns.remove("description")
    print_table(
        console,
        f"backends on {arch}",
        columns,
        (_cells(record, statuses[record.name])[: len(columns)] for record in records),
        numbers=("priority",),
        whole=("name", "distribution", "rows"),
    )
    if not records:
        console.print("no distribution registers a backend; is mla-core itself installed?")
    return 0 if "ok" in statuses.values() else 1


def local_arch() -> str:
    """Return the architecture of the first GPU, or ``cpu``."""
    return arch_of("cuda" if torch.cuda.is_available() else "cpu")


def status(record: Record, arch: str) -> str:
    """Say whether a backend can be used on an architecture: ``ok``, or a word and the cause."""
    if record.backend is None:
        return f"unusable: {record.error}"
    if reason := probe_failure(record.backend, arch):
        return f"not here: {reason}"
    return "ok" if record.backend.capabilities else "empty: offers no kernel yet"


def _cells(record: Record, shown_status: str) -> tuple[str, ...]:
    distributions = "\n".join(f"{name} {_version(name)}" for name in record.distributions)
    if record.backend is None:
        return record.name, distributions, "", shown_status, "", ""
    counts = Counter(row.op for row in record.backend.capabilities)
    return (
        record.name,
        distributions,
        str(record.backend.priority),
        shown_status,
        "\n".join(f"{op} {count}" for op, count in counts.items()),
        record.backend.description,
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "?"
