"""Root-mean-square norms of a query's and a key's latent rows, the query's quantised, at once.

Grid (tokens, 2), or (tokens, 1) without keys: a program norms one row, of the query if its second
index is 0. Rows stay in registers between the sum of squares and the bytes that are written.
``QUANT`` says how the query is stored besides: not at all, in fp8 or in MXFP4 (kinds of
`mla_fusions.kernels.absorbed`). Groups that share a scale are ``Q_SHAPE``: elements of a row, and
the tile that covers them: how many groups, of how many elements.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._norm import inverse_root, normed, row_sums
from mla_fusions.kernels._quantise import fp8_quotients, fp32_scales
from mla_fusions.kernels.absorbed import FP8, MIN_AMAX, MXFP4, halves, mxfp4_codes


@triton.jit
def norm_query(
    token,  # i64
    q_ptr,  # [num_tokens, Q_SHAPE[0]]
    weight_ptr,  # [Q_SHAPE[0]]
    residual_ptr,  # like q, or None
    codes_ptr,  # bytes [num_tokens, Q_SHAPE[0], or half for MXFP4]; None unless QUANT
    scales_ptr,  # [num_tokens, groups] f32, or u8 for MXFP4; None unless QUANT
    out_ptr,  # like q, or None
    residual_out_ptr,  # like q, or None
    eps,
    stride_t,  # all strides in elements
    residual_stride_t,
    codes_stride_t,
    scales_stride_t,
    scales_stride_g,
    out_stride_t,
    residual_out_stride_t,
    Q_SHAPE: tl.constexpr,
    QUANT: tl.constexpr,
    BIAS: tl.constexpr,  # exponent bias of fp8
    IS_NATIVE: tl.constexpr,  # the chip converts to it
    IS_GEMMA: tl.constexpr,  # weights are stored less 1
):
    """Norm the query of a token, with what is fused to it."""
    WIDTH: tl.constexpr = Q_SHAPE[0]
    group, within = tl.arange(0, Q_SHAPE[1]), tl.arange(0, Q_SHAPE[2])
    e = group[None, :, None] * Q_SHAPE[2] + within[None, None, :]
    mask = e < WIDTH
    x = tl.load(q_ptr + token * stride_t + e, mask=mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        old = tl.load(residual_ptr + token * residual_stride_t + e, mask=mask, other=0)
        x += old.to(tl.float32)
    inverse = inverse_root(row_sums(x * x), eps, WIDTH)
    # Rows may be replaced: all is read before.
    tl.debug_barrier()
    if residual_out_ptr is not None:
        kept = x.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + token * residual_out_stride_t + e, kept, mask=mask)
    y = normed(x, None, inverse, weight_ptr, None, e, mask, IS_GEMMA)
    if out_ptr is not None:
        rounded = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * out_stride_t + e, rounded, mask=mask)
    if QUANT != 0:
        g = group[None, :]
        scales = scales_ptr + token * scales_stride_t + g * scales_stride_g
        is_group = g * Q_SHAPE[2] < WIDTH
        codes = codes_ptr + token * codes_stride_t
        if QUANT == FP8:
            factors = fp32_scales(y, BIAS, MIN_AMAX)
            values = fp8_quotients(y, factors[:, :, None], BIAS, IS_NATIVE, True)
            tl.store(codes + e, values, mask=mask)
            tl.store(scales, factors, mask=is_group)
        else:
            tl.static_assert(QUANT == MXFP4)
            SIZE: tl.constexpr = Q_SHAPE[1] * Q_SHAPE[2]
            nibbles, exponents = mxfp4_codes(y)
            low, high = halves(tl.reshape(nibbles, (1, SIZE)))
            byte = tl.arange(0, SIZE // 2)[None, :]
            packed = (low | (high << 4)).to(tl.uint8)
            tl.store(codes + byte, packed, mask=byte < WIDTH // 2)
            tl.store(scales, exponents.to(tl.uint8), mask=is_group)


@triton.jit
def norm_row(
    x_ptr,
    weight_ptr,
    out_ptr,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_GEMMA: tl.constexpr,
):
    """Norm a row, and nothing else."""
    e = tl.arange(0, BLOCK)[None, None, :]
    x = tl.load(x_ptr + e, mask=e < WIDTH, other=0).to(tl.float32)
    y = normed(
        x,
        None,
        inverse_root(row_sums(x * x), eps, WIDTH),
        weight_ptr,
        None,
        e,
        e < WIDTH,
        IS_GEMMA,
    )
    # Rows may be replaced: all is read before.
    tl.debug_barrier()
    tl.store(out_ptr + e, y.to(out_ptr.dtype.element_ty), mask=e < WIDTH)


@triton.jit(do_not_specialize=["q_eps", "k_eps"])
def norm_rows_kernel(
    q_ptr,  # as in `norm_query`, and so are all before the key's
    q_weight_ptr,
    residual_ptr,
    q_codes_ptr,
    q_scales_ptr,
    q_out_ptr,
    residual_out_ptr,
    q_eps,
    q_stride_t,
    residual_stride_t,
    q_codes_stride_t,
    q_scales_stride_t,
    q_scales_stride_g,
    q_out_stride_t,
    residual_out_stride_t,
    k_ptr,  # [num_tokens, K_WIDTH], or None
    k_weight_ptr,  # [K_WIDTH], or None
    k_out_ptr,  # like k, or None
    k_eps,
    k_stride_t,
    k_out_stride_t,
    Q_SHAPE: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K_WIDTH rounded up to a power of two
    QUANT: tl.constexpr,
    BIAS: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    IS_GEMMA: tl.constexpr,
):
    """Norm one row."""
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        norm_query(
            token,
            q_ptr,
            q_weight_ptr,
            residual_ptr,
            q_codes_ptr,
            q_scales_ptr,
            q_out_ptr,
            residual_out_ptr,
            q_eps,
            q_stride_t,
            residual_stride_t,
            q_codes_stride_t,
            q_scales_stride_t,
            q_scales_stride_g,
            q_out_stride_t,
            residual_out_stride_t,
            Q_SHAPE,
            QUANT,
            BIAS,
            IS_NATIVE,
            IS_GEMMA,
        )
    elif k_ptr is not None:
        norm_row(
            k_ptr + token * k_stride_t,
            k_weight_ptr,
            k_out_ptr + token * k_out_stride_t,
            k_eps,
            K_WIDTH,
            K_BLOCK,
            IS_GEMMA,
        )
