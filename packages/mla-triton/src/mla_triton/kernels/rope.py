"""Rotating the newest keys of each request, before the decode kernel reads them.

Grid (max_seqlen_q, batch_size): a program owns one query token and its key. A launch of its own,
because in the decode kernel many programs read one key: a rotation in place would race with them,
and each would pay for it.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._math import request_bounds
from mla_triton.kernels._rope import round_as_stored


@triton.jit(
    do_not_specialize=[
        "cp_world_size",
        "cp_rank",
        "num_cache_pages",
        "num_positions",
        "position_offset",
    ]
)
def rotate_keys_kernel(
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]; written with WRITE_BACK
    new_keys_ptr,  # [total_q, R], dtype of the cache; written without WRITE_BACK
    tokens_ptr,  # [total_q, R] floating; unused without HAS_TOKENS
    positions_ptr,  # [total_q] i32 or i64
    cos_sin_ptr,  # [num_positions, ROTARY]
    k_pe_scale_ptr,  # [1] f32, for ``tokens``; unused without HAS_SCALE
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    kv_last_page_len_ptr,  # [batch_size] i32
    global_kv_lens_ptr,  # [batch_size] i32; unused without HAS_CP
    cp_world_size,
    cp_rank,
    num_cache_pages,
    num_positions,
    position_offset,
    k_pe_stride_p,  # elements
    k_pe_stride_t,
    new_keys_stride_t,
    tokens_stride_t,
    cos_sin_stride_t,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,  # ROTARY / 2 rounded up to a power of two
    PAGE_SIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
    HAS_CP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):
    """Rotate one key, round it as the cache does and store it.

    For a token without a key in this cache, ``tokens`` gets zeros and nothing else is written.
    """
    # locate
    q_idx = tl.program_id(0)
    request = tl.program_id(1)
    q_begin, q_len, page_begin, kv_len = request_bounds(
        request, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr, PAGE_SIZE
    )
    if q_idx >= q_len:
        return
    token = kv_len - q_len + q_idx
    is_held = token >= 0
    if HAS_CP:
        # A position of the whole context; this rank holds every cp_world_size-th.
        position = tl.load(global_kv_lens_ptr + request) - q_len + q_idx
        is_held = (position >= cp_rank) & ((position - cp_rank) % cp_world_size == 0)
        token = (position - cp_rank) // cp_world_size
        is_held = is_held & (token < kv_len)
    page = tl.load(kv_page_indices_ptr + page_begin + token // PAGE_SIZE, mask=is_held, other=-1)
    is_held = is_held & (page >= 0) & (page < num_cache_pages)
    row_ptr = k_pe_ptr + page.to(tl.int64) * k_pe_stride_p + token % PAGE_SIZE * k_pe_stride_t

    # rotate: an element and its partner meet in one thread, which alone reads and writes them
    p = tl.arange(0, BLOCK_P)
    is_pair = p < ROTARY // 2
    if IS_NEOX:
        first, second = OFFSET + p, OFFSET + ROTARY // 2 + p
    else:
        first, second = OFFSET + 2 * p, OFFSET + 2 * p + 1
    # Not ``is_pair & is_held``: Triton 3.9's interpreter spreads a scalar truth as an integer.
    is_read = p < tl.where(is_held, ROTARY // 2, 0)
    a = tl.load(row_ptr + first, mask=is_read, other=0.0).to(tl.float32)
    b = tl.load(row_ptr + second, mask=is_read, other=0.0).to(tl.float32)
    q_token = (q_begin + q_idx).to(tl.int64)
    place = tl.load(positions_ptr + q_token).to(tl.int64) + position_offset
    is_known = is_held & (place >= 0) & (place < num_positions)
    in_table = p < tl.where(is_known, ROTARY // 2, 0)
    cos_ptr = cos_sin_ptr + place * cos_sin_stride_t + p
    nan = float("nan")
    cos = tl.load(cos_ptr, mask=in_table, other=nan).to(tl.float32)
    sin = tl.load(cos_ptr + ROTARY // 2, mask=in_table, other=nan).to(tl.float32)
    dtype: tl.constexpr = k_pe_ptr.dtype.element_ty
    new_a = round_as_stored(a * cos - b * sin, dtype)
    new_b = round_as_stored(b * cos + a * sin, dtype)

    # store
    if WRITE_BACK:
        tl.store(row_ptr + first, new_a.to(dtype), mask=is_read)
        tl.store(row_ptr + second, new_b.to(dtype), mask=is_read)
    if HAS_TOKENS or not WRITE_BACK:
        r = tl.arange(0, BLOCK_R)
        passes = (r < OFFSET) | ((r >= OFFSET + ROTARY) & (r < R))
        is_passing = passes & (r < tl.where(is_held, R, 0))
        same = tl.load(row_ptr + r, mask=is_passing, other=0.0)
        if not WRITE_BACK:
            new_ptr = new_keys_ptr + q_token * new_keys_stride_t
            tl.store(new_ptr + r, same, mask=is_passing)
            tl.store(new_ptr + first, new_a.to(dtype), mask=is_read)
            tl.store(new_ptr + second, new_b.to(dtype), mask=is_read)
        if HAS_TOKENS:
            scale = 1.0
            if HAS_SCALE:
                scale = tl.load(k_pe_scale_ptr)
            out_ptr = tokens_ptr + q_token * tokens_stride_t
            out_dtype: tl.constexpr = tokens_ptr.dtype.element_ty
            shown_a = tl.where(is_read, new_a * scale, 0.0)
            shown_b = tl.where(is_read, new_b * scale, 0.0)
            tl.store(out_ptr + r, (same.to(tl.float32) * scale).to(out_dtype), mask=passes)
            tl.store(out_ptr + first, shown_a.to(out_dtype), mask=is_pair)
            tl.store(out_ptr + second, shown_b.to(out_dtype), mask=is_pair)
