"""Vector floating-point arithmetic: f32, f16 and f64 through the same functions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from cdna_emulator.numpy_core import rounding
from cdna_emulator.numpy_core.registry import Step, add_lanewise, lanewise
from cdna_emulator.numpy_core.state import Array, Mode, lanes_of

_U32 = np.uint32
#: Bits of the mantissa and of the exponent of each format.
MANTISSA = {np.float16: 10, np.float32: 23, np.float64: 52}
_EXPONENT = {np.float16: 5, np.float32: 8, np.float64: 11}


def rounding_mode(step: Step, values: Array) -> int:
    """Return the rounding mode for a format."""
    return step.mode.round32 if values.dtype.type is np.float32 else step.mode.round64


def unsigned(values: Array) -> Array:
    """See the bits of floats as unsigned integers."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def exponent_field(values: Array) -> Array:
    """Return the biased exponents."""
    kind = values.dtype.type
    field = unsigned(values) >> np.array(MANTISSA[kind], unsigned(values).dtype)
    result: Array = field.astype(np.int64) & ((1 << _EXPONENT[kind]) - 1)
    return result


def is_signalling(values: Array) -> Array:
    """Find NaNs whose top mantissa bit is clear."""
    bits = unsigned(values)
    quiet = bits >> bits.dtype.type(MANTISSA[values.dtype.type] - 1) & bits.dtype.type(1)
    result: Array = np.isnan(values) & (quiet == 0)
    return result


def quieted(values: Array) -> Array:
    """Set the top mantissa bit of NaNs."""
    bits = unsigned(values)
    top = bits.dtype.type(1 << (MANTISSA[values.dtype.type] - 1))
    return np.where(np.isnan(values), bits | top, bits).view(values.dtype)


# --- sums and products


def _add(step: Step, a: Array, b: Array) -> Array:
    return rounding.add(a, b, rounding_mode(step, a))


def _mul(step: Step, a: Array, b: Array) -> Array:
    return rounding.mul(a, b, rounding_mode(step, a))


def _fma(step: Step, a: Array, b: Array, c: Array) -> Array:
    return rounding.fma(a, b, c, rounding_mode(step, a))


def _multiply_then_add(step: Step, a: Array, b: Array, c: Array) -> Array:
    """Round the product and the sum."""
    return _add(step, _mul(step, a, b), c)


for _type in ("f32", "f16", "f64"):
    add_lanewise(f"v_add_{_type}", _add)
    add_lanewise(f"v_mul_{_type}", _mul)
    add_lanewise(f"v_fma_{_type}", _fma)
for _type in ("f32", "f16"):
    add_lanewise(f"v_sub_{_type}", lambda s, a, b: _add(s, a, -b))
    add_lanewise(f"v_subrev_{_type}", lambda s, a, b: _add(s, b, -a))
add_lanewise("v_fmac_f32 v_fmac_f64", lambda s, d, a, b: _fma(s, a, b, d))
add_lanewise("v_fmamk_f32", lambda s, a, k, b: _fma(s, a, _constant(s, k, a), b))
add_lanewise("v_fmaak_f32", lambda s, a, b, k: _fma(s, a, b, _constant(s, k, a)))
add_lanewise("v_mad_f16", _multiply_then_add)
add_lanewise("v_mac_f16", lambda s, d, a, b: _multiply_then_add(s, a, b, d))
add_lanewise("v_madmk_f16", lambda s, a, k, b: _multiply_then_add(s, a, _constant(s, k, a), b))
add_lanewise("v_madak_f16", lambda s, a, b, k: _multiply_then_add(s, a, b, _constant(s, k, a)))


def _constant(step: Step, bits: Array, like: Array) -> Array:
    """See the constant inside an instruction as a float of the operands' format."""
    kind = like.dtype.type
    value = bits.view(np.float32) if kind is np.float32 else bits.astype(np.uint16).view(np.float16)
    mode = step.mode
    return rounding.flush(value, mode.flush_inputs32 if kind is np.float32 else mode.flush_inputs64)


@lanewise("v_mul_legacy_f32")
def _mul_legacy(step: Step, a: Array, b: Array) -> Array:
    return np.where((a == 0) | (b == 0), np.float32(0), _mul(step, a, b))


# --- minimum, maximum, median


def minimum(mode: Mode, a: Array, b: Array) -> Array:
    """Return the smaller number; a NaN loses, unless it signals in IEEE mode."""
    result = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return _nan_rules(mode, a, b, result)


