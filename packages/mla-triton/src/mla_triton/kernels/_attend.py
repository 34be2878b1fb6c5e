"""A tile of query rows attends to a range of its request's tokens: what decode kernels share.

A kernel locates its rows and its range, then calls `load_queries`, `attend`, `normalise` and
`store_rows`. What a row may see is a range of local tokens, ``[low, high)``.

Matrix products take the dtype of the queries, or bf16 for fp8 queries, which holds every fp8 value.
Cached fp8 numbers are brought to it exactly; their scale is applied to the scores and the result
when there is one for the whole cache, else to the numbers, in fp32 before they are rounded: each
latent element is then off by 2**-9 of itself in bf16 and 2**-12 in fp16, as in a cache of that
dtype. With fp16 queries, latents and rotary keys must lie within fp16's range.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_triton.kernels._math import finite_or_zero, scale_scores, token_rows


@triton.jit
def load_queries(
    ql_nope_ptr,  # [total_q, num_heads, D]
    q_pe_ptr,  # [total_q, num_heads, R]
    q_token,  # [M] i64
    head,  # [M] i64
    is_row,  # [M] i1
    ql_nope_stride_t,  # elements
    ql_nope_stride_h,
    q_pe_stride_t,
    q_pe_stride_h,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return ql_nope [M, BLOCK_D] and q_pe [M, BLOCK_R]; rows and columns past the end are zeros.

    fp8 becomes bf16. Without rope the second is a stand-in that nothing reads.
    """
    d = tl.arange(0, BLOCK_D)
    ql_nope = tl.load(
        ql_nope_ptr + (q_token * ql_nope_stride_t + head * ql_nope_stride_h)[:, None] + d[None, :],
        mask=is_row[:, None] & (d < D)[None, :],
        other=0.0,
    )
    q_pe = ql_nope
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        q_pe = tl.load(
            q_pe_ptr + (q_token * q_pe_stride_t + head * q_pe_stride_h)[:, None] + r[None, :],
            mask=is_row[:, None] & (r < R)[None, :],
            other=0.0,
        )
    if ql_nope_ptr.dtype.element_ty.primitive_bitwidth == 8:
        ql_nope = ql_nope.to(tl.bfloat16)
        q_pe = q_pe.to(tl.bfloat16)
    return ql_nope, q_pe


