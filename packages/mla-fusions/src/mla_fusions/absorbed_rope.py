"""An absorbed projection, RoPE and the cache write in one launch, as engines call it.

W_UK is multiplied into the query while the same launch rotates the other part of it, joins both,
and writes the keys: what lies between a layer's projections and its attention.
"""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_fusions import rows
from mla_fusions.absorbed import (
    FLOATING,
    FP8_OF,
    Config,
    Product,
    product_of_fp8,
    product_of_halves,
    product_of_mxfp4,
    product_of_nvfp4,
)
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import as_scale
from mla_fusions.rope_writers import cat_and_cache
from mla_fusions.rotation import Keys, Queries, Rotation, arrange

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@uncompiled
def fused_fp8_bmm_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    w_k: torch.Tensor,
    w_k_scale: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    group_size: int = 128,
    transpose_bm: bool = True,
    config: Config | None = None,
    k_scale: torch.Tensor | float | None = None,
    is_neox: bool = False,
    q_out_dtype: torch.dtype | None = torch.bfloat16,
    num_decode_toks_for_zeros: int = 0,
) -> Outputs:
    """Absorb W_UK, stored in fp8, into queries, rotate and join both parts, and write the keys.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope : [h, B, p], bf16, fp16 or fp32, last dim contiguous
        Quantised to fp8, ``group_size`` elements of a token with one scale.
    w_k : [h, c, p], float8_e4m3fn or float8_e4m3fnuz, the last or the second dim contiguous
    w_k_scale : fp32, one element
        Dequantisation factor of all weights.
    q_pe : [B, h, r], bf16, fp16 or fp32, last dim contiguous
    k_nope : [>= B, kh, c], bf16, fp16 or fp32, last dim contiguous
    k_rope : like ``k_nope`` but [..., r]
        Those of the first B tokens turn; the others are taken as they are.
    kv_cache : [num_slots, kh, c + r], bf16, fp16, fp32 or fp8
        Dense inside a head; heads and slots may be any distance apart.
    slot_mapping : [at most as many as keys], int64 or int32
        Distinct; one outside the cache skips its token, and tokens past its end are not written.
    positions : [>= B], int64 or int32
        Clamped into the tables.
    cos, sin : [max_position, r / 2 or r], also [max_position, 1, 1, ...]; bf16, fp16 or fp32
    group_size : int
        A power of two, at least 32.
    transpose_bm : bool
        Whether ``q_out`` is [B, h, c + r], and not [h, B, c + r].
    config : mapping or str, optional
        As in `batched_gemm_bf16`; K is not split.
    k_scale : fp32, one element, or None
        Keys are divided by it before they are stored. A number is copied to the device in each
        call.
    is_neox : bool
        Whether pairs are halves, not neighbours.
    q_out_dtype : torch.dtype, optional
        bf16, fp16, fp32 or fp8, which saturates; None is bf16.
    num_decode_toks_for_zeros : int in 0..B
        How many of the first tokens get a copy of their rotated ``q_pe``, and zeros.

    Returns
    -------
    q_out : [B, h, c + r]
        The absorbed part, then the rotated one.
    decode_q_pe_out : [num_decode_toks_for_zeros, h, r], like ``q_pe``
    k_pe_out : [keys, kh, r], like ``k_rope``
        Rotated, not scaled.
    q_nope_zeros_out : [num_decode_toks_for_zeros, h, c], like ``q_nope``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: any architecture; the fourth result is the zeros, which its
    code returns too, though its docstring says the cache; zeros are right for any number of tokens;
    rotates in fp32 and rounds once; divides by scales; fp8 saturates; ``k_pe_out`` is written for
    tokens without a slot too; any number of key heads; 64-bit addresses.
    """
    op = "fused_fp8_bmm_rope_cat_and_cache_mla"
    product = product_of_fp8(op, ("q_nope", "w_k", "w_k_scale"), q_nope, w_k, w_k_scale, group_size)
    return _fused(
        product, q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin,
        transpose_bm, config, k_scale, is_neox, q_out_dtype, num_decode_toks_for_zeros,
    )  # fmt: skip


