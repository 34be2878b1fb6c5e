"""Quantising tiles bit for bit as `mla_core.layouts.codecs` does: fp8 with scales, and NVFP4.

Tiles are fp32 [BLOCK_T, GROUPS, GROUP]; one scale belongs to each of the ``GROUPS``. Codes are
bytes: fp8 is never a type of memory here, because no chip knows both flavours of it.

``CODEC`` is (kind, exponent bias of fp8, whether the chip converts to it, floor of a group's
largest magnitude).

Codes are those of the correctly rounded quotient of an element and its scale. A division takes
about two dozen instructions, and many more for numbers that are zero, tiny or huge; so there is one
for each scale, and `divided` makes quotients of it.
"""

from __future__ import annotations

import triton
from triton import language as tl

#: Kinds of codecs.
CAST = tl.constexpr(0)
PER_TENSOR = tl.constexpr(1)
GROUP_FP32 = tl.constexpr(2)
GROUP_E8M0 = tl.constexpr(3)
NVFP4 = tl.constexpr(4)
#: fp8 without any scale.
FP8 = tl.constexpr(5)
#: As GROUP_FP32, with scales that are powers of two.
GROUP_POWER = tl.constexpr(6)
#: Smallest normal fp32 number, the floor of a scale.
TINY = tl.constexpr(2.0**-126)
#: Floor of an E8M0 scale before it is rounded up to a power of two.
E8M0_MIN = tl.constexpr(1e-4)


@triton.jit
def largest(x):
    """Return the largest magnitude of each group, NaN if there is one: [BLOCK_T, GROUPS]."""
    # Magnitudes order as their bits do, with NaN on top, which a maximum of floats would drop.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=2).to(tl.float32, bitcast=True)


@triton.jit
def divided(x, s, LIMIT: tl.constexpr):
    """Return fp32 quotients ``x / s`` to be rounded to fp8 or e2m1, which makes them exact.

    Rounded to five bits or fewer, a result gives what the correctly rounded quotient gives, ties,
    signs of zeros, infinities and NaN included. Magnitudes above ``LIMIT`` become about that;
    ``LIMIT`` is 0 where there are none, as if ``s`` comes from the largest ``x``.

    Parameters
    ----------
    x : fp32
    s : fp32, a number or a tensor that broadcasts to ``x``
        Any number, of either sign; not zero if ``LIMIT`` is.
    """
    bits = s.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Both are multiplied by a power of two that leaves of s a number from 1 on and below 4, or
    # less if s is subnormal: nothing that matters overflows or is subnormal then.
    power = tl.maximum(254 - (magnitude >> 23), 1) << 23
    # Dividing by zero, infinity and NaN is multiplying by infinity, zero and NaN.
    odd = tl.where(magnitude > 0x7F800000, 0x7FC00000, 0)
    is_number = magnitude < 0x7F800000
    if LIMIT > 0:
        odd = tl.where(magnitude == 0, 0x7F800000, odd)
        is_number &= magnitude != 0
    power = tl.where(is_number, power, odd)
    m = magnitude.to(tl.float32, bitcast=True) * power.to(tl.float32, bitcast=True)
    m = tl.where(is_number, m, 1.0)
    # Negative ones, so that nothing has to be negated below; -1 flips the sign bit.
    power = (power | ((bits ^ magnitude) ^ -2147483648)).to(tl.float32, bitcast=True)
    y = tl.div_rn(-1.0, m)
    x = x * power
    if LIMIT > 0:
        bound = m * LIMIT
        x = tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    # Markstein's correction: the remainder of a quotient that is off by two units at most is exact.
    # Around all numbers of five bits the result is correctly rounded for every m (all were tried),
    # and rounding to fp8 changes at no others. Zeros keep their sign.
    q = x * y
    return tl.fma(tl.fma(q, m, x), y, q)


@triton.jit
def fp8_codes(x, BIAS: tl.constexpr, IS_NATIVE: tl.constexpr, IS_BOUND: tl.constexpr = False):
    """Round fp32 to fp8 bytes, to nearest even, saturating; NaN stays NaN.

    ``BIAS`` is 7 for e4m3 (OCP) and 8 for e4m3fnuz; ``IS_NATIVE`` says that the chip converts;
    ``IS_BOUND`` that no number is rounded to a larger one than fp8 has.
    """
    LIMIT: tl.constexpr = 448.0 if BIAS == 7 else 240.0
    if not IS_BOUND:
        x = tl.where(x > LIMIT, LIMIT, x)
        x = tl.where(x < -LIMIT, -LIMIT, x)
    if IS_NATIVE:
        if BIAS == 7:
            codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            codes = x.to(tl.float8e4b8).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Drop 20 bits of the mantissa; a tie goes up from an odd code. A carry moves the exponent.
        normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - ((127 - BIAS) << 23)) >> 20
        # Added to a number whose last digit is the smallest fp8 step, a small one is rounded to it.
        STEPS: tl.constexpr = 2.0 ** (21 - BIAS)
        shifted = magnitude.to(tl.float32, bitcast=True) + STEPS
        small = shifted.to(tl.int32, bitcast=True) - ((127 + 21 - BIAS) << 23)
        # In the first binade both are right, below it only the latter, at most 8, and above it only
        # the former, which is below the latter. Comparisons would take AMD's scalar registers.
        codes = tl.minimum(small, tl.maximum(normal, 8))
        sign = (bits >> 24) & 0x80
        if BIAS == 7:
            codes = tl.where(magnitude > 0x7F800000, 0x7F, codes) | sign
        else:
            # No negative zero: its byte is the only NaN.
            codes = tl.where(codes == 0, 0, codes | sign)
            codes = tl.where(magnitude > 0x7F800000, 0x80, codes)
        codes = codes.to(tl.uint8)
    return codes