def maximum(mode: Mode, a: Array, b: Array) -> Array:
    """Return the larger number; a NaN loses, unless it signals in IEEE mode."""
    result = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return _nan_rules(mode, a, b, result)


def _nan_rules(mode: Mode, a: Array, b: Array, result: Array) -> Array:
    result = np.where(np.isnan(b), a, result)
    result = np.where(np.isnan(a), b, result)
    if mode.ieee:
        result = np.where(is_signalling(b), quieted(b), result)
        result = np.where(is_signalling(a), quieted(a), result)
    return result


def minimum3(mode: Mode, a: Array, b: Array, c: Array) -> Array:
    """Return the smallest of three."""
    return minimum(mode, minimum(mode, a, b), c)


def maximum3(mode: Mode, a: Array, b: Array, c: Array) -> Array:
    """Return the largest of three."""
    return maximum(mode, maximum(mode, a, b), c)


def median3(mode: Mode, a: Array, b: Array, c: Array) -> Array:
    """Return the middle of three; with a NaN among them the smallest."""
    largest = maximum3(mode, a, b, c)
    result = maximum(mode, a, b)
    result = np.where(largest == b, maximum(mode, a, c), result)
    result = np.where(largest == a, maximum(mode, b, c), result)
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, minimum3(mode, a, b, c), result)


def ieee_minimum(a: Array, b: Array) -> Array:
    """Return the IEEE 754-2019 minimum: any NaN wins, and -0 is below +0."""
    result = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return np.where(np.isnan(a), quieted(a), np.where(np.isnan(b), quieted(b), result))


def ieee_maximum(a: Array, b: Array) -> Array:
    """Return the IEEE 754-2019 maximum: any NaN wins, and +0 is above -0."""
    result = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return np.where(np.isnan(a), quieted(a), np.where(np.isnan(b), quieted(b), result))


for _type in ("f32", "f16", "f64"):
    add_lanewise(f"v_min_{_type}", lambda s, a, b: minimum(s.mode, a, b))
    add_lanewise(f"v_max_{_type}", lambda s, a, b: maximum(s.mode, a, b))
for _type in ("f32", "f16"):
    add_lanewise(f"v_min3_{_type}", lambda s, a, b, c: minimum3(s.mode, a, b, c))
    add_lanewise(f"v_max3_{_type}", lambda s, a, b, c: maximum3(s.mode, a, b, c))
    add_lanewise(f"v_med3_{_type}", lambda s, a, b, c: median3(s.mode, a, b, c))
add_lanewise("v_minimum3_f32", lambda s, a, b, c: ieee_minimum(ieee_minimum(a, b), c))
add_lanewise("v_maximum3_f32", lambda s, a, b, c: ieee_maximum(ieee_maximum(a, b), c))


# --- parts of numbers


def _fract(step: Step, a: Array) -> Array:
    result = rounding.add(a, -np.floor(a), rounding_mode(step, a))
    # Just below zero the difference rounds to one, which is no fraction.
    below_one = np.nextafter(a.dtype.type(1), a.dtype.type(0))
    result = np.where(result >= 1, below_one, result)
    return np.where(np.isinf(a), a.dtype.type(np.nan), result)


def _mantissa(step: Step, a: Array) -> Array:
    fraction, _ = np.frexp(a.astype(np.float64))
    return np.where(np.isfinite(a), fraction, a).astype(a.dtype)


def _exponent(step: Step, a: Array) -> Array:
    kind = a.dtype.type
    _, exponent = np.frexp(a.astype(np.float64))
    result = np.where(np.isfinite(a), exponent, 0)
    return result.astype(np.int16 if kind is np.float16 else np.int32)


for _type in ("f32", "f16", "f64"):
    add_lanewise(f"v_fract_{_type}", _fract)
    add_lanewise(f"v_trunc_{_type}", lambda s, a: quieted(np.trunc(a)))
    add_lanewise(f"v_ceil_{_type}", lambda s, a: quieted(np.ceil(a)))
    add_lanewise(f"v_floor_{_type}", lambda s, a: quieted(np.floor(a)))
    add_lanewise(f"v_rndne_{_type}", lambda s, a: quieted(np.rint(a)))
    add_lanewise(f"v_frexp_mant_{_type}", _mantissa)
add_lanewise("v_frexp_exp_i32_f32 v_frexp_exp_i32_f64 v_frexp_exp_i16_f16", _exponent)


