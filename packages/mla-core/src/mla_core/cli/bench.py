"""Measure contenders side by side: each is checked against the truth, and only then timed.

Give case names, or a named set with --set. Eager times include planning and everything a decode
step pays; with --graph, replays of a captured CUDA graph are timed as well. --rows draws results
that were measured before.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import TextIO

import torch

from mla_core.arch import arch_of
from mla_core.bench import BenchSet, Event, Settings, load_sets, parse_case, plot, roofline
from mla_core.bench import contenders as field
from mla_core.bench import run as measure
from mla_core.bench.rows import Row, read_rows
from mla_core.cli.console import make_console, print_table
from mla_core.errors import BackendUnavailableError, LayoutError

_DEFAULT_SET = "smoke"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("cases", nargs="*", help="such as decode/bf16/h16/q1/b8/s4096/p64")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="NAME")
    parser.add_argument("--sets-file", type=Path, help="TOML file with more sets")
    parser.add_argument("--list", action="store_true", help="list the sets and contenders")
    parser.add_argument(
        "--contenders",
        help="comma-separated backends, baselines or module:attribute of adapters "
        "(default: those of the set, else all)",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: %(default)s")
    parser.add_argument("--graph", action="store_true", help="also time CUDA-graph replays")
    parser.add_argument("--samples", type=int, default=50, help="most samples of a row")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to sample a row")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write DIR/<arch>/<set>-<time>.jsonl")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw time over context length")
    parser.add_argument(
        "--roofline", type=Path, metavar="PNG", help="draw TFLOP/s over flops per byte"
    )
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="draw these results files, and measure nothing",
    )


def run(options: argparse.Namespace) -> int:
    """Measure and report; 1 if a contender was wrong or crashed, or if nothing was timed."""
    sets = load_sets() | (load_sets(options.sets_file) if options.sets_file else {})
    if options.list:
        return _list(sets)
    if options.rows:
        _draw(_stored_rows(options), options)
        return 0
    label, chosen = _chosen(options, sets)
    settings = Settings(
        device=_device(options.device),
        graph=options.graph,
        max_samples=options.samples,
        min_samples=min(5, options.samples),
        seconds=options.seconds,
        seed=options.seed,
    )
    names = chosen.contenders
    if options.contenders:
        names = tuple(name.strip() for name in options.contenders.split(",") if name.strip())
    contenders = field.find(names or field.names())
    total = len(chosen.cases) * len(contenders) * len(settings.modes)
    events: list[Event] = []
    with _results_file(options.out, label, settings) as file, _progress(total) as advance:
        for event in measure(chosen.cases, contenders, settings):
            events.append(event)
            advance(event)
            if event.row is not None and file is not None:
                file.write(event.row.to_json() + "\n")
                file.flush()
    rows = [event.row for event in events if event.row is not None]
    _report(events)
    _draw(rows, options)
    is_clean = not {"wrong", "failed"} & {event.outcome for event in events}
    return 0 if rows and is_clean else 1


def _stored_rows(options: argparse.Namespace) -> list[Row]:
    if options.cases or options.sets:
        raise LayoutError("bench: --rows measures nothing: give no cases and no --set with it")
    if options.plot is None and options.roofline is None:
        raise LayoutError("bench: --rows must come with --plot or --roofline")
    rows = []
    for path in options.rows:
        try:
            rows += read_rows(path)
        except (OSError, ValueError, TypeError) as exc:
            raise LayoutError(
                f"bench: --rows must be results files of this command, got {path}: {exc}"
            ) from exc
    return rows


def _draw(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the pictures that were asked for."""
    for draw, path in ((plot.draw, options.plot), (roofline.draw, options.roofline)):
        if path is not None:
            plot.save(draw(rows), path)
            print(f"wrote {path}")


def _chosen(options: argparse.Namespace, sets: dict[str, BenchSet]) -> tuple[str, BenchSet]:
    """Join the named sets and the cases of the command line; the label names the results file."""
    names = options.sets or ([] if options.cases else [_DEFAULT_SET])
    if unknown := sorted(set(names) - sets.keys()):
        raise LayoutError(
            f"bench: --set must be one of {', '.join(sets)}, got {', '.join(unknown)}"
        )
    cases = [case for name in names for case in sets[name].cases]
    cases += [parse_case(name) for name in options.cases]
    contenders = dict.fromkeys(name for s in names for name in sets[s].contenders)
    label = "+".join(names) or "cases"
    return label, BenchSet(label, "", tuple(contenders), tuple(dict.fromkeys(cases)))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise LayoutError(f"bench: --device must be cpu or cuda, got {name!r}") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(f"bench: --device {name}: torch sees no GPU here")
    return device


@contextmanager
def _results_file(out: Path | None, label: str, settings: Settings) -> Iterator[TextIO | None]:
    if out is None:
        yield None
        return
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = out / arch_of(settings.device) / f"{label}-{stamp}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield file
    print(f"wrote {path}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Event], None]]:
    """Show progress on stderr: a bar where rich is installed, else one line per event."""
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        counter = Counter[str]()

        def advance(event: Event) -> None:
            counter["done"] += 1
            print(f"[{counter['done']}/{total}] {_line(event)}", file=sys.stderr, flush=True)

        yield advance
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=make_console(stderr=True)) as progress:
        task = progress.add_task("bench", total=total)

        def advance(event: Event) -> None:
            progress.update(task, advance=1, description=f"{event.case} {event.contender}")

        yield advance


def _report(events: Sequence[Event]) -> None:
    """Print one table per case, the quickest contender first; plain lines without rich."""
    columns = ("contender", "us", "p10..p90", "GB/s", "TFLOP/s", "ceiling", "x best", "error")
    for case, group in groupby(events, key=lambda event: event.case):
        of_case = list(group)
        timed = sorted(
            (event.row for event in of_case if event.row is not None),
            key=lambda row: row.median_us,
        )
        cells = [_cells(row, timed) for row in timed]
        try:
            console = make_console()
        except BackendUnavailableError:
            print(f"\n{case}")
            for row in (columns, *cells):
                print("  ".join(cell.ljust(16) for cell in row).rstrip())
        else:
            print_table(console, str(case), columns, cells, numbers=columns[1:], whole=columns[:1])
        kernels = dict.fromkeys(f"{row.backend}: {row.kernel}" for row in timed)
        reasons = [
            f"{_label(event.contender, event.graph)}: {event.outcome}: {event.detail}"
            for event in of_case
            if event.row is None
        ]
        print("\n".join(f"  {note}" for note in (*kernels, *reasons)))


def _cells(row: Row, timed: Sequence[Row]) -> tuple[str, ...]:
    best = min(other.median_us for other in timed if other.graph == row.graph)
    return (
        _label(row.backend, row.graph),
        _number(row.median_us),
        f"{_number(row.p10_us)}..{_number(row.p90_us)}",
        _number(row.gbps),
        f"{row.tflops:.3g}",
        f"{100 * row.share:.1f}%",
        f"{row.median_us / best:.2f}",
        f"{row.error:.1e}",
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _label(contender: str, graph: bool) -> str:
    return f"{contender} (graph)" if graph else contender


def _line(event: Event) -> str:
    result = f"{event.row.median_us:.1f} us" if event.row is not None else event.detail
    return f"{event.case} {_label(event.contender, event.graph)}: {event.outcome} {result}"


def _list(sets: dict[str, BenchSet]) -> int:
    for case_set in sets.values():
        print(f"{case_set.name}: {case_set.description} ({len(case_set.cases)} cases)")
        for case in case_set.cases:
            print(f"  {case}")
    print(f"contenders: {', '.join(field.names())}")
    return 0