@uncompiled
def fused_fp4_bmm_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    w_k: torch.Tensor,
    w_k_scale: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    y: torch.Tensor | None = None,
    transpose_bm: bool = True,
    prequant: bool = True,
    y_scale: torch.Tensor | None = None,
    config: Config | None = None,
    k_scale: torch.Tensor | float | None = None,
    is_neox: bool = False,
    q_out_dtype: torch.dtype | None = None,
    num_decode_toks_for_zeros: int = 0,
) -> Outputs:
    """Absorb W_UK, stored in MXFP4, into queries, rotate and join both parts, and write the keys.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope : [h, B, p], last dim contiguous
        bf16, fp16 or fp32; bf16 unless ``prequant``. p is a multiple of 32.
    w_k : [h, c, p / 2], uint8 or float4_e2m1fn_x2, last dim contiguous
    w_k_scale : [h, c, p / 32], uint8 or float8_e8m0fnu, last dim contiguous
    q_pe, k_nope, ..., num_decode_toks_for_zeros
        As in `fused_fp8_bmm_rope_cat_and_cache_mla`, but for those named here.
    y : Tensor, optional
        Without effect, as in the original.
    prequant : bool
        Whether ``q_nope`` is quantised to MXFP4; aiter refuses False.
    y_scale : fp32, one element, optional
        An fp8 ``q_out`` is divided by it, in both parts; other dtypes are refused with it.
    config : mapping or str, optional
        As in `batched_gemm_bf16`; K is not split.

    Returns
    -------
    q_out, decode_q_pe_out, k_pe_out, q_nope_zeros_out
        As in `fused_fp8_bmm_rope_cat_and_cache_mla`, which also says what differs from aiter.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    del y
    op = "fused_fp4_bmm_rope_cat_and_cache_mla"
    names = ("q_nope", "w_k", "w_k_scale")
    product = product_of_mxfp4(op, names, q_nope, w_k, w_k_scale, is_quantised=prequant)
    return _fused(
        product, q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin,
        transpose_bm, config, k_scale, is_neox, q_out_dtype, num_decode_toks_for_zeros, y_scale,
    )  # fmt: skip


@uncompiled
def fused_bf16_bmm_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    w_k: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    transpose_bm: bool = True,
    config: Config | None = None,
    k_scale: torch.Tensor | float | None = None,
    is_neox: bool = False,
    q_out_dtype: torch.dtype | None = torch.bfloat16,
    num_decode_toks_for_zeros: int = 0,
) -> Outputs:
    """Absorb W_UK, stored in bf16 or fp16, into queries, rotate and join, and write the keys.

    Parameters
    ----------
    q_nope : [h, B, p], bf16 or fp16, last dim contiguous
    w_k : [h, c, p], like ``q_nope``, the last or the second dim contiguous
    q_pe, k_nope, ..., num_decode_toks_for_zeros
        As in `fused_fp8_bmm_rope_cat_and_cache_mla`.

    Returns
    -------
    q_out, decode_q_pe_out, k_pe_out, q_nope_zeros_out
        As there.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    op = "fused_bf16_bmm_rope_cat_and_cache_mla"
    return _fused(
        product_of_halves(op, ("q_nope", "w_k"), q_nope, w_k),
        q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin,
        transpose_bm, config, k_scale, is_neox, q_out_dtype, num_decode_toks_for_zeros,
    )  # fmt: skip


