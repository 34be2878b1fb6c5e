"""Rotating queries and keys, and writing both in one launch: queries out, keys into a paged cache.

The grid has one dimension. The first ``num_kv_programs`` programs take ``BLOCK_T`` tokens of one
key head each: they rotate part ``b`` of the rows and store both parts as
`mla_fusions.kernels.write_rows` does, for every layout, and norm them first where another kernel
asks for it. Each of the others takes ``BLOCK_H`` query heads of one token: it copies the latent
part, rotates the rotary one, and puts them side by side.

``x`` becomes ``x * cos + rot(x) * sin`` in fp32, ``rot`` mapping each pair (a, b) to (-b, a);
launches turn off the fusing of products and sums, so that every chip rounds alike. ``ROPE`` is
(elements that turn, the first of them, whether halves are paired, whether tables have a column for
each element, power of two that covers the pairs).
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._norm import inverse_root, normed, row_sums
from mla_fusions.kernels._quantise import CAST, load_factor, quantise
from mla_fusions.kernels.write_rows import load_rows, store_rows


@triton.jit
def load_positions(positions_ptr, offsets_ptr, tokens, mask, num_positions):
    """Load positions, add offsets if there are, and clamp them into the tables.

    Load before this what needs no positions: it is under way when these are waited for, and where
    tables are read comes after a barrier, without which compilers put these first.
    """
    positions = tl.load(positions_ptr + tokens, mask=mask, other=0).to(tl.int64)
    if offsets_ptr is not None:
        positions += tl.load(offsets_ptr + tokens, mask=mask, other=0).to(tl.int64)
    tl.debug_barrier()
    return tl.minimum(tl.maximum(positions, 0), num_positions - 1)


@triton.jit
def load_rotated(
    x_ptr,
    stride_t,
    stride_h,
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    positions,  # [BLOCK_T] i64
    tokens,
    head,
    is_token,
    is_turned,  # [BLOCK_T]: rows of other tokens stay as they are
    SHAPE: tl.constexpr,
    ROPE: tl.constexpr,
    mean=None,  # as in `normed`, by which rows come before they turn if there is a weight
    inverse=None,
    weight_ptr=None,
    bias_ptr=None,
    IS_GEMMA: tl.constexpr = False,
):
    """Load one part of the rows of some tokens, rotated: fp32 [BLOCK_T, GROUPS, GROUP].

    Any codec can follow, since the tile is that of `load_rows`: so the other one of a pair is
    loaded a second time rather than moved between threads.
    """
    HALF: tl.constexpr = ROPE[0] // 2
    e = tl.arange(0, SHAPE[1])[None, :, None] * SHAPE[2] + tl.arange(0, SHAPE[2])[None, None, :]
    j = e - ROPE[1]
    if ROPE[2]:
        is_first = j < HALF
        other = tl.where(is_first, e + HALF, e - HALF)
        column = tl.where(is_first, j, j - HALF)
    else:
        is_first = (j & 1) == 0
        other = tl.where(is_first, e + 1, e - 1)
        column = j >> 1
    if ROPE[3]:
        column = j
    rows = x_ptr + (head * stride_h + tokens * stride_t)[:, None, None]
    x = tl.load(rows + e, mask=is_token[:, None, None] & (e < SHAPE[0]), other=0).to(tl.float32)
    turns = (is_token & is_turned)[:, None, None] & (j >= 0) & (j < ROPE[0])
    y = tl.load(rows + other, mask=turns, other=0).to(tl.float32)
    if weight_ptr is not None:
        x = normed(x, mean, inverse, weight_ptr, bias_ptr, e, e < SHAPE[0], IS_GEMMA)
        is_pair = (j >= 0) & (j < ROPE[0])
        y = normed(y, mean, inverse, weight_ptr, bias_ptr, other, is_pair, IS_GEMMA)
    cos = tl.load(cos_ptr + (positions * cos_stride)[:, None, None] + column, mask=turns, other=1)
    sin = tl.load(sin_ptr + (positions * sin_stride)[:, None, None] + column, mask=turns, other=0)
    a, b = x * cos.to(tl.float32), y * sin.to(tl.float32)
    # Subtracted, as negating would lose the sign of a zero.
    return tl.where(turns, tl.where(is_first, a - b, a + b), x)


@triton.jit
def load_pairs(starts, mask, ROPE: tl.constexpr):
    """Load the first ones and the second ones of all pairs, each [rows, PAIRS]."""
    HALF: tl.constexpr = ROPE[0] // 2
    PAIRS: tl.constexpr = ROPE[4]
    if ROPE[2]:
        p = tl.arange(0, PAIRS)[None, :]
        mask = mask[:, None] & (p < HALF)
        a = tl.load(starts[:, None] + p, mask=mask, other=0)
        b = tl.load(starts[:, None] + HALF + p, mask=mask, other=0)
    else:
        e = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(starts[:, None] + e, mask=mask[:, None] & (e < ROPE[0]), other=0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    return a, b


@triton.jit
def load_columns(starts, mask, ROPE: tl.constexpr):
    """Load a table's factors of the first ones and of the second ones of all pairs, in fp32."""
    if ROPE[3]:
        a, b = load_pairs(starts, mask, ROPE)
    else:
        p = tl.arange(0, ROPE[4])[None, :]
        a = tl.load(starts[:, None] + p, mask=mask[:, None] & (p < ROPE[0] // 2), other=0)
        b = a
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(starts, a, b, mask, factor, ROPE: tl.constexpr, CODEC: tl.constexpr):
    """Store what `load_pairs` loads."""
    HALF: tl.constexpr = ROPE[0] // 2
    PAIRS: tl.constexpr = ROPE[4]
    if ROPE[2]:
        p = tl.arange(0, PAIRS)[None, :]
        mask = mask[:, None] & (p < HALF)
        tl.store(starts[:, None] + p, encode(starts, a, factor, CODEC), mask=mask)
        tl.store(starts[:, None] + HALF + p, encode(starts, b, factor, CODEC), mask=mask)
    else:
        e = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIRS))
        mask = mask[:, None] & (e < ROPE[0])
        tl.store(starts[:, None] + e, encode(starts, both, factor, CODEC), mask=mask)


