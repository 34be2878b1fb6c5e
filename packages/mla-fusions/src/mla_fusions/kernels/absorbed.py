"""Products of activations with one weight matrix per head, quantised in several ways.

y[t, h] = x[t, h] @ w[h].T, the weights being read once. Grid (tiles of N and tokens, heads, splits
of K): a program owns ``BLOCK_M`` tokens and ``BLOCK_N`` outputs of one head. Tokens vary fastest,
so that programs with the same weights run together.

``X_KIND`` and ``W_KIND`` say how operands are stored and multiplied:

- PLAIN: bf16 or fp16, as they are
- FP8: activations are quantised here, with an fp32 scale for each token and ``BLOCK_K`` elements;
  the scale multiplies the product of a block, the weights' only one the sum
- MXFP4: activations are quantised here, with a power of two for each token and 32 elements
- PACKED: activations that are MXFP4 already
- NVFP4: weights alone, with an fp8 scale for each 16 elements and perhaps one for all

Products of fp4 numbers with their scales are exact in bf16 and NVFP4's in fp16 too, so where the
chip has no such instruction operands are widened and multiplied as those. A byte holds elements 2 i
and 2 i + 1: instead of interleaving the halves of weights, activations are split into even and odd
ones, and two products are added.
"""

from __future__ import annotations

import triton
from triton import language as tl

from mla_fusions.kernels._quantise import fp8_codes, fp8_quotients, fp32_scales

#: Kinds of operands.
PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
MXFP4 = tl.constexpr(2)
PACKED = tl.constexpr(3)
NVFP4 = tl.constexpr(4)
#: Floor of the largest magnitude of activations that fp8 quantises.
MIN_AMAX = tl.constexpr(1e-10)
#: Lifts the bits of e2m1, put where fp32 has its exponent and mantissa, to their value.
E2M1_UNIT = tl.constexpr(2.0**126)