@uncompiled
def fused_nvfp4_bmm_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    w_k: torch.Tensor,
    w_k_scale: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w_k_global_scale: torch.Tensor | None = None,
    transpose_bm: bool = True,
    config: Config | None = None,
    k_scale: torch.Tensor | float | None = None,
    is_neox: bool = False,
    q_out_dtype: torch.dtype | None = torch.bfloat16,
    num_decode_toks_for_zeros: int = 0,
) -> Outputs:
    """Absorb W_UK, stored in NVFP4, into queries, rotate and join both parts, and write the keys.

    Parameters
    ----------
    q_nope : [h, B, p], bf16 or fp16, last dim contiguous
        p is a multiple of 16.
    w_k : [h, c, p / 2], uint8 or float4_e2m1fn_x2, last dim contiguous
    w_k_scale : [h, c, p / 16], float8_e4m3fn, last dim contiguous
    w_k_global_scale : fp32, one element, optional
        Dequantisation factor of all weights, besides ``w_k_scale``.
    q_pe, k_nope, ..., num_decode_toks_for_zeros
        As in `fused_fp8_bmm_rope_cat_and_cache_mla`.

    Returns
    -------
    q_out, decode_q_pe_out, k_pe_out, q_nope_zeros_out
        As there.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    op = "fused_nvfp4_bmm_rope_cat_and_cache_mla"
    names = ("q_nope", "w_k", "w_k_scale", "w_k_global_scale")
    return _fused(
        product_of_nvfp4(op, names, q_nope, w_k, w_k_scale, w_k_global_scale),
        q_pe, k_nope, k_rope, kv_cache, slot_mapping, positions, cos, sin,
        transpose_bm, config, k_scale, is_neox, q_out_dtype, num_decode_toks_for_zeros,
    )  # fmt: skip


def _fused(
    product: Product,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    transpose_bm: bool,
    config: Config | None,
    k_scale: torch.Tensor | float | None,
    is_neox: bool,
    q_out_dtype: torch.dtype | None,
    num_extra: int,
    y_scale: torch.Tensor | None = None,
) -> Outputs:
    """Check the rest, and launch."""
    op, x = product.op, product.x
    heads, tokens, _ = x.shape
    n, device = product.w.shape[1], x.device
    check_tensor(op, "q_pe", q_pe, shape=(tokens, heads, "r"), dtypes=FLOATING, device=device)
    shape: tuple[int | str, ...] = ("keys", "kh", n)
    check_tensor(op, "k_nope", k_nope, shape=shape, dtypes=FLOATING, device=device)
    dtype = torch.bfloat16 if q_out_dtype is None else q_out_dtype
    if dtype not in (*FLOATING, *FP8_OF):
        accepted = " or ".join(map(str, (*FLOATING, *FP8_OF)))
        raise LayoutError(f"{op}: q_out_dtype must be {accepted}, got {dtype}")
    if y_scale is not None:
        if dtype not in FP8_OF:
            raise LayoutError(f"{op}: y_scale must be None unless q_out is fp8, got {dtype}")
        y_scale = product.y_factor = as_scale(op, "y_scale", y_scale, device)
    width = n + q_pe.shape[2]
    q_out = torch.empty(
        (tokens, heads, width) if transpose_bm else (heads, tokens, width),
        dtype=dtype,
        device=device,
    )
    turn, queries, keys, returned = cat_and_cache(
        op,
        None,
        q_pe,
        k_nope,
        k_rope,
        kv_cache,
        slot_mapping,
        positions,
        cos,
        sin,
        k_scale,
        is_neox,
        num_extra,
        dtype=x.dtype,
        q_out=q_out if transpose_bm else q_out.transpose(0, 1),
        q_scale=y_scale,
        names=("k_rope", "positions"),
    )
    by_head = q_out.transpose(0, 1) if transpose_bm else q_out
    join(product, by_head[..., :n], turn, queries, keys, config)
    return (q_out, *returned[1:])


def join(
    product: Product,
    y: torch.Tensor,
    turn: Rotation,
    queries: Queries,
    keys: Keys,
    config: Config | None = None,
) -> None:
    """Launch what `rotate_and_write` does together with a product; all but ``config`` was checked.

    Parameters
    ----------
    y : [heads, tokens, N], bf16, fp16, fp32 or fp8
        Where the product goes, which ``queries`` leave.
    config : mapping or str, optional
        As in `batched_gemm_bf16`; K is not split.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    rows.require_kernel(product.op, arch_of(y.device))
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.absorbed_rope import absorbed_rope_kernel

    heads, tokens, n = y.shape
    tiles = product.tiles(config, 1)
    arranged = arrange(turn, queries, keys, tiles.num_warps)
    num_products = heads * tiles.of(tokens, n)
    if not num_products + arranged.num_programs:
        return
    args, constants = product.arguments((product.w_factor, None, product.y_factor), y, None, tiles)
    launch(
        absorbed_rope_kernel,
        (num_products + arranged.num_programs,),
        num_products,
        *args,
        *arranged.args,
        **constants,
        **arranged.constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # Products and sums of rotations round on their own: the same bits on every chip.
        enable_fp_fusion=False,
    )
