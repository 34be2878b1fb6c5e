"""Reading sources and writing destinations of parsed instructions.

Everything an encoding can do to an operand is here: negation and absolute value, sign extension and
part selection (SDWA), moving between lanes (DPP), register indexing by M0, halves chosen by
``op_sel``, denormal flushing, output modifiers and clamping.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from cdna_emulator.arguments import PRIVATE_APERTURE, SHARED_APERTURE
from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.instruction import SPECIAL, Instruction, Operand
from cdna_emulator.numpy_core.rounding import flush
from cdna_emulator.numpy_core.state import LANE, LANES, Array, WaveState, lanes_of, mask_of

_U16, _U32, _U64 = np.uint32(0xFFFF), np.uint32, np.uint64
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_WIDE = frozenset(("f64", "b64", "i64", "u64", "pkf32"))
#: 16-bit instructions that write one half of the destination and keep the other. All other ones
#: clear the upper half.
_KEEPS_OTHER_HALF = "v_mad_f16 v_fma_f16 v_div_fixup_f16 v_mad_u16 v_mad_i16"
_WORD_0, _DWORD = 4, 6
_PRESERVE, _SIGN = 2, 1


def number(inst: Instruction, key: str, default: int = 0) -> int:
    """Return a modifier that is one number."""
    return cast(int, inst.modifiers.get(key, default))


def bits(inst: Instruction, key: str, default: int, count: int = 4) -> tuple[int, ...]:
    """Return a list modifier, filled up with ``default``."""
    given = cast("tuple[int, ...]", inst.modifiers.get(key, ()))
    return (*given, *([default] * (count - len(given))))[:count] if given else (default,) * count


def sources(inst: Instruction) -> list[int]:
    """Return the positions of operands that are only read, in order."""
    return [k for k, operand in enumerate(inst.operands) if operand.slot.role == "s"]


# --- raw registers


def _vgpr_index(state: WaveState, inst: Instruction, operand: Operand) -> int:
    """Apply register indexing by M0 to a vector register number."""
    if not state.mode.gpr_idx or not inst.op.unit.is_vector:
        return operand.index
    position = next(k for k, other in enumerate(inst.operands) if other is operand)
    enabled = state.m0 >> 12
    if operand.slot.is_written and operand.slot.role == "d":
        on = enabled >> 3 & 1
    else:
        on = enabled >> sources(inst).index(position) & 1 if operand.slot.role == "s" else 0
        if operand.slot.role == "x":
            on = enabled >> 3 & 1
    return operand.index + (state.m0 & 0xFF if on else 0)


def scalar(state: WaveState, operand: Operand, words: int = 1) -> int:
    """Return a scalar source: a register, a constant or one of the special values."""
    if operand.kind == "sgpr":
        return sum(int(state.sgpr[operand.index + k]) << 32 * k for k in range(words))
    if operand.kind == "constant":
        return operand.bits
    if operand.kind == "off":
        return 0
    if operand.kind == "special":
        return _special(state, operand.index)
    raise UnknownInstructionError(f"numpy core: a scalar operand must not be {operand.kind}")


def _special(state: WaveState, which: int) -> int:
    values = {
        "src_scc": state.scc,
        "src_vccz": int(state.vcc == 0),
        "src_execz": int(state.exec == 0),
        "src_shared_base": SHARED_APERTURE << 32,
        "src_shared_limit": SHARED_APERTURE << 32 | 0xFFFFFFFF,
        "src_private_base": PRIVATE_APERTURE << 32,
        "src_private_limit": PRIVATE_APERTURE << 32 | 0xFFFFFFFF,
    }
    for name, value in values.items():
        if SPECIAL[name] == which:
            return value
    raise UnknownInstructionError("numpy core: src_lds_direct is not modelled; use ds_read_b32")


def vector_words(state: WaveState, inst: Instruction, operand: Operand, words: int) -> Array:
    """Return ``words`` x 64 raw 32-bit values of a source."""
    if operand.kind == "vgpr":
        index = _vgpr_index(state, inst, operand)
        return state.vgpr[index : index + words].copy()
    value = scalar(state, operand, words)
    parts = [value >> 32 * k & 0xFFFFFFFF for k in range(words)]
    return np.repeat(np.array(parts, np.uint32)[:, None], LANES, axis=1)


def pair_of(words: Array) -> Array:
    """Join two rows of 32-bit values into 64-bit ones."""
    result: Array = words[0].astype(_U64) | words[1].astype(_U64) << _U64(32)
    return result


# --- DPP


def dpp_lanes(inst: Instruction) -> tuple[Array, Array]:
    """Return for each lane the lane that DPP reads, and whether there is one."""
    modifiers = inst.modifiers
    row, column = LANE & ~15, LANE & 15
    every = np.ones(LANES, bool)
    if "quad_perm" in modifiers:
        pattern = np.array(modifiers["quad_perm"])
        return (LANE & ~3) + pattern[LANE & 3], every
    if "row_shl" in modifiers:
        source = column + number(inst, "row_shl")
        return row + (source & 15), source < 16
    if "row_shr" in modifiers:
        source = column - number(inst, "row_shr")
        return row + (source & 15), source >= 0
    if "row_ror" in modifiers:
        return row + (column - number(inst, "row_ror") & 15), every
    if "wave_shl" in modifiers:
        return LANE + 1 & 63, LANE < 63
    if "wave_rol" in modifiers:
        return LANE + 1 & 63, every
    if "wave_shr" in modifiers:
        return LANE - 1 & 63, LANE > 0
    if "wave_ror" in modifiers:
        return LANE - 1 & 63, every
    if "row_mirror" in modifiers:
        return row + 15 - column, every
    if "row_half_mirror" in modifiers:
        return (LANE & ~7) + 7 - (LANE & 7), every
    if number(inst, "row_bcast") == 15:
        return (row - 1) & 63, row > 0
    if number(inst, "row_bcast") == 31:
        return np.full(LANES, 31), LANE >= 32
    if "row_newbcast" in modifiers:
        return row + number(inst, "row_newbcast"), every
    raise UnknownInstructionError(f"numpy core: `{inst.text}`: DPP control is not known")


def _dpp_valid(state: WaveState, inst: Instruction) -> Array:
    lanes, valid = dpp_lanes(inst)
    # A lane that is off gives no data, as if it lay outside.
    return valid & state.active[lanes]


def write_lanes(state: WaveState, inst: Instruction) -> Array:
    """Return the lanes whose results are written."""
    lanes = state.active
    if inst.encoding != "dpp":
        return lanes
    if not number(inst, "bound_ctrl"):
        lanes = lanes & _dpp_valid(state, inst)
    rows = number(inst, "row_mask", 15) >> (LANE >> 4) & 1
    banks = number(inst, "bank_mask", 15) >> (LANE >> 2 & 3) & 1
    result: Array = lanes & rows.astype(bool) & banks.astype(bool)
    return result


# --- sources


def raw(state: WaveState, inst: Instruction, position: int, words: int) -> Array:
    """Return the words of a source after DPP and part selection."""
    values = vector_words(state, inst, inst.operands[position], words)
    order = sources(inst)
    which = order.index(position) if position in order else -1
    if inst.encoding == "dpp" and which == 0:
        lanes, _ = dpp_lanes(inst)
        values = np.where(_dpp_valid(state, inst), values[:, lanes], _U32(0))
    if inst.encoding == "sdwa" and which in (0, 1):
        select = number(inst, f"src{which}_sel", _DWORD)
        values = _select(values, select, inst.operands[position].sext)
    return values


def _select(values: Array, select: int, sext: bool) -> Array:
    if select == _DWORD:
        return values
    width, shift = (16, 16 * (select - _WORD_0)) if select >= _WORD_0 else (8, 8 * select)
    part = values >> _U32(shift) & _U32((1 << width) - 1)
    if sext:
        top = _U32(32 - width)
        part = ((part << top).view(np.int32) >> top.astype(np.int32)).view(np.uint32)
    return part


def _half(inst: Instruction, position: int, words: Array) -> Array:
    """Return the 16 bits that ``op_sel`` chooses."""
    order = sources(inst)
    which = order.index(position) if position in order else 3
    high = which < 3 and inst.encoding != "sdwa" and bits(inst, "op_sel", 0)[which]
    half: Array = words[0] >> _U32(16) if high else words[0] & _U16
    return half


def read(state: WaveState, inst: Instruction, position: int) -> Array:
    """Return a source as its slot's type: floats, unsigned integers or booleans."""
    operand = inst.operands[position]
    kind = operand.slot.type
    if kind == "mask":
        return lanes_of(scalar(state, operand, 2))
    wide = kind in _WIDE
    words = raw(state, inst, position, 2 if wide else 1)
    if kind in ("f16", "bf16", "u16", "i16"):
        values = _half(inst, position, words).astype(np.uint16)
        return _float_or_bits(state, operand, values, kind)
    if wide:
        return _float_or_bits(state, operand, pair_of(words), kind)
    return _float_or_bits(state, operand, words[0], kind)