@triton.jit
def e2m1_values(codes):
    """Return the fp32 values of e2m1 codes 0..15, given as int32."""
    # 0.5 is a subnormal number in either format, so one product serves all codes.
    bits = ((codes & 7) << 22) | ((codes & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * E2M1_UNIT


@triton.jit
def e4m3_values(codes, BIAS: tl.constexpr):
    """Return the fp32 values of fp8 bytes of exponent bias 7 (OCP) or 8 (fnuz).

    As `mla_fusions.kernels._quantise.fp8_values`, with the trick of `e2m1_values`.
    """
    codes = codes.to(tl.int32)
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    UNIT: tl.constexpr = 2.0 ** (127 - BIAS)
    values = bits.to(tl.float32, bitcast=True) * UNIT
    is_nan = (codes & 0x7F) == 0x7F if BIAS == 7 else codes == 0x80
    return tl.where(is_nan, float("nan"), values)


@triton.jit
def e8m0_values(codes):
    """Return ``2 ** (byte - 127)`` in fp32, NaN for 255; ``codes`` are bytes or int32."""
    codes = codes.to(tl.int32)
    bits = tl.where(codes == 0, 0x400000, codes << 23)
    bits = tl.where(codes == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e2m1_rounded(x):
    """Round fp32 below 8 in magnitude to e2m1 codes 0..15, ties to even, 6 being the largest.

    As `mla_fusions.kernels._quantise.e2m1_codes`, without a comparison for each code: tiles here
    are large, and every comparison takes two of AMD's scalar registers.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Drop 22 bits of the mantissa; a tie goes up from an odd code. A carry moves the exponent.
    normal = (magnitude + 0x1FFFFF + ((magnitude >> 22) & 1) - (126 << 23)) >> 22
    # Added to 2 ** 22, whose last digit is a half, numbers below 1 are rounded to halves.
    small = (magnitude.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True)
    # From 1 to 2 both are right, below it only the latter, which is at most 2, and above it only
    # the former, which is at least 4 and below the latter.
    codes = tl.minimum(small - 0x4A800000, tl.maximum(normal, 2))
    return tl.minimum(codes, 7) | ((bits >> 28) & 8)


@triton.jit
def e2m1_nearest(x):
    """Return the fp32 value of what `e2m1_rounded` makes of a number, without its code."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    # Added to a number whose last digit is the distance of e2m1 there, at least a half, magnitudes
    # are rounded to multiples of it, of which the even ones have even codes.
    power = tl.maximum(magnitude, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    last = power.to(tl.float32, bitcast=True) * 4194304.0
    rounded = tl.minimum((magnitude + last) - last, 6.0).to(tl.int32, bitcast=True)
    return (rounded | (bits ^ (bits & 0x7FFFFFFF))).to(tl.float32, bitcast=True)


@triton.jit
def mxfp4_scaled(x):
    """Divide fp32 [BLOCK_M, GROUPS, 32] by powers of two; and int32 bytes of these.

    As `mla_core.reference.quant.quantize_mxfp4`; a group that is not finite has the scale NaN.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    # A quarter of the mantissa's range carries into the exponent from 1.75 on.
    scales = tl.maximum(((bits + 0x200000) >> 23) - 2, 0)
    reciprocal = ((254 - scales) << 23).to(tl.float32, bitcast=True)
    scales = tl.where(bits >= 0x7F800000, 255, scales)
    return x * reciprocal[:, :, None], scales


@triton.jit
def mxfp4_codes(x):
    """Quantise fp32 [BLOCK_M, GROUPS, 32]: int32 codes like ``x``, and scales as `mxfp4_scaled`."""
    scaled, scales = mxfp4_scaled(x)
    return e2m1_rounded(scaled), scales


@triton.jit
def below(i, LIMIT: tl.constexpr, IS_EVEN: tl.constexpr):
    """Return ``i < LIMIT``; ``IS_EVEN`` says that blocks end there, so that no mask is compiled."""
    return tl.full(i.shape, True, tl.int1) if IS_EVEN else i < LIMIT


@triton.jit
def per_element(scales, COUNT: tl.constexpr):
    """Repeat scales [ROWS, GROUPS] for ``COUNT`` bytes each: [ROWS, GROUPS * COUNT]."""
    ROWS: tl.constexpr = scales.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    wide = tl.broadcast_to(scales[:, :, None], (ROWS, GROUPS, COUNT))
    return tl.reshape(wide, (ROWS, GROUPS * COUNT))


@triton.jit
def unpacked(packed, scales):
    """Return what `widened` does, in bf16, with scales bf16 like ``packed``; NVIDIA's chips alone.

    Registers hold two elements: codes move to where bf16 has its exponent and mantissa, as in
    `e2m1_values`, and are multiplied, in about three instructions for an element, not ten.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, last, unit, a, b, c, d;
        mov.b32 unit, 0x7E807E80;
        prmt.b32 first, $4, 0, 0x1404;
        prmt.b32 last, $4, 0, 0x3424;
        shr.b32 a, first, 2;
        shr.b32 b, last, 2;
        shr.b32 c, first, 6;
        shr.b32 d, last, 6;
        and.b32 a, a, 0x01C001C0;
        and.b32 b, b, 0x01C001C0;
        and.b32 c, c, 0x01C001C0;
        and.b32 d, d, 0x01C001C0;
        lop3.b32 c, first, 0x80008000, c, 0xEA;
        lop3.b32 d, last, 0x80008000, d, 0xEA;
        shl.b32 first, first, 4;
        shl.b32 last, last, 4;
        lop3.b32 a, first, 0x80008000, a, 0xEA;
        lop3.b32 b, last, 0x80008000, b, 0xEA;
        mul.rn.bf16x2 a, a, unit;
        mul.rn.bf16x2 b, b, unit;
        mul.rn.bf16x2 c, c, unit;
        mul.rn.bf16x2 d, d, unit;
        mul.rn.bf16x2 $0, a, $5;
        mul.rn.bf16x2 $1, b, $6;
        mul.rn.bf16x2 $2, c, $5;
        mul.rn.bf16x2 $3, d, $6;
        }""",
        "=r,=r,=r,=r,r,r,r",
        [packed, scales],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def widened(packed, scales, COUNT: tl.constexpr, dtype: tl.constexpr, HAS_PTX: tl.constexpr):
    """Return the even and the odd elements of packed e2m1 times fp32 scales of ``COUNT`` bytes."""
    if HAS_PTX and dtype == tl.bfloat16:
        low, high = unpacked(packed, per_element(scales.to(tl.bfloat16), COUNT))
    else:
        codes = packed.to(tl.int32)
        scales = per_element(scales, COUNT)
        low = (e2m1_values(codes & 15) * scales).to(dtype)
        high = (e2m1_values(codes >> 4) * scales).to(dtype)
    return low, high


@triton.jit
def interleaved(even, odd):
    """Return [ROWS, 2 * COLUMNS] of even and odd columns, the inverse of `halves`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def load_scales(
    rows,  # [ROWS, 1]
    is_row,
    first,
    GROUPS: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IN_WORDS: tl.constexpr,
):
    """Load bytes [ROWS, GROUPS] of scales, the ``first`` ones and those that follow.

    ``IN_WORDS`` says that four at a time are aligned and all there. As bytes they would be too
    narrow for a copy that nothing waits for.
    """
    if IN_WORDS:
        WORDS: tl.constexpr = GROUPS // 4
        word = first // 4 + tl.arange(0, WORDS)[None, :]
        words = tl.load(rows.to(tl.pointer_type(tl.int32)) + word, mask=is_row, other=0)
        words = words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
        scales = tl.reshape(words, (words.shape[0], GROUPS)).to(tl.uint8)
    else:
        group = first + tl.arange(0, GROUPS)[None, :]
        scales = tl.load(rows + group, mask=is_row & below(group, LIMIT, IS_EVEN), other=0)
    return scales


@triton.jit
def halves(x):
    """Return the even and the odd columns of [ROWS, COLUMNS]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def product_of_fp8(x, w, BIAS: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Quantise fp32 x [BLOCK_M, BLOCK_K] and multiply with bytes w [BLOCK_N, BLOCK_K]."""
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    groups = tl.reshape(x, (M, 1, K))
    scales = fp32_scales(groups, BIAS, MIN_AMAX)
    codes = fp8_quotients(groups, scales[:, :, None], BIAS, IS_NATIVE, True)
    codes = tl.reshape(codes, (M, K))
    if IS_NATIVE:
        if BIAS == 7:
            x = codes.to(tl.float8e4nv, bitcast=True)
            w = w.to(tl.float8e4nv, bitcast=True)
        else:
            x = codes.to(tl.float8e4b8, bitcast=True)
            w = w.to(tl.float8e4b8, bitcast=True)
    else:
        # Both flavours are exact in bf16.
        x = e4m3_values(codes, BIAS).to(tl.bfloat16)
        w = e4m3_values(w, BIAS).to(tl.bfloat16)
    return tl.dot(x, tl.trans(w)) * tl.reshape(scales, (M, 1))


@triton.jit
def finished(acc, n, N, w_factor_ptr, bias_ptr, y_factor_ptr):
    """Return sums [BLOCK_M, BLOCK_N] with the weights' factor, the bias and the result's factor."""
    if w_factor_ptr is not None:
        acc = acc * tl.load(w_factor_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if y_factor_ptr is not None:
        acc = tl.div_rn(acc, tl.zeros_like(acc) + tl.load(y_factor_ptr))
    return acc


@triton.jit
def store_result(acc, where, mask, Y_BIAS: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Round to the dtype of the result; ``Y_BIAS`` is 0 unless that is fp8, stored as bytes."""
    if Y_BIAS > 0:
        tl.store(where, fp8_codes(acc, Y_BIAS, IS_NATIVE), mask=mask)
    else:
        tl.store(where, acc.to(where.dtype.element_ty), mask=mask)


@triton.jit
def multiply_tile(
    tile,
    head,
    split,
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    w_factor_ptr,
    bias_ptr,
    y_factor_ptr,
    y_ptr,
    num_tokens,
    x_stride_h,
    x_stride_t,
    x_scales_stride_h,
    x_scales_stride_t,
    w_stride_h,
    w_stride_n,
    w_stride_k,
    w_scales_stride_h,
    w_scales_stride_n,
    bias_stride_h,
    y_stride_s,
    y_stride_h,
    y_stride_t,
    N: tl.constexpr,
    K: tl.constexpr,
    IN_WORDS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    BIAS: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    HAS_SCALED_DOT: tl.constexpr,
    HAS_PTX: tl.constexpr,
    IS_ONE_TILE: tl.constexpr,
    Y_BIAS: tl.constexpr,
    Y_IS_NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one tile of a head; see `absorbed_kernel` for the arguments."""
    # A division by a number that is not known costs as much as a load from a cache.
    tiles_m = 1 if IS_ONE_TILE else tl.cdiv(num_tokens, BLOCK_M)
    head, split = head.to(tl.int64), split.to(tl.int64)
    tokens = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = (tokens < num_tokens)[:, None]
    is_n = below(n, N, N % BLOCK_N == 0)[:, None]
    rows = x_ptr + head * x_stride_h + (tokens * x_stride_t)[:, None]
    columns = w_ptr + head * w_stride_h + (n.to(tl.int64) * w_stride_n)[:, None]
    if w_scales_ptr is not None:
        w_scales = w_scales_ptr + head * w_scales_stride_h
        w_scales += (n.to(tl.int64) * w_scales_stride_n)[:, None]
    if X_KIND == PACKED:
        x_scales = x_scales_ptr + head * x_scales_stride_h + (tokens * x_scales_stride_t)[:, None]

    IS_EVEN: tl.constexpr = K % BLOCK_K == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = (split * SPLIT_K).to(tl.int32)
    for start in range(first, tl.minimum(first + SPLIT_K, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        is_k = below(k, K, IS_EVEN)
        if W_KIND == PLAIN:
            x = tl.load(rows + k, mask=is_token & is_k, other=0)
            w = tl.load(columns + k * w_stride_k, mask=is_n & is_k, other=0)
            acc = tl.dot(x, tl.trans(w), acc)
        elif W_KIND == FP8:
            x = tl.load(rows + k, mask=is_token & is_k, other=0).to(tl.float32)
            w = tl.load(columns + k * w_stride_k, mask=is_n & is_k, other=0)
            acc += product_of_fp8(x, w, BIAS, IS_NATIVE)
        else:
            # All is loaded before anything is made of it.
            GROUP: tl.constexpr = 16 if W_KIND == NVFP4 else 32
            GROUPS: tl.constexpr = BLOCK_K // GROUP
            byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            is_byte = below(byte, K // 2, IS_EVEN)
            w = tl.load(columns + byte, mask=is_n & is_byte, other=0)
            if X_KIND == PACKED:
                packed = tl.load(rows + byte, mask=is_token & is_byte, other=0)
                x_factors = load_scales(
                    x_scales, is_token, start // 32, GROUPS, K // 32, IS_EVEN, False
                )
            else:
                x = tl.load(rows + k, mask=is_token & is_k, other=0)
            scales = load_scales(
                w_scales, is_n, start // GROUP, GROUPS, K // GROUP, IS_EVEN, IN_WORDS
            )
            if X_KIND == MXFP4:
                groups = tl.reshape(x.to(tl.float32), (BLOCK_M, GROUPS, 32))
                scaled, x_factors = mxfp4_scaled(groups)
            if HAS_SCALED_DOT and X_KIND != PLAIN:
                if X_KIND == MXFP4:
                    even, odd = halves(tl.reshape(e2m1_rounded(scaled), (BLOCK_M, BLOCK_K)))
                    packed = (even | (odd << 4)).to(tl.uint8)
                    x_factors = x_factors.to(tl.uint8)
                acc = tl.dot_scaled(packed, x_factors, "e2m1", tl.trans(w), scales, "e2m1", acc=acc)
            else:
                if X_KIND == MXFP4:
                    values = e2m1_nearest(scaled) * e8m0_values(x_factors)[:, :, None]
                    x = tl.reshape(values.to(tl.bfloat16), (BLOCK_M, BLOCK_K))
                elif X_KIND == PACKED:
                    even, odd = widened(packed, e8m0_values(x_factors), 16, tl.bfloat16, HAS_PTX)
                    x = interleaved(even, odd)
                factors = e4m3_values(scales, 7) if W_KIND == NVFP4 else e8m0_values(scales)
                low, high = widened(w, factors, GROUP // 2, x.dtype, HAS_PTX)
                if HAS_PTX and BLOCK_M >= 64:
                    # Operands of such products come from shared memory, and taking many activations
                    # apart moves them between threads.
                    acc = tl.dot(x, tl.trans(interleaved(low, high)), acc)
                else:
                    even, odd = halves(x)
                    acc = tl.dot(even, tl.trans(low), acc)
                    acc = tl.dot(odd, tl.trans(high), acc)

    where = y_ptr + split * y_stride_s + head * y_stride_h + (tokens * y_stride_t)[:, None]
    mask = is_token & below(n, N, N % BLOCK_N == 0)[None, :]
    if IS_SPLIT:
        tl.store(where + n[None, :], acc, mask=mask)
    else:
        if bias_ptr is not None:
            bias_ptr += head * bias_stride_h
        acc = finished(acc, n, N, w_factor_ptr, bias_ptr, y_factor_ptr)
        store_result(acc, where + n[None, :], mask, Y_BIAS, Y_IS_NATIVE)


@triton.jit(do_not_specialize=["num_tokens"])
def absorbed_kernel(
    x_ptr,  # [heads, num_tokens, K], or bytes [heads, num_tokens, K / 2]
    x_scales_ptr,  # [heads, num_tokens, K / 32] u8; None unless PACKED
    w_ptr,  # [heads, N, K], fp8 as bytes, or bytes [heads, N, K / 2]
    w_scales_ptr,  # [heads, N, K / 32 or K / 16] u8; None without
    w_factor_ptr,  # [1] f32, or None
    bias_ptr,  # [heads, N], or None
    y_factor_ptr,  # [1] f32, or None
    y_ptr,  # [heads, num_tokens, N], or f32 [splits, heads, num_tokens, N]
    num_tokens,
    x_stride_h,  # all strides in elements
    x_stride_t,
    x_scales_stride_h,
    x_scales_stride_t,
    w_stride_h,
    w_stride_n,
    w_stride_k,
    w_scales_stride_h,
    w_scales_stride_n,
    bias_stride_h,
    y_stride_s,
    y_stride_h,
    y_stride_t,
    N: tl.constexpr,
    K: tl.constexpr,
    IN_WORDS: tl.constexpr,  # four scales of the weights at a time are aligned, for all of K
    SPLIT_K: tl.constexpr,  # elements of K that a split takes, whole blocks
    IS_SPLIT: tl.constexpr,  # sums are stored as they are, for `reduce_splits_kernel`
    X_KIND: tl.constexpr,
    W_KIND: tl.constexpr,
    BIAS: tl.constexpr,  # exponent bias of the fp8 weights
    IS_NATIVE: tl.constexpr,  # the chip converts to that fp8 and multiplies it
    HAS_SCALED_DOT: tl.constexpr,  # the chip multiplies MXFP4
    HAS_PTX: tl.constexpr,  # the chip has NVIDIA's instructions
    IS_ONE_TILE: tl.constexpr,  # BLOCK_M tokens are all of them
    Y_BIAS: tl.constexpr,  # exponent bias of an fp8 result, else 0
    Y_IS_NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one tile."""
    multiply_tile(
        tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
        x_ptr,
        x_scales_ptr,
        w_ptr,
        w_scales_ptr,
        w_factor_ptr,
        bias_ptr,
        y_factor_ptr,
        y_ptr,
        num_tokens,
        x_stride_h,
        x_stride_t,
        x_scales_stride_h,
        x_scales_stride_t,
        w_stride_h,
        w_stride_n,
        w_stride_k,
        w_scales_stride_h,
        w_scales_stride_n,
        bias_stride_h,
        y_stride_s,
        y_stride_h,
        y_stride_t,
        N,
        K,
        IN_WORDS,
        SPLIT_K,
        IS_SPLIT,
        X_KIND,
        W_KIND,
        BIAS,
        IS_NATIVE,
        HAS_SCALED_DOT,
        HAS_PTX,
        IS_ONE_TILE,
        Y_BIAS,
        Y_IS_NATIVE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_splits_kernel(
    sums_ptr,  # [splits, heads, num_tokens, N] f32, dense
    w_factor_ptr,  # [1] f32, or None
    bias_ptr,  # [heads, N], or None
    y_factor_ptr,  # [1] f32, or None
    y_ptr,  # [heads, num_tokens, N]
    num_tokens,
    sums_stride_s,
    sums_stride_h,
    bias_stride_h,
    y_stride_h,
    y_stride_t,
    N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    Y_BIAS: tl.constexpr,
    Y_IS_NATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the splits of K, always in the same order. Grid (tiles of N and tokens, heads)."""
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tokens = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (tokens < num_tokens)[:, None] & (n < N)[None, :]
    sums = sums_ptr + head * sums_stride_h + (tokens * N)[:, None] + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(NUM_SPLITS):
        acc += tl.load(sums, mask=mask, other=0)
        sums += sums_stride_s
    if bias_ptr is not None:
        bias_ptr += head * bias_stride_h
    acc = finished(acc, n, N, w_factor_ptr, bias_ptr, y_factor_ptr)
    where = y_ptr + head * y_stride_h + (tokens * y_stride_t)[:, None] + n[None, :]
    store_result(acc, where, mask, Y_BIAS, Y_IS_NATIVE)