@triton.jit
def encode(starts, x, factor, CODEC: tl.constexpr):
    """Return a tile as what the memory at ``starts`` holds; a codec of None rounds to its type."""
    if CODEC is None or CODEC[0] == CAST:
        # Of the same type, it is copied bit for bit.
        stored = x.to(starts.dtype.element_ty)
    else:
        stored, _ = quantise(x.to(tl.float32), factor, CODEC)
    return stored


@triton.jit
def write_keys(
    program,
    a_ptr,
    b_ptr,
    k_out_ptr,
    slots_ptr,  # None where the slot of a token is its own number
    positions_ptr,
    offsets_ptr,
    cos_ptr,
    sin_ptr,
    a_out_ptr,
    a_scales_ptr,
    a_factor_ptr,
    b_out_ptr,
    b_scales_ptr,
    b_factor_ptr,
    num_keys,
    num_written,
    num_turned,
    num_slots,
    num_positions,
    cos_stride,
    sin_stride,
    k_out_stride_t,
    k_out_stride_h,
    a_stride_t,
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
    KEY_HEADS: tl.constexpr,
    ROPE: tl.constexpr,  # None where part b does not turn
    IS_IN_PLACE: tl.constexpr,
    IS_DIVIDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    A_SHAPE: tl.constexpr,
    A_CODEC: tl.constexpr,
    A_PLACE: tl.constexpr,
    A_SCALES: tl.constexpr,
    B_SHAPE: tl.constexpr,
    B_CODEC: tl.constexpr,
    B_PLACE: tl.constexpr,
    B_SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    weight_ptr=None,  # [NORM_WIDTH] floating, or None to store part a as it is
    a_normed_ptr=None,  # like a, or None; gets part a normed
    a_normed_stride_t=0,
    eps=0.0,
    NORM_WIDTH: tl.constexpr = 0,  # part a is normed, or both parts together
    IS_GEMMA: tl.constexpr = False,
):
    """Norm part a if asked for, rotate part b, and store the rows of some tokens of one head."""
    head = (program % KEY_HEADS).to(tl.int64)
    tokens = (program // KEY_HEADS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < num_keys
    # Rows of skipped tokens are loaded too: waiting for the slots would double the latency.
    if slots_ptr is None:
        slots = tl.where(tokens < num_written, tokens, -1)
    else:
        slots = tl.load(slots_ptr + tokens, mask=tokens < num_written, other=-1).to(tl.int64)
    a_factor = load_factor(a_factor_ptr, A_CODEC)
    if B_SHAPE is not None:
        b_factor = load_factor(b_factor_ptr, B_CODEC)
    a = load_rows(a_ptr, a_stride_t, a_stride_h, tokens, head, is_token, A_SHAPE)
    is_live = (slots >= 0) & (slots < num_slots)
    page, o = slots // PAGE_SIZE, slots % PAGE_SIZE
    inverse = None
    b_weight_ptr = None
    if weight_ptr is not None:
        a = a.to(tl.float32)
        squares = row_sums(a * a)
        if A_SHAPE[0] < NORM_WIDTH:
            raw = load_rows(b_ptr, b_stride_t, b_stride_h, tokens, head, is_token, B_SHAPE)
            raw = raw.to(tl.float32)
            squares += row_sums(raw * raw)
            b_weight_ptr = weight_ptr + A_SHAPE[0]
        inverse = inverse_root(squares, eps, NORM_WIDTH)
        e = tl.arange(0, A_SHAPE[1])[None, :, None] * A_SHAPE[2]
        e += tl.arange(0, A_SHAPE[2])[None, None, :]
        a = normed(a, None, inverse, weight_ptr, None, e, e < A_SHAPE[0], IS_GEMMA)
    if ROPE is not None:
        is_turned = tokens < num_turned
        positions = load_positions(
            positions_ptr, offsets_ptr, tokens, is_token & is_turned, num_positions
        )
        b = load_rotated(
            b_ptr,
            b_stride_t,
            b_stride_h,
            cos_ptr,
            sin_ptr,
            cos_stride,
            sin_stride,
            positions,
            tokens,
            head,
            is_token,
            is_turned,
            B_SHAPE,
            ROPE,
            None,
            inverse,
            b_weight_ptr,
            None,
            IS_GEMMA,
        )
    elif B_SHAPE is not None:
        b = load_rows(b_ptr, b_stride_t, b_stride_h, tokens, head, is_token, B_SHAPE)
    if IS_IN_PLACE:
        # All is read before any of it is written over.
        tl.debug_barrier()
    if a_normed_ptr is not None:
        starts = a_normed_ptr + (tokens * a_normed_stride_t)[:, None, None]
        mask = is_token[:, None, None] & (e < A_SHAPE[0])
        tl.store(starts + e, a.to(a_normed_ptr.dtype.element_ty), mask=mask)
    if B_SHAPE is not None:
        if k_out_ptr is not None:
            e = tl.arange(0, B_SHAPE[1])[None, :, None] * B_SHAPE[2]
            e += tl.arange(0, B_SHAPE[2])[None, None, :]
            starts = k_out_ptr + (tokens * k_out_stride_t + head * k_out_stride_h)[:, None, None]
            mask = is_token[:, None, None] & (e < B_SHAPE[0])
            tl.store(starts + e, b.to(k_out_ptr.dtype.element_ty), mask=mask)
        if IS_DIVIDED:
            b = tl.div_rn(b.to(tl.float32), tl.load(b_factor_ptr))
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
    if IS_DIVIDED:
        a = tl.div_rn(a.to(tl.float32), tl.load(a_factor_ptr))
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


@triton.jit
def write_queries(
    program,
    q_nope_ptr,
    q_pe_ptr,
    q_out_ptr,
    q_factor_ptr,
    pe_out_ptr,
    zeros_ptr,
    slots_ptr,
    positions_ptr,
    offsets_ptr,
    cos_ptr,
    sin_ptr,
    num_written,
    num_positions,
    num_copied,
    num_zeros,
    cos_stride,
    sin_stride,
    q_nope_stride_t,
    q_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    pe_out_stride_t,
    pe_out_stride_h,
    zeros_stride_t,
    zeros_stride_h,
    HEADS: tl.constexpr,
    Q_SHAPE: tl.constexpr,
    Q_CODEC: tl.constexpr,
    ROPE: tl.constexpr,
    IS_IN_PLACE: tl.constexpr,
    SKIPS_QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotate and join some heads of one token."""
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = (program // BLOCKS).to(tl.int64)
    heads = (program % BLOCKS).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < HEADS
    is_live = is_head
    # For each head, since the interpreter of Triton 3.9 makes numbers of flags that it broadcasts.
    tokens = tl.zeros((BLOCK_H,), tl.int64) + token
    if SKIPS_QUERIES:
        is_live &= tl.load(slots_ptr + tokens, mask=tokens < num_written, other=-1) >= 0
    out = q_out_ptr + (token * q_out_stride_t + heads * q_out_stride_h)
    # Every load comes before the first store.
    q_factor = load_factor(q_factor_ptr, Q_CODEC)
    if Q_SHAPE[0] > 0:
        c = tl.arange(0, Q_SHAPE[1])[None, :]
        starts = q_nope_ptr + (token * q_nope_stride_t + heads * q_nope_stride_h)[:, None]
        nope = tl.load(starts + c, mask=is_head[:, None] & (c < Q_SHAPE[0]), other=0)
    if ROPE is not None:
        pe = q_pe_ptr + (token * q_pe_stride_t + heads * q_pe_stride_h)
        a, b = load_pairs(pe + ROPE[1], is_head, ROPE)
        position = load_positions(positions_ptr, offsets_ptr, token, token >= 0, num_positions)
        one = tl.arange(0, 1)
        cos_a, cos_b = load_columns(cos_ptr + position * cos_stride + one, one == 0, ROPE)
        sin_a, sin_b = load_columns(sin_ptr + position * sin_stride + one, one == 0, ROPE)
        if ROPE[0] < Q_SHAPE[2]:
            r = tl.arange(0, Q_SHAPE[3])[None, :]
            stays = (r < Q_SHAPE[2]) & ((r < ROPE[1]) | (r >= ROPE[1] + ROPE[0]))
            rest = tl.load(pe[:, None] + r, mask=is_head[:, None] & stays, other=0)
        if IS_IN_PLACE:
            # All pairs are read before one is written over.
            tl.debug_barrier()
        a, b = a.to(tl.float32), b.to(tl.float32)
        # Pair by pair, subtracted as in `load_rotated`.
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        place = out + Q_SHAPE[5]
        store_pairs(place + ROPE[1], first, second, is_live, q_factor, ROPE, Q_CODEC)
        if ROPE[0] < Q_SHAPE[2]:
            stored = encode(place, rest, q_factor, Q_CODEC)
            tl.store(place[:, None] + r, stored, mask=is_live[:, None] & stays)
        if pe_out_ptr is not None:
            place = pe_out_ptr + (token * pe_out_stride_t + heads * pe_out_stride_h)
            is_copied = is_head & (tokens < num_copied)
            store_pairs(place + ROPE[1], first, second, is_copied, q_factor, ROPE, None)
            if ROPE[0] < Q_SHAPE[2]:
                stored = encode(place, rest, q_factor, None)
                tl.store(place[:, None] + r, stored, mask=is_copied[:, None] & stays)
    elif Q_SHAPE[2] > 0:
        r = tl.arange(0, Q_SHAPE[3])[None, :]
        starts = q_pe_ptr + (token * q_pe_stride_t + heads * q_pe_stride_h)[:, None]
        rest = tl.load(starts + r, mask=is_head[:, None] & (r < Q_SHAPE[2]), other=0)
        stored = encode(out, rest, q_factor, Q_CODEC)
        mask = is_live[:, None] & (r < Q_SHAPE[2])
        tl.store(out[:, None] + Q_SHAPE[5] + r, stored, mask=mask)
    if Q_SHAPE[0] > 0:
        stored = encode(out, nope, q_factor, Q_CODEC)
        mask = is_live[:, None] & (c < Q_SHAPE[0])
        tl.store(out[:, None] + Q_SHAPE[4] + c, stored, mask=mask)
    if zeros_ptr is not None:
        ZEROS: tl.constexpr = Q_SHAPE[7]
        z = tl.arange(0, ZEROS)[None, :]
        starts = zeros_ptr + (token * zeros_stride_t + heads * zeros_stride_h)[:, None]
        mask = (is_head & (tokens < num_zeros))[:, None] & (z < Q_SHAPE[6])
        zeros = tl.zeros((BLOCK_H, ZEROS), zeros_ptr.dtype.element_ty)
        tl.store(starts + z, zeros, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_kv_programs",
        "num_keys",
        "num_written",
        "num_turned",
        "num_slots",
        "num_positions",
        "num_copied",
        "num_zeros",
    ]
)
def rope_rows_kernel(
    q_nope_ptr,  # [T, HEADS, Q_SHAPE[0]] floating; unused where that is 0
    q_pe_ptr,  # [T, HEADS, Q_SHAPE[2]] floating
    q_out_ptr,  # [T, HEADS, Q_SHAPE[0] + Q_SHAPE[2] or more]; fp8 as bytes
    q_factor_ptr,  # [1] f32; unused unless Q_CODEC says so
    pe_out_ptr,  # [num_copied, HEADS, Q_SHAPE[2]] floating, or None
    zeros_ptr,  # [num_zeros, HEADS, Q_SHAPE[6]] floating, or None
    a_ptr,  # [num_keys, KEY_HEADS, A_SHAPE[0]] floating
    b_ptr,  # [num_keys, KEY_HEADS, B_SHAPE[0]] floating; unused without B_SHAPE
    k_out_ptr,  # like b, or None
    slots_ptr,  # [num_written] i32 or i64, or None where the slot of a token is its own number
    positions_ptr,  # [T] i32 or i64; neither it nor the tables are read without ROPE
    offsets_ptr,  # like positions, or None
    cos_ptr,  # [num_positions, columns] floating
    sin_ptr,
    a_out_ptr,  # as in write_rows_kernel, and so are all that follow
    a_scales_ptr,
    a_factor_ptr,
    b_out_ptr,
    b_scales_ptr,
    b_factor_ptr,
    num_kv_programs,
    num_keys,
    num_written,  # tokens with slots
    num_turned,  # keys of tokens from here on are not rotated
    num_slots,
    num_positions,
    num_copied,
    num_zeros,
    cos_stride,  # all strides in elements
    sin_stride,
    q_nope_stride_t,
    q_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    q_out_stride_t,
    q_out_stride_h,
    pe_out_stride_t,
    pe_out_stride_h,
    zeros_stride_t,
    zeros_stride_h,
    k_out_stride_t,
    k_out_stride_h,
    a_stride_t,
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
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    Q_SHAPE: tl.constexpr,  # width, tile of latent, rotary part; places of both; width, tile of 0s
    Q_CODEC: tl.constexpr,
    ROPE: tl.constexpr,  # None where nothing turns
    IS_IN_PLACE: tl.constexpr,  # rotated rows may replace those they come from
    IS_DIVIDED: tl.constexpr,  # rows are divided by the factors before they are encoded
    SKIPS_QUERIES: tl.constexpr,  # of tokens without a slot
    PAGE_SIZE: tl.constexpr,
    A_SHAPE: tl.constexpr,
    A_CODEC: tl.constexpr,
    A_PLACE: tl.constexpr,
    A_SCALES: tl.constexpr,
    B_SHAPE: tl.constexpr,
    B_CODEC: tl.constexpr,
    B_PLACE: tl.constexpr,
    B_SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rotate, join and write; a slot outside the cache skips its token's key."""
    program = tl.program_id(0)
    if program < num_kv_programs:
        write_keys(
            program,
            a_ptr,
            b_ptr,
            k_out_ptr,
            slots_ptr,
            positions_ptr,
            offsets_ptr,
            cos_ptr,
            sin_ptr,
            a_out_ptr,
            a_scales_ptr,
            a_factor_ptr,
            b_out_ptr,
            b_scales_ptr,
            b_factor_ptr,
            num_keys,
            num_written,
            num_turned,
            num_slots,
            num_positions,
            cos_stride,
            sin_stride,
            k_out_stride_t,
            k_out_stride_h,
            a_stride_t,
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
            KEY_HEADS,
            ROPE,
            IS_IN_PLACE,
            IS_DIVIDED,
            PAGE_SIZE,
            A_SHAPE,
            A_CODEC,
            A_PLACE,
            A_SCALES,
            B_SHAPE,
            B_CODEC,
            B_PLACE,
            B_SCALES,
            BLOCK_T,
        )
    else:
        write_queries(
            program - num_kv_programs,
            q_nope_ptr,
            q_pe_ptr,
            q_out_ptr,
            q_factor_ptr,
            pe_out_ptr,
            zeros_ptr,
            slots_ptr,
            positions_ptr,
            offsets_ptr,
            cos_ptr,
            sin_ptr,
            num_written,
            num_positions,
            num_copied,
            num_zeros,
            cos_stride,
            sin_stride,
            q_nope_stride_t,
            q_nope_stride_h,
            q_pe_stride_t,
            q_pe_stride_h,
            q_out_stride_t,
            q_out_stride_h,
            pe_out_stride_t,
            pe_out_stride_h,
            zeros_stride_t,
            zeros_stride_h,
            HEADS,
            Q_SHAPE,
            Q_CODEC,
            ROPE,
            IS_IN_PLACE,
            SKIPS_QUERIES,
            BLOCK_H,
        )
