"""Writing rows into a paged cache: quantise and scatter by slot, for every layout.

Grid (blocks of tokens, heads): a program takes ``BLOCK_T`` tokens of one head, which for a latent
cache is the only one, and both parts of their rows, ``a`` and ``b``: latent and rotary key, or key
and value. What differs between formats is data, three kinds of tuples made by `mla_fusions.rows`:

- ``SHAPE``: elements of a row, and the tile that covers them: how many groups, of how many elements
- ``CODEC``: how a row is quantised; see `mla_fusions.kernels._quantise`
- ``PLACE``: where an element goes, as strides of the digits of two indices. The token in the page
  has the digits ``(o // (T1 * T0), o // T0 % T1, o % T0)``, the element ``(e // E0, e % E0)``:
  (T1, T0, three strides, E0, two strides, number of copies, stride of copies)
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._quantise import CAST, FP8, NVFP4, PER_TENSOR, load_factor, quantise


@triton.jit
def token_offsets(o, PLACE: tl.constexpr):
    """Return the offset of each token of a page, in elements."""
    if PLACE[0] * PLACE[1] == 1:
        offsets = o * PLACE[2]
    else:
        top, middle = o // (PLACE[0] * PLACE[1]), o // PLACE[1] % PLACE[0]
        offsets = top * PLACE[2] + middle * PLACE[3] + o % PLACE[1] * PLACE[4]
    return offsets


@triton.jit
def element_offsets(e, PLACE: tl.constexpr):
    """Return the offset of each element of a row, in elements."""
    offsets = e // PLACE[5] * PLACE[6]
    if PLACE[5] > 1:
        offsets += e % PLACE[5] * PLACE[7]
    return offsets


@triton.jit
def load_rows(rows_ptr, stride_t, stride_h, tokens, head, is_token, SHAPE: tl.constexpr):
    """Load one part of the rows of some tokens: [BLOCK_T, GROUPS, GROUP]."""
    e = tl.arange(0, SHAPE[1])[None, :, None] * SHAPE[2] + tl.arange(0, SHAPE[2])[None, None, :]
    starts = rows_ptr + (head * stride_h + tokens * stride_t)[:, None, None]
    return tl.load(starts + e, mask=is_token[:, None, None] & (e < SHAPE[0]), other=0)


@triton.jit
def store_tile(blocks, o, is_live, values, WIDTH: tl.constexpr, PLACE: tl.constexpr):
    """Store the first WIDTH elements of rows [BLOCK_T, n, m], and their copies if there are."""
    N: tl.constexpr = values.shape[1]
    M: tl.constexpr = values.shape[2]
    e = tl.arange(0, N)[None, :, None] * M + tl.arange(0, M)[None, None, :]
    where = blocks[:, None, None] + token_offsets(o, PLACE)[:, None, None]
    where += element_offsets(e, PLACE)
    mask = is_live[:, None, None] & (e < WIDTH)
    COPIES: tl.constexpr = PLACE[8]
    for copy in tl.static_range(COPIES):
        tl.store(where + copy * PLACE[9], values, mask=mask)


@triton.jit
def store_rows(
    x,  # [BLOCK_T, GROUPS, GROUP], as loaded
    out_ptr,
    scales_ptr,  # unused where the codec puts no scales in the page
    factor,  # f32; unused unless one factor serves all
    stride_p,
    stride_h,
    scales_stride_p,
    scales_stride_h,
    page,  # [BLOCK_T] i64
    head,
    o,  # [BLOCK_T] i64, token in the page
    is_live,
    SHAPE: tl.constexpr,
    CODEC: tl.constexpr,
    PLACE: tl.constexpr,
    SCALES: tl.constexpr,  # the place of the scales
):
    """Quantise one part of some rows and store it."""
    blocks = out_ptr + (page * stride_p + head * stride_h)
    if CODEC[0] == CAST:
        # Rows of the cache's own dtype are copied bit for bit.
        store_tile(blocks, o, is_live, x.to(out_ptr.dtype.element_ty), SHAPE[0], PLACE)
    else:
        codes, scales = quantise(x.to(tl.float32), factor, CODEC)
        STORED: tl.constexpr = SHAPE[0] // 2 if CODEC[0] == NVFP4 else SHAPE[0]
        store_tile(blocks, o, is_live, codes, STORED, PLACE)
        if CODEC[0] != PER_TENSOR and CODEC[0] != FP8:
            blocks = scales_ptr + (page * scales_stride_p + head * scales_stride_h)
            NUM: tl.constexpr = (SHAPE[0] + SHAPE[2] - 1) // SHAPE[2]
            store_tile(blocks, o, is_live, scales[:, :, None], NUM, SCALES)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def write_rows_kernel(
    a_ptr,  # [num_tokens, heads, A_SHAPE[0]] floating
    b_ptr,  # [num_tokens, heads, B_SHAPE[0]] floating; unused without B_SHAPE
    slots_ptr,  # [num_tokens] i32 or i64
    a_out_ptr,  # fp8 and fp4 as bytes
    a_scales_ptr,
    a_factor_ptr,
    b_out_ptr,
    b_scales_ptr,
    b_factor_ptr,
    num_tokens,
    num_slots,
    a_stride_t,  # all strides in elements
    a_stride_h,
    a_out_stride_p,
    a_out_stride_h,
    a_scales_stride_p,
    a_scales_stride_h,
    b_stride_t,
    b_stride_h,
    b_out_stride_p,
    b_out_stride_h,
    b_scales_stride_p,
    b_scales_stride_h,
    PAGE_SIZE: tl.constexpr,
    A_SHAPE: tl.constexpr,
    A_CODEC: tl.constexpr,
    A_PLACE: tl.constexpr,
    A_SCALES: tl.constexpr,
    B_SHAPE: tl.constexpr,  # None when rows have one part
    B_CODEC: tl.constexpr,
    B_PLACE: tl.constexpr,
    B_SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write rows to their slots; a slot outside the cache skips its token."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    is_token = tokens < num_tokens

    # Rows of skipped tokens are loaded too: waiting for the slots would double the latency.
    slots = tl.load(slots_ptr + tokens, mask=is_token, other=-1).to(tl.int64)
    a_factor = load_factor(a_factor_ptr, A_CODEC)
    a = load_rows(a_ptr, a_stride_t, a_stride_h, tokens, head, is_token, A_SHAPE)
    if B_SHAPE is not None:
        b_factor = load_factor(b_factor_ptr, B_CODEC)
        b = load_rows(b_ptr, b_stride_t, b_stride_h, tokens, head, is_token, B_SHAPE)

    is_live = (slots >= 0) & (slots < num_slots)
    page, o = slots // PAGE_SIZE, slots % PAGE_SIZE
    store_rows(
        a,
        a_out_ptr,
        a_scales_ptr,
        a_factor,
        a_out_stride_p,
        a_out_stride_h,
        a_scales_stride_p,
        a_scales_stride_h,
        page,
        head,
        o,
        is_live,
        A_SHAPE,
        A_CODEC,
        A_PLACE,
        A_SCALES,
    )
    if B_SHAPE is not None:
        store_rows(
            b,
            b_out_ptr,
            b_scales_ptr,
            b_factor,
            b_out_stride_p,
            b_out_stride_h,
            b_scales_stride_p,
            b_scales_stride_h,
            page,
            head,
            o,
            is_live,
            B_SHAPE,
            B_CODEC,
            B_PLACE,
            B_SCALES,
        )
