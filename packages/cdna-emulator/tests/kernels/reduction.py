"""Reductions, scans, sorts and what is built of them."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def softmax(x_ptr, o_ptr, width, BLOCK: tl.constexpr):
    """Softmax of a masked row per program."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + i, mask=i < width, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    y = e / tl.sum(e, 0)
    tl.store(o_ptr + row * width + i, y.to(o_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def layer_norm(x_ptr, w_ptr, b_ptr, o_ptr, mean_ptr, width, eps, BLOCK: tl.constexpr):
    """Layer norm in two passes over a row that is longer than a block."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        total += tl.load(x_ptr + row * width + start + i, mask=start + i < width, other=0.0)
    mean = tl.sum(total, 0) / width
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(x_ptr + row * width + start + i, mask=start + i < width, other=0.0)
        x = tl.where(start + i < width, x - mean, 0.0)
        square += x * x
    rstd = 1 / tl.sqrt(tl.sum(square, 0) / width + eps)
    tl.store(mean_ptr + row, mean)
    for start in range(0, width, BLOCK):
        here = start + i < width
        x = tl.load(x_ptr + row * width + start + i, mask=here)
        w, b = tl.load(w_ptr + start + i, mask=here), tl.load(b_ptr + start + i, mask=here)
        tl.store(o_ptr + row * width + start + i, (x - mean) * rstd * w + b, mask=here)


@triton.jit
def rms_norm(x_ptr, w_ptr, o_ptr, width, eps, BLOCK: tl.constexpr):
    """RMS norm of a row of 16-bit values."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = x * rstd * tl.load(w_ptr + i, mask=i < width)
    tl.store(o_ptr + row * width + i, y.to(o_ptr.dtype.element_ty), mask=i < width)


@triton.jit
def reduce_all(x_ptr, o_ptr, M: tl.constexpr, N: tl.constexpr):
    """Sum, max and min along both axes of a tile."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(o_ptr + m, tl.sum(x, 1))
    tl.store(o_ptr + M + m, tl.max(x, 1))
    tl.store(o_ptr + 2 * M + m, tl.min(x, 1))
    tl.store(o_ptr + 3 * M + n, tl.sum(x, 0))
    tl.store(o_ptr + 3 * M + N + n, tl.max(x, 0))
    tl.store(o_ptr + 3 * M + 2 * N + n, tl.min(x, 0))


@triton.jit
def arg_extrema(x_ptr, o_ptr, M: tl.constexpr, N: tl.constexpr):
    """First index of the largest and smallest value of each row."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(o_ptr + m, tl.argmax(x, 1))
    tl.store(o_ptr + M + m, tl.argmin(x, 1))


@triton.jit
def scan(x_ptr, sum_ptr, product_ptr, M: tl.constexpr, N: tl.constexpr):
    """Prefix sums along rows, and prefix products from the end."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    at = m[:, None] * N + n[None, :]
    x = tl.load(x_ptr + at)
    tl.store(sum_ptr + at, tl.cumsum(x, 1))
    tl.store(product_ptr + at, tl.cumprod(x, 1, reverse=True))


@triton.jit
def _recurrence(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1


@triton.jit
def linear_recurrence(a_ptr, b_ptr, o_ptr, N: tl.constexpr):
    """y[i] = a[i] * y[i - 1] + b[i] as an associative scan of pairs."""
    n = tl.arange(0, N)
    a, b = tl.load(a_ptr + n), tl.load(b_ptr + n)
    _, y = tl.associative_scan((a, b), 0, _recurrence)
    tl.store(o_ptr + n, y)


@triton.jit
def sort_rows(x_ptr, o_ptr, M: tl.constexpr, N: tl.constexpr, DESCENDING: tl.constexpr):
    """Sort each row."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    at = m[:, None] * N + n[None, :]
    tl.store(o_ptr + at, tl.sort(tl.load(x_ptr + at), descending=DESCENDING))


@triton.jit
def top_k(x_ptr, o_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Keep the K largest values of each row, largest first."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(o_ptr + m[:, None] * K + k[None, :], tl.topk(x, K))


@triton.jit
def histogram(x_ptr, o_ptr, N: tl.constexpr, BINS: tl.constexpr):
    """Count values 0..BINS-1."""
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(o_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))


@triton.jit
def _longest(a, b):
    return tl.maximum(a, b)


@triton.jit
def reduce_bits(x_ptr, o_ptr, N: tl.constexpr):
    """Xor, or, and a reduction by a function of the kernel's own."""
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(o_ptr, tl.xor_sum(x, 0))
    tl.store(o_ptr + 1, tl.reduce_or(x, 0))
    tl.store(o_ptr + 2, tl.reduce(x, 0, _longest))
