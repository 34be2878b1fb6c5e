"""Binding to the native core: structures of native/machine.h and the calls around them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cdna_emulator.errors import ToolchainError
from cdna_emulator.lowering import NativeInstruction, lower
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.program import Program

_u32, _u64, _i32, _pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32, ctypes.c_void_p
LANES, VGPRS, SGPRS = 64, 512, 128
#: Different findings one thread can hold; the rest are counted.
FINDING_CAPACITY = 1024
ARCH_NUMBERS = {"gfx942": 942, "gfx950": 950}


class MemorySlot(ctypes.Structure):
    """One mapped buffer; see native/machine.h, as for all structures here."""

    _fields_ = (
        ("base", _u64),
        ("size", _u64),
        ("host", _pointer),
        ("writable", _u32),
        ("reserved", _u32),
    )


class FindingRecord(ctypes.Structure):
    """One finding as the core records it."""

    _fields_ = (
        ("kind", _u32),
        ("instruction", _u32),
        ("address", _u32),
        ("wave", _u32),
        ("workgroup", _u32 * 3),
        ("lane", _i32),
        ("detail0", _u64),
        ("detail1", _u64),
        ("count", _u64),
    )


class RunConfig(ctypes.Structure):
    """Everything one call of the core needs."""

    _fields_ = (
        ("instructions", _pointer),
        ("slots", _pointer),
        ("initial_sgprs", _pointer),
        ("executed", _pointer),
        ("bytes", _pointer),
        ("bank_cycles", _pointer),
        ("findings", _pointer),
        ("image_base", _u64),
        ("seed", _u64),
        ("max_instructions", _u64),
        ("first_workgroup", _u64),
        ("end_workgroup", _u64),
        ("instruction_count", _u32),
        ("entry", _u32),
        ("slot_count", _u32),
        ("finding_capacity", _u32),
        ("initial_sgpr_count", _u32),
        ("system_first", _u32),
        ("system_sgprs", _u32),
        ("workitem_id_mode", _u32),
        ("arch", _u32),
        ("lds_bytes", _u32),
        ("scratch_bytes", _u32),
        ("grid", _u32 * 3),
        ("block", _u32 * 3),
        ("mode", _u32),
        ("schedule", _u32),
        ("slice", _u32),
        ("late_dma", _u32),
        ("checks", _u32),
    )


class RunOutput(ctypes.Structure):
    """What one call of the core reports beside its arrays."""

    _fields_ = (("instructions", _u64), ("finding_count", _u32), ("findings_lost", _u32))


class WaveImage(ctypes.Structure):
    """Registers and LDS of one wave, before and after."""

    _fields_ = (
        ("vgpr", _u32 * LANES * VGPRS),
        ("sgpr", _u32 * SGPRS),
        ("scc", _u32),
        ("mode", _u32),
        ("lds", _pointer),
    )


@dataclass
class Counters:
    """Per-instruction counters of one or more calls, and what was found."""

    executed: np.ndarray[Any, np.dtype[np.uint64]]
    bytes: np.ndarray[Any, np.dtype[np.uint64]]
    bank_cycles: np.ndarray[Any, np.dtype[np.uint64]]
    findings: list[FindingRecord]
    findings_lost: int
    instructions: int


@cache
def library() -> ctypes.CDLL:
    """Load the compiled core.

    Raises
    ------
    ToolchainError
        It is not built, or was built from other sources than this module mirrors.
    """
    path = Path(__file__).with_name("native") / "_core.so"
    if not path.is_file():
        raise ToolchainError(
            f"native core: {path} must exist, found none; "
            "build it with `python -m cdna_emulator.native.build`"
        )
    core = ctypes.CDLL(str(path))
    core.cdna_handler_index.argtypes = [ctypes.c_char_p]
    core.cdna_handler_index.restype = _i32
    core.cdna_layout.argtypes = [_u32 * 3]
    core.cdna_layout.restype = None
    core.cdna_run.argtypes = [ctypes.POINTER(RunConfig), ctypes.POINTER(RunOutput)]
    core.cdna_run_wave.argtypes = [
        ctypes.POINTER(RunConfig),
        ctypes.POINTER(WaveImage),
        ctypes.POINTER(RunOutput),
    ]
    sizes = (_u32 * 3)()
    core.cdna_layout(sizes)
    mirrored = [ctypes.sizeof(kind) for kind in (NativeInstruction, RunConfig, FindingRecord)]
    if list(sizes) != mirrored:
        raise ToolchainError(
            f"native core: structure sizes must be {mirrored}, got {list(sizes)}; "
            "rebuild it with `python -m cdna_emulator.native.build`"
        )
    return core


def has_handler(mnemonic: str) -> bool:
    """Whether the native core executes a mnemonic (without encoding suffix)."""
    return _handler_index(mnemonic) >= 0


def _handler_index(mnemonic: str) -> int:
    return int(library().cdna_handler_index(mnemonic.encode()))


class NativeProgram:
    """A lowered program, ready for any number of runs on any number of threads."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.records = lower(program, _handler_index)

    def call(self, config: RunConfig, image: WaveImage | None = None) -> Counters:
        """Run with counters of its own; ``config`` is copied and completed."""
        count = len(self.records)
        mine = RunConfig.from_buffer_copy(config)
        executed, moved, bank_cycles = (np.zeros(count, np.uint64) for _ in range(3))
        findings = (FindingRecord * FINDING_CAPACITY)()
        mine.instructions = ctypes.addressof(self.records)
        mine.instruction_count = count
        mine.executed, mine.bytes = executed.ctypes.data, moved.ctypes.data
        mine.bank_cycles = bank_cycles.ctypes.data
        mine.findings = ctypes.addressof(findings)
        mine.finding_capacity = FINDING_CAPACITY
        mine.arch = ARCH_NUMBERS[self.program.arch]
        output = RunOutput()
        if image is None:
            status = library().cdna_run(mine, output)
        else:
            status = library().cdna_run_wave(mine, image, output)
        if status:
            raise ToolchainError("native core: the configuration is unusable")
        found = [
            FindingRecord.from_buffer_copy(findings[index]) for index in range(output.finding_count)
        ]
        return Counters(
            executed, moved, bank_cycles, found, output.findings_lost, output.instructions
        )


