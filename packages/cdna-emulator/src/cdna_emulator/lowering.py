"""From parsed instructions to the fixed-size records that the native core executes.

`NativeOperand` and `NativeInstruction` mirror ``Operand`` and ``Instruction`` of native/core.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.instruction import Instruction, Operand
from cdna_emulator.isa import Unit
from cdna_emulator.program import Program

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
_i8, _i32 = ctypes.c_int8, ctypes.c_int32
MAX_OPERANDS = 6


class NativeOperand(ctypes.Structure):
    """One operand; see native/core.h."""

    _fields_ = (
        ("kind", _u8),
        ("width", _u8),
        ("flags", _u8),
        ("select", _u8),
        ("index", _u16),
        ("reserved", _u16),
        ("bits", _u64),
    )


class NativeInstruction(ctypes.Structure):
    """One instruction; see native/core.h."""

    _fields_ = (
        ("op", NativeOperand * MAX_OPERANDS),
        ("handler", _u32),
        ("address", _u32),
        ("target", _i32),
        ("offset", _i32),
        ("offset1", _i32),
        ("flags", _u32),
        ("immediate", _u32),
        ("dpp_control", _u16),
        ("row_mask", _u8),
        ("bank_mask", _u8),
        ("op_count", _u8),
        ("op_sel", _u8),
        ("op_sel_hi", _u8),
        ("neg_lo", _u8),
        ("neg_hi", _u8),
        ("output_modifier", _u8),
        ("cbsz", _u8),
        ("abid", _u8),
        ("blgp", _u8),
        ("dst_select", _u8),
        ("dst_unused", _u8),
        ("counter", _u8),
        ("vmcnt", _i8),
        ("lgkmcnt", _i8),
        ("expcnt", _i8),
        ("bitop3", _u8),
        ("encoding", _u8),
        ("reserved", _u8 * 7),
    )


_KINDS = {"off": 0, "label": 0, "vgpr": 1, "sgpr": 2, "constant": 3, "special": 4}
_NEG, _ABS, _SEXT, _READ, _WRITE = 1, 2, 4, 8, 16
#: Bits of ``flags`` that modifiers set, then those that the op table's words set.
_MODIFIER_FLAGS = {
    name: 1 << bit
    for bit, name in enumerate(("offen", "idxen", "lds", "sc0", "sc1", "nt", "clamp"))
}
_SDWA, _DPP, _BOUND_CTRL, _IGNORES_EXEC = 1 << 7, 1 << 8, 1 << 9, 1 << 10
_WORD_FLAGS = {
    "ignores_exec": _IGNORES_EXEC,
    "lds_dma": _MODIFIER_FLAGS["lds"],
    "branch": 1 << 11,
    "load": 1 << 12,
    "store": 1 << 13,
    "atomic": 1 << 14,
    "writes_exec": 1 << 15,
    "reads_vcc": 1 << 16,
    "reads_m0": 1 << 19,
}
_VECTOR, _MATRIX = 1 << 17, 1 << 18
_VM, _LGKM_LDS, _LGKM_SMEM, _BOTH = 1, 2, 3, 4
_COUNTERS = {
    Unit.BUFFER: _VM,
    Unit.GLOBAL: _VM,
    Unit.SCRATCH: _VM,
    Unit.LDS: _LGKM_LDS,
    Unit.SMEM: _LGKM_SMEM,
    Unit.FLAT: _BOTH,
}
_ENCODINGS = {"": 0, "e32": 1, "e64": 2, "dpp": 3, "sdwa": 4, "e64_dpp": 5}
_DPP_BASES = {
    "row_shl": 0x100,
    "row_shr": 0x110,
    "row_ror": 0x120,
    "row_newbcast": 0x150,
}
_DPP_FIXED = {
    "wave_shl": 0x130,
    "wave_rol": 0x134,
    "wave_shr": 0x138,
    "wave_ror": 0x13C,
    "row_mirror": 0x140,
    "row_half_mirror": 0x141,
}
_ROW_BCAST = {15: 0x142, 31: 0x143}
_DWORD = 6


def lower(program: Program, handler_index: Callable[[str], int]) -> ctypes.Array[NativeInstruction]:
    """Return the program's instructions as one native array.

    Raises
    ------
    UnknownInstructionError
        The core has no handler for an instruction, or does not model one of its modifiers.
    """
    records = (NativeInstruction * len(program.instructions))()
    handlers: dict[str, int] = {}
    for record, instruction, target in zip(
        records, program.instructions, program.targets, strict=True
    ):
        name = instruction.mnemonic
        if name not in handlers:
            handlers[name] = handler_index(name)
        if handlers[name] < 0:
            raise _unknown(program, instruction, "the native core has no handler for it")
        record.handler = handlers[name]
        record.target = target
        _fill(record, instruction, program)
    return records


def _unknown(program: Program, instruction: Instruction, what: str) -> UnknownInstructionError:
    return UnknownInstructionError(
        f"{program.name}: `{instruction.text}` at {instruction.address:#x}: {what}"
    )


def _fill(record: NativeInstruction, instruction: Instruction, program: Program) -> None:
    modifiers, op = instruction.modifiers, instruction.op
    selects = (
        _number(modifiers, "dst_sel", _DWORD),
        _number(modifiers, "src0_sel", _DWORD),
        _number(modifiers, "src1_sel", _DWORD),
    )
    written = sum(operand.slot.is_written for operand in instruction.operands)
    for position, operand in enumerate(instruction.operands):
        source = position - written
        select = selects[1 + source] if 0 <= source < 2 else _DWORD
        _fill_operand(record.op[position], operand, select)
    record.op_count = len(instruction.operands)
    record.address = instruction.address
    record.offset = _number(modifiers, "offset", _number(modifiers, "offset0", 0))
    record.offset1 = _number(modifiers, "offset1", 0)
    record.immediate = _immediate(instruction)
    flags = sum(bit for word, bit in _MODIFIER_FLAGS.items() if word in modifiers)
    for word, bit in _WORD_FLAGS.items():
        flags |= bit if word in op.flags else 0
    flags |= _SDWA if instruction.encoding == "sdwa" else 0
    flags |= _VECTOR if op.unit.is_vector else 0
    flags |= _MATRIX if op.unit is Unit.MFMA else 0
    if "dpp" in instruction.encoding:
        flags |= _DPP
        flags |= _BOUND_CTRL if "bound_ctrl" in modifiers else 0
        record.dpp_control = _dpp_control(instruction, program)
        record.row_mask = _number(modifiers, "row_mask", 15)
        record.bank_mask = _number(modifiers, "bank_mask", 15)
    record.flags = flags
    sources = len(instruction.operands) - written
    record.op_sel = _op_sel(modifiers, sources)
    # Packed instructions read the high half for the high result unless told otherwise; for the
    # mixed-precision ones the bits say which sources are f16, and LLVM leaves zeros out.
    default = 0 if "_mix" in instruction.mnemonic else 1
    record.op_sel_hi = _bits(modifiers, "op_sel_hi", (default,) * max(0, sources))
    record.neg_lo = _bits(modifiers, "neg_lo")
    record.neg_hi = _bits(modifiers, "neg_hi")
    if "neg" in modifiers:  # matrix instructions on f64 negate through blgp
        record.blgp = _bits(modifiers, "neg")
    else:
        record.blgp = _number(modifiers, "blgp", 0)
    record.output_modifier = {2: 1, 4: 2}.get(_number(modifiers, "mul", 0), 0)
    record.output_modifier |= 3 if "div" in modifiers else 0
    record.cbsz = _number(modifiers, "cbsz", 0)
    record.abid = _number(modifiers, "abid", 0)
    record.dst_select = selects[0]
    record.dst_unused = _number(modifiers, "dst_unused", 0)
    record.counter = _COUNTERS.get(op.unit, 0) if {"load", "store"} & op.flags else 0
    if "crosslane" in op.flags:
        record.counter = _LGKM_LDS
    for name in ("vmcnt", "lgkmcnt", "expcnt"):
        setattr(record, name, _number(modifiers, name, -1))
    record.bitop3 = _number(modifiers, "bitop3", 0)
    record.encoding = _ENCODINGS[instruction.encoding]


def _op_sel(modifiers: dict[str, int | tuple[int, ...]], sources: int) -> int:
    """Return the bits of ``op_sel``; LLVM prints the destination's, bit 3, after the sources'."""
    values = modifiers.get("op_sel", ())
    assert isinstance(values, tuple)
    if len(values) == sources + 1 and sources < 3:
        return _bits({"op_sel": values[:-1]}, "op_sel") | values[-1] << 3
    return _bits(modifiers, "op_sel")


def _fill_operand(record: NativeOperand, operand: Operand, select: int) -> None:
    record.kind = _KINDS[operand.kind]
    record.width = operand.width
    record.index = operand.index
    record.bits = operand.bits
    record.select = select
    flags = _NEG * operand.neg | _ABS * operand.abs | _SEXT * operand.sext
    flags |= _READ * operand.slot.is_read | _WRITE * operand.slot.is_written
    record.flags = flags


def _immediate(instruction: Instruction) -> int:
    for operand in instruction.operands:
        if operand.slot.type == "imm" and operand.kind == "constant":
            return operand.bits & 0xFFFFFFFF
    return 0


def _dpp_control(instruction: Instruction, program: Program) -> int:
    modifiers = instruction.modifiers
    for name, base in _DPP_BASES.items():
        if name in modifiers:
            return base + _number(modifiers, name, 0)
    for name, value in _DPP_FIXED.items():
        if name in modifiers:
            return value
    if "row_bcast" in modifiers:
        return _ROW_BCAST[_number(modifiers, "row_bcast", 15)]
    quad = modifiers.get("quad_perm")
    if isinstance(quad, tuple):
        return sum(lane << (2 * position) for position, lane in enumerate(quad))
    raise _unknown(program, instruction, "its DPP control is not modelled")


def _number(modifiers: dict[str, int | tuple[int, ...]], name: str, default: int) -> int:
    value = modifiers.get(name, default)
    assert isinstance(value, int)
    return value


def _bits(
    modifiers: dict[str, int | tuple[int, ...]], name: str, default: tuple[int, ...] = ()
) -> int:
    values = modifiers.get(name, default)
    assert isinstance(values, tuple)
    return sum(bit << position for position, bit in enumerate(values))
