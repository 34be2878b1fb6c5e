"""Flash attention forward, plain and in the form that decodes one token over a split cache."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def attention(
    q_ptr,  # [H, T, D]
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,  # [H, T] f32
    T,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Online softmax over the keys of one head for BLOCK_M queries."""
    base = tl.program_id(1) * T * D
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + base + m[:, None] * D + d[None, :], mask=(m < T)[:, None], other=0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BLOCK_M, T) if IS_CAUSAL else T
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + base + n[None, :] * D + d[:, None], mask=(n < T)[None, :], other=0.0)
        s = tl.dot(q, k) * scale_log2
        seen = (n < T)[None, :]
        if IS_CAUSAL:
            seen = seen & (n[None, :] <= m[:, None])
        s = tl.where(seen, s, float("-inf"))
        peak_new = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - peak_new[:, None])
        alpha = tl.exp2(peak - peak_new)
        denom = denom * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + base + n[:, None] * D + d[None, :], mask=(n < T)[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        peak = peak_new
    o = (acc / denom[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + base + m[:, None] * D + d[None, :], o, mask=(m < T)[:, None])
    tl.store(lse_ptr + tl.program_id(1) * T + m, peak + tl.log2(denom), mask=m < T)


@triton.jit
def decode_gemv(q_ptr, k_ptr, v_ptr, o_ptr, T, scale, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One query per program without matrix instructions: sums of products only."""
    head = tl.program_id(0)
    d, i = tl.arange(0, D), tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + head * D + d).to(tl.float32)
    peak, denom = float("-inf"), 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(0, T, BLOCK_N):
        here = (start + i) < T
        k = tl.load(k_ptr + (start + i)[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        s = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale
        s = tl.where(here, s, float("-inf"))
        peak_new = tl.maximum(peak, tl.max(s, 0))
        alpha, p = tl.exp(peak - peak_new), tl.exp(s - peak_new)
        v = tl.load(v_ptr + (start + i)[:, None] * D + d[None, :], mask=here[:, None], other=0.0)
        acc = acc * alpha + tl.sum(p[:, None] * v.to(tl.float32), 0)
        denom = denom * alpha + tl.sum(p, 0)
        peak = peak_new
    tl.store(o_ptr + head * D + d, acc / denom)
