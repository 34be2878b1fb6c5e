"""Run a kernel of a code object over CPU arrays: the package's front door."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cdna_emulator import native_core
from cdna_emulator.checks.findings import CHECKS, Finding
from cdna_emulator.checks.hazards import find_hazards
from cdna_emulator.checks.wording import describe
from cdna_emulator.code_object import CodeObject
from cdna_emulator.dispatch import Launch, extent, prepare, system_sgprs
from cdna_emulator.errors import ArgumentError, CheckError
from cdna_emulator.native_core import Counters, NativeProgram, RunConfig
from cdna_emulator.numpy_core.core import run_grid
from cdna_emulator.profile import Profile
from cdna_emulator.program import Program, load_program
from cdna_emulator.schedule import DEFAULT_SCHEDULE, Schedule

#: Wave-instructions of one workgroup after which it counts as an infinite loop.
MAX_INSTRUCTIONS = 200_000_000
_CHECK_BITS = {"waits": 1, "barrier_writes": 2, "races": 4, "uninitialised": 8, "barriers": 16}
#: Chunks of the grid that each thread takes, one after another.
_CHUNKS_PER_THREAD = 8


@dataclass(frozen=True)
class Result:
    """What a run reports; the arrays it wrote are the caller's own.

    Parameters
    ----------
    findings : list of Finding
    profile : Profile
    instructions : int
        Wave-instructions executed.
    findings_lost : int
        Mistakes met at more instructions than a thread has room to report.
    seconds : float
        Wall-clock time of the execution alone.
    """

    findings: list[Finding]
    profile: Profile
    instructions: int
    findings_lost: int
    seconds: float = field(compare=False)


def run(
    code_object: CodeObject | bytes | str | Path,
    kernel: str | None,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any] | Mapping[str, Any],
    *,
    arch: str | None = None,
    schedule: str = DEFAULT_SCHEDULE,
    checks: str | Iterable[str] = "all",
    core: Literal["native", "numpy"] = "native",
    threads: int | None = None,
    dynamic_lds: int = 0,
    max_instructions: int = MAX_INSTRUCTIONS,
    strict: bool = True,
) -> Result:
    """Execute a kernel instruction by instruction.

    Parameters
    ----------
    code_object : CodeObject, bytes or path
        A linked code object for gfx942 or gfx950, version 5 or 6.
    kernel : str, optional
        Its name; may be ``None`` when there is only one.
    grid : int or up to 3 ints
        Workgroups in x, y and z.
    block : int or up to 3 ints
        Work-items of a workgroup.
    args : sequence or mapping by name
        NumPy arrays and torch CPU tensors are memory, read and written in place; ``int``,
        ``float``, NumPy scalars and ``bytes`` are values; ``None`` is a null pointer.
    arch : str, optional
        Refuse a code object of another architecture.
    schedule : str
        Order of waves; see `cdna_emulator.schedule`.
    checks : "all", "none" or names of `cdna_emulator.checks.findings.CHECKS`
        Accesses outside the arguments' memory are found whatever is chosen.
    core : "native" or "numpy"
        ``numpy`` is the slow second implementation; it runs waves to barriers, finds what lies out
        of bounds, and takes no other schedule or check.
    threads : int, optional
        Workgroups run in parallel on so many threads; default: all processors.
    dynamic_lds : int
        Bytes of LDS beside what the kernel declares.
    max_instructions : int
        Of one workgroup, after which it is stopped with a finding.
    strict : bool
        Raise when there are findings.

    Returns
    -------
    Result

    Raises
    ------
    CheckError
        The checkers found mistakes and ``strict`` is set; the arrays are written all the same.
    ArgumentError, CodeObjectError, UnknownInstructionError
        The launch cannot be done as asked.
    """
    if not isinstance(code_object, CodeObject):
        code_object = _read(_content(code_object))
    if arch is not None and arch != code_object.arch:
        raise ArgumentError(
            f"run: arch must be that of the code object, {code_object.arch}, got {arch}"
        )
    for name, number in (("threads", threads), ("max_instructions", max_instructions)):
        if number is not None and number < 1:
            raise ArgumentError(f"run: {name} must be 1 or more, got {number}")
    order, wanted = Schedule.parse(schedule), _checks(checks)
    chosen = code_object.kernel(kernel)
    loaded = _load(code_object, chosen.name)
    program = loaded.program
    launch = prepare(
        code_object, chosen, extent("grid", grid), extent("block", block), args, dynamic_lds
    )
    started = time.perf_counter()
    if core == "numpy":
        if wanted or order.kind != "run_to_barrier" or order.late_dma:
            raise ArgumentError(
                "run: the numpy core takes schedule='run_to_barrier' and checks='none' only"
            )
        counters = run_grid(program, launch, max_instructions)
    elif core == "native":
        counters = _run_native(loaded.native, launch, order, wanted, threads, max_instructions)
    else:
        raise ArgumentError(f"run: core must be native or numpy, got {core!r}")
    seconds = time.perf_counter() - started
    findings = describe(program, launch.memory, counters)
    if "hazards" in wanted:
        findings += loaded.hazards
    if findings and strict:
        raise CheckError(findings)
    profile = Profile(program, counters.executed, counters.bytes, counters.bank_cycles)
    return Result(findings, profile, counters.instructions, counters.findings_lost, seconds)


def _content(source: bytes | str | Path) -> bytes:
    return bytes(source) if isinstance(source, bytes | bytearray) else Path(source).read_bytes()


@lru_cache(maxsize=64)
def _read(data: bytes) -> CodeObject:
    return CodeObject.read(data)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A kernel's program, and what is worked out of it once for all its runs."""

    code_object: CodeObject
    program: Program

    @cached_property
    def native(self) -> NativeProgram:
        """The program as the native core takes it."""
        return NativeProgram(self.program)

    @cached_property
    def hazards(self) -> tuple[Finding, ...]:
        """Wait states that are missing, whatever the arguments."""
        return tuple(find_hazards(self.program))