@triton.jit
def load_latents(
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    kv_scale_ptr,  # [num_cache_pages, PAGE_SIZE, D / SCALE_GROUP] f32 or E8M0; unused without
    page,  # [N] i64
    offset,  # [N] i32, token in the page
    is_live,  # [N] i1
    kv_c_stride_p,  # elements
    kv_c_stride_t,
    kv_scale_stride_p,
    kv_scale_stride_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERT_ONCE: tl.constexpr,
):
    """Return latents [N, BLOCK_D] of DTYPE, zeros for dead tokens, group scales applied."""
    d = tl.arange(0, BLOCK_D)
    kv_c = tl.load(
        kv_c_ptr + (page * kv_c_stride_p + offset * kv_c_stride_t)[:, None] + d[None, :],
        mask=is_live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if kv_c_ptr.dtype.element_ty.primitive_bitwidth == 8:
        # By way of fp32: compilers turn fp8 into bf16 with far more instructions.
        kv_c = kv_c.to(tl.float32)
    if SCALE_GROUP > 0:
        GROUPS: tl.constexpr = BLOCK_D // SCALE_GROUP
        g = tl.arange(0, GROUPS)
        scale = tl.load(
            kv_scale_ptr
            + (page * kv_scale_stride_p + offset * kv_scale_stride_t)[:, None]
            + g[None, :],
            mask=is_live[:, None] & (g < tl.cdiv(D, SCALE_GROUP))[None, :],
            other=0,
        )
        scale = scale_value(scale)
        groups = tl.reshape(kv_c, [BLOCK_N, GROUPS, SCALE_GROUP])
        kv_c = tl.reshape(groups * scale[:, :, None], [BLOCK_N, BLOCK_D])
    kv_c = kv_c.to(DTYPE)
    if CONVERT_ONCE:
        # A sum over one element costs nothing, and compilers do not move it. Without it they move
        # the conversion behind the exchange through shared memory, to both products, where several
        # warps convert the same elements and run out of registers.
        kv_c = tl.sum(kv_c[:, :, None], 2)
    return kv_c


@triton.jit
def scale_value(scale):
    """Return scales as fp32: as they are, or ``2 ** (byte - 127)`` for E8M0 bytes; 255 is NaN."""
    if scale.dtype == tl.uint8:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def attend(
    ql_nope,  # [M, BLOCK_D]
    q_pe,  # [M, BLOCK_R]
    low,  # [M] i32, first token a row sees; unused without HAS_WINDOW
    high,  # [M] i32, end of the tokens a row sees
    begin,  # first token of a page or a multiple of BLOCK_N; from `seen_range`
    end,
    lowest,  # no row sees a token below it; unused without HAS_WINDOW
    page_begin,
    kv_c_ptr,  # [num_cache_pages, PAGE_SIZE, D]
    k_pe_ptr,  # [num_cache_pages, PAGE_SIZE, R]
    kv_scale_ptr,  # [1] f32, or as in `load_latents`; unused without either
    q_scale_ptr,  # [1] f32; unused without HAS_Q_SCALE
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    num_cache_pages,
    kv_c_stride_p,  # elements
    kv_c_stride_t,
    k_pe_stride_p,
    k_pe_stride_t,
    kv_scale_stride_p,  # unused without SCALE_GROUP
    kv_scale_stride_t,
    sm_scale_log2,  # sm_scale * log2(e)
    softcap,  # unused without HAS_SOFTCAP
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LATENT_ALIGN: tl.constexpr,  # divides the strides of kv_c
    ROPE_ALIGN: tl.constexpr,  # divides the strides of k_pe and how far the new keys are from it
    SCALE_GROUP: tl.constexpr,  # neighbours that share a scale in the cache; 0 for none there
    HAS_KV_SCALE: tl.constexpr,  # one scale for latents and rotary keys of the whole cache
    HAS_Q_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    # Where the rotary parts of the newest tokens are: 0 in the cache, else in new_keys, which is
    # read 1 as if it were part of the cache or 2 by loads of its own. The first costs nothing, but
    # AMD's compiler relies on offsets of 32 bits from a pointer of less than 2 GiB.
    NEW_KEYS: tl.constexpr = 0,
    new_keys_ptr=None,  # [total_q, R], dtype of the cache
    new_keys_stride_t=0,  # elements
    q_begin=0,  # first query token of the request
    first_newest=0,  # from `newest_tokens`
    newest_step=1,
    newest_base=0,
):
    """Return acc [M, BLOCK_D], m [M] and denom [M], all fp32, over the tokens of [begin, end).

    ``acc / denom`` is the attention output, ``m + log2(denom)`` its log-sum-exp in base 2. Rows
    that see nothing have 0, -inf and 0.
    """
    DTYPE: tl.constexpr = ql_nope.dtype
    IS_WIDENED: tl.constexpr = (
        kv_c_ptr.dtype.element_ty.primitive_bitwidth == 8 and DTYPE.primitive_bitwidth == 16
    )
    # Larger tiles leave no registers for it, by what compilers report.
    CONVERT_ONCE: tl.constexpr = IS_WIDENED and BLOCK_M == 16 and BLOCK_N * BLOCK_D <= 16384
    if HAS_Q_SCALE:
        sm_scale_log2 *= tl.load(q_scale_ptr)
    if HAS_KV_SCALE:
        kv_scale = tl.load(kv_scale_ptr)
        sm_scale_log2 *= kv_scale
    # No change, but the compiler then knows how wide it may load.
    kv_c_stride_p = kv_c_stride_p // LATENT_ALIGN * LATENT_ALIGN
    kv_c_stride_t = kv_c_stride_t // LATENT_ALIGN * LATENT_ALIGN
    k_pe_stride_p = k_pe_stride_p // ROPE_ALIGN * ROPE_ALIGN
    k_pe_stride_t = k_pe_stride_t // ROPE_ALIGN * ROPE_ALIGN
    if NEW_KEYS == 1:
        # Elements from one pointer to the other.
        to_new_keys = new_keys_ptr.to(tl.int64) - k_pe_ptr.to(tl.int64)
        to_new_keys = to_new_keys // (k_pe_ptr.dtype.element_ty.primitive_bitwidth // 8)
        to_new_keys = to_new_keys // ROPE_ALIGN * ROPE_ALIGN
        new_keys_stride_t = new_keys_stride_t // ROPE_ALIGN * ROPE_ALIGN
    r = tl.arange(0, BLOCK_R)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denom = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Dead tokens are loaded as zeros *and* masked, since memory may hold NaN.
    for start in range(begin, end, BLOCK_N):
        token, page, offset, is_live = token_rows(
            start, end, page_begin, kv_page_indices_ptr, num_cache_pages, PAGE_SIZE, BLOCK_N
        )
        if HAS_WINDOW:
            is_live = is_live & (token >= lowest)
        kv_c = load_latents(
            kv_c_ptr,
            kv_scale_ptr,
            page,
            offset,
            is_live,
            kv_c_stride_p,
            kv_c_stride_t,
            kv_scale_stride_p,
            kv_scale_stride_t,
            D,
            BLOCK_D,
            BLOCK_N,
            SCALE_GROUP,
            DTYPE,
            CONVERT_ONCE,
        )
        s = tl.dot(ql_nope, tl.trans(kv_c), input_precision="ieee")  # [M, N]
        if R > 0:
            k_pe_row = page * k_pe_stride_p + offset * k_pe_stride_t
            is_read = is_live
            if NEW_KEYS > 0:
                is_newest = token >= first_newest
                q_token = q_begin + token * newest_step + newest_base
                new_row = q_token.to(tl.int64) * new_keys_stride_t
                if NEW_KEYS == 1:
                    k_pe_row = tl.where(is_newest, new_row + to_new_keys, k_pe_row)
                else:
                    is_read = is_live & (token < first_newest)
            k_pe = tl.load(
                k_pe_ptr + k_pe_row[:, None] + r[None, :],
                mask=is_read[:, None] & (r < R)[None, :],
                other=0.0,
            )  # [N, R]
            if NEW_KEYS == 2:
                new_key = tl.load(
                    new_keys_ptr + new_row[:, None] + r[None, :],
                    mask=(is_live & is_newest)[:, None] & (r < R)[None, :],
                    other=0.0,
                )
                k_pe = tl.where(is_newest[:, None], new_key, k_pe)
            if k_pe_ptr.dtype.element_ty.primitive_bitwidth == 8:
                k_pe = k_pe.to(tl.float32)
            s = tl.dot(q_pe, tl.trans(k_pe.to(DTYPE)), s, input_precision="ieee")
        s = scale_scores(s, sm_scale_log2, softcap, HAS_SOFTCAP)
        is_seen = is_live[None, :] & (token[None, :] < high[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (token[None, :] >= low[:, None])
        s = tl.where(is_seen, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = finite_or_zero(m_new)
        p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        denom = denom * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(DTYPE), kv_c, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    if HAS_KV_SCALE:
        acc *= kv_scale
    return acc, m, denom


@triton.jit
def normalise(
    acc,  # [M, BLOCK_D] f32
    m,  # [M] f32
    denom,  # [M] f32
    head,  # [M] i64
    is_row,  # [M] i1
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    HAS_SINK: tl.constexpr,
):
    """Return the output [M, BLOCK_D] and its natural log-sum-exp [M]: 0 and -inf for nothing."""
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
    lse = tl.where(is_nothing, float("-inf"), (m + tl.log2(denom)) * 0.6931471805599453)
    return acc / denom[:, None], lse


@triton.jit
def store_rows(
    values,  # [M, BLOCK_D] f32
    out_ptr,
    row,  # [M] i64, element offset of each row in out
    is_row,  # [M] i1
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the rows that exist, rounded to the dtype of ``out``."""
    d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + row[:, None] + d[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (d < D)[None, :],
    )