def _float_or_bits(state: WaveState, operand: Operand, values: Array, kind: str) -> Array:
    values = _sign(values, operand.neg, operand.abs)
    if kind == "bf16":
        return flush32((values.astype(np.uint32) << _U32(16)).view(np.float32), state)
    if kind not in _FLOATS:
        return values
    floats = values.view(_FLOATS[kind])
    flushing = state.mode.flush_inputs32 if kind == "f32" else state.mode.flush_inputs64
    return flush(floats, flushing)


def flush32(values: Array, state: WaveState) -> Array:
    """Flush f32 inputs as the mode says."""
    return flush(values, state.mode.flush_inputs32)


def _sign(values: Array, neg: bool, absolute: bool) -> Array:
    top = values.dtype.type(1 << (values.dtype.itemsize * 8 - 1))
    if absolute:
        values = values & ~top
    return values ^ top if neg else values


# --- destinations


def modify_output(state: WaveState, inst: Instruction, values: Array) -> Array:
    """Apply denormal flushing, the output modifier and clamping to float results."""
    single = values.dtype.type is np.float32
    flushing = state.mode.flush_outputs32 if single else state.mode.flush_outputs64
    values = flush(values, flushing)
    factor = {2: 2.0, 4: 4.0}.get(number(inst, "mul")) or (0.5 if number(inst, "div") else None)
    if factor is not None and flushing and not state.mode.ieee:
        # Output modifiers work only while denormals are flushed, and give no minus zero.
        values = flush(values * values.dtype.type(factor), True)
        values = np.where(values == 0, values.dtype.type(0), values)
    return clamp_float(state, inst, values)


