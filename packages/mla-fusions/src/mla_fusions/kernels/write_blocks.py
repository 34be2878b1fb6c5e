"""Writing keys and values into caches with one fp8 scale for each head of each block.

Grid (num_tokens, heads): the program of the first token of a run, neighbours in the batch that go
to one block, does the run's work; the others end at once. A block grows from its beginning, so what
lies before the run is there already. Where the run has larger numbers than the block's scale allows
for, that is quantised again.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._quantise import fp8_quotients, fp8_values
from mla_fusions.kernels.write_rows import element_offsets, token_offsets

#: Floor of a block's largest magnitude.
MIN_AMAX = tl.constexpr(1e-6)


@triton.jit
def block_elements(slots, PAGE_SIZE: tl.constexpr, stride_p, e, PLACE: tl.constexpr):
    """Return the offsets of elements e [BLOCK_D] of the rows of slots [CHUNK]: [CHUNK, BLOCK_D]."""
    token = slots // PAGE_SIZE * stride_p + token_offsets(slots % PAGE_SIZE, PLACE)
    return token[:, None] + element_offsets(e, PLACE)[None, :]


@triton.jit
def write_part(
    rows_ptr,  # of the run's first token and the head
    stride_t,
    out_ptr,  # of the head
    stride_p,
    scale_ptr,  # of the head's block
    slots_ptr,  # of the run's first token
    block_slot,  # first slot of the block
    num_old,  # tokens of the block that were there before
    num_new,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PLACE: tl.constexpr,
    BIAS: tl.constexpr,
    IS_NATIVE: tl.constexpr,
):
    """Write one head's keys or values of a run."""
    LIMIT: tl.constexpr = 448.0 if BIAS == 7 else 240.0
    e = tl.arange(0, BLOCK_D)
    t = tl.arange(0, CHUNK).to(tl.int64)
    is_element = (e < WIDTH)[None, :]

    bits = tl.zeros([CHUNK, BLOCK_D], dtype=tl.int32)
    for start in range(0, num_new, CHUNK):
        tokens = start + t
        mask = (tokens < num_new)[:, None] & is_element
        x = tl.load(rows_ptr + tokens[:, None] * stride_t + e[None, :], mask=mask, other=0)
        # Magnitudes order as their bits do, with NaN on top.
        bits = tl.maximum(bits, x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.where(amax < MIN_AMAX, MIN_AMAX, amax), LIMIT)

    if num_old > 0:
        old_scale = tl.load(scale_ptr)
        if old_scale < scale:
            for start in range(0, num_old, CHUNK):
                tokens = start + t
                mask = (tokens < num_old)[:, None] & is_element
                slots = block_slot + tokens
                where = out_ptr + block_elements(slots, PAGE_SIZE, stride_p, e, PLACE)
                x = fp8_values(tl.load(where, mask=mask, other=0), BIAS)
                codes = fp8_quotients(x * old_scale, scale, BIAS, IS_NATIVE, False)
                tl.store(where, codes, mask=mask)
        scale = tl.where(old_scale < scale, scale, old_scale)
    tl.store(scale_ptr, scale)

    for start in range(0, num_new, CHUNK):
        tokens = start + t
        mask = (tokens < num_new)[:, None] & is_element
        x = tl.load(rows_ptr + tokens[:, None] * stride_t + e[None, :], mask=mask, other=0)
        codes = fp8_quotients(x.to(tl.float32), scale, BIAS, IS_NATIVE, False)
        slots = tl.load(slots_ptr + tokens, mask=tokens < num_new, other=0).to(tl.int64)
        where = out_ptr + block_elements(slots, PAGE_SIZE, stride_p, e, PLACE)
        tl.store(where, codes, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def write_blocks_kernel(
    key_ptr,  # [num_tokens, heads, K_WIDTH] floating
    value_ptr,  # [num_tokens, heads, V_WIDTH] floating
    slots_ptr,  # [num_tokens] i32 or i64
    key_out_ptr,  # fp8 as bytes
    value_out_ptr,
    key_scales_ptr,  # f32
    value_scales_ptr,
    num_tokens,
    num_slots,
    key_stride_t,  # all strides in elements
    key_stride_h,
    value_stride_t,
    value_stride_h,
    key_out_stride_p,
    key_out_stride_h,
    value_out_stride_p,
    value_out_stride_h,
    key_scales_stride_b,
    key_scales_stride_h,
    value_scales_stride_b,
    value_scales_stride_h,
    PAGE_SIZE: tl.constexpr,
    SCALE_TOKENS: tl.constexpr,  # of one scale: one page or several
    BLOCK_S: tl.constexpr,  # SCALE_TOKENS rounded up to a power of two
    K_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_PLACE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_PLACE: tl.constexpr,
    CHUNK: tl.constexpr,
    BIAS: tl.constexpr,
    IS_NATIVE: tl.constexpr,
):
    """Write the run that starts at a token, if one does."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    first_slot = tl.load(slots_ptr + token).to(tl.int64)
    if (first_slot < 0) | (first_slot >= num_slots):
        return
    block = first_slot // SCALE_TOKENS
    before = tl.load(slots_ptr + token - 1, mask=token > 0, other=-1).to(tl.int64)
    if (before >= 0) & (before // SCALE_TOKENS == block):
        return

    i = tl.arange(0, BLOCK_S)
    slots = tl.load(slots_ptr + token + i, mask=token + i < num_tokens, other=-1).to(tl.int64)
    is_same = (slots >= 0) & (slots // SCALE_TOKENS == block)
    num_new = tl.min(tl.where(is_same, BLOCK_S, i), axis=0)
    block_slot = block * SCALE_TOKENS
    offsets = tl.where(i < num_new, (slots - block_slot).to(tl.int32), SCALE_TOKENS)
    num_old = tl.min(offsets, axis=0)

    write_part(
        key_ptr + token * key_stride_t + head * key_stride_h,
        key_stride_t,
        key_out_ptr + head * key_out_stride_h,
        key_out_stride_p,
        key_scales_ptr + block * key_scales_stride_b + head * key_scales_stride_h,
        slots_ptr + token,
        block_slot,
        num_old,
        num_new,
        K_WIDTH,
        K_BLOCK,
        CHUNK,
        PAGE_SIZE,
        K_PLACE,
        BIAS,
        IS_NATIVE,
    )
    write_part(
        value_ptr + token * value_stride_t + head * value_stride_h,
        value_stride_t,
        value_out_ptr + head * value_out_stride_h,
        value_out_stride_p,
        value_scales_ptr + block * value_scales_stride_b + head * value_scales_stride_h,
        slots_ptr + token,
        block_slot,
        num_old,
        num_new,
        V_WIDTH,
        V_BLOCK,
        CHUNK,
        PAGE_SIZE,
        V_PLACE,
        BIAS,
        IS_NATIVE,
    )
