"""Dynamic counts of one launch: instruction mix, bytes per memory space, an issue estimate.

Counts are exact: every executed wave-instruction and every byte that active lanes asked for. The
cycle numbers are an **estimate** from issue slots alone. They know nothing of latency, caches,
clocks or occupancy, and serve only to compare versions of one kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import Unit
from cdna_emulator.program import Program

#: Cycles for which a wave-instruction occupies its unit: 64 lanes pass 16 at a time, transcendental
#: functions a quarter as fast.
_VALU_CYCLES, _TRANS_CYCLES, _SCALAR_CYCLES = 4, 16, 4
#: Floating-point operations of one SIMD per cycle in matrix instructions, by input type: the peak
#: rates of AMD's MI300X and MI355X data sheets divided by compute units, SIMDs and clock.
_MATRIX_RATES = {
    "gfx942": {"f64": 64, "f32": 64, "xf32": 256, "16": 512, "8": 1024, "f8f6f4": 1024},
    "gfx950": {"f64": 32, "f32": 64, "xf32": 256, "16": 1024, "8": 2048, "f8f6f4": 2048},
}
_SHAPE = re.compile(r"_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_")


@dataclass(frozen=True)
class Profile:
    """What a launch executed.

    Parameters
    ----------
    program : Program
    executed : [instructions], uint64
        Times each instruction was executed, by any wave.
    bytes : [instructions], uint64
        Bytes its active lanes loaded or stored.
    bank_cycles : [instructions], uint64
        Estimated LDS cycles, conflicts included.
    """

    program: Program
    executed: np.ndarray
    bytes: np.ndarray
    bank_cycles: np.ndarray

    @cached_property
    def wave_instructions(self) -> int:
        """All executed wave-instructions."""
        return int(self.executed.sum())

    @cached_property
    def mix(self) -> Counter[str]:
        """Executed wave-instructions by mnemonic."""
        return self._count(lambda instruction: instruction.mnemonic)

    @cached_property
    def units(self) -> Counter[str]:
        """Executed wave-instructions by unit."""
        return self._count(lambda instruction: instruction.op.unit.value)

    @property
    def mfma_share(self) -> float:
        """Share of matrix instructions among all, 0 to 1."""
        return self.units[Unit.MFMA.value] / max(1, self.wave_instructions)

    @cached_property
    def bytes_moved(self) -> dict[str, int]:
        """Bytes by direction and memory space: ``global load``, ``lds store``, ..."""
        moved: Counter[str] = Counter()
        for instruction, count in zip(self.program.instructions, self.bytes, strict=True):
            if count:
                moved[_space(instruction)] += int(count)
        return dict(sorted(moved.items()))

    @cached_property
    def estimated_cycles(self) -> dict[str, int]:
        """Issue cycles by unit, summed over all waves; an estimate, see the module's text."""
        cycles: Counter[str] = Counter()
        for index, instruction in enumerate(self.program.instructions):
            unit = instruction.op.unit
            if unit is Unit.LDS:
                cycles[unit.value] += int(self.bank_cycles[index])
            else:
                cost = _issue_cycles(instruction, self.program.arch)
                cycles[unit.value] += cost * int(self.executed[index])
        return dict(cycles)

    def _count(self, key) -> Counter[str]:  # type: ignore[no-untyped-def]
        counts: Counter[str] = Counter()
        for instruction, count in zip(self.program.instructions, self.executed, strict=True):
            if count:
                counts[key(instruction)] += int(count)
        return counts


def _space(instruction: Instruction) -> str:
    unit = instruction.op.unit
    place = {
        Unit.SMEM: "scalar",
        Unit.LDS: "lds",
        Unit.SCRATCH: "scratch",
        Unit.FLAT: "flat",
    }.get(unit, "global")
    if "atomic" in instruction.op.flags or "lds_atomic" in instruction.op.flags:
        return f"{place} atomic"
    if instruction.is_lds_dma:
        return "global to lds"
    return f"{place} {'store' if 'store' in instruction.op.flags else 'load'}"


def _issue_cycles(instruction: Instruction, arch: str) -> int:
    unit = instruction.op.unit
    if unit is Unit.MFMA:
        return matrix_cycles(instruction.mnemonic, arch)
    if unit is Unit.TRANS:
        return _TRANS_CYCLES
    if unit is Unit.VALU:
        return _VALU_CYCLES
    return _SCALAR_CYCLES


def matrix_cycles(mnemonic: str, arch: str) -> int:
    """Return the cycles of one matrix instruction at its peak rate."""
    match = _SHAPE.search(mnemonic)
    if match is None:
        raise ValueError(f"{mnemonic}: must name a matrix shape")
    rows, columns, depth, blocks = (int(text or 1) for text in match.groups())
    kind = mnemonic[match.end() :]
    if kind.startswith(("fp8", "bf8", "i8")):
        rate = "8"
    elif kind in ("f16", "bf16"):
        rate = "16"
    else:
        rate = kind
    operations = 2 * rows * columns * depth * blocks
    return max(8, operations // _MATRIX_RATES[arch][rate])