def scaled(values: Array, powers: Array, mode: int) -> Array:
    """Return ``values * 2**powers``, rounded once."""
    if values.dtype.type is not np.float64:
        wide = np.ldexp(values.astype(np.float64), np.clip(powers, -400, 400).astype(np.int32))
        return rounding.round_float(wide, values.dtype.type, mode)
    result = values.copy()
    for lane in np.flatnonzero(np.isfinite(values) & (values != 0)):
        power = int(np.clip(powers[lane], -5000, 5000))
        exact = Fraction(float(values[lane])) * Fraction(2) ** power
        result[lane] = rounding.round_fraction(exact, mode)
    return quieted(result)


@lanewise("v_ldexp_f32 v_ldexp_f64")
def _ldexp(step: Step, a: Array, b: Array) -> Array:
    return scaled(a, np.ascontiguousarray(b).view(np.int32), rounding_mode(step, a))


@lanewise("v_ldexp_f16")
def _ldexp16(step: Step, a: Array, b: Array) -> Array:
    return scaled(a, np.ascontiguousarray(b).view(np.int16), rounding_mode(step, a))


# --- division


@lanewise("v_div_fmas_f32 v_div_fmas_f64")
def _div_fmas(step: Step, a: Array, b: Array, c: Array) -> Array:
    # Undo v_div_scale: a scaled denominator made the quotient small, a scaled numerator large. The
    # CDNA documents give one factor for both cases; division is right with these.
    power, middle = (64, 127) if a.dtype.type is np.float32 else (128, 1023)
    result = _fma(step, a, b, c)
    factor = np.where(exponent_field(c) > middle, power, -power)
    mode = rounding_mode(step, a)
    unscaled = rounding.fma_scaled(a, b, c, factor, mode)
    # What overflows does so before the factor; division does not come there.
    over = np.abs(result) >= np.finfo(result.dtype).max
    unscaled = np.where(over, scaled(result, factor, mode), unscaled)
    return np.where(lanes_of(step.state.vcc), unscaled, result)


@lanewise("v_div_fixup_f32 v_div_fixup_f64 v_div_fixup_f16")
def _div_fixup(step: Step, quotient: Array, denominator: Array, numerator: Array) -> Array:
    kind = quotient.dtype.type
    sign = np.signbit(denominator) ^ np.signbit(numerator)
    result = np.abs(quotient)
    if kind is not np.float16:
        # Far outside the range the quotient of the refinement steps is not to be trusted.
        least = {np.float32: -150, np.float64: -1075}[kind]
        under = exponent_field(numerator) - exponent_field(denominator) < least
        result = np.where(under, _smallest(step, sign, kind), result)
        # The refinement of a quotient that is too large ends in NaN.
        result = np.where(np.isnan(result), _largest(step, sign, kind), result)
    infinite = (denominator == 0) | np.isinf(numerator)
    zero = np.isinf(denominator) | (numerator == 0)
    result = np.where(zero, kind(0), result)
    result = np.where(infinite, kind(np.inf), result)
    result = np.where(sign, -result, result)
    default = kind(-np.nan)
    result = np.where(infinite & zero & ((denominator == 0) == (numerator == 0)), default, result)
    result = np.where(np.isnan(denominator), quieted(denominator), result)
    return np.where(np.isnan(numerator), quieted(numerator), result).astype(kind)


def _smallest(step: Step, sign: Array, kind: type) -> Array:
    """Return what an underflowing quotient rounds to, as a magnitude."""
    mode = step.mode.round32 if kind is np.float32 else step.mode.round64
    away = np.where(sign, mode == rounding.DOWN, mode == rounding.UP)
    return np.where(away, np.finfo(kind).smallest_subnormal, kind(0))


def _largest(step: Step, sign: Array, kind: type) -> Array:
    """Return what an overflowing quotient rounds to, as a magnitude."""
    mode = step.mode.round32 if kind is np.float32 else step.mode.round64
    away = np.where(sign, mode == rounding.DOWN, mode == rounding.UP) | (mode == rounding.NEAREST)
    return np.where(away, kind(np.inf), np.finfo(kind).max)


