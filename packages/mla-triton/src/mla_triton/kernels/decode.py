"""Absorbed MLA decode over paged rows.

s = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(s) @ kv_c
Grid (row blocks, num_splits, batch_size): a program owns BLOCK_M rows (query token x head) of one
request over one split of its keys. With one split it writes the result, else a normalised partial
that ``mla_core.reduce`` merges.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._math import (
    finite_or_zero,
    query_rows,
    request_bounds,
    scale_scores,
    split_range,
    token_rows,
)


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_cache_pages",
        "window",
        "lse_stride_t",
        "lse_stride_s",
        "lse_stride_h",
    ]
)
def decode_kernel(
    out_ptr,  # [total_q, num_splits, num_heads, D], dtype of q or f32 partials
    lse_ptr,  # [total_q, num_splits, num_heads] f32, natural log; unused without HAS_LSE
    ql_nope_ptr,  # [total_q, num_heads, D]
    q_pe_ptr,  # [total_q, num_heads, R]
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    kv_last_page_len_ptr,  # [batch_size] i32
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    window,  # unused without HAS_WINDOW
    num_heads,
    num_cache_pages,
    out_stride_t,  # elements
    out_stride_s,
    out_stride_h,
    lse_stride_t,
    lse_stride_s,
    lse_stride_h,
    ql_nope_stride_t,
    ql_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    kv_c_stride_p,
    kv_c_stride_t,
    k_pe_stride_p,
    k_pe_stride_t,
    split_blocks,  # length of a split, in blocks of BLOCK_N tokens
    D: tl.constexpr,  # kv_lora_rank
    R: tl.constexpr,  # qk_rope_head_dim
    BLOCK_D: tl.constexpr,  # D and R rounded up to powers of two
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Attend BLOCK_M rows of one request to one split of its keys."""
    # locate
    split = tl.program_id(1)
    q_begin, q_len, page_begin, kv_len = request_bounds(
        tl.program_id(2), qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, PAGE_SIZE
    )
    if tl.program_id(0) * BLOCK_M >= q_len * num_heads:
        return
    q_idx, head, is_row, limit = query_rows(
        tl.program_id(0), q_len, kv_len, num_heads, BLOCK_M, IS_CAUSAL
    )
    begin, end = split_range(kv_len, split, tl.num_programs(1), split_blocks, BLOCK_N)
    end = tl.minimum(end, tl.max(limit, 0))
    if HAS_WINDOW:
        lowest = tl.maximum(tl.min(tl.where(is_row, limit, kv_len), 0) - window, 0)
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)

    # load Q: rows past the request's last become zeros
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    q_token = (q_begin + q_idx).to(tl.int64)
    ql_nope = tl.load(
        ql_nope_ptr + (q_token * ql_nope_stride_t + head * ql_nope_stride_h)[:, None] + d[None, :],
        mask=is_row[:, None] & (d < D)[None, :],
        other=0.0,
    )  # [M, D]
    if R > 0:
        q_pe = tl.load(
            q_pe_ptr + (q_token * q_pe_stride_t + head * q_pe_stride_h)[:, None] + r[None, :],
            mask=is_row[:, None] & (r < R)[None, :],
            other=0.0,
        )  # [M, R]

    # loop over KV; dead tokens are loaded as zeros *and* masked, since memory may hold NaN
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        is_seen = is_live[None, :] & (token[None, :] < limit[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (token[None, :] >= limit[:, None] - window)
        s = tl.where(is_seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = finite_or_zero(m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(kv_c.dtype), kv_c, acc * alpha[:, None], input_precision="ieee")
        m = m_new

    # normalise
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
    acc = acc / denom[:, None]

    # store; an empty partial is marked by its lse and its values are never read
    if (tl.num_programs(1) == 1) | (begin < end):
        tl.store(
            out_ptr
            + (q_token * out_stride_t + split * out_stride_s + head * out_stride_h)[:, None]
            + d[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=is_row[:, None] & (d < D)[None, :],
        )
    if HAS_LSE:
        lse = tl.where(is_nothing, float("-inf"), (m + tl.log2(denom)) * 0.6931471805599453)
        tl.store(
            lse_ptr + q_token * lse_stride_t + split * lse_stride_s + head * lse_stride_h,
            lse,
            mask=is_row,
        )
