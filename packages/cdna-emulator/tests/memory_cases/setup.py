"""One wave with random registers and memory, and addresses where memory instructions look."""

from __future__ import annotations

from typing import Any

import numpy as np

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.native_core import Counters, WaveState, run_wave
from cdna_emulator.program import Program, load_program

Array = np.ndarray[Any, Any]
LANES = np.arange(64)
VCC, M0, EXEC = 106, 124, 126
MEMORY_BYTES, LDS_BYTES = 8192, 4096
BASE = 8  # s[8:9] holds the memory's address
FLUSH_NOTHING = 0x3F0
FLUSH_ALL = 0x300
SCALAR_OFFSET = 16  # s7, of buffers


def registers(first: int, count: int) -> str:
    """Return the text of a run of vector registers."""
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def programs(texts: list[str], arch: str) -> dict[str, Program]:
    """Assemble one program for each instruction, all in one go."""
    kernels = {f"k{i}": text.split("\n") for i, text in enumerate(texts)}
    code_object = CodeObject.read(assemble_kernels(kernels, arch))
    return {text: load_program(code_object, f"k{i}") for i, text in enumerate(texts)}


class Setup:
    """Random registers and memory, with addresses where the instructions of this file look."""

    def __init__(self, seed: int, alignment: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.bytes = self.rng.integers(0, 256, MEMORY_BYTES, dtype=np.uint8)
        self.lds = self.rng.integers(0, 256, LDS_BYTES, dtype=np.uint8)
        self.memory = DeviceMemory()
        self.address = self.memory.map("data", self.bytes.ctypes.data, self.bytes.size, self.bytes)
        self.vgpr = self.rng.integers(0, 1 << 32, (512, 64), dtype=np.uint32)
        self.sgpr = self.rng.integers(0, 1 << 32, 128, dtype=np.uint32)
        # Distinct places, 32 bytes apart, in random order.
        places = self.rng.permutation(64) * 32 + 64
        self.offsets = places + self.rng.integers(0, 8 // alignment + 1, 64) * alignment
        self.vgpr[4] = self.offsets
        self.vgpr[5] = self.offsets
        full = self.address + self.offsets.astype(np.uint64)
        self.vgpr[2], self.vgpr[3] = full & 0xFFFFFFFF, full >> 32
        self.set_pair(BASE, self.address)
        self.set_pair(12, self.address)  # descriptor of a raw buffer
        self.sgpr[14], self.sgpr[15] = MEMORY_BYTES, 0x00020000
        self.sgpr[6], self.sgpr[7] = 64, SCALAR_OFFSET
        self.sgpr[13] &= 0xFFFF
        self.set_exec(int(self.rng.integers(0, 1 << 63)) << 1 | 1)

    def set_pair(self, index: int, value: int) -> None:
        """Set two scalar registers."""
        self.sgpr[index], self.sgpr[index + 1] = value & 0xFFFFFFFF, value >> 32

    def set_exec(self, value: int) -> None:
        """Choose the active lanes."""
        self.set_pair(EXEC, value)
        self.active = [lane for lane in range(64) if value >> lane & 1]

    def run(
        self, program: Program, mode: int = FLUSH_NOTHING, scratch_bytes: int = 0
    ) -> tuple[WaveState, Counters]:
        """Execute, leaving the state before untouched apart from memory."""
        state = WaveState(self.sgpr.copy(), self.vgpr.copy(), self.lds.copy(), 0, mode)
        return run_wave(program, state, memory=self.memory, scratch_bytes=scratch_bytes)


def as_register(raw: bytes, is_signed: bool, half: int) -> list[int]:
    """Return the dwords that a load of these bytes gives."""
    if len(raw) >= 4:
        return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    value = int.from_bytes(raw, "little", signed=is_signed)
    return [(value & 0xFFFFFFFF, value & 0xFFFF, (value & 0xFFFF) << 16)[half]]


def as_bytes(vgpr: Array, first: int, lane: int, size: int, half: int) -> bytes:
    """Return the bytes that a store of a lane writes."""
    dwords = vgpr[first : first + max(1, size // 4), lane]
    raw = np.ascontiguousarray(dwords).tobytes()
    return raw[2 : 2 + size] if half == 2 else raw[:size]


def check_loaded(
    setup: Setup, after: WaveState, expected: dict[int, list[int]], first: int = 16
) -> None:
    """Compare the registers a load fills; all others must be as before."""
    wanted = setup.vgpr.copy()
    for lane, values in expected.items():
        for i, value in enumerate(values):
            wanted[first + i, lane] = value
    np.testing.assert_array_equal(after.vgpr, wanted)


def kinds(counters: Counters) -> list[tuple[int, int, int]]:
    """Return kind, lane and first detail of each finding."""
    return [(f.kind, f.lane, f.detail0) for f in counters.findings]
