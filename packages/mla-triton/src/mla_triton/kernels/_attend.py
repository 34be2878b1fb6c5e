"""A tile of query rows attends to a range of its request's tokens: what decode kernels share.

A kernel locates its rows and its range, then calls `load_queries`, `attend`, `normalise` and
`store_rows`. What a row may see is a range of local tokens, ``[low, high)``.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._math import finite_or_zero, scale_scores, token_rows


@triton.jit
def load_queries(
    ql_nope_ptr,  # [total_q, num_heads, D]
    q_pe_ptr,  # [total_q, num_heads, R]
    q_token,  # [M] i64
    head,  # [M] i64
    is_row,  # [M] i1
    ql_nope_stride_t,  # elements
    ql_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return ql_nope [M, BLOCK_D] and q_pe [M, BLOCK_R]; rows and columns past the end are zeros.

    Without rope the second is a stand-in that nothing reads.
    """
    d = tl.arange(0, BLOCK_D)
    ql_nope = tl.load(
        ql_nope_ptr + (q_token * ql_nope_stride_t + head * ql_nope_stride_h)[:, None] + d[None, :],
        mask=is_row[:, None] & (d < D)[None, :],
        other=0.0,
    )
    q_pe = ql_nope
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        q_pe = tl.load(
            q_pe_ptr + (q_token * q_pe_stride_t + head * q_pe_stride_h)[:, None] + r[None, :],
            mask=is_row[:, None] & (r < R)[None, :],
            other=0.0,
        )
    return ql_nope, q_pe


@triton.jit
def attend(
    ql_nope,  # [M, BLOCK_D]
    q_pe,  # [M, BLOCK_R]
    low,  # [M] i32, first token a row sees; unused without HAS_WINDOW
    high,  # [M] i32, end of the tokens a row sees
    begin,  # first token of a page or a multiple of BLOCK_N; from `seen_range`
    end,
    lowest,  # no row sees a token below it; unused without HAS_WINDOW
    page_begin,
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    num_cache_pages,
    kv_c_stride_p,  # elements
    kv_c_stride_t,
    k_pe_stride_p,
    k_pe_stride_t,
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return acc [M, BLOCK_D], m [M] and denom [M], all fp32, over the tokens of [begin, end).

    ``acc / denom`` is the attention output, ``m + log2(denom)`` its log-sum-exp in base 2. Rows
    that see nothing have 0, -inf and 0.
    """
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Dead tokens are loaded as zeros *and* masked, since memory may hold NaN.
    for start in range(begin, end, BLOCK_N):
        token, page, offset, is_live = token_rows(
            start, end, page_begin, kv_page_indices_ptr, num_cache_pages, PAGE_SIZE, BLOCK_N
        )
        if HAS_WINDOW:
            is_live = is_live & (token >= lowest)
        kv_c = tl.load(
            kv_c_ptr + (page * kv_c_stride_p + offset * kv_c_stride_t)[:, None] + d[None, :],
            mask=is_live[:, None] & (d < D)[None, :],
            other=0.0,
        )  # [N, D]
        s = tl.dot(ql_nope, tl.trans(kv_c), input_precision="ieee")  # [M, N]
        if R > 0:
            k_pe = tl.load(
                k_pe_ptr + (page * k_pe_stride_p + offset * k_pe_stride_t)[:, None] + r[None, :],
                mask=is_live[:, None] & (r < R)[None, :],
                other=0.0,
            )  # [N, R]
            s = tl.dot(q_pe, tl.trans(k_pe), s, input_precision="ieee")
        s = scale_scores(s, sm_scale_log2, softcap, HAS_SOFTCAP)
        is_seen = is_live[None, :] & (token[None, :] < high[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (token[None, :] >= low[:, None])
        s = tl.where(is_seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = finite_or_zero(m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(kv_c.dtype), kv_c, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return acc, m, denom


@triton.jit
def normalise(
    acc,  # [M, BLOCK_D] f32
    m,  # [M] f32
    denom,  # [M] f32
    head,  # [M] i64
    is_row,  # [M] i1
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    HAS_SINK: tl.constexpr,
):
    """Return the output [M, BLOCK_D] and its natural log-sum-exp [M]: 0 and -inf for nothing."""
    if HAS_SINK:
        sink = tl.load(sink_ptr + head, mask=is_row, other=float("-inf")) * 1.4426950408889634
        m_new = tl.maximum(m, sink)
        m_safe = finite_or_zero(m_new)
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.exp2(sink - m_safe)
        acc *= alpha[:, None]
        m = m_new
    is_nothing = denom == 0.0
    denom = tl.where(is_nothing, 1.0, denom)
    lse = tl.where(is_nothing, float("-inf"), (m + tl.log2(denom)) * 0.6931471805599453)
    return acc / denom[:, None], lse


@triton.jit
def store_rows(
    values,  # [M, BLOCK_D] f32
    out_ptr,
    row,  # [M] i64, element offset of each row in out
    is_row,  # [M] i1
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the rows that exist, rounded to the dtype of ``out``."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + row[:, None] + d[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (d < D)[None, :],
    )
