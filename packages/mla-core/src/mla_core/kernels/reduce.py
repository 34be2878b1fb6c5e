"""Merge of normalised attention partials.

m = max_s lse_s;  w_s = exp(lse_s - m);  out = sum_s w_s * partial_out_s / sum_s w_s
lse = m + log(sum_s w_s)
Grid (groups * GROUP_ROWS * num_heads, value_dim / BLOCK_D): a program owns BLOCK_D columns of one
output row of one head. Partials are added BLOCK_S at a time in split order, whatever the batch.
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def _partial_rows(
    s,  # [BLOCK_S] i32, split number within the group
    first,  # first partial of the group
    count,
    local_row,
    num_partials,
    partial_map_ptr,
    HAS_MAP: tl.constexpr,
):
    """Return the partial's row and whether it exists."""
    exists = s < count
    row = (first + s).to(tl.int64)
    if HAS_MAP:
        row = tl.load(partial_map_ptr + row, mask=exists, other=-1).to(tl.int64)
        exists = exists & (row >= 0)
        row += local_row
    return row, exists & (row >= 0) & (row < num_partials)


@triton.jit
def _unfold(
    row,  # folded query row
    qo_indptr_ptr,  # [batch_size + 1] i32
    batch_size,
    search_steps,
    FOLD: tl.constexpr,
):
    """Take a row ``q_start * FOLD + group * q_len + i`` apart: query token, group, existence."""
    low = row * 0
    high = low + batch_size
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        is_open = low < high
        ends = tl.load(qo_indptr_ptr + middle + 1, mask=is_open, other=0) * FOLD
        low = tl.where(is_open & (ends <= row), middle + 1, low)
        high = tl.where(is_open & (ends > row), middle, high)
    exists = low < batch_size
    q_start = tl.load(qo_indptr_ptr + low, mask=exists, other=0)
    q_len = tl.load(qo_indptr_ptr + low + 1, mask=exists, other=0) - q_start
    nth = row - q_start * FOLD
    q_len = tl.maximum(q_len, 1)
    return q_start + nth % q_len, nth // q_len, exists


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "batch_size",
        "search_steps",
        "num_splits",
        "num_partials",
        "lse_stride_t",
        "lse_stride_h",
        "partial_lse_stride_t",
        "partial_lse_stride_s",
        "partial_lse_stride_h",
    ]
)
def reduce_partials_kernel(
    out_ptr,  # [total_q, num_heads, D]
    lse_ptr,  # [total_q, num_heads] f32
    partial_out_ptr,  # [num_partials, num_heads, D], or [groups, num_splits, num_heads, D]
    partial_lse_ptr,  # [num_partials, num_heads] f32, or [groups, num_splits, num_heads]
    reduce_indptr_ptr,  # [groups + 1] i32, range of partials per group; unused when dense
    partial_map_ptr,  # [n] i32, row of each partial; unused without HAS_MAP
    final_map_ptr,  # [groups, 2] i32, output rows [begin, end); unused without HAS_FINAL_MAP
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    qo_indptr_ptr,  # [batch_size + 1] i32; unused unless heads are folded
    batch_size,
    search_steps,  # bits of batch_size
    num_heads,  # of a partial
    num_splits,  # dense only
    num_partials,  # rows a partial can have: num_splits when dense
    out_stride_t,  # elements
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    partial_out_stride_t,  # dense only
    partial_out_stride_s,
    partial_out_stride_h,
    partial_lse_stride_t,  # dense only
    partial_lse_stride_s,
    partial_lse_stride_h,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    IS_DENSE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_FINAL_MAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_BASE_TWO: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Merge BLOCK_D columns of one output row of one head."""
    # locate
    head = tl.program_id(0) % num_heads
    group_row = tl.program_id(0) // num_heads
    group = group_row // GROUP_ROWS
    local_row = group_row % GROUP_ROWS
    if IS_DENSE:
        first = 0
        count = num_splits
        partial_out_ptr += group.to(tl.int64) * partial_out_stride_t
        partial_lse_ptr += group.to(tl.int64) * partial_lse_stride_t
    else:
        first = tl.load(reduce_indptr_ptr + group)
        count = tl.load(reduce_indptr_ptr + group + 1) - first
    out_row = group_row
    if HAS_FINAL_MAP:
        out_row = tl.load(final_map_ptr + group * 2) + local_row
        # A tile without partials was written by the attention kernel itself.
        first_partial = tl.load(partial_map_ptr + first, mask=count > 0, other=-1)
        if (out_row >= tl.load(final_map_ptr + group * 2 + 1)) | (first_partial < 0):
            return
    out_head = head
    if FOLD > 1:
        out_row, head_group, has_request = _unfold(
            out_row, qo_indptr_ptr, batch_size, search_steps, FOLD
        )
        if not has_request:
            return
        out_head = head_group * num_heads + head
    partial_out_ptr += head.to(tl.int64) * partial_out_stride_h
    partial_lse_ptr += head.to(tl.int64) * partial_lse_stride_h

    # maximum; weights are powers of two so that both bases share one path
    to_log2 = 1.0 if IS_BASE_TWO else 1.4426950408889634
    s = tl.arange(0, BLOCK_S)
    m = float("-inf")
    if HAS_SINK:
        sink = tl.load(sink_ptr + out_head).to(tl.float32)
        if IS_BASE_TWO:
            sink *= 1.4426950408889634
        m = sink
    for start in range(0, count, BLOCK_S):
        row, exists = _partial_rows(
            start + s, first, count, local_row, num_partials, partial_map_ptr, HAS_MAP
        )
        lse_s = tl.load(
            partial_lse_ptr + row * partial_lse_stride_s, mask=exists, other=float("-inf")
        )
        m = tl.maximum(m, tl.max(lse_s, 0))
    m_safe = tl.where(m == float("-inf"), 0.0, m)

    # weighted sum, in split order
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    denom = 0.0
    for start in range(0, count, BLOCK_S):
        row, exists = _partial_rows(
            start + s, first, count, local_row, num_partials, partial_map_ptr, HAS_MAP
        )
        lse_s = tl.load(
            partial_lse_ptr + row * partial_lse_stride_s, mask=exists, other=float("-inf")
        )
        weight = tl.exp2((lse_s - m_safe) * to_log2)  # [S]
        # The bytes of an empty partial are never read: they may be NaN.
        is_read = (lse_s > float("-inf"))[:, None] & (d < D)[None, :]
        x = tl.load(
            partial_out_ptr + row[:, None] * partial_out_stride_s + d[None, :],
            mask=is_read,
            other=0.0,
        ).to(tl.float32)  # [S, D]
        acc += tl.sum(weight[:, None] * x, 0)
        denom += tl.sum(weight, 0)
    if HAS_SINK:
        denom += tl.exp2((sink - m_safe) * to_log2)

    # normalise and store
    is_nothing = denom == 0.0
    denom = tl.where(is_nothing, 1.0, denom)
    acc = acc / denom
    out_offset = out_row.to(tl.int64) * out_stride_t + out_head.to(tl.int64) * out_stride_h
    tl.store(out_ptr + out_offset + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    if tl.program_id(1) == 0:
        lse = m + tl.log2(denom) / to_log2
        lse = tl.where(is_nothing, float("-inf"), lse)
        lse_offset = out_row.to(tl.int64) * lse_stride_t + out_head.to(tl.int64) * lse_stride_h
        tl.store(lse_ptr + lse_offset, lse)
