"""Conversions between number formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core import rounding
from cdna_emulator.numpy_core.formats import (
    EIGHT_BIT,
    Format,
    decode,
    encode,
    float_to_bf16,
)
from cdna_emulator.numpy_core.operands import (
    bits,
    destination_high,
    flush32,
    insert,
    modify_output,
    raw,
    read,
    write,
    write_lanes,
    write_words,
)
from cdna_emulator.numpy_core.registry import Step, add_lanewise, handler, lanewise
from cdna_emulator.numpy_core.state import Array, WaveState

_U32 = np.uint32


def to_integer(values: Array, dtype: type) -> Array:
    """Truncate towards zero; what does not fit becomes the nearest limit, NaN zero."""
    limits = np.iinfo(dtype)
    wide = np.trunc(values.astype(np.float64))
    inside = np.where(np.isnan(wide), 0, np.clip(wide, float(limits.min), float(limits.max)))
    return inside.astype(np.int64).astype(dtype)


def _single(step: Step, exact: Array) -> Array:
    """Round exact float64 values to f32 by the mode."""
    return rounding.round_float(exact, np.float32, step.mode.round32)


def _half(step: Step, exact: Array) -> Array:
    return rounding.round_float(exact, np.float16, step.mode.round64)


for _name, _function in (
    ("v_cvt_f32_i32", lambda s, a: _single(s, a.view(np.int32).astype(np.float64))),
    ("v_cvt_f32_u32", lambda s, a: _single(s, a.astype(np.float64))),
    ("v_cvt_f64_i32", lambda s, a: a.view(np.int32).astype(np.float64)),
    ("v_cvt_f64_u32", lambda s, a: a.astype(np.float64)),
    ("v_cvt_f64_f32", lambda s, a: a.astype(np.float64)),
    ("v_cvt_f32_f64", lambda s, a: rounding.round_float(a, np.float32, s.mode.round64)),
    ("v_cvt_i32_f32", lambda s, a: to_integer(a, np.int32)),
    ("v_cvt_u32_f32", lambda s, a: to_integer(a, np.uint32)),
    ("v_cvt_i32_f64", lambda s, a: to_integer(a, np.int32)),
    ("v_cvt_u32_f64", lambda s, a: to_integer(a, np.uint32)),
    (
        "v_cvt_rpi_i32_f32",
        # The sum is rounded to f32, as LLVM relies on for the pattern floor(x + 0.5).
        lambda s, a: to_integer(
            np.floor(rounding.add(a, np.full_like(a, 0.5), rounding.NEAREST)), np.int32
        ),
    ),
    ("v_cvt_flr_i32_f32", lambda s, a: to_integer(np.floor(a), np.int32)),
    ("v_cvt_f16_f32", lambda s, a: _half(s, a.astype(np.float64))),
    ("v_cvt_f32_f16", lambda s, a: a.astype(np.float32)),
    ("v_cvt_f32_bf16", lambda s, a: a),
    ("v_cvt_f16_u16", lambda s, a: _half(s, a.astype(np.float64))),
    ("v_cvt_f16_i16", lambda s, a: _half(s, a.view(np.int16).astype(np.float64))),
    ("v_cvt_u16_f16", lambda s, a: to_integer(a, np.uint16)),
    ("v_cvt_i16_f16", lambda s, a: to_integer(a, np.int16)),
    ("v_cvt_norm_i16_f16", lambda s, a: _normalized(a, True).astype(np.int16)),
    ("v_cvt_norm_u16_f16", lambda s, a: _normalized(a, False).astype(np.uint16)),
):
    add_lanewise(_name, _function)
for _byte in range(4):
    add_lanewise(
        f"v_cvt_f32_ubyte{_byte}",
        lambda s, a, _shift=8 * _byte: (a >> _U32(_shift) & _U32(255)).astype(np.float32),
    )


@lanewise("v_cvt_off_f32_i4")
def _offset_nibble(step: Step, a: Array) -> Array:
    """Read a signed nibble as sixteenths."""
    nibble = (a & _U32(15)).astype(np.int64)
    return (((nibble ^ 8) - 8) / 16).astype(np.float32)


def _normalized(values: Array, is_signed: bool) -> Array:
    """Map -1..1 or 0..1 to the whole range of 16 bits, nearest even."""
    scale, least = (32767, -1) if is_signed else (65535, 0)
    # The product is one of f32.
    scaled = np.clip(values.astype(np.float32), np.float32(least), 1) * np.float32(scale)
    return np.where(np.isnan(scaled), 0, np.rint(scaled)).astype(np.int64)


# --- pairs


def pack(low: Array, high: Array) -> Array:
    """Join two 16-bit values into 32-bit ones."""
    first, second = (np.ascontiguousarray(x) for x in (low, high))
    return first.view(np.uint16).astype(np.uint32) | second.view(np.uint16).astype(
        np.uint32
    ) << _U32(16)


def _two(convert: Callable[[Step, Array], Array]) -> Callable[[Step, Array, Array], Array]:
    return lambda step, a, b: pack(convert(step, a), convert(step, b))


def _to_half(step: Step, values: Array, mode: int) -> Array:
    result = rounding.round_float(values.astype(np.float64), np.float16, mode)
    return rounding.flush(result, step.mode.flush_outputs64)


add_lanewise("v_cvt_pkrtz_f16_f32", _two(lambda s, a: _to_half(s, a, rounding.ZERO)))
add_lanewise("v_cvt_pk_f16_f32", _two(lambda s, a: _to_half(s, a, rounding.NEAREST)))
add_lanewise("v_cvt_pk_bf16_f32", _two(lambda s, a: float_to_bf16(a).astype(np.uint16)))
add_lanewise("v_pack_b32_f16", lambda s, a, b: pack(a, b))
add_lanewise(
    "v_cvt_pknorm_i16_f32 v_cvt_pknorm_i16_f16",
    _two(lambda s, a: _normalized(a, True).astype(np.int16)),
)
add_lanewise(
    "v_cvt_pknorm_u16_f32 v_cvt_pknorm_u16_f16",
    _two(lambda s, a: _normalized(a, False).astype(np.uint16)),
)
add_lanewise("v_cvt_pk_u16_u32", _two(lambda s, a: np.minimum(a, _U32(0xFFFF)).astype(np.uint16)))
add_lanewise(
    "v_cvt_pk_i16_i32",
    _two(lambda s, a: np.clip(a.view(np.int32), -32768, 32767).astype(np.int16)),
)


@lanewise("v_cvt_pk_u8_f32")
def _insert_byte(step: Step, a: Array, which: Array, old: Array) -> Array:
    shift = (which & _U32(3)) * _U32(8)
    # Unlike other conversions to integers, this one rounds as the mode says.
    whole = {
        rounding.NEAREST: np.rint,
        rounding.UP: np.ceil,
        rounding.DOWN: np.floor,
        rounding.ZERO: np.trunc,
    }[step.mode.round32]
    byte = to_integer(whole(a), np.uint8).astype(np.uint32)
    result: Array = old & ~(_U32(255) << shift) | byte << shift
    return result


# --- eight-bit floats


def _eight_bit(state: WaveState, inst: Instruction) -> Format:
    return EIGHT_BIT[state.arch]["fp8" if "fp8" in inst.mnemonic else "bf8"]


@handler("v_cvt_f32_fp8 v_cvt_f32_bf8")
def _from_eight_bit(state: WaveState, inst: Instruction) -> None:
    byte = raw(state, inst, 1, 1)[0] & _U32(255)
    write(state, inst, 0, decode(byte, _eight_bit(state, inst)).astype(np.float32))


@handler("v_cvt_pk_f32_fp8 v_cvt_pk_f32_bf8")
def _from_eight_bit_pair(state: WaveState, inst: Instruction) -> None:
    word = raw(state, inst, 1, 1)[0]
    if bits(inst, "op_sel", 0)[0]:
        word = word >> _U32(16)
    form = _eight_bit(state, inst)
    both = [decode(word >> _U32(8 * k) & _U32(255), form).astype(np.float32) for k in (0, 1)]
    both = [modify_output(state, inst, value) for value in both]
    rows = np.stack([np.ascontiguousarray(value).view(np.uint32) for value in both])
    write_words(state, inst.operands[0].index, rows, write_lanes(state, inst))


def saturates(state: WaveState) -> bool:
    """Whether MODE asks for overflow to give the largest number instead of NaN or infinity."""
    return bool(state.mode.bits >> 23 & 1)


@handler("v_cvt_pk_fp8_f32 v_cvt_pk_bf8_f32")
def _to_eight_bit_pair(state: WaveState, inst: Instruction) -> None:
    form = _eight_bit(state, inst)
    low, high = (encode(read(state, inst, k), form, saturate=saturates(state)) for k in (1, 2))
    insert(state, inst, low | high << _U32(8), 16, 16 * destination_high(inst))


@handler("v_cvt_sr_fp8_f32 v_cvt_sr_bf8_f32")
def _to_eight_bit_stochastic(state: WaveState, inst: Instruction) -> None:
    form = _eight_bit(state, inst)
    values, noise = read(state, inst, 1), raw(state, inst, 2, 1)[0]
    code = stochastic(values, noise, form, saturates(state))
    select = bits(inst, "op_sel", 0)
    insert(state, inst, code, 8, 8 * (select[2] | select[3] << 1))


def stochastic(values: Array, noise: Array, form: Format, saturate: bool) -> Array:
    """Add noise to the mantissa bits that will be dropped, then cut off."""
    dropped = 23 - form.mantissa
    size = np.ascontiguousarray(np.abs(values)).view(np.uint32)
    noisy = (size + (noise >> _U32(32 - dropped))).view(np.float32).astype(np.float64)
    # A carry out of the largest numbers is infinite, whatever bits are left behind.
    noisy = np.where(np.isnan(noisy), np.inf, noisy)
    _, exponent = np.frexp(np.where(np.isfinite(noisy), noisy, 1))
    # The spacing of the format's numbers around the value.
    step = np.ldexp(1.0, np.maximum(exponent - 1, 1 - form.bias) - form.mantissa)
    cut = np.floor(noisy / step) * step
    cut = np.where(np.isfinite(values), cut, np.abs(values))
    return encode(np.copysign(cut, values), form, saturate=saturate)


@handler("v_cvt_sr_bf16_f32 v_cvt_sr_f16_f32")
def _to_sixteen_bit_stochastic(state: WaveState, inst: Instruction) -> None:
    values, noise = read(state, inst, 1), raw(state, inst, 2, 1)[0]
    single = np.ascontiguousarray(flush32(values, state)).view(np.uint32).astype(np.uint64)
    if "bf16" in inst.mnemonic:
        code = single + (noise >> _U32(16)) >> 16
        quiet = single >> 16 | 0x40
    else:
        code, quiet = _half_stochastic(values, noise), single >> 16 & 0x8000 | 0x7E00
    infinite = single >> 16 if "bf16" in inst.mnemonic else single >> 16 & 0x8000 | 0x7C00
    code = np.where(np.isinf(values), infinite, code)
    code = np.where(np.isnan(values), quiet, code)
    insert(state, inst, code, 16, 16 * destination_high(inst))


def _half_stochastic(values: Array, noise: Array) -> Array:
    magnitude = np.abs(values).astype(np.float64)
    _, exponent = np.frexp(magnitude)
    step = np.ldexp(1.0, np.maximum(exponent - 1, -14) - 10)
    part = (noise >> _U32(19)).astype(np.float64) / (1 << 13)
    cut = np.floor(magnitude / step + part) * step
    half = np.copysign(cut, values).astype(np.float16)
    result: Array = half.view(np.uint16).astype(np.uint64)
    return result