def clamp_float(state: WaveState, inst: Instruction, values: Array) -> Array:
    """Clamp to 0..1 where the instruction says so."""
    if "clamp" not in inst.modifiers:
        return values
    zero, one = values.dtype.type(0), values.dtype.type(1)
    limited = np.where(values > one, one, np.where(values > zero, values, zero))
    nan = zero if state.mode.dx10_clamp else values
    return np.where(np.isnan(values), nan, limited)


def write(state: WaveState, inst: Instruction, position: int, values: Array) -> None:
    """Write a vector result, or a mask of lanes, to an operand."""
    operand = inst.operands[position]
    lanes = write_lanes(state, inst)
    if operand.slot.type == "mask":
        state.set_pair(operand.index, mask_of(values & lanes))
        return
    if values.dtype.kind == "f":
        values = modify_output(state, inst, values)
        values = values.view(f"u{values.dtype.itemsize}")
    if values.dtype.kind == "i":
        values = values.view(f"u{values.dtype.itemsize}")
    index = _vgpr_index(state, inst, operand)
    if values.dtype.itemsize == 8:
        write_words(state, index, np.stack([values, values >> _U64(32)]).astype(np.uint32), lanes)
        return
    old = state.vgpr[index]
    if inst.encoding == "sdwa" and "dst_sel" in inst.modifiers:
        new = _merge(old, values.astype(np.uint32), inst)
    elif values.dtype.itemsize == 2:
        new = merge_half(old, values, inst)
    else:
        new = values
    write_words(state, index, new[None], lanes)


def write_words(state: WaveState, index: int, words: Array, lanes: Array) -> None:
    """Write rows of 32-bit values to successive vector registers."""
    for k, row in enumerate(words):
        state.vgpr[index + k] = np.where(lanes, row, state.vgpr[index + k])


def destination_high(inst: Instruction) -> int:
    """Return the number of ``op_sel`` that belongs to the destination, 0 if none does."""
    given = cast("tuple[int, ...]", inst.modifiers.get("op_sel", ()))
    # It follows those of the sources.
    return given[-1] if len(given) > len(sources(inst)) else 0


def merge_half(old: Array, values: Array, inst: Instruction) -> Array:
    """Put a 16-bit result into its half of the register."""
    wide = values.astype(np.uint32)
    if destination_high(inst):
        return old & _U16 | wide << _U32(16)
    if inst.mnemonic in _KEEPS_OTHER_HALF.split():
        return old & ~_U16 | wide
    return wide


def insert(state: WaveState, inst: Instruction, values: Array, width: int, shift: int) -> None:
    """Write some bits of the destination register and keep the others."""
    index = inst.operands[0].index
    old = state.vgpr[index]
    part = _U32(((1 << width) - 1) << shift)
    word = old & ~part | values.astype(np.uint32) << _U32(shift) & part
    write_words(state, index, word[None], write_lanes(state, inst))


def _merge(old: Array, values: Array, inst: Instruction) -> Array:
    """Put a result into the part of the register that SDWA chooses."""
    select, unused = number(inst, "dst_sel", _DWORD), number(inst, "dst_unused")
    if select == _DWORD:
        return values
    width, shift = (16, 16 * (select - _WORD_0)) if select >= _WORD_0 else (8, 8 * select)
    part = (1 << width) - 1
    placed = (values & _U32(part)) << _U32(shift)
    if unused == _PRESERVE:
        return old & ~_U32(part << shift) | placed
    if unused == _SIGN:
        above = (0xFFFFFFFF << (width + shift)) & 0xFFFFFFFF
        negative = values >> _U32(width - 1) & _U32(1)
        return np.where(negative == 1, placed | _U32(above), placed)
    return placed
