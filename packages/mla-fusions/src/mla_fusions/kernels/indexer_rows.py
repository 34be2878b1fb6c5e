"""What the indexer of sparse attention reads: queries, their weights, and keys in a paged cache.

The grid has one dimension. The first ``num_kv_programs`` programs take ``BLOCK_T`` tokens each:
they norm their keys (LayerNorm), rotate, quantise and store them. Each of the others takes
``BLOCK_H`` query heads of one token, rotates and quantises them, and folds their scales into their
weights. ``ROPE`` is that of `mla_fusions.kernels.rope_rows`, ``SHAPE``, ``CODEC``, ``PLACE`` and
``SCALES`` are those of `mla_fusions.kernels.write_rows`.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._norm import inverse_root, row_sums
from mla_fusions.kernels._quantise import quantise
from mla_fusions.kernels.rope_rows import load_positions, load_rotated
from mla_fusions.kernels.write_rows import load_rows, store_rows


@triton.jit
def write_indexer_keys(
    program,
    k_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    slots_ptr,
    positions_ptr,
    offsets_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    scales_ptr,
    eps,
    num_tokens,
    num_written,
    num_slots,
    num_positions,
    cos_stride,
    sin_stride,
    k_stride_t,
    out_stride_p,
    scales_stride_p,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SHAPE: tl.constexpr,
    CODEC: tl.constexpr,
    PLACE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Norm, rotate, quantise and store the keys of some tokens."""
    tokens = program.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < num_tokens
    slots = tl.load(slots_ptr + tokens, mask=tokens < num_written, other=-1).to(tl.int64)
    positions = load_positions(positions_ptr, offsets_ptr, tokens, is_token, num_positions)
    is_live = (slots >= 0) & (slots < num_slots)
    page, o = slots // PAGE_SIZE, slots % PAGE_SIZE
    mean = None
    inverse = None
    if norm_weight_ptr is not None:
        k = load_rows(k_ptr, k_stride_t, 0, tokens, 0, is_token, SHAPE).to(tl.float32)
        e = tl.arange(0, SHAPE[1])[None, :, None] * SHAPE[2]
        e += tl.arange(0, SHAPE[2])[None, None, :]
        mean = row_sums(k) / SHAPE[0]
        centred = tl.where(e < SHAPE[0], k - mean[:, None, None], 0.0)
        inverse = inverse_root(row_sums(centred * centred), eps, SHAPE[0])
    k = load_rotated(
        k_ptr,
        k_stride_t,
        0,
        cos_ptr,
        sin_ptr,
        cos_stride,
        sin_stride,
        positions,
        tokens,
        0,
        is_token,
        is_token,
        SHAPE,
        ROPE,
        mean,
        inverse,
        norm_weight_ptr,
        norm_bias_ptr,
    )
    store_rows(
        k,
        out_ptr,
        scales_ptr,
        slots_ptr,
        out_stride_p,
        0,
        scales_stride_p,
        0,
        page,
        0,
        o,
        is_live,
        SHAPE,
        CODEC,
        PLACE,
        SCALES,
    )