def memory_slots(memory: DeviceMemory) -> ctypes.Array[MemorySlot]:
    """Return the slot table of a memory; slot 0 stays unmapped."""
    slots = (MemorySlot * (len(memory.buffers) + 1))()
    for index, buffer in enumerate(memory.buffers, start=1):
        slots[index].base, slots[index].size = buffer.address, buffer.size
        slots[index].host, slots[index].writable = buffer.host, buffer.is_writable
    return slots


@dataclass
class WaveState:
    """Registers and LDS of one wave for `run_wave`.

    Parameters
    ----------
    sgpr : [128], uint32
        By number in machine code: VCC 106, M0 124, EXEC 126.
    vgpr : [512, 64], uint32
        Accumulation registers from 256.
    lds : [bytes], uint8
    scc : int
    mode : int
        Bits of the MODE register.
    """

    sgpr: np.ndarray[Any, np.dtype[np.uint32]]
    vgpr: np.ndarray[Any, np.dtype[np.uint32]]
    lds: np.ndarray[Any, np.dtype[np.uint8]]
    scc: int = 0
    mode: int = 0x3F0


def run_wave(
    program: Program,
    state: WaveState,
    *,
    memory: DeviceMemory | None = None,
    scratch_bytes: int = 0,
    checks: int = 0,
    max_instructions: int = 1_000_000,
) -> tuple[WaveState, Counters]:
    """Run a program on one wave from a given state; return the state after it.

    All registers and LDS count as initialised. The program must end with ``s_endpgm``.
    """
    lds = np.ascontiguousarray(state.lds).copy()
    image = WaveImage(scc=state.scc, mode=state.mode, lds=lds.ctypes.data)
    ctypes.memmove(image.vgpr, np.ascontiguousarray(state.vgpr).ctypes.data, VGPRS * LANES * 4)
    ctypes.memmove(image.sgpr, np.ascontiguousarray(state.sgpr).ctypes.data, SGPRS * 4)
    slots = memory_slots(memory or DeviceMemory())
    config = RunConfig(
        slots=ctypes.addressof(slots),
        slot_count=len(slots),
        lds_bytes=lds.size,
        scratch_bytes=scratch_bytes,
        max_instructions=max_instructions,
        grid=(_u32 * 3)(1, 1, 1),
        block=(_u32 * 3)(LANES, 1, 1),
        mode=state.mode,
        checks=checks,
        end_workgroup=1,
    )
    counters = NativeProgram(program).call(config, image)
    after = WaveState(
        np.frombuffer(image.sgpr, np.uint32).copy(),
        np.frombuffer(image.vgpr, np.uint32).reshape(VGPRS, LANES).copy(),
        lds,
        image.scc,
        image.mode,
    )
    return after, counters