_LOADED: dict[tuple[int, str], _Loaded] = {}
_LOADED_LOCK = threading.Lock()
_LOADED_KEPT = 256


def _load(code_object: CodeObject, name: str) -> _Loaded:
    """Return a kernel's program, kept for later runs of the same code object."""
    key = (id(code_object), name)
    with _LOADED_LOCK:
        kept = _LOADED.get(key)
        if kept is None or kept.code_object is not code_object:
            while len(_LOADED) >= _LOADED_KEPT:
                del _LOADED[next(iter(_LOADED))]
            kept = _LOADED[key] = _Loaded(code_object, load_program(code_object, name))
    return kept


def _checks(checks: str | Iterable[str]) -> frozenset[str]:
    if checks == "all":
        return frozenset(CHECKS)
    wanted = frozenset(() if checks == "none" else [checks] if isinstance(checks, str) else checks)
    if unknown := sorted(wanted - set(CHECKS)):
        raise ArgumentError(
            f"run: checks must be all, none or some of {', '.join(CHECKS)}, got {unknown}"
        )
    return wanted


def _run_native(
    native: NativeProgram,
    launch: Launch,
    order: Schedule,
    checks: frozenset[str],
    threads: int | None,
    max_instructions: int,
) -> Counters:
    slots = native_core.memory_slots(launch.memory)
    sgprs = np.array([*launch.user_sgprs, 0], np.uint32)
    config = RunConfig(
        slots=ctypes.addressof(slots),
        slot_count=len(slots),
        initial_sgprs=sgprs.ctypes.data,
        initial_sgpr_count=len(launch.user_sgprs),
        system_first=launch.kernel.descriptor.user_sgpr_count,
        system_sgprs=system_sgprs(launch.kernel),
        workitem_id_mode=launch.kernel.descriptor.workitem_id_mode,
        image_base=launch.image_base,
        entry=native.program.index_of(launch.entry_address),
        seed=order.number,
        slice=order.number,
        schedule=order.kind_number,
        late_dma=order.late_dma,
        max_instructions=max_instructions,
        lds_bytes=launch.lds_bytes,
        scratch_bytes=launch.kernel.private_segment_size,
        grid=(ctypes.c_uint32 * 3)(*launch.grid),
        block=(ctypes.c_uint32 * 3)(*launch.block),
        mode=launch.mode,
        checks=sum(bit for name, bit in _CHECK_BITS.items() if name in checks),
    )
    total = math.prod(launch.grid)
    workers = min(threads or len(os.sched_getaffinity(0)), max(1, total))
    size = max(1, -(-total // (workers * _CHUNKS_PER_THREAD)))
    ranges = [(first, min(first + size, total)) for first in range(0, total, size)]

    def call(bounds: tuple[int, int]) -> Counters:
        mine = RunConfig.from_buffer_copy(config)
        mine.first_workgroup, mine.end_workgroup = bounds
        return native.call(mine)

    if workers == 1:
        parts = [call(bounds) for bounds in ranges]
    else:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(call, ranges))
    return merge(parts, len(native.records))


def merge(parts: list[Counters], count: int) -> Counters:
    """Add up the counters of several calls."""
    total = Counters(
        np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.uint64), [], 0, 0
    )
    for part in parts:
        total.executed += part.executed
        total.bytes += part.bytes
        total.bank_cycles += part.bank_cycles
        total.findings += part.findings
        total.findings_lost += part.findings_lost
        total.instructions += part.instructions
    return total
