"""Small floating-point formats: bf16, fp8 and bf8 (OCP and FNUZ), fp6, bf6, fp4 and E8M0 scales.

A format is its number of exponent and mantissa bits, its bias and what its top codes mean. Values
are decoded by the formula and encoded by choosing among the neighbours, so nothing here depends on
bit tricks of one format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from cdna_emulator.numpy_core.state import Array


@dataclass(frozen=True)
class Format:
    """Layout of a small float: sign, exponent, mantissa from the top bit down.

    ``infinity`` says what the top exponent holds: ``ieee`` infinity and NaN, ``nan`` a single NaN
    code for each sign, ``fnuz`` ordinary numbers with NaN at the code of minus zero, ``finite``
    ordinary numbers and no NaN at all.
    """

    exponent: int
    mantissa: int
    bias: int
    infinity: str

    @property
    def bits(self) -> int:
        """Width of a value."""
        return 1 + self.exponent + self.mantissa


FP8_OCP = Format(4, 3, 7, "nan")
BF8_OCP = Format(5, 2, 15, "ieee")
FP8_FNUZ = Format(4, 3, 8, "fnuz")
BF8_FNUZ = Format(5, 2, 16, "fnuz")
FP6 = Format(2, 3, 1, "finite")
BF6 = Format(3, 2, 3, "finite")
FP4 = Format(2, 1, 1, "finite")

#: fp8 and bf8 of each architecture.
EIGHT_BIT = {
    "gfx942": {"fp8": FP8_FNUZ, "bf8": BF8_FNUZ},
    "gfx950": {"fp8": FP8_OCP, "bf8": BF8_OCP},
}
#: What ``cbsz`` and ``blgp`` choose for the f8f6f4 matrix instructions.
F8F6F4 = (FP8_OCP, BF8_OCP, FP6, BF6, FP4)


def _decode_one(code: int, form: Format) -> float:
    negative = code >> (form.bits - 1)
    exponent = code >> form.mantissa & ((1 << form.exponent) - 1)
    mantissa = code & ((1 << form.mantissa) - 1)
    top = exponent == (1 << form.exponent) - 1
    if form.infinity == "fnuz" and code == 1 << (form.bits - 1):
        return float("nan")
    if form.infinity == "ieee" and top:
        return float("nan") if mantissa else (float("-inf") if negative else float("inf"))
    if form.infinity == "nan" and top and mantissa == (1 << form.mantissa) - 1:
        return float("nan")
    if exponent:
        value = (1 + mantissa / (1 << form.mantissa)) * 2.0 ** (exponent - form.bias)
    else:
        value = mantissa / (1 << form.mantissa) * 2.0 ** (1 - form.bias)
    return -value if negative else value


@cache
def table(form: Format) -> Array:
    """Return the value of every code."""
    return np.array([_decode_one(code, form) for code in range(1 << form.bits)], np.float64)


def decode(codes: Array, form: Format) -> Array:
    """Return the float64 values of some codes."""
    return table(form)[np.asarray(codes, np.int64)]


@cache
def _magnitudes(form: Format) -> Array:
    """Return the finite magnitudes in order; code and position are the same number."""
    half = table(form)[: 1 << (form.bits - 1)]
    return half[np.isfinite(half)]


def max_value(form: Format) -> float:
    """Return the largest finite number."""
    return float(_magnitudes(form)[-1])


def nan_code(form: Format) -> int:
    """Return the code that conversions give for NaN."""
    if form.infinity == "fnuz":
        return 1 << (form.bits - 1)
    largest = (1 << (form.bits - 1)) - 1
    # Infinity with the top mantissa bit is the quiet NaN.
    return largest if form.infinity != "ieee" else largest & ~1 if form.mantissa == 2 else largest


def encode(values: Array, form: Format, *, saturate: bool = True) -> Array:
    """Round to nearest even; beyond the largest number clamp to it, or become infinity or NaN."""
    magnitudes = _magnitudes(form)
    sign = np.signbit(values)
    size = np.abs(values.astype(np.float64))
    upper = np.searchsorted(magnitudes, size, side="left").clip(1, len(magnitudes) - 1)
    lower = upper - 1
    to_lower, to_upper = size - magnitudes[lower], magnitudes[upper] - size
    tie_even = np.where(lower % 2 == 0, lower, upper)
    code = np.where(to_lower < to_upper, lower, np.where(to_upper < to_lower, upper, tie_even))
    # What would round to the number after the largest, were there one, overflows.
    step = magnitudes[-1] - magnitudes[-2]
    limit = magnitudes[-1] + step / 2
    top_is_odd = (len(magnitudes) - 1) % 2 == 1
    over = (size > limit) | ((size == limit) & top_is_odd)
    over_code = len(magnitudes) - 1 if saturate else len(magnitudes)
    if form.infinity == "fnuz" and not saturate:
        over_code = nan_code(form)
    code = np.where(over, over_code, code)
    code = np.where(np.isnan(values), nan_code(form), code)
    signed = code | (sign.astype(np.int64) << (form.bits - 1))
    if form.infinity == "fnuz":
        # There is no minus zero; its code is NaN.
        signed = np.where((code == 0) | (code == nan_code(form)), code, signed)
    return np.asarray(signed, np.uint32)


def bf16_to_float(bits: Array) -> Array:
    """Return bf16 bits as float32."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """Round float64 or float32 to bf16, nearest even; returns bits."""
    wide = np.asarray(values, np.float64)
    single = _round_odd_to_single(wide)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40
    return np.where(np.isnan(wide), quiet, rounded).astype(np.uint32) & np.uint32(0xFFFF)


def _round_odd_to_single(wide: Array) -> Array:
    """Round float64 to float32 so that a second rounding to bf16 comes out as one."""
    near = np.ascontiguousarray(wide.astype(np.float32))
    back = near.astype(np.float64)
    even = near.view(np.uint32) & np.uint32(1) == 0
    move = even & np.isfinite(near) & (back != wide) & ~np.isnan(wide)
    toward = np.where(wide > back, np.float32(np.inf), np.float32(-np.inf))
    return np.ascontiguousarray(np.where(move, np.nextafter(near, toward), near))


def scale_value(codes: Array) -> Array:
    """Return the values of E8M0 scales: powers of two, NaN for 255."""
    codes = np.asarray(codes, np.int64)
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))
