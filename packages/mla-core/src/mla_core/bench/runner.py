"""Running cases: prepare everyone, check everyone, then time whoever is right, taking turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mla_core.arch import arch_of
from mla_core.bench import ceilings, rows
from mla_core.bench.cases import BenchCase
from mla_core.bench.contenders import Contender, Prepared
from mla_core.bench.rows import Row
from mla_core.bench.timing import Clock, EventClock, GraphClock, HostClock, summarise
from mla_core.bench.workload import DecodeWorkload, build_decode
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError, MLAError
from mla_core.testing.assertions import TOLERANCES

#: ``skipped``: cannot run this; ``wrong``: failed the check; ``failed``: raised something else.
Outcome = Literal["timed", "skipped", "wrong", "failed"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Parameters
    ----------
    device : torch.device
    graph : bool
        Also time replays of a captured CUDA graph.
    max_samples, min_samples : int
        Bounds on the samples of one row.
    seconds : float
        A row stops sampling after this long, once it has ``min_samples``.
    seed : int
    ceiling_megabytes : int, optional
        Size of the memory test; see `mla_core.bench.ceilings.measure`.
    """

    device: torch.device
    graph: bool = False
    max_samples: int = 50
    min_samples: int = 5
    seconds: float = 1.0
    seed: int = 0
    ceiling_megabytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.device.type not in ("cpu", "cuda"):
            raise LayoutError(f"bench: device must be cpu or cuda, got {self.device}")
        if self.graph and self.device.type != "cuda":
            raise LayoutError(f"bench: graph must be False on {self.device}; it needs a CUDA GPU")
        if not 1 <= self.min_samples <= self.max_samples:
            raise LayoutError(
                "bench: min_samples must be in 1..max_samples, got "
                f"{self.min_samples} and {self.max_samples}"
            )

    @property
    def modes(self) -> tuple[bool, ...]:
        """Values of the column ``graph``."""
        return (False, True) if self.graph else (False,)


@dataclass(frozen=True, slots=True)
class Event:
    """The outcome of one contender on one case in one mode; ``row`` only if it was timed."""

    case: BenchCase
    contender: str
    graph: bool
    outcome: Outcome
    detail: str = ""
    row: Row | None = None


@dataclass(slots=True)
class _Entry:
    """One row being measured."""

    contender: str
    graph: bool
    kernel: str
    error: float
    clock: Clock
    samples: list[float] = field(default_factory=list)

    def is_done(self, settings: Settings, calls_per_sample: int) -> bool:
        count = len(self.samples)
        spent = sum(self.samples) * calls_per_sample * 1e-6
        enough = count >= settings.min_samples and spent >= settings.seconds
        return enough or count >= settings.max_samples


class _WrongResultError(Exception):
    """A contender's output is too far from the truth to be timed."""


def run(
    cases: Sequence[BenchCase], contenders: Sequence[Contender], settings: Settings
) -> Iterator[Event]:
    """Measure every contender on every case, in each mode; yield one event for each.

    Contenders take turns sample by sample, so that a change of clocks or load meets all of them.
    """
    for case in cases:
        yield from _run_case(case, contenders, settings)
        # Caches of one case would crowd out those of the next.
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _run_case(
    case: BenchCase, contenders: Sequence[Contender], settings: Settings
) -> Iterator[Event]:
    workload = build_decode(case, settings.device, seed=settings.seed)
    entries: list[_Entry] = []
    for contender in contenders:
        yield from _admit(contender, workload, settings, entries)
    # A sample on the host is one call; on a GPU it is at least a tour over the data sets.
    calls = 1 if settings.device.type == "cpu" else len(workload.kvs)
    open_entries = list(entries)
    while open_entries:
        for entry in open_entries:
            entry.samples.append(entry.clock.sample())
        open_entries = [e for e in open_entries if not e.is_done(settings, calls)]
    for entry in entries:
        row = _row(entry, workload, settings)
        yield Event(case, entry.contender, entry.graph, "timed", row=row)


def _admit(
    contender: Contender, workload: DecodeWorkload, settings: Settings, entries: list[_Entry]
) -> Iterator[Event]:
    """Prepare and check a contender in each mode: an entry if it is right, else an event."""
    prepared: Prepared | None = None
    for graph in settings.modes:
        try:
            prepared = prepared or contender.prepare(workload)
            error, clock = _checked_clock(prepared, workload, graph)
        except (MLAError, torch.OutOfMemoryError) as exc:
            outcome: Outcome = "skipped"
            detail = str(exc)
        except _WrongResultError as exc:
            outcome, detail = "wrong", str(exc)
        # Contenders are foreign code: one that crashes must not end an hour of measuring. The
        # event carries the cause, and the command's exit status tells.
        except Exception as exc:
            outcome, detail = "failed", f"{type(exc).__name__}: {exc}"
        else:
            entries.append(_Entry(contender.name, graph, prepared.kernel, error, clock))
            continue
        yield Event(workload.case, contender.name, graph, outcome, detail)


def _checked_clock(
    prepared: Prepared, workload: DecodeWorkload, graph: bool
) -> tuple[float, Clock]:
    """Run every data set, compare with the truth, and return the error and a clock."""
    num_sets = len(workload.kvs)
    call = prepared.replay if graph else prepared.step
    error = _check([call(i) for i in range(num_sets)], workload)
    if graph:
        clock = GraphClock(call, num_sets)
        for out in clock.outputs:
            out.fill_(float("nan"))
        clock.replay()
        return max(error, _check(clock.outputs, workload)), clock
    if workload.device.type == "cuda":
        return error, EventClock(call, num_sets)
    return error, HostClock(call, num_sets)


def _check(outs: list[torch.Tensor], workload: DecodeWorkload) -> float:
    limit = TOLERANCES[dtype_name(workload.out_dtype)].relative_l2
    error = workload.error(outs)
    # Written so that NaN fails.
    if not error <= limit:
        raise _WrongResultError(f"relative L2 error {error:.3g}, limit {limit:g}; not timed")
    return error


def _row(entry: _Entry, workload: DecodeWorkload, settings: Settings) -> Row:
    case, device = workload.case, settings.device
    summary = summarise(entry.samples)
    limit = ceilings.measure(device, case.q_dtype, megabytes=settings.ceiling_megabytes)
    num_bytes, flops = workload.num_bytes, workload.num_flops
    return Row(
        case=str(case),
        op=case.op,
        backend=entry.contender,
        kernel=entry.kernel,
        arch=arch_of(device),
        device=rows.device_name(device),
        median_us=summary.median,
        p10_us=summary.p10,
        p90_us=summary.p90,
        bytes=num_bytes,
        flops=flops,
        gbps=num_bytes / summary.median * 1e-3,
        tflops=flops / summary.median * 1e-6,
        ceiling_gbps=limit.gbps,
        ceiling_tflops=limit.tflops,
        share=limit.floor_us(num_bytes, flops) / summary.median,
        error=entry.error,
        graph=entry.graph,
        versions=rows.versions(),
        commit=rows.commit(),
        date=rows.now(),
    )
