"""Conversions of gfx950 between wide floats and 8, 6 or 4-bit floats with a block scale.

The scale is a power of two: the exponent of an f32. Narrow values are multiplied by it when they
are widened; wide values are divided by it when they are narrowed.
"""

from __future__ import annotations

import re

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import OPS
from cdna_emulator.numpy_core import formats, rounding
from cdna_emulator.numpy_core.convert import saturates
from cdna_emulator.numpy_core.operands import (
    bits,
    destination_high,
    insert,
    raw,
    write_lanes,
    write_words,
)
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.state import Array, WaveState

_U32, _U64 = np.uint32, np.uint64
_NARROW = {
    "fp8": formats.FP8_OCP,
    "bf8": formats.BF8_OCP,
    "fp6": formats.FP6,
    "bf6": formats.BF6,
    "fp4": formats.FP4,
}
_WIDTH = {"f32": 32, "f16": 16, "bf16": 16}
_NAME = re.compile(r"v_cvt_scalef32_(sr_)?(pk32_|2xpk16_|pk_)?([a-z0-9]+)_([a-z0-9]+)")


def _fields(words: Array, width: int, count: int) -> list[Array]:
    """Cut registers into fields, from the lowest bit up."""
    found = []
    for k in range(count):
        word, shift = divmod(width * k, 32)
        value = words[word].astype(_U64) >> _U64(shift)
        if shift + width > 32:
            value = value | words[word + 1].astype(_U64) << _U64(32 - shift)
        found.append((value & _U64((1 << width) - 1)).astype(np.uint32))
    return found


