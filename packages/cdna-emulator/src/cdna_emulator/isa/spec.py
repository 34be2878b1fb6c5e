"""Rows of the op table and the notation they are written in.

A row gives the unit that executes a group of instructions, their operands in the order of LLVM's
text, and their names. An operand is ``role:type``:

``d``  written     ``s``  read     ``x``  read and written     ``?``  after the type: optional

Types say how constants and modifiers are read: ``f16 bf16 f32 f64`` floats, ``pk16`` two 16-bit
values, ``pkf32`` two floats in a register pair, ``i16 u16 i32 u32 i64 u64`` integers, ``b8`` to
``b1024`` plain bits, ``mask`` one bit per lane in a pair of scalar registers, ``imm`` a number
inside the instruction, ``label`` a branch target, ``rsrc`` a buffer descriptor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Unit(enum.Enum):
    """Part of a compute unit that executes an instruction."""

    SALU = "salu"
    SMEM = "smem"
    VALU = "valu"
    TRANS = "trans"
    MFMA = "mfma"
    LDS = "lds"
    BUFFER = "buffer"
    GLOBAL = "global"
    FLAT = "flat"
    SCRATCH = "scratch"
    CONTROL = "control"

    @property
    def is_vector(self) -> bool:
        """Whether the vector ALU pipeline executes it."""
        return self in (Unit.VALU, Unit.TRANS, Unit.MFMA)

    @property
    def is_vector_memory(self) -> bool:
        """Whether ``vmcnt`` counts it."""
        return self in (Unit.BUFFER, Unit.GLOBAL, Unit.FLAT, Unit.SCRATCH)


@dataclass(frozen=True, slots=True)
class Slot:
    """One operand of an instruction: its role and the type that its bits have."""

    role: str
    type: str
    optional: bool = False

    @property
    def is_read(self) -> bool:
        """Whether the instruction reads the operand."""
        return self.role in "sx"

    @property
    def is_written(self) -> bool:
        """Whether the instruction writes the operand."""
        return self.role in "dx"


@dataclass(frozen=True, slots=True)
class OpSpec:
    """One instruction: where it executes and what its operands are.

    ``flags`` are words for what operands do not show:

    ``atomic``      returns the old value into the first operand only with ``sc0``
    ``ignores_exec`` acts on every lane
    ``reads_vcc``   / ``writes_exec`` / ``reads_scc`` / ``writes_scc`` / ``reads_m0``: operands
                    that the text does not name
    ``branch``      may go to another instruction
    ``store``       a memory write
    ``load``        a memory read
    ``gfx950``      exists on gfx950 only; ``gfx942``: on gfx942 only
    """

    name: str
    unit: Unit
    slots: tuple[Slot, ...]
    flags: frozenset[str] = frozenset()


def expand(unit: Unit, slots: str, names: str, flags: str = "") -> dict[str, OpSpec]:
    """Return the ops of one row; ``{a,b}`` in a name stands for either word."""
    parsed = tuple(_slot(text) for text in slots.split())
    found = {}
    for pattern in names.split():
        for name in _alternatives(pattern):
            found[name] = OpSpec(name, unit, parsed, frozenset(flags.split()))
    return found


def _slot(text: str) -> Slot:
    role, _, kind = text.partition(":")
    return Slot(role, kind.removesuffix("?"), kind.endswith("?"))


def _alternatives(pattern: str) -> list[str]:
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    words, _, tail = rest.partition("}")
    return [head + word + end for word in words.split(",") for end in _alternatives(tail)]
