"""Matrix products: every MFMA shape and dtype that `tl.dot` and `tl.dot_scaled` reach."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def matmul(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,  # [M, N]
    M,
    N,
    K,
    a_stride,
    b_stride,
    c_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a tile per program, over K in a pipelined loop, every edge masked."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_ptr + m[:, None] * a_stride + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :]
        )
        b = tl.load(
            b_ptr + k[:, None] * b_stride + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :]
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        c_ptr + m[:, None] * c_stride + n[None, :],
        acc.to(c_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (n < N)[None, :],
    )


@triton.jit
def matmul_bt(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr
):
    """Multiply by a matrix stored transposed: its rows run along K."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    c = tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=ACC)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def matmul_batched(a_ptr, b_ptr, c_ptr, B: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """Multiply B pairs of [M, K] and [K, M] matrices in one dot."""
    i, m, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None, None] * M * K + m[None, :, None] * K + k[None, None, :])
    b = tl.load(b_ptr + i[:, None, None] * M * K + k[None, :, None] * M + m[None, None, :])
    c = tl.dot(a, b, out_dtype=tl.float32)
    tl.store(c_ptr + i[:, None, None] * M * M + m[None, :, None] * M + m[None, None, :], c)


@triton.jit
def matmul_split_k(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add the products of slices of K with atomics."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=(k < K)[:, None], other=0.0)
    tl.atomic_add(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b), sem="relaxed")


@triton.jit
def matmul_chain(a_ptr, b_ptr, c_ptr, o_ptr, M: tl.constexpr, K: tl.constexpr):
    """(a @ b) @ c: the first product becomes an operand through registers or LDS."""
    m, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * M + m[None, :])
    c = tl.load(c_ptr + m[:, None] * K + k[None, :])
    s = tl.dot(a, b)
    tl.store(o_ptr + m[:, None] * K + k[None, :], tl.dot(s.to(a.dtype), c))


@triton.jit
def matmul_scaled(
    a_ptr,  # [M, K] or [M, K / 2] bytes of two e2m1
    a_scale_ptr,  # [M, K / 32] e8m0
    b_ptr,  # [K, N] or [K / 2, N]
    b_scale_ptr,  # [N, K / 32]
    c_ptr,  # [M, N] f32
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_PACK: tl.constexpr,
    B_PACK: tl.constexpr,
):
    """Multiply matrices with one exponent for every 32 elements of K."""
    m, n, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 32)
    ka, kb = tl.arange(0, K // A_PACK), tl.arange(0, K // B_PACK)
    a = tl.load(a_ptr + m[:, None] * (K // A_PACK) + ka[None, :])
    b = tl.load(b_ptr + kb[:, None] * N + n[None, :])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // 32) + g[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + g[None, :])
    c = tl.dot_scaled(a, a_scale, A_FORMAT, b, b_scale, B_FORMAT)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)
