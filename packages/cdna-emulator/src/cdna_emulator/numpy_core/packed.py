"""Packed arithmetic on two halves, dot products and mixed-precision multiply-adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core import rounding
from cdna_emulator.numpy_core.formats import bf16_to_float
from cdna_emulator.numpy_core.operands import (
    bits,
    clamp_float,
    modify_output,
    raw,
    sources,
    write_lanes,
    write_words,
)
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.state import Array, Mode, WaveState
from cdna_emulator.numpy_core.valu_float import (
    ieee_maximum,
    ieee_minimum,
    maximum,
    minimum,
)

_U16, _U32 = np.uint32(0xFFFF), np.uint32


def _parts(
    state: WaveState, inst: Instruction, which: int, width: int, *, negates: bool = True
) -> tuple[Array, Array]:
    """Return what the low and the high result take from a packed source.

    ``width`` is 16, or 32 for sources in register pairs. Only floats can be negated.
    """
    position = sources(inst)[which]
    words = raw(state, inst, position, width // 16)
    both = (words[0] & _U16, words[0] >> _U32(16)) if width == 16 else (words[0], words[1])
    low = both[bits(inst, "op_sel", 0)[which]]
    high = both[bits(inst, "op_sel_hi", 1)[which]]
    if not negates:
        return low, high
    top = _U32(1 << (width - 1))
    if bits(inst, "neg_lo", 0)[which]:
        low = low ^ top
    if bits(inst, "neg_hi", 0)[which]:
        high = high ^ top
    return low, high


def _half_floats(state: WaveState, values: Array) -> Array:
    floats = values.astype(np.uint16).view(np.float16)
    return rounding.flush(floats, state.mode.flush_inputs64)


def _put(state: WaveState, inst: Instruction, words: Array) -> None:
    write_words(state, inst.operands[0].index, words, write_lanes(state, inst))


# --- two f16


def _packed_half(name: str, formula: Callable[..., Array]) -> None:
    @handler(name)
    def execute(state: WaveState, inst: Instruction) -> None:
        count = len(sources(inst))
        pairs = [_parts(state, inst, k, 16) for k in range(count)]
        halves = []
        for side in (0, 1):
            operands = [_half_floats(state, pair[side]) for pair in pairs]
            value = modify_output(state, inst, formula(state.mode, *operands))
            halves.append(np.ascontiguousarray(value).view(np.uint16).astype(np.uint32))
        _put(state, inst, (halves[0] | halves[1] << _U32(16))[None])


_packed_half("v_pk_add_f16", lambda m, a, b: rounding.add(a, b, m.round64))
_packed_half("v_pk_mul_f16", lambda m, a, b: rounding.mul(a, b, m.round64))
_packed_half("v_pk_fma_f16", lambda m, a, b, c: rounding.fma(a, b, c, m.round64))
_packed_half("v_pk_max_f16", maximum)
_packed_half("v_pk_min_f16", minimum)
_packed_half("v_pk_minimum3_f16", lambda m, a, b, c: ieee_minimum(ieee_minimum(a, b), c))
_packed_half("v_pk_maximum3_f16", lambda m, a, b, c: ieee_maximum(ieee_maximum(a, b), c))


# --- two 16-bit integers


def _packed_integer(
    name: str, dtype: type, formula: Callable[..., Array], *, clamps: bool = True
) -> None:
    @handler(name)
    def execute(state: WaveState, inst: Instruction) -> None:
        pairs = [_parts(state, inst, k, 16, negates=False) for k in range(len(sources(inst)))]
        halves = []
        for side in (0, 1):
            seen = [p[side].astype(np.uint16).view(dtype).astype(np.int64) for p in pairs]
            exact = formula(*seen)
            if clamps and "clamp" in inst.modifiers:
                exact = np.clip(exact, np.iinfo(dtype).min, np.iinfo(dtype).max)
            halves.append(exact.astype(np.uint16).astype(np.uint32))
        _put(state, inst, (halves[0] | halves[1] << _U32(16))[None])


for _suffix, _dtype in (("i16", np.int16), ("u16", np.uint16)):
    _packed_integer(f"v_pk_add_{_suffix}", _dtype, lambda a, b: a + b)
    _packed_integer(f"v_pk_sub_{_suffix}", _dtype, lambda a, b: a - b)
    _packed_integer(f"v_pk_max_{_suffix}", _dtype, np.maximum)
    _packed_integer(f"v_pk_min_{_suffix}", _dtype, np.minimum)
    _packed_integer(f"v_pk_mad_{_suffix}", _dtype, lambda a, b, c: a * b + c)
_packed_integer("v_pk_mul_lo_u16", np.uint16, lambda a, b: a * b)
_packed_integer("v_pk_lshlrev_b16", np.uint16, lambda a, b: b << (a & 15), clamps=False)
_packed_integer("v_pk_lshrrev_b16", np.uint16, lambda a, b: b >> (a & 15))
_packed_integer("v_pk_ashrrev_i16", np.int16, lambda a, b: b >> (a & 15))


# --- two f32


def _packed_single(name: str, formula: Callable[..., Array]) -> None:
    @handler(name)
    def execute(state: WaveState, inst: Instruction) -> None:
        pairs = [_parts(state, inst, k, 32) for k in range(len(sources(inst)))]
        words = []
        for side in (0, 1):
            floats = [np.ascontiguousarray(p[side]).view(np.float32) for p in pairs]
            flushed = [rounding.flush(x, state.mode.flush_inputs32) for x in floats]
            value = modify_output(state, inst, formula(state.mode, *flushed))
            words.append(np.ascontiguousarray(value).view(np.uint32))
        _put(state, inst, np.stack(words))


_packed_single("v_pk_add_f32", lambda m, a, b: rounding.add(a, b, m.round32))
_packed_single("v_pk_mul_f32", lambda m, a, b: rounding.mul(a, b, m.round32))
_packed_single("v_pk_fma_f32", lambda m, a, b, c: rounding.fma(a, b, c, m.round32))


@handler("v_pk_mov_b32")
def _packed_move(state: WaveState, inst: Instruction) -> None:
    first, second = (raw(state, inst, k, 2) for k in sources(inst))
    select = bits(inst, "op_sel", 0)
    _put(state, inst, np.stack([first[select[0]], second[select[1]]]))


# --- dot products


def _accumulator(state: WaveState, inst: Instruction) -> Array:
    """Return the third source, which the two-operand forms take from the destination."""
    position = sources(inst)[2] if len(sources(inst)) == 3 else 0
    result: Array = raw(state, inst, position, 1)[0]
    return result


def _fields(values: Array, width: int, is_signed: bool) -> list[Array]:
    parts = [
        (values >> _U32(shift) & _U32((1 << width) - 1)).astype(np.int64)
        for shift in range(0, 32, width)
    ]
    half = 1 << (width - 1)
    return [(part ^ half) - half for part in parts] if is_signed else parts


def _integer_dot(names: str, width: int, is_signed: bool) -> None:
    @handler(names)
    def execute(state: WaveState, inst: Instruction) -> None:
        if width == 16:
            low_high = [_parts(state, inst, k, 16, negates=False) for k in (0, 1)]
            first, second = (low | high << _U32(16) for low, high in low_high)
        else:
            first, second = (raw(state, inst, sources(inst)[k], 1)[0] for k in (0, 1))
        dtype: Any = np.int32 if is_signed else np.uint32
        total = np.ascontiguousarray(_accumulator(state, inst)).view(dtype).astype(np.int64)
        for a, b in zip(
            _fields(first, width, is_signed), _fields(second, width, is_signed), strict=True
        ):
            total = total + a * b
        if "clamp" in inst.modifiers:
            total = np.clip(total, np.iinfo(dtype).min, np.iinfo(dtype).max)
        _put(state, inst, total.astype(np.uint32)[None])


_integer_dot("v_dot2_i32_i16 v_dot2c_i32_i16", 16, True)
_integer_dot("v_dot2_u32_u16", 16, False)
_integer_dot("v_dot4_i32_i8 v_dot4c_i32_i8", 8, True)
_integer_dot("v_dot4_u32_u8", 8, False)
_integer_dot("v_dot8_i32_i4 v_dot8c_i32_i4", 4, True)
_integer_dot("v_dot8_u32_u4", 4, False)


def _float_dot(
    names: str, convert: Callable[[Array], Array], *, sums_products_first: bool = False
) -> None:
    @handler(names)
    def execute(state: WaveState, inst: Instruction) -> None:
        pairs = [_parts(state, inst, k, 16) for k in (0, 1)]
        total = np.ascontiguousarray(_accumulator(state, inst)).view(np.float32)
        # Step by step in f32; whatever the mode says, no step gives a denormal.
        total = rounding.flush(total, True)
        if len(sources(inst)) == 3 and bits(inst, "neg_lo", 0)[2]:
            total = -total
        sides = [[convert(pair[side]).astype(np.float32) for pair in pairs] for side in (0, 1)]
        products = [rounding.flush(a * b, True) for a, b in sides]
        terms = [*products, total] if sums_products_first else [total, *products]
        partial = rounding.flush(terms[0] + terms[1], True)
        value = clamp_float(state, inst, rounding.flush(partial + terms[2], True))
        _put(state, inst, np.ascontiguousarray(value).view(np.uint32)[None])


_float_dot(
    "v_dot2_f32_f16 v_dot2c_f32_f16",
    lambda values: values.astype(np.uint16).view(np.float16),
)
_float_dot("v_dot2c_f32_bf16", bf16_to_float)
_float_dot("v_dot2_f32_bf16", bf16_to_float, sums_products_first=True)


# --- mixed precision


def _mixed_source(state: WaveState, inst: Instruction, which: int) -> Array:
    """Return a source as f32: a whole register, or the half of it that is f16."""
    position = sources(inst)[which]
    operand = inst.operands[position]
    word = raw(state, inst, position, 1)[0]
    if bits(inst, "op_sel_hi", 0)[which]:
        half = word >> _U32(16) if bits(inst, "op_sel", 0)[which] else word & _U16
        value = _half_floats(state, half).astype(np.float32)
    else:
        value = np.ascontiguousarray(word).view(np.float32)
    pattern: Array = np.ascontiguousarray(value).view(np.uint32)
    if operand.abs:
        pattern = pattern & _U32(0x7FFFFFFF)
    if operand.neg:
        pattern = pattern ^ _U32(0x80000000)
    return rounding.flush(pattern.view(np.float32), state.mode.flush_inputs32)


@handler("v_fma_mix_f32 v_fma_mixlo_f16 v_fma_mixhi_f16")
def _mix(state: WaveState, inst: Instruction) -> None:
    a, b, c = (_mixed_source(state, inst, k) for k in range(3))
    mode: Mode = state.mode
    name = inst.mnemonic
    value = rounding.fma(a, b, c, mode.round32)
    if name.endswith("f16"):
        # The sum is rounded to f32 first.
        value = rounding.round_float(value.astype(np.float64), np.float16, mode.round64)
    value = modify_output(state, inst, value)
    old = state.vgpr[inst.operands[0].index]
    if name.endswith("f32"):
        word = np.ascontiguousarray(value).view(np.uint32)
    else:
        half = np.ascontiguousarray(value).view(np.uint16).astype(np.uint32)
        word = old & ~_U16 | half if "mixlo" in name else old & _U16 | half << _U32(16)
    _put(state, inst, word[None])