def _join(fields: list[Array], width: int) -> Array:
    """Put fields into registers, from the lowest bit up."""
    lanes = len(fields[0])
    words = np.zeros((-(-width * len(fields) // 32), lanes), np.uint32)
    for k, field in enumerate(fields):
        word, shift = divmod(width * k, 32)
        wide = field.astype(_U64) << _U64(shift)
        words[word] |= (wide & _U64(0xFFFFFFFF)).astype(np.uint32)
        if shift + width > 32:
            words[word + 1] |= (wide >> _U64(32)).astype(np.uint32)
    return words


def _widen(codes: Array, kind: str) -> Array:
    """Return f32, f16 or bf16 bits as float64."""
    if kind == "f32":
        return np.ascontiguousarray(codes).view(np.float32).astype(np.float64)
    if kind == "f16":
        return codes.astype(np.uint16).view(np.float16).astype(np.float64)
    return formats.bf16_to_float(codes).astype(np.float64)


def _to_bits(values: Array, kind: str) -> Array:
    """Round float64 to f32, f16 or bf16 bits, nearest even."""
    if kind == "bf16":
        return formats.float_to_bf16(values)
    if kind == "f32":
        return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    half = rounding.round_float(values, np.float16, rounding.NEAREST)
    return np.ascontiguousarray(half).view(np.uint16).astype(np.uint32)


def _scale(words: Array) -> Array:
    """Return the power of two that an f32's exponent field stands for."""
    return formats.scale_value(words >> _U32(23) & _U32(255))


def _narrow(values: Array, noise: Array | None, form: formats.Format, saturate: bool) -> Array:
    saturate = saturate or form.infinity == "finite"
    if noise is None:
        return formats.encode(values, form, saturate=saturate)
    return formats.encode(_cut(values, noise, form), form, saturate=saturate)


def _cut(values: Array, noise: Array, form: formats.Format) -> Array:
    """Add a random part of the last kept place and drop what is below it."""
    magnitude = np.abs(values)
    _, exponent = np.frexp(magnitude)
    step = np.ldexp(1.0, np.maximum(exponent - 1, 1 - form.bias) - form.mantissa)
    cut = np.floor(magnitude / step + noise.astype(np.float64) / 2.0**32) * step
    return np.copysign(np.where(np.isfinite(values), cut, magnitude), values)


def _next_noise(noise: Array) -> Array:
    """Step the generator of v_prng_b32."""
    return (noise << _U32(1)) ^ (noise >> _U32(31)) * _U32(197)


def _execute(state: WaveState, inst: Instruction) -> None:
    match = _NAME.fullmatch(inst.mnemonic)
    assert match is not None
    stochastic, packing, target, source = match.groups()
    if target in _NARROW:
        _to_narrow(state, inst, bool(stochastic), packing or "", target, source)
    else:
        _from_narrow(state, inst, packing or "", target, source)


def _to_narrow(
    state: WaveState, inst: Instruction, stochastic: bool, packing: str, target: str, source: str
) -> None:
    form, width = _NARROW[target], _WIDTH[source]
    last = len(inst.operands) - 1
    scale = _scale(raw(state, inst, last, 1)[0])
    noise = raw(state, inst, last - 1, 1)[0] if stochastic else None
    codes = []
    for number, value in enumerate(_wide_values(state, inst, packing, width, stochastic)):
        if noise is not None and number:
            noise = _next_noise(noise)
        exact = _widen(value, source) / scale
        codes.append(_narrow(exact, noise, form, saturates(state)))
    words = _join(codes, form.bits)
    total = form.bits * len(codes)
    if total >= 32:
        write_words(state, inst.operands[0].index, words, write_lanes(state, inst))
    elif total == 16:
        insert(state, inst, words[0], 16, 16 * destination_high(inst))
    else:
        select = bits(inst, "op_sel", 0)
        insert(state, inst, words[0], 8, 8 * (select[2] | select[3] << 1))


def _wide_values(
    state: WaveState, inst: Instruction, packing: str, width: int, stochastic: bool
) -> list[Array]:
    """Return the raw values to narrow, in the order of the result."""
    if packing == "2xpk16_":
        first, second = (_fields(raw(state, inst, k, 16), 32, 16) for k in (1, 2))
        return [value for pair in zip(first, second, strict=True) for value in pair]
    if packing == "pk32_":
        return _fields(raw(state, inst, 1, width), width, 32)
    if packing == "pk_" and width == 32 and not stochastic:
        return [_flushed(state, _signed(inst, k, raw(state, inst, k, 1)[0])) for k in (1, 2)]
    if packing == "pk_":
        return _fields(raw(state, inst, 1, width // 16), width, 2)
    word = raw(state, inst, 1, 1)[0]
    if width == 32:
        return [_flushed(state, _signed(inst, 1, word))]
    return [word >> _U32(16) if bits(inst, "op_sel", 0)[0] else word & _U32(0xFFFF)]


def _flushed(state: WaveState, word: Array) -> Array:
    """Flush f32 denormals as the mode says."""
    single = np.ascontiguousarray(word).view(np.float32)
    return np.ascontiguousarray(rounding.flush(single, state.mode.flush_inputs32)).view(np.uint32)


def _signed(inst: Instruction, position: int, word: Array) -> Array:
    """Apply negation and absolute value to an f32 source."""
    operand = inst.operands[position]
    if operand.abs:
        word = word & _U32(0x7FFFFFFF)
    return word ^ _U32(0x80000000) if operand.neg else word


def _from_narrow(
    state: WaveState, inst: Instruction, packing: str, target: str, source: str
) -> None:
    form = _NARROW[source]
    count = 32 if packing == "pk32_" else 2 if packing == "pk_" else 1
    words = raw(state, inst, 1, -(-form.bits * count // 32))
    scale = _scale(raw(state, inst, 2, 1)[0])
    select = bits(inst, "op_sel", 0)
    if packing == "pk_" and form.bits == 8:
        words = words >> _U32(16 * select[0])
    elif packing != "pk32_":
        words = words >> _U32(8 * (select[0] | select[1] << 1))
    values = [formats.decode(code, form) * scale for code in _fields(words, form.bits, count)]
    results = [_to_bits(value, target) for value in values]
    if count == 1 and target == "f16":
        insert(state, inst, results[0], 16, 16 * destination_high(inst))
        return
    rows = _join(results, _WIDTH[target])
    write_words(state, inst.operands[0].index, rows, write_lanes(state, inst))


handler(" ".join(name for name in OPS if name.startswith("v_cvt_scalef32_")))(_execute)