@lanewise("v_div_scale_f32 v_div_scale_f64")
def _div_scale(
    step: Step, value: Array, denominator: Array, numerator: Array
) -> tuple[Array, Array]:
    kind = value.dtype.type
    power, far, tiny = {np.float32: (64, 96, 23), np.float64: (128, 768, 53)}[kind]
    result = value.copy()
    flags = np.zeros(len(value), bool)
    same_denominator, same_numerator = value == denominator, value == numerator
    for lane in range(len(value)):
        d, n = float(denominator[lane]), float(numerator[lane])
        shift = 0
        if d == 0 or n == 0:
            result[lane] = np.nan
            continue
        gap = int(exponent_field(numerator)[lane] - exponent_field(denominator)[lane])
        reciprocal_tiny = _is_denormal_quotient(1.0, d, kind)
        quotient_tiny = _is_denormal_quotient(n, d, kind)
        if gap >= far:
            flags[lane] = True
            shift = power if same_denominator[lane] else 0
        elif _is_denormal(denominator[lane]):
            shift = power
        elif reciprocal_tiny and quotient_tiny:
            # The documents scale up here, which overflows; scaled down, division is right.
            flags[lane] = True
            shift = -power if same_denominator[lane] else 0
        elif reciprocal_tiny:
            shift = -power
        elif quotient_tiny:
            flags[lane] = True
            shift = power if same_numerator[lane] else 0
        elif exponent_field(numerator)[lane] <= tiny:
            shift = power
        if shift:
            one = result[lane : lane + 1]
            result[lane : lane + 1] = scaled(one, np.array([shift]), rounding.NEAREST)
    return result, flags


def _is_denormal(value: np.floating) -> bool:
    return bool(value != 0 and abs(value) < np.finfo(value.dtype).smallest_normal)


def _is_denormal_quotient(numerator: float, denominator: float, kind: type) -> bool:
    """Whether the exact quotient is below the smallest normal number."""
    if not (np.isfinite(numerator) and np.isfinite(denominator)):
        return False
    exact = abs(Fraction(numerator) / Fraction(denominator))
    return exact < Fraction(float(np.finfo(kind).smallest_normal))


# --- cube maps


def _major(x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Return where z, and else where y, is the axis of the face."""
    on_z = (np.abs(z) >= np.abs(x)) & (np.abs(z) >= np.abs(y))
    return on_z, ~on_z & (np.abs(y) >= np.abs(x))


@lanewise("v_cubeid_f32")
def _cube_face(step: Step, x: Array, y: Array, z: Array) -> Array:
    on_z, on_y = _major(x, y, z)
    face = np.where(
        on_z, np.where(z < 0, 5, 4), np.where(on_y, np.where(y < 0, 3, 2), np.where(x < 0, 1, 0))
    )
    return face.astype(np.float32)


@lanewise("v_cubesc_f32")
def _cube_s(step: Step, x: Array, y: Array, z: Array) -> Array:
    on_z, on_y = _major(x, y, z)
    return np.where(on_z, np.where(z < 0, -x, x), np.where(on_y, x, np.where(x < 0, z, -z)))


@lanewise("v_cubetc_f32")
def _cube_t(step: Step, x: Array, y: Array, z: Array) -> Array:
    _, on_y = _major(x, y, z)
    return np.where(on_y, np.where(y < 0, -z, z), -y)


@lanewise("v_cubema_f32")
def _cube_axis(step: Step, x: Array, y: Array, z: Array) -> Array:
    on_z, on_y = _major(x, y, z)
    axis = np.where(on_z, z, np.where(on_y, y, x))
    return rounding.add(axis, axis, step.mode.round32)


# --- argument reduction


def _two_over_pi() -> int:
    """Return the first 1201 bits of 2/pi, by Machin's formula for pi."""
    bits = 1300
    one = 1 << bits

    def arctan_inverse(x: int) -> int:
        total, term, k = 0, one // x, 1
        while term:
            total += term // k if k % 4 == 1 else -(term // k)
            term //= x * x
            k += 2
        return total

    pi = 4 * (4 * arctan_inverse(5) - arctan_inverse(239))
    return (2 * one * one // pi) >> (bits - 1201)


_TWO_OVER_PI = _two_over_pi()


@lanewise("v_trig_preop_f64")
def _trig_preop(step: Step, a: Array, b: Array) -> Array:
    result = np.zeros(len(a), np.float64)
    exponents = exponent_field(a)
    for lane in range(len(a)):
        exponent = int(exponents[lane])
        shift = int(b[lane] & 31) * 53 + max(exponent - 1077, 0)
        scale = -53 - shift + (128 if exponent >= 1968 else 0)
        window = (_TWO_OVER_PI << shift & (1 << 1201) - 1) >> (1201 - 53)
        result[lane] = float(Fraction(window) * Fraction(2) ** scale)
    return result
