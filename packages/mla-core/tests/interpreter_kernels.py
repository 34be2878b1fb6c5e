"""Kernels for ``test_interpreter``; imported only once the interpreter is on."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


@triton.jit
def dot_accumulate_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tile = n[:, None] * N + n[None, :]
    acc = tl.load(out_ptr + tile)
    tl.store(out_ptr + tile, tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), acc))


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    sums = tl.fma(tl.load(x_ptr + n), tl.load(y_ptr + n), tl.load(z_ptr + n))
    tl.store(out_ptr + n, sums)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["length"])
@triton.jit
def tuned_copy_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    for start in range(0, length, BLOCK):
        n = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + n, tl.load(x_ptr + n, mask=n < length), mask=n < length)
