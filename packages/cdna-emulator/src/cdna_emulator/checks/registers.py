"""Which registers an instruction reads and writes, implicit ones included.

Registers are numbers: 0..511 vector registers (accumulation registers from 256), 1000 and up
scalar registers by their number in machine code.
"""

from __future__ import annotations

from functools import lru_cache

from cdna_emulator.instruction import EXEC, M0, VCC, Instruction, Operand
from cdna_emulator.isa import Unit

SGPR_BASE = 1000
VCC_REGISTERS = frozenset({SGPR_BASE + VCC, SGPR_BASE + VCC + 1})
EXEC_REGISTERS = frozenset({SGPR_BASE + EXEC, SGPR_BASE + EXEC + 1})
M0_REGISTER = SGPR_BASE + M0
_LAST_VGPR = SGPR_BASE - 1
_VCCZ_EXECZ = (1, 2)
_SETREG_ID = 0x3F
Registers = frozenset[int]


def is_vector(register: int) -> bool:
    """Whether a register number is a vector or accumulation register."""
    return register <= _LAST_VGPR


def of_operand(operand: Operand) -> Registers:
    """Return the registers of one operand."""
    if operand.kind == "vgpr":
        return frozenset(range(operand.index, operand.index + operand.width))
    if operand.kind == "sgpr":
        first = SGPR_BASE + operand.index
        return frozenset(range(first, first + operand.width))
    return frozenset()


@lru_cache(maxsize=1 << 16)
def _operand_sets(operands: tuple[Operand, ...]) -> tuple[Registers, Registers]:
    read: set[int] = set()
    written: set[int] = set()
    for operand in operands:
        registers = of_operand(operand)
        if operand.slot.is_read:
            read |= registers
        if operand.slot.is_written:
            written |= registers
    return frozenset(read), frozenset(written)


def reads(instruction: Instruction) -> Registers:
    """Return every register an instruction reads; EXEC only where it is an operand."""
    found = _operand_sets(instruction.operands)[0]
    if "reads_vcc" in instruction.op.flags:
        found |= VCC_REGISTERS
    if "reads_exec" in instruction.op.flags:
        found |= EXEC_REGISTERS
    if uses_m0(instruction):
        found |= {M0_REGISTER}
    return found


def writes(instruction: Instruction) -> Registers:
    """Return every register an instruction writes."""
    found = _operand_sets(instruction.operands)[1]
    if "writes_exec" in instruction.op.flags:
        found |= EXEC_REGISTERS
    if "writes_m0" in instruction.op.flags:
        found |= {M0_REGISTER}
    return found


def uses_m0(instruction: Instruction) -> bool:
    """Whether M0 is an implicit operand."""
    return (
        "reads_m0" in instruction.op.flags
        or instruction.is_lds_dma
        or instruction.mnemonic == "s_sendmsg"
    )


def reads_zero_flags(instruction: Instruction) -> bool:
    """Whether VCCZ or EXECZ is a data operand."""
    return any(
        operand.kind == "special" and operand.index in _VCCZ_EXECZ
        for operand in instruction.operands
    )


def store_data(instruction: Instruction) -> Registers:
    """Return the data registers of a store or atomic of more than 64 bits; else nothing."""
    if not instruction.op.unit.is_vector_memory or "store" not in instruction.op.flags:
        return frozenset()
    wide = [
        operand
        for operand in instruction.operands
        if operand.kind == "vgpr" and operand.slot.type == "b32" and operand.width > 2
    ]
    return frozenset().union(*(of_operand(operand) for operand in wide))


def has_scalar_offset(instruction: Instruction) -> bool:
    """Whether it is a buffer instruction whose offset is a scalar register."""
    return instruction.op.unit is Unit.BUFFER and instruction.operands[-1].kind == "sgpr"


def hardware_register(instruction: Instruction) -> int | None:
    """Return the number of the hardware register of ``s_setreg`` and ``s_getreg``."""
    if not instruction.mnemonic.startswith(("s_setreg", "s_getreg")):
        return None
    for operand in instruction.operands:
        if operand.slot.type == "imm":
            return operand.bits & _SETREG_ID
    return None


def is_valu(instruction: Instruction) -> bool:
    """Whether the vector ALU executes it, matrix instructions left out."""
    return instruction.op.unit in (Unit.VALU, Unit.TRANS)


def is_matrix(instruction: Instruction) -> bool:
    """Whether it is a matrix instruction."""
    return instruction.op.unit is Unit.MFMA
