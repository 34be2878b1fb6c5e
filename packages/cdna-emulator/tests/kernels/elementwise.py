"""Arithmetic lane by lane: integers of every width, floats, maths functions, conversions."""

from __future__ import annotations

import triton
from triton import language as tl
from triton.language.extra import libdevice


@triton.jit
def integers(a_ptr, b_ptr, o_ptr, N: tl.constexpr):
    """Quotients, remainders, shifts and bits of integers of any width; b is never 0."""
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    shift = (i % 7).to(a.dtype)
    tl.store(o_ptr + i, a // b)
    tl.store(o_ptr + N + i, a % b)
    tl.store(o_ptr + 2 * N + i, a * b + a)
    tl.store(o_ptr + 3 * N + i, a >> shift)
    tl.store(o_ptr + 4 * N + i, a << shift)
    tl.store(o_ptr + 5 * N + i, (a & b) ^ (a | ~b))
    tl.store(o_ptr + 6 * N + i, tl.minimum(a, b) - tl.maximum(a, b))
    tl.store(o_ptr + 7 * N + i, tl.where(a < b, a, -b))


@triton.jit
def wide_products(a_ptr, b_ptr, o_ptr, N: tl.constexpr):
    """The high halves of 32-bit products."""
    i = tl.arange(0, N)
    tl.store(o_ptr + i, tl.umulhi(tl.load(a_ptr + i), tl.load(b_ptr + i)))


@triton.jit
def bit_tricks(a_ptr, o_ptr, N: tl.constexpr):
    """First set bit from either end, set bits, reversed bits: machine instructions of one operand.

    Written as assembly, because the device library of this compiler offers none of them.
    """
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    high = tl.inline_asm_elementwise("v_ffbh_u32 $0, $1", "=v,v", [a], tl.int32, True, 1)
    low = tl.inline_asm_elementwise("v_ffbl_b32 $0, $1", "=v,v", [a], tl.int32, True, 1)
    count = tl.inline_asm_elementwise("v_bcnt_u32_b32 $0, $1, 7", "=v,v", [a], tl.int32, True, 1)
    turned = tl.inline_asm_elementwise("v_bfrev_b32 $0, $1", "=v,v", [a], tl.int32, True, 1)
    tl.store(o_ptr + i, high)
    tl.store(o_ptr + N + i, low)
    tl.store(o_ptr + 2 * N + i, count)
    tl.store(o_ptr + 3 * N + i, turned)


@triton.jit
def maths(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Functions that `tl` has, in the precision of the argument; x lies in (0, 8)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    x = tl.load(x_ptr + i, mask=here, other=1.0)
    tl.store(o_ptr + i, tl.exp(x), mask=here)
    tl.store(o_ptr + n + i, tl.exp2(x), mask=here)
    tl.store(o_ptr + 2 * n + i, tl.log(x), mask=here)
    tl.store(o_ptr + 3 * n + i, tl.log2(x), mask=here)
    tl.store(o_ptr + 4 * n + i, tl.sin(x), mask=here)
    tl.store(o_ptr + 5 * n + i, tl.cos(x), mask=here)
    tl.store(o_ptr + 6 * n + i, tl.sqrt(x), mask=here)
    tl.store(o_ptr + 7 * n + i, tl.rsqrt(x), mask=here)
    tl.store(o_ptr + 8 * n + i, tl.erf(x), mask=here)
    tl.store(o_ptr + 9 * n + i, tl.floor(x) + tl.ceil(x) * tl.abs(-x), mask=here)
    tl.store(o_ptr + 10 * n + i, 1 / x, mask=here)
    tl.store(o_ptr + 11 * n + i, tl.fma(x, x, -x), mask=here)


@triton.jit
def library(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Functions of the device library."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    x = tl.load(x_ptr + i, mask=here, other=1.0)
    y = tl.load(y_ptr + i, mask=here, other=1.0)
    tl.store(o_ptr + i, libdevice.tanh(x), mask=here)
    tl.store(o_ptr + n + i, libdevice.pow(x, y), mask=here)
    tl.store(o_ptr + 2 * n + i, libdevice.atan2(x, y), mask=here)
    tl.store(o_ptr + 3 * n + i, libdevice.expm1(x), mask=here)
    tl.store(o_ptr + 4 * n + i, libdevice.log1p(x), mask=here)
    tl.store(o_ptr + 5 * n + i, libdevice.fmod(x, y), mask=here)
    tl.store(o_ptr + 6 * n + i, libdevice.rint(x), mask=here)
    tl.store(o_ptr + 7 * n + i, libdevice.acos(x / 8), mask=here)
    tl.store(o_ptr + 8 * n + i, libdevice.cosh(x), mask=here)
    tl.store(o_ptr + 9 * n + i, libdevice.hypot(x, y), mask=here)
    tl.store(o_ptr + 10 * n + i, libdevice.trunc(x) * libdevice.round(y), mask=here)
    tl.store(o_ptr + 11 * n + i, libdevice.tan(x / 8), mask=here)


@triton.jit
def accurate(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Correctly rounded square roots and quotients."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n), tl.load(y_ptr + i, mask=i < n, other=1.0)
    tl.store(o_ptr + i, tl.sqrt_rn(x), mask=i < n)
    tl.store(o_ptr + n + i, tl.div_rn(x, y), mask=i < n)


@triton.jit
def doubles(x_ptr, y_ptr, o_ptr, N: tl.constexpr):
    """Arithmetic in fp64."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(o_ptr + i, x / y)
    tl.store(o_ptr + N + i, tl.sqrt(tl.abs(x)))
    tl.store(o_ptr + 2 * N + i, x * y + x)
    tl.store(o_ptr + 3 * N + i, tl.where(x < y, tl.floor(x), tl.ceil(y)))
    tl.store(o_ptr + 4 * N + i, tl.maximum(x, y) - tl.minimum(x, y))
    tl.store(o_ptr + 5 * N + i, x.to(tl.int64).to(tl.float64) + y.to(tl.float32).to(tl.float64))


@triton.jit
def halves(x_ptr, y_ptr, o_ptr, N: tl.constexpr):
    """Arithmetic in a 16-bit float, packed two by two."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(o_ptr + i, x + y)
    tl.store(o_ptr + N + i, x * y - x)
    tl.store(o_ptr + 2 * N + i, tl.maximum(x, y))
    tl.store(o_ptr + 3 * N + i, tl.where(x > y, x, -y))
    tl.store(o_ptr + 4 * N + i, tl.fma(x, y, x))
    tl.store(o_ptr + 5 * N + i, tl.clamp(x, -y * 0 - 1, y * 0 + 1))


@triton.jit
def convert(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Convert from the dtype of one buffer to that of the other."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(o_ptr + i, x.to(o_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def random_numbers(o_ptr, u_ptr, normal_ptr, seed, n, BLOCK: tl.constexpr):
    """Philox: integers, uniform and normal numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + i, tl.randint(seed, i), mask=i < n)
    tl.store(u_ptr + i, tl.rand(seed, i), mask=i < n)
    tl.store(normal_ptr + i, tl.randn(seed, i), mask=i < n)


@triton.jit
def collatz(x_ptr, o_ptr, BLOCK: tl.constexpr):
    """Count steps to 1, lanes leaving at different times; one value per program."""
    x = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    while x != 1:
        if x % 2 == 0:  # noqa: SIM108
            x = x // 2
        else:
            x = 3 * x + 1
        steps += 1
    tl.store(o_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), steps)


@triton.jit
def activations(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """SiLU, GELU and a clipped one, in fp32 from 16-bit values."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    tl.store(o_ptr + i, x * tl.sigmoid(x), mask=i < n)
    tl.store(o_ptr + n + i, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), mask=i < n)
    tl.store(o_ptr + 2 * n + i, tl.clamp(x, -1.0, 1.0), mask=i < n)


@triton.jit
def bits(x_ptr, o_ptr, N: tl.constexpr):
    """Read the exponent and flip the sign through the bits of a float."""
    i = tl.arange(0, N)
    raw = tl.load(x_ptr + i).to(tl.int32, bitcast=True)
    tl.store(o_ptr + i, (raw >> 23) & 255)
    flipped = (raw ^ -2147483648).to(tl.float32, bitcast=True)
    tl.store(o_ptr + N + i, flipped.to(tl.int32))


@triton.jit
def inline_assembly(a_ptr, b_ptr, o_ptr, N: tl.constexpr):
    """A byte permutation and a sum of differences written as machine instructions."""
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    mixed = tl.inline_asm_elementwise(
        "v_perm_b32 $0, $1, $2, $3",
        "=v,v,v,v",
        [a, b, tl.full([N], 0x07020500, tl.int32)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    summed = tl.inline_asm_elementwise(
        "v_sad_u8 $0, $1, $2, 5", "=v,v,v", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(o_ptr + i, mixed)
    tl.store(o_ptr + N + i, summed)
