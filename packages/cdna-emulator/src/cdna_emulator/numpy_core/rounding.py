"""Correctly rounded arithmetic in every rounding mode.

Sums and products of f32 and f16 are formed in float64, where what does not fit is rounded to odd:
a 53-bit number rounded that way rounds once more to 24 bits or fewer as the exact value would.
For f64 itself exact fractions are used.

Rounding modes are numbered as in the MODE register: 0 nearest even, 1 up, 2 down, 3 toward zero.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from cdna_emulator.numpy_core.state import Array

NEAREST, UP, DOWN, ZERO = range(4)


def odd_sum(a: Array, b: Array) -> Array:
    """Return ``a + b`` in float64 rounded to odd."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return _toward_odd(total, error)


def _toward_odd(value: Array, error: Array) -> Array:
    """Move an even float64 one step towards the exact value, when that lies off it."""
    value = np.ascontiguousarray(value, np.float64)
    even = value.view(np.uint64) & np.uint64(1) == 0
    move = even & np.isfinite(value) & np.isfinite(error) & (error != 0)
    target = np.where(error > 0, np.inf, -np.inf)
    return np.where(move, np.nextafter(value, target), value)


def round_float(value: Array, dtype: type, mode: int) -> Array:
    """Round float64 to float32 or float16; float64 stays as it is."""
    if dtype is np.float64:
        return value
    near: Array = value.astype(dtype)
    if mode == NEAREST:
        return near
    wide = near.astype(np.float64)
    infinity = dtype(np.inf)
    down = np.where(wide > value, np.nextafter(near, -infinity), near)
    up = np.where(wide < value, np.nextafter(near, infinity), near)
    if mode == UP:
        return up
    if mode == DOWN:
        return down
    return np.where(value < 0, up, down)


def add(a: Array, b: Array, mode: int) -> Array:
    """Return ``a + b`` in the operands' format."""
    dtype = a.dtype.type
    if dtype is np.float64:
        if mode == NEAREST:
            return a + b
        signs = (np.signbit(a), np.signbit(b))
        return _exactly(lambda x, y: x + y, (a, b), mode, a + b, signs)
    result = round_float(odd_sum(a.astype(np.float64), b.astype(np.float64)), dtype, mode)
    return _zero_sign(result, a, b, mode)


def mul(a: Array, b: Array, mode: int) -> Array:
    """Return ``a * b`` in the operands' format."""
    dtype = a.dtype.type
    if dtype is np.float64:
        if mode == NEAREST:
            return a * b
        return _exactly(lambda x, y: x * y, (a, b), mode, a * b)
    return round_float(a.astype(np.float64) * b.astype(np.float64), dtype, mode)


def fma(a: Array, b: Array, c: Array, mode: int) -> Array:
    """Return ``a * b + c`` rounded once."""
    dtype = a.dtype.type
    if dtype is np.float64:
        signs = (np.signbit(a) ^ np.signbit(b), np.signbit(c))
        return _exactly(lambda x, y, z: x * y + z, (a, b, c), mode, a * b + c, signs)
    product = a.astype(np.float64) * b.astype(np.float64)
    result = round_float(odd_sum(product, c.astype(np.float64)), dtype, mode)
    return _zero_sign(result, product, c, mode)


def fma_scaled(a: Array, b: Array, c: Array, powers: Array, mode: int) -> Array:
    """Return ``(a * b + c) * 2**powers``, rounded once."""
    dtype = a.dtype.type
    if dtype is not np.float64:
        total = odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
        return round_float(np.ldexp(total, powers), dtype, mode)
    result = fma(a, b, c, mode)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for lane in np.flatnonzero(finite):
        x, y, z = (Fraction(float(v[lane])) for v in (a, b, c))
        exact = (x * y + z) * Fraction(2) ** int(powers[lane])
        if exact:
            result[lane] = round_fraction(exact, mode)
    return result


def _zero_sign(result: Array, a: Array, b: Array, mode: int) -> Array:
    """Give a sum that cancels exactly its sign: negative when rounding down."""
    if mode != DOWN:
        return result
    cancelled = (result == 0) & (a == -b) & (np.signbit(a) != np.signbit(b))
    return np.where(cancelled, result.dtype.type(-0.0), result)


def _exactly(
    formula: Callable[..., Fraction],
    operands: tuple[Array, ...],
    mode: int,
    plain: Array,
    terms: tuple[Array, Array] | None = None,
) -> Array:
    """Evaluate over fractions; lanes that are not finite take the plain result.

    ``terms`` are the signs of a sum's two terms, which decide the sign of a sum that is zero.
    """
    result = plain.copy()
    if len(operands) == 3:
        # A product that overflows does not meet an infinite third operand.
        product = np.isfinite(operands[0]) & np.isfinite(operands[1])
        result = np.where(product & ~np.isfinite(operands[2]), operands[2], result)
    finite = np.logical_and.reduce([np.isfinite(x) for x in operands])
    for lane in np.flatnonzero(finite):
        value = formula(*(Fraction(float(x[lane])) for x in operands))
        if value:
            result[lane] = round_fraction(value, mode)
        elif terms is not None:
            first, second = bool(terms[0][lane]), bool(terms[1][lane])
            negative = first if first == second else mode == DOWN
            result[lane] = -0.0 if negative else 0.0
    return result


def round_fraction(value: Fraction, mode: int) -> float:
    """Round an exact number that is not zero to float64."""
    try:
        near = float(value)
    except OverflowError:
        near = np.inf if value > 0 else -np.inf
    if mode == NEAREST:
        return near
    exact_near = Fraction(near) if np.isfinite(near) else None
    above = near > 0 if exact_near is None else exact_near > value
    below = near < 0 if exact_near is None else exact_near < value
    toward = {UP: np.inf, DOWN: -np.inf, ZERO: -np.inf if value > 0 else np.inf}[mode]
    if (above and toward < 0) or (below and toward > 0):
        return float(np.nextafter(near, toward))
    return near


def flush(value: Array, on: bool) -> Array:
    """Turn denormals into zeros of their sign, when ``on``."""
    if not on:
        return value
    tiny = np.finfo(value.dtype).smallest_normal
    small = np.abs(value) < tiny
    return np.where(small, np.copysign(value.dtype.type(0), value), value)