@triton.jit
def write_indexer_queries(
    program,
    q_ptr,
    q_out_ptr,
    weights_ptr,
    weights_out_ptr,
    positions_ptr,
    offsets_ptr,
    cos_ptr,
    sin_ptr,
    weights_scale,
    num_positions,
    cos_stride,
    sin_stride,
    q_stride_t,
    q_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    weights_stride_t,
    weights_out_stride_t,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    SHAPE: tl.constexpr,
    Q_CODEC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotate and quantise some heads of one token, and fold their scales into their weights."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (program // BLOCKS).to(tl.int64)
    heads = (program % BLOCKS).to(tl.int64) * BLOCK_H
    heads += tl.arange(0, BLOCK_H)
    is_head = heads < HEADS
    weights = tl.load(weights_ptr + token * weights_stride_t + heads, mask=is_head, other=0)
    tokens = tl.zeros((BLOCK_H,), tl.int64) + token
    positions = load_positions(positions_ptr, offsets_ptr, tokens, is_head, num_positions)
    q = load_rotated(
        q_ptr,
        q_stride_h,
        q_stride_t,
        cos_ptr,
        sin_ptr,
        cos_stride,
        sin_stride,
        positions,
        heads,
        token,
        is_head,
        is_head,
        SHAPE,
        ROPE,
    )
    codes, scales = quantise(q, q_ptr, Q_CODEC)
    e = tl.arange(0, SHAPE[1])[None, :, None] * SHAPE[2] + tl.arange(0, SHAPE[2])[None, None, :]
    starts = q_out_ptr + (token * q_out_stride_t + heads * q_out_stride_h)[:, None, None]
    tl.store(starts + e, codes, mask=is_head[:, None, None])
    # One group, hence one scale, of each head.
    folded = weights.to(tl.float32) * tl.reshape(scales, (BLOCK_H,)) * weights_scale
    tl.store(weights_out_ptr + token * weights_out_stride_t + heads, folded, mask=is_head)


@triton.jit(
    do_not_specialize=[
        "eps",
        "weights_scale",
        "num_kv_programs",
        "num_tokens",
        "num_written",
        "num_slots",
        "num_positions",
    ]
)
def indexer_rows_kernel(
    q_ptr,  # [num_tokens, HEADS, SHAPE[0]] floating
    q_out_ptr,  # bytes like q
    weights_ptr,  # [num_tokens, HEADS] floating
    weights_out_ptr,  # f32 like weights
    k_ptr,  # [num_tokens, SHAPE[0]] floating
    norm_weight_ptr,  # [SHAPE[0]] floating, or None to leave keys as they are
    norm_bias_ptr,  # like norm_weight
    slots_ptr,  # [num_written] i32 or i64
    positions_ptr,  # [num_tokens] i32 or i64
    offsets_ptr,  # like positions, or None
    cos_ptr,  # [num_positions, columns] floating
    sin_ptr,
    out_ptr,  # bytes
    scales_ptr,  # f32
    eps,
    weights_scale,
    num_kv_programs,
    num_tokens,
    num_written,  # tokens with slots
    num_slots,
    num_positions,
    cos_stride,  # all strides in elements
    sin_stride,
    q_stride_t,
    q_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    weights_stride_t,
    weights_out_stride_t,
    k_stride_t,
    out_stride_p,
    scales_stride_p,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SHAPE: tl.constexpr,
    Q_CODEC: tl.constexpr,
    CODEC: tl.constexpr,
    PLACE: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write some keys, or make some queries and their weights."""
    program = tl.program_id(0)
    if program < num_kv_programs:
        write_indexer_keys(
            program,
            k_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            slots_ptr,
            positions_ptr,
            offsets_ptr,
            cos_ptr,
            sin_ptr,
            out_ptr,
            scales_ptr,
            eps,
            num_tokens,
            num_written,
            num_slots,
            num_positions,
            cos_stride,
            sin_stride,
            k_stride_t,
            out_stride_p,
            scales_stride_p,
            ROPE,
            PAGE_SIZE,
            SHAPE,
            CODEC,
            PLACE,
            SCALES,
            BLOCK_T,
        )
    else:
        write_indexer_queries(
            program - num_kv_programs,
            q_ptr,
            q_out_ptr,
            weights_ptr,
            weights_out_ptr,
            positions_ptr,
            offsets_ptr,
            cos_ptr,
            sin_ptr,
            weights_scale,
            num_positions,
            cos_stride,
            sin_stride,
            q_stride_t,
            q_stride_h,
            q_out_stride_t,
            q_out_stride_h,
            weights_stride_t,
            weights_out_stride_t,
            HEADS,
            ROPE,
            SHAPE,
            Q_CODEC,
            BLOCK_H,
        )
