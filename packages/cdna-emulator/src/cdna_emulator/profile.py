"""Dynamic counts of one launch: instruction mix, bytes per memory space, an issue estimate.

Counts are exact: every executed wave-instruction and every byte that active lanes asked for. The
cycle numbers are an **estimate** from issue slots alone. They know nothing of latency, caches,
clocks or occupancy, and serve only to compare versions of one kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import Unit
from cdna_emulator.program import Program

#: Cycles for which a wave-instruction occupies its unit: 64 lanes pass 16 at a time, transcendental
#: functions a quarter as fast.
_VALU_CYCLES, _TRANS_CYCLES, _SCALAR_CYCLES = 4, 16, 4
#: Operations of one SIMD per cycle in matrix instructions, by input type: the peak rates of AMD's
#: MI300X and MI355X data sheets divided by compute units, SIMDs and clock.
_MATRIX_RATES = {
    "gfx942": {"f64": 64, "f32": 64, "xf32": 256, "16": 512, "8": 1024},
    "gfx950": {"f64": 32, "16": 1024, "8": 2048, "f8f6f4": 2048},
}
#: Cycles of those that multiply several small blocks, by rows: 16- and 8-bit inputs win nothing.
_BLOCK_CYCLES = {32: 64, 16: 32, 4: 8}
_F64_BLOCK_CYCLES = 16
#: Numbers of the formats fp6, bf6 and fp4 in cbsz and blgp.
_NARROW_FORMATS = (2, 3, 4)
_LANES, _LDS_PHASE_LANES = 64, 32
_LDS_BANKS = {"gfx942": 32, "gfx950": 64}
_LDS_BITS = re.compile(r"_[biuf](\d+)")
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

    @cached_property
    def bank_conflict_cycles(self) -> int:
        """LDS cycles beyond those of whole waves without conflicts; an estimate."""
        extra = 0
        for index, instruction in enumerate(self.program.instructions):
            if instruction.op.unit is Unit.LDS and self.bank_cycles[index]:
                free = _conflict_free_cycles(instruction.mnemonic, self.program.arch)
                extra += max(0, int(self.bank_cycles[index]) - free * int(self.executed[index]))
        return extra

    def _count(self, key: Callable[[Instruction], str]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for instruction, count in zip(self.program.instructions, self.executed, strict=True):
            if count:
                counts[key(instruction)] += int(count)
        return counts


def _conflict_free_cycles(mnemonic: str, arch: str) -> int:
    """Return the cycles of a full wave that hits every bank once at a time; see native/lds.cpp."""
    match = _LDS_BITS.search(mnemonic)
    if match is None:
        return 0
    dwords = -(-int(match[1]) // 32)
    lanes = min(_LDS_PHASE_LANES, _LDS_BANKS[arch] // (1 << (dwords - 1).bit_length()))
    accesses = 2 if mnemonic.split("_")[1].startswith(("read2", "write2", "wrxchg2")) else 1
    return accesses * _LANES // lanes


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
        return matrix_cycles(instruction, arch)
    if unit is Unit.TRANS:
        return _TRANS_CYCLES
    if unit is Unit.VALU:
        return _VALU_CYCLES
    return _SCALAR_CYCLES


def matrix_cycles(instruction: Instruction, arch: str) -> int:
    """Return the cycles for which a matrix instruction occupies the matrix core."""
    mnemonic = instruction.mnemonic
    match = _SHAPE.search(mnemonic)
    if match is None:
        raise ValueError(f"{mnemonic}: must name a matrix shape")
    rows, columns, depth, blocks = (int(text or 1) for text in match.groups())
    kind = mnemonic[match.end() :]
    if blocks > 1:
        return _F64_BLOCK_CYCLES if kind == "f64" else _BLOCK_CYCLES[rows]
    if kind.startswith(("fp8", "bf8", "i8")):
        kind = "8"
    elif kind in ("f16", "bf16"):
        kind = "16"
    # Those that gfx950 inherited kept their cycles, beside wider and faster ones; f64 got slower.
    is_inherited = "gfx950" not in instruction.op.flags and kind != "f64"
    rate = _MATRIX_RATES["gfx942" if is_inherited else arch][kind]
    formats = [instruction.modifiers.get(name, 0) for name in ("cbsz", "blgp")]
    if kind == "f8f6f4" and all(form in _NARROW_FORMATS for form in formats):
        rate *= 2
    return 2 * rows * columns * depth // rate
