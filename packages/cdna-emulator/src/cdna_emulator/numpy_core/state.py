"""Registers of one wave, and what else its instructions can reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cdna_emulator.instruction import EXEC, M0, VCC

Array = np.ndarray[Any, np.dtype[Any]]

LANES = 64
VGPRS = 512
SGPRS = 128
LANE = np.arange(LANES)


_MASK64 = (1 << 64) - 1


class Memory(Protocol):
    """What the core needs of device memory."""

    def view(self, address: int, size: int) -> Array | None:
        """Return the bytes at a device address as a writable view; None out of bounds."""


@dataclass
class Mode:
    """The MODE register: rounding, denormals and the switches that change results."""

    bits: int = 0x3F0

    @property
    def round32(self) -> int:
        """Rounding of f32: 0 nearest even, 1 up, 2 down, 3 toward zero."""
        return self.bits & 3

    @property
    def round64(self) -> int:
        """Rounding of f16 and f64."""
        return self.bits >> 2 & 3

    @property
    def flush_inputs32(self) -> bool:
        """Whether f32 denormals are read as zero."""
        return not self.bits >> 4 & 1

    @property
    def flush_outputs32(self) -> bool:
        """Whether f32 denormal results become zero."""
        return not self.bits >> 5 & 1

    @property
    def flush_inputs64(self) -> bool:
        """Whether f16 and f64 denormals are read as zero."""
        return not self.bits >> 6 & 1

    @property
    def flush_outputs64(self) -> bool:
        """Whether f16 and f64 denormal results become zero."""
        return not self.bits >> 7 & 1

    @property
    def dx10_clamp(self) -> bool:
        """Whether clamping turns NaN into zero."""
        return bool(self.bits >> 8 & 1)

    @property
    def ieee(self) -> bool:
        """Whether minimum and maximum quiet signalling NaNs."""
        return bool(self.bits >> 9 & 1)

    @property
    def gpr_idx(self) -> bool:
        """Whether M0 is added to vector register numbers."""
        return bool(self.bits >> 27 & 1)

    @gpr_idx.setter
    def gpr_idx(self, on: bool) -> None:
        self.bits = self.bits & ~(1 << 27) | int(on) << 27


@dataclass(frozen=True)
class Fault:
    """An access outside memory; the access itself read zero or wrote nothing.

    ``space`` is ``memory``, ``lds`` or ``scratch``; ``index`` that of the instruction.
    """

    space: str
    index: int
    lane: int
    address: int
    size: int


@dataclass
class WaveState:
    """Everything one wave's instructions read and write.

    Parameters
    ----------
    sgpr : array
        128 scalar registers by their number in machine code: VCC is 106, M0 124, EXEC 126.
    vgpr : array
        512 x 64: vector registers, accumulation registers from 256.
    lds : array
        Bytes of the workgroup's LDS, shared by its waves.
    scratch : array
        64 x bytes of private memory.
    index : int
        Of the next instruction.
    pc : int
        Address, in the code object, that a branch goes to; -1 after anything else.
    image_base : int
        Device address of the code object's address 0, which programs see in their PC.
    executed : Counter
        How often each instruction, by index, was executed.
    """

    sgpr: Array = field(default_factory=lambda: np.zeros(SGPRS, np.uint32))
    vgpr: Array = field(default_factory=lambda: np.zeros((VGPRS, LANES), np.uint32))
    scc: int = 0
    mode: Mode = field(default_factory=Mode)
    lds: Array = field(default_factory=lambda: np.zeros(65536, np.uint8))
    scratch: Array = field(default_factory=lambda: np.zeros((LANES, 0), np.uint8))
    memory: Memory | None = None
    arch: str = "gfx942"
    index: int = 0
    pc: int = -1
    image_base: int = 0
    executed: Counter[int] = field(default_factory=Counter)
    status: str = "running"
    clock: int = 0
    faults: list[Fault] = field(default_factory=list)

    def pair(self, index: int) -> int:
        """Return two scalar registers as one number."""
        return int(self.sgpr[index]) | int(self.sgpr[index + 1]) << 32

    def set_pair(self, index: int, value: int) -> None:
        """Write two scalar registers."""
        self.sgpr[index] = value & 0xFFFFFFFF
        self.sgpr[index + 1] = value >> 32 & 0xFFFFFFFF

    @property
    def exec(self) -> int:
        """The lanes that are on, as a 64-bit number."""
        return self.pair(EXEC)

    @exec.setter
    def exec(self, value: int) -> None:
        self.set_pair(EXEC, value & _MASK64)

    @property
    def active(self) -> Array:
        """The lanes that are on, as 64 booleans."""
        return lanes_of(self.exec)

    @property
    def vcc(self) -> int:
        """VCC as a 64-bit number."""
        return self.pair(VCC)

    @property
    def m0(self) -> int:
        """The M0 register."""
        return int(self.sgpr[M0])

    def fault(self, space: str, lane: int, address: int, size: int) -> None:
        """Record an access out of bounds."""
        self.faults.append(Fault(space, self.index, lane, address, size))


def lanes_of(mask: int) -> Array:
    """Return 64 booleans, one for each bit."""
    return np.array([mask >> lane & 1 for lane in range(LANES)], bool)


def mask_of(lanes: Array) -> int:
    """Return the 64-bit number with one bit for each true lane."""
    return sum(1 << lane for lane in range(LANES) if lanes[lane])
