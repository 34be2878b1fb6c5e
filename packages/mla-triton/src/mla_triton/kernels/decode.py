"""Absorbed MLA decode over paged rows.

s = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(s) @ kv_c
Grid (row blocks, num_splits, batch_size): a program owns BLOCK_M rows (query token x head) of one
request over one split of its keys. With one split it writes the result, else a normalised partial
that ``mla_core.reduce`` merges.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._attend import attend, load_queries, normalise, store_rows
from mla_triton.kernels._math import (
    query_rows,
    request_bounds,
    seen_range,
    seen_tokens,
    split_range,
)
from mla_triton.kernels._rope import newest_tokens, rotate_queries


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_cache_pages",
        "window",
        "cp_world_size",
        "cp_rank",
        "lse_stride_t",
        "lse_stride_s",
        "lse_stride_h",
        "num_positions",
        "position_offset",
        "split_blocks",
    ]
)
def decode_kernel(
    out_ptr,  # [total_q, num_splits, num_heads, D], dtype of q or f32 partials
    lse_ptr,  # [total_q, num_splits, num_heads] f32, natural log; unused without HAS_LSE
    ql_nope_ptr,  # [total_q, num_heads, D]
    q_pe_ptr,  # [total_q, num_heads, R]
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]
    kv_scale_ptr,  # [1] f32, or one row per token; see `attend`
    q_scale_ptr,  # [1] f32; unused without HAS_Q_SCALE
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    kv_last_page_len_ptr,  # [batch_size] i32
    global_kv_lens_ptr,  # [batch_size] i32; unused without HAS_CP
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    window,  # unused without HAS_WINDOW
    cp_world_size,  # unused without HAS_CP
    cp_rank,
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
    kv_scale_stride_p,
    kv_scale_stride_t,
    new_keys_ptr,  # [total_q, R], dtype of the cache; unused without NEW_KEYS
    positions_ptr,  # [total_q] i32 or i64; from here on unused without ROTARY
    cos_sin_ptr,  # [num_positions, ROTARY]
    new_keys_stride_t,
    cos_sin_stride_t,
    num_positions,
    position_offset,
    split_blocks,  # length of a split, in blocks of BLOCK_N tokens
    D: tl.constexpr,  # kv_lora_rank
    R: tl.constexpr,  # qk_rope_head_dim
    BLOCK_D: tl.constexpr,  # D and R rounded up to powers of two
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LATENT_ALIGN: tl.constexpr,  # from here to HAS_Q_SCALE, and the sizes above: see `attend`
    ROPE_ALIGN: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    HAS_KV_SCALE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_CP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ROTARY: tl.constexpr,  # 0, or with fused RoPE the elements that turn
    ROPE_OFFSET: tl.constexpr,  # first of them
    IS_NEOX: tl.constexpr,
    NEW_KEYS: tl.constexpr,  # see `attend`
):
    """Attend BLOCK_M rows of one request to one split of its keys."""
    # locate
    split = tl.program_id(1)
    q_begin, q_len, page_begin, kv_len = request_bounds(
        tl.program_id(2), qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, PAGE_SIZE
    )
    if tl.program_id(0) * BLOCK_M >= q_len * num_heads:
        return
    global_len = kv_len
    if HAS_CP:
        global_len = tl.load(global_kv_lens_ptr + tl.program_id(2))
    q_idx, head, is_row = query_rows(tl.program_id(0), q_len, num_heads, BLOCK_M)
    low, high = seen_tokens(
        q_idx,
        is_row,
        q_len,
        kv_len,
        global_len,
        cp_world_size,
        cp_rank,
        window,
        IS_CAUSAL,
        HAS_CP,
        HAS_WINDOW,
    )
    begin, end = split_range(kv_len, split, tl.num_programs(1), split_blocks, BLOCK_N)
    begin, end, lowest = seen_range(begin, end, low, high, BLOCK_N, HAS_WINDOW)

    # load Q
    q_token = (q_begin + q_idx).to(tl.int64)
    ql_nope, q_pe = load_queries(
        ql_nope_ptr,
        q_pe_ptr,
        q_token,
        head,
        is_row,
        ql_nope_stride_t,
        ql_nope_stride_h,
        q_pe_stride_t,
        q_pe_stride_h,
        D,
        R,
        BLOCK_D,
        BLOCK_R,
    )

    first_newest, newest_step, newest_base = 0, 1, 0
    if ROTARY > 0:
        q_pe = rotate_queries(
            q_pe,
            q_pe_ptr,
            positions_ptr,
            cos_sin_ptr,
            q_token,
            head,
            is_row,
            q_pe_stride_t,
            q_pe_stride_h,
            cos_sin_stride_t,
            num_positions,
            position_offset,
            BLOCK_R,
            ROPE_OFFSET,
            ROTARY,
            IS_NEOX,
        )
    if NEW_KEYS > 0:
        first_newest, newest_step, newest_base = newest_tokens(
            q_len, global_len, cp_world_size, cp_rank, HAS_CP
        )

    # loop over KV
    acc, m, denom = attend(
        ql_nope,
        q_pe,
        low,
        high,
        begin,
        end,
        lowest,
        page_begin,
        kv_c_ptr,
        k_pe_ptr,
        kv_scale_ptr,
        q_scale_ptr,
        kv_page_indices_ptr,
        num_cache_pages,
        kv_c_stride_p,
        kv_c_stride_t,
        k_pe_stride_p,
        k_pe_stride_t,
        kv_scale_stride_p,
        kv_scale_stride_t,
        sm_scale_log2,
        softcap,
        D,
        R,
        BLOCK_D,
        BLOCK_R,
        BLOCK_M,
        BLOCK_N,
        PAGE_SIZE,
        LATENT_ALIGN,
        ROPE_ALIGN,
        SCALE_GROUP,
        HAS_KV_SCALE,
        HAS_Q_SCALE,
        HAS_SOFTCAP,
        HAS_WINDOW,
        NEW_KEYS,
        new_keys_ptr,
        new_keys_stride_t,
        q_begin,
        first_newest,
        newest_step,
        newest_base,
    )

    # normalise
    values, lse = normalise(acc, m, denom, head, is_row, sink_ptr, HAS_SINK)

    # store; an empty partial is marked by its lse and its values are never read
    if (tl.num_programs(1) == 1) | (begin < end):
        row = q_token * out_stride_t + split * out_stride_s + head * out_stride_h
        store_rows(values, out_ptr, row, is_row, D, BLOCK_D)
    if HAS_LSE:
        tl.store(
            lse_ptr + q_token * lse_stride_t + split * lse_stride_s + head * lse_stride_h,
            lse,
            mask=is_row,
        )
