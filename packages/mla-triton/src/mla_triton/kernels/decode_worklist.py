"""Absorbed MLA decode of a work list: a fixed number of workers, each with its works.

s = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(s) @ kv_c
Grid (row blocks of a tile, workers): a program walks the works of its worker one after another and
owns BLOCK_M rows (query token x head) of each. The only work of a tile writes the result; a piece
of a tile that was cut writes a normalised partial, which ``mla_core.reduce`` merges.

A list is data that may be stale or wrong: whatever it says is clipped to the batch and the buffers.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._attend import attend, load_queries, normalise, store_rows
from mla_triton.kernels._math import query_rows, request_bounds, seen_range, seen_tokens
from mla_triton.kernels._rope import newest_tokens, rotate_queries


@triton.jit
def _work(
    nth,  # place in work_info; the worker's empty requests follow from `end` on
    end,
    worker,
    work_info_ptr,  # [max_works, 8] i32
    batch_size,
    FOLD: tl.constexpr,
):
    """Return request and head group in one, two flags, partial row, query rows, cache entries.

    A place from `end` on stands for every num_workers-th group: all of its rows, none of its keys.
    """
    is_listed = nth < end
    work_ptr = work_info_ptr + nth * 8  # a list of 2**28 works would not fit a device
    fill = worker + (nth - end) * tl.num_programs(1)
    group = tl.where(is_listed, tl.load(work_ptr, mask=is_listed, other=0), fill)
    partial_row = tl.load(work_ptr + 1, mask=is_listed, other=-1)
    qo_start = tl.load(work_ptr + 2, mask=is_listed, other=0)
    qo_end = tl.load(work_ptr + 3, mask=is_listed, other=0)
    kv_start = tl.load(work_ptr + 4, mask=is_listed, other=0)
    kv_end = tl.load(work_ptr + 5, mask=is_listed, other=0)
    exists = (group >= 0) & (group < batch_size * FOLD)
    group = tl.where(exists, group, 0)
    return group, exists, is_listed, partial_row, qo_start, qo_end, kv_start, kv_end


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_cache_pages",
        "window",
        "cp_world_size",
        "cp_rank",
        "batch_size",
        "max_works",
        "num_partial_rows",
        "max_tile_tokens",
        "lse_stride_t",
        "lse_stride_h",
        "partial_lse_stride_t",
        "num_positions",
        "position_offset",
    ]
)
def decode_worklist_kernel(
    out_ptr,  # [total_q, num_heads * FOLD, D]
    lse_ptr,  # [total_q, num_heads * FOLD] f32, natural log; unused without HAS_LSE
    partial_out_ptr,  # [num_partial_rows, num_heads, D] f32
    partial_lse_ptr,  # [num_partial_rows, num_heads] f32, natural log
    ql_nope_ptr,  # [total_q, num_heads * FOLD, D]
    q_pe_ptr,  # [total_q, num_heads * FOLD, R]
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]
    kv_scale_ptr,  # [1] f32, or one row per token; see `attend`
    q_scale_ptr,  # [1] f32; unused without HAS_Q_SCALE
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    kv_last_page_len_ptr,  # [batch_size] i32
    global_kv_lens_ptr,  # [batch_size] i32; unused without HAS_CP
    work_indptr_ptr,  # [num_workers + 1] i32
    work_info_ptr,  # [max_works, 8] i32, the columns of mla_core.metadata.worklist
    sink_ptr,  # [num_heads * FOLD] f32; unused without HAS_SINK
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    window,  # unused without HAS_WINDOW
    cp_world_size,  # unused without HAS_CP
    cp_rank,
    num_heads,  # of a group
    num_cache_pages,
    batch_size,
    max_works,
    num_partial_rows,
    max_tile_tokens,
    out_stride_t,  # elements
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    partial_out_stride_t,
    partial_out_stride_h,
    partial_lse_stride_t,
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
    FOLD: tl.constexpr,  # groups of heads that the list calls requests
    FILLS_EMPTY: tl.constexpr,  # the list may leave out requests without keys
):
    """Attend BLOCK_M rows of each of a worker's works to the work's keys."""
    worker = tl.program_id(1)
    first = tl.maximum(tl.load(work_indptr_ptr + worker), 0)
    end = tl.minimum(tl.load(work_indptr_ptr + worker + 1), max_works)
    end = tl.maximum(end, first)
    places = end
    if FILLS_EMPTY:
        # One tile each: max_tile_tokens is then max_seqlen_q.
        places += tl.cdiv(tl.maximum(batch_size * FOLD - worker, 0), tl.num_programs(1))
    # What works share is computed for each again: kept in registers, it would leave none.
    for nth in tl.range(first, places, disable_licm=True):
        # locate
        group, exists, is_listed, partial_row, qo_start, qo_end, kv_start, kv_end = _work(
            nth, end, worker, work_info_ptr, batch_size, FOLD
        )
        q_begin, q_len, page_begin, kv_len = request_bounds(
            group // FOLD, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, PAGE_SIZE
        )
        # Rows of a group lie one request after another; see `_work` for what is not listed.
        group_begin = q_begin * FOLD + group % FOLD * q_len
        qo_start = tl.where(is_listed, qo_start, group_begin)
        qo_end = tl.minimum(tl.where(is_listed, qo_end, group_begin + q_len), group_begin + q_len)
        exists = exists & (qo_start >= group_begin) & (is_listed | (kv_len == 0))
        exists = exists & (qo_start < qo_end)
        q_first = tl.where(exists, qo_start - group_begin, 0)
        q_end = tl.where(exists, qo_end - group_begin, 0)
        q_end = tl.minimum(q_end, q_first + max_tile_tokens)
        global_len = kv_len
        if HAS_CP:
            global_len = tl.load(global_kv_lens_ptr + group // FOLD)
        q_idx, local_head, is_row = query_rows(
            tl.program_id(0), q_end - q_first, num_heads, BLOCK_M
        )
        low, high = seen_tokens(
            q_first + q_idx,
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
        head = local_head + group % FOLD * num_heads
        # The second bound also hides that begin is a multiple, which costs ptxas 100 registers.
        num_pages = tl.cdiv(kv_len, PAGE_SIZE)
        kv_start = tl.minimum(tl.maximum(kv_start, page_begin) - page_begin, num_pages)
        kv_end = tl.minimum(tl.maximum(kv_end, page_begin) - page_begin, num_pages)
        begin = tl.minimum(kv_start * PAGE_SIZE, kv_len)
        tokens_end = tl.minimum(kv_end * PAGE_SIZE, kv_len)
        tokens_end = tl.where(is_listed, tokens_end, 0)
        begin, tokens_end, lowest = seen_range(begin, tokens_end, low, high, BLOCK_N, HAS_WINDOW)

        # load Q
        q_token = tl.where(is_row, q_begin + q_first + q_idx, 0).to(tl.int64)
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
            tokens_end,
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

        # normalise; the merge adds the sink of a tile that was cut
        is_whole = partial_row < 0
        values, lse = normalise(acc, m, denom, head, is_row & is_whole, sink_ptr, HAS_SINK)

        # store; an empty partial is marked by its lse and its values are never read
        if is_whole:
            row = q_token * out_stride_t + head * out_stride_h
            store_rows(values, out_ptr, row, is_row, D, BLOCK_D)
            if HAS_LSE:
                row = q_token * lse_stride_t + head * lse_stride_h
                tl.store(lse_ptr + row, lse, mask=is_row)
        else:
            partial = partial_row.to(tl.int64) + q_idx
            is_row = is_row & (partial < num_partial_rows)
            if begin < tokens_end:
                row = partial * partial_out_stride_t + local_head * partial_out_stride_h
                store_rows(values, partial_out_ptr, row, is_row, D, BLOCK_D)
            row = partial * partial_lse_stride_t + local_head
            tl.store(partial_lse_ptr + row, lse, mask=is_row)