@triton.jit
def fp8_values(codes, BIAS: tl.constexpr):
    """Return the fp32 values of fp8 bytes; ``BIAS`` as in `fp8_codes`."""
    codes = codes.to(tl.int32)
    magnitude = codes & 0x7F
    normal = ((magnitude + ((127 - BIAS) << 3)) << 20).to(tl.float32, bitcast=True)
    STEP: tl.constexpr = 2.0 ** (-2 - BIAS)
    values = tl.where(magnitude < 8, magnitude.to(tl.float32) * STEP, normal)
    # By its bit, since Triton subtracts from 0 to negate, which has no negative zero.
    bits = values.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)
    values = bits.to(tl.float32, bitcast=True)
    is_nan = magnitude == 0x7F if BIAS == 7 else codes == 0x80
    return tl.where(is_nan, float("nan"), values)


@triton.jit
def fp32_scales(x, BIAS: tl.constexpr, MIN_AMAX: tl.constexpr):
    """Return the scale of each group that puts its largest magnitude at the largest fp8 number."""
    LIMIT: tl.constexpr = 448.0 if BIAS == 7 else 240.0
    amax = largest(x)
    if MIN_AMAX > 0:
        amax = tl.where(amax < MIN_AMAX, MIN_AMAX, amax)
    scales = tl.div_rn(amax, LIMIT)
    return tl.where(scales < TINY, TINY, scales)


@triton.jit
def power_of_two(x):
    """Return the smallest powers of two that are not below positive normal fp32; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFFF) & 0x7F800000
    return tl.where(bits > 0x7F800000, x, rounded.to(tl.float32, bitcast=True))


@triton.jit
def fp8_quotients(x, s, BIAS: tl.constexpr, IS_NATIVE: tl.constexpr, IS_BOUND: tl.constexpr):
    """Round ``x / s`` to fp8 bytes, saturating; ``IS_BOUND`` says that no quotient has to."""
    LIMIT: tl.constexpr = 448.0 if BIAS == 7 else 240.0
    BOUND: tl.constexpr = 0.0 if IS_BOUND else LIMIT
    return fp8_codes(divided(x, s, BOUND), BIAS, IS_NATIVE, True)


@triton.jit
def e8m0_scales(x, BIAS: tl.constexpr):
    """Return the byte of each group's power of two, and its reciprocal in fp32."""
    LIMIT: tl.constexpr = 448.0 if BIAS == 7 else 240.0
    scales = tl.div_rn(largest(x), LIMIT)
    scales = tl.where(scales < E8M0_MIN, E8M0_MIN, scales)
    bits = scales.to(tl.int32, bitcast=True)
    # The next power of two, unless it is one; infinity and NaN give 255, the NaN of E8M0.
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(exponent, 255)
    # A finite scale is below 2 ** 122, so its reciprocal is a normal number.
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    reciprocal = tl.where(exponent == 255, float("nan"), reciprocal)
    return exponent.to(tl.uint8), reciprocal


@triton.jit
def e2m1_codes(x):
    """Round fp32 to e2m1 codes 0..15, ties to even, saturating; the sign is bit 3."""
    a = tl.abs(x)
    # One for each magnitude that is passed. From an odd code a tie goes up, to the even one.
    codes = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    codes += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    codes += (a > 5.0).to(tl.int32)
    return codes | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def load_factor(factor_ptr, CODEC: tl.constexpr):
    """Return the one factor of a codec that has one: loaded before the first store, and once."""
    factor = factor_ptr
    if CODEC[0] == PER_TENSOR:
        factor = tl.load(factor_ptr)
    return factor


@triton.jit
def quantise(x, factor, CODEC: tl.constexpr):
    """Return the codes and the stored scales of a tile; without scales in the page, codes twice.

    Codes are [BLOCK_T, GROUPS, GROUP] bytes, NVFP4's [BLOCK_T, GROUPS, GROUP / 2]. ``factor`` is
    that of `load_factor`.
    """
    KIND: tl.constexpr = CODEC[0]
    BIAS: tl.constexpr = CODEC[1]
    IS_NATIVE: tl.constexpr = CODEC[2]
    if KIND == FP8:
        codes = fp8_codes(x, BIAS, IS_NATIVE)
        scales = codes
    elif KIND == PER_TENSOR:
        codes = fp8_quotients(x, factor, BIAS, IS_NATIVE, False)
        scales = codes
    elif KIND == GROUP_POWER:
        scales = power_of_two(fp32_scales(x, BIAS, CODEC[3]))
        codes = fp8_quotients(x, scales[:, :, None], BIAS, IS_NATIVE, True)
    elif KIND == GROUP_FP32:
        scales = fp32_scales(x, BIAS, CODEC[3])
        codes = fp8_quotients(x, scales[:, :, None], BIAS, IS_NATIVE, True)
    elif KIND == GROUP_E8M0:
        scales, reciprocal = e8m0_scales(x, BIAS)
        # Exact, as dividing by a power of two is.
        codes = fp8_codes(x * reciprocal[:, :, None], BIAS, IS_NATIVE)
    else:
        tl.static_assert(KIND == NVFP4)
        # Not by the chip: both bytes of one conversion, widened as a pair, are a pattern that
        # ptxas 12.8 reads before it is written. There are few scales.
        scales = fp8_codes(tl.div_rn(largest(x), 6.0), 7, False)
        # Against the rounded scale, so that the pair is consistent.
        divisor = fp8_values(scales, 7)
        divisor = tl.where(divisor == 0.0, 1.0, divisor)
        halves = e2m1_codes(divided(x, divisor[:, :, None], 6.0))
        low, high = tl.split(tl.reshape(halves, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
        codes = (low | (high << 4)).to(tl.uint8)
    return codes, scales
