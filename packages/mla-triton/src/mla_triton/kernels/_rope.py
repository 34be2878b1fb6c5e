"""RoPE inside decode: rotating a tile of queries, and which cached tokens are query tokens' own.

x' = x * cos + rot(x) * sin, rot mapping each pair (a, b) to (-b, a). An element of the rotary part
and its partner in the pair are loaded side by side, so that nothing moves between threads. Elements
outside ``[OFFSET, OFFSET + ROTARY)`` pass through.

The table has the cosines of the ROTARY / 2 pairs, then their sines. A position outside of it reads
nothing and gives NaN.
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def partner_of(
    r,  # elements of the rotary part, of any shape
    OFFSET: tl.constexpr,
    ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Return the other element of each element's pair, its pair, and whether it comes first.

    Elements that do not turn get some valid element.
    """
    HALF: tl.constexpr = ROTARY // 2
    e = r - OFFSET
    e = tl.where((e >= 0) & (e < ROTARY), e, 0)
    if IS_NEOX:
        is_first = e < HALF
        pair = tl.where(is_first, e, e - HALF)
        partner = tl.where(is_first, e + HALF, e - HALF)
    else:
        is_first = e % 2 == 0
        pair = e // 2
        partner = tl.where(is_first, e + 1, e - 1)
    return partner + OFFSET, pair, is_first


@triton.jit
def rotate(
    x,  # [N, BLOCK_R] f32
    partner,  # [N, BLOCK_R] f32, the other elements of the pairs
    place,  # [N] i64, row of the table
    turns,  # [N] i1, rows that turn; the others are returned as they are
    cos_sin_ptr,  # [num_positions, ROTARY]
    cos_sin_stride_t,  # elements
    num_positions,
    BLOCK_R: tl.constexpr,
    OFFSET: tl.constexpr,
    ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Return rotated rows [N, BLOCK_R], fp32."""
    r = tl.arange(0, BLOCK_R)
    _, pair, is_first = partner_of(r, OFFSET, ROTARY, IS_NEOX)
    turning = turns[:, None] & ((r >= OFFSET) & (r < OFFSET + ROTARY))[None, :]
    in_table = turning & ((place >= 0) & (place < num_positions))[:, None]
    cos_ptr = cos_sin_ptr + (place * cos_sin_stride_t)[:, None] + pair[None, :]
    nan = float("nan")
    cos = tl.load(cos_ptr, mask=in_table, other=nan).to(tl.float32)
    sin = tl.load(cos_ptr + ROTARY // 2, mask=in_table, other=nan).to(tl.float32)
    sin = tl.where(is_first[None, :], -sin, sin)
    return tl.where(turning, x * cos + partner * sin, x)


@triton.jit
def round_as_stored(
    x,  # f32
    DTYPE: tl.constexpr,  # of the cache
):
    """Round to what the cache would hold; fp8 saturates. Widened to fp32 again."""
    if DTYPE.primitive_bitwidth == 8:
        LARGEST: tl.constexpr = 240.0 if DTYPE.is_fp8e4b8() else 448.0
        # NaN fails both comparisons and stays.
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def rotate_queries(
    q_pe,  # [M, BLOCK_R] from `load_queries`
    q_pe_ptr,  # [total_q, num_heads, R]
    positions_ptr,  # [total_q] i32 or i64
    cos_sin_ptr,  # [num_positions, ROTARY]
    q_token,  # [M] i64
    head,  # [M] i64
    is_row,  # [M] i1
    q_pe_stride_t,  # elements
    q_pe_stride_h,
    cos_sin_stride_t,
    num_positions,
    position_offset,
    BLOCK_R: tl.constexpr,
    OFFSET: tl.constexpr,
    ROTARY: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """Return the rotated queries, rounded to the dtype they have."""
    partner, _, _ = partner_of(tl.arange(0, BLOCK_R), OFFSET, ROTARY, IS_NEOX)
    other = tl.load(
        q_pe_ptr + (q_token * q_pe_stride_t + head * q_pe_stride_h)[:, None] + partner[None, :],
        mask=is_row[:, None],
        other=0.0,
    )
    place = tl.load(positions_ptr + q_token, mask=is_row, other=0).to(tl.int64) + position_offset
    rotated = rotate(
        q_pe.to(tl.float32),
        other.to(tl.float32),
        place,
        is_row,
        cos_sin_ptr,
        cos_sin_stride_t,
        num_positions,
        BLOCK_R,
        OFFSET,
        ROTARY,
        IS_NEOX,
    )
    return rotated.to(q_pe.dtype)


@triton.jit
def newest_tokens(
    q_len,
    global_len,  # keys over all context-parallel ranks; the cached ones without HAS_CP
    cp_world_size,  # unused without HAS_CP
    cp_rank,
    HAS_CP: tl.constexpr,
):
    """Return the first cached token that is a query token's, step and base.

    Cached token ``j`` from there on is that of query token ``j * step + base`` of the request;
    for older ones that is negative.
    """
    first, step, base = tl.maximum(global_len - q_len, 0), 1, q_len - global_len
    if HAS_CP:
        base += cp_rank
        step = cp_world_size
        first = tl.maximum(cp_world_size - 1 - base, 0) // cp_world_size
    return first, step, base
