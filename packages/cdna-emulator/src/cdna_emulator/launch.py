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
from cdna_emulator.arguments import pack_arguments
from cdna_emulator.checks.findings import CHECKS, Finding
from cdna_emulator.checks.hazards import find_hazards
from cdna_emulator.checks.wording import describe
from cdna_emulator.code_object import CodeObject, Kernel
from cdna_emulator.errors import ArgumentError, CheckError
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.native_core import Counters, NativeProgram, RunConfig
from cdna_emulator.numpy_core.core import run_grid
from cdna_emulator.profile import Profile
from cdna_emulator.program import Program, load_program
from cdna_emulator.schedule import DEFAULT_SCHEDULE, Schedule

#: Bytes of LDS of a workgroup.
LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
MAX_BLOCK = 1024
#: Wave-instructions of one workgroup after which it counts as an infinite loop.
MAX_INSTRUCTIONS = 200_000_000
_CHECK_BITS = {"waits": 1, "barrier_writes": 2, "races": 4, "uninitialised": 8, "barriers": 16}
#: Chunks of the grid that each thread takes, one after another.
_CHUNKS_PER_THREAD = 8
_FP16_OVERFLOW_BIT = 23


@dataclass(frozen=True)
class Launch:
    """Everything that a core needs to know of a launch beside the program."""

    kernel: Kernel
    memory: DeviceMemory
    image_base: int
    user_sgprs: tuple[int, ...]
    entry_address: int
    mode: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    lds_bytes: int


@dataclass(frozen=True)
class Result:
    """What a run reports; the arrays it wrote are the caller's own.

    Parameters
    ----------
    findings : list of Finding
    profile : Profile
    instructions : int
        Wave-instructions executed.
    seconds : float
        Wall-clock time of the execution alone.
    """

    findings: list[Finding]
    profile: Profile
    instructions: int
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
    checks : "all", "none" or names of `CHECKS`
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
    order, wanted = Schedule.parse(schedule), _checks(checks)
    chosen = code_object.kernel(kernel)
    loaded = _load(code_object, chosen.name)
    program = loaded.program
    launch = _prepare(
        code_object, chosen, _extent("grid", grid), _extent("block", block), args, dynamic_lds
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
    return Result(findings, profile, counters.instructions, seconds)


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


def _extent(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(sizes) <= 3 or any(size < 0 for size in sizes):
        raise ArgumentError(f"run: {name} must be 1 to 3 sizes of 0 or more, got {value!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _prepare(
    code_object: CodeObject,
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[Any] | Mapping[str, Any],
    dynamic_lds: int,
) -> Launch:
    items = math.prod(block)
    if not 1 <= items <= MAX_BLOCK:
        raise ArgumentError(f"run: block must be 1 to {MAX_BLOCK} work-items, got {block}")
    if items > kernel.max_flat_workgroup_size:
        raise ArgumentError(
            f"run: block must be at most {kernel.max_flat_workgroup_size} work-items for "
            f"{kernel.name}, got {items}"
        )
    if kernel.reqd_workgroup_size not in (None, block):
        raise ArgumentError(
            f"run: block must be {kernel.reqd_workgroup_size} for {kernel.name}, got {block}"
        )
    lds_bytes = kernel.group_segment_size + dynamic_lds
    if lds_bytes > LDS_BYTES[code_object.arch]:
        raise ArgumentError(
            f"run: LDS must be at most {LDS_BYTES[code_object.arch]} bytes on {code_object.arch}, "
            f"got {lds_bytes}"
        )
    memory = DeviceMemory()
    kernarg = pack_arguments(kernel, args, memory, grid, block)
    kernarg_address = memory.map_bytes("the kernel's arguments", kernarg)
    image_base = _map_image(code_object, memory)
    sgprs, entry = _user_sgprs(kernel, kernarg, kernarg_address, memory, grid, block)
    return Launch(kernel, memory, image_base, sgprs, entry, _mode(kernel), grid, block, lds_bytes)


def _map_image(code_object: CodeObject, memory: DeviceMemory) -> int:
    """Map the loaded code object; return the device address of its address 0."""
    end = max(segment.address + len(segment.data) for segment in code_object.segments)
    base = memory.map_bytes("the code object", bytes(end), writable=True)
    for segment in code_object.load(base):
        view = memory.view(segment.address, len(segment.data))
        assert view is not None
        view[:] = np.frombuffer(segment.data, np.uint8)
    return base


def _user_sgprs(
    kernel: Kernel,
    kernarg: bytes,
    kernarg_address: int,
    memory: DeviceMemory,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
) -> tuple[tuple[int, ...], int]:
    """Return s0 and up at the start, and the address where execution starts."""
    descriptor = kernel.descriptor
    words: list[int] = []

    def push(value: int, count: int) -> None:
        words.extend(value >> (32 * index) & 0xFFFFFFFF for index in range(count))

    if descriptor.enable_private_segment_buffer:
        push(0, 4)
    if descriptor.enable_dispatch_ptr:
        push(memory.map_bytes("the dispatch packet", _packet(kernel, grid, block)), 2)
    if descriptor.enable_queue_ptr:
        push(0, 2)
    if descriptor.enable_kernarg_segment_ptr:
        push(kernarg_address, 2)
    if descriptor.enable_dispatch_id:
        push(0, 2)
    if descriptor.enable_flat_scratch_init:
        push(0, 2)
    if descriptor.enable_private_segment_size:
        push(kernel.private_segment_size, 1)
    entry = kernel.entry_address
    if descriptor.kernarg_preload_length:
        assert kernel.preload_entry_address is not None
        begin = 4 * descriptor.kernarg_preload_offset
        size = 4 * descriptor.kernarg_preload_length
        preloaded = kernarg[begin : begin + size].ljust(size, b"\0")
        words.extend(np.frombuffer(preloaded, np.uint32).tolist())
        entry = kernel.preload_entry_address
    return tuple(words[: descriptor.user_sgpr_count]), entry


def _packet(kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int]) -> bytes:
    """Return the AQL packet of the launch, as the HSA runtime specification lays it out."""
    packet = np.zeros(16, np.uint32)
    packet[0] = 2 | 3 << 16  # kernel dispatch of three dimensions
    packet[1] = block[0] | block[1] << 16
    packet[2] = block[2]
    packet[3:6] = [grid[axis] * block[axis] for axis in range(3)]
    packet[6], packet[7] = kernel.private_segment_size, kernel.group_segment_size
    return packet.tobytes()


def _mode(kernel: Kernel) -> int:
    descriptor = kernel.descriptor
    return (
        descriptor.round_mode_32
        | descriptor.round_mode_16_64 << 2
        | descriptor.denorm_mode_32 << 4
        | descriptor.denorm_mode_16_64 << 6
        | descriptor.dx10_clamp << 8
        | descriptor.ieee_mode << 9
        | descriptor.fp16_overflow << _FP16_OVERFLOW_BIT
    )


def _system_sgprs(kernel: Kernel) -> int:
    descriptor = kernel.descriptor
    return (
        descriptor.enable_workgroup_id_x
        | descriptor.enable_workgroup_id_y << 1
        | descriptor.enable_workgroup_id_z << 2
        | descriptor.enable_workgroup_info << 3
    )


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
        system_sgprs=_system_sgprs(launch.kernel),
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
