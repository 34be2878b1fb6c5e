"""The inputs of sparse attention's indexer: queries and weights, and keys in their paged cache.

A page holds the fp8 keys of its tokens, then their fp32 scales: core's layouts ``indexer`` and
``indexer_shuffled``.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import fp8_of_arch
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_core.layouts import Layout, arrange, get
from mla_core.layouts.codecs import Cast, GroupScaled
from mla_fusions import rows
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS, SLOTS, check_dense, fp8_suffix
from mla_fusions.rotation import FP8_OF, rotation_of, schedule

#: Floor of a group's largest magnitude.
_MIN_AMAX = 1e-4
#: Words for the scales, and whether they are powers of two.
_FORMATS = {None: False, "": False, "fp32": False, "ue8m0": True}


@uncompiled
def indexer_k_quant_and_cache(
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    quant_block_size: int,
    scale_fmt: str | None,
    preshuffle: bool = False,
) -> None:
    """Quantise indexer keys in groups and write each to its slot, in place.

    Call-compatible with the op of the same name in ROCm/aiter and vLLM.

    Parameters
    ----------
    k : [>= T, d], bf16, fp16 or fp32, last dim contiguous
    kv_cache : [num_blocks, block_size, d + 4 * d / quant_block_size], uint8 or fp8
        Dense inside a block, which holds keys and then fp32 scales; uint8 holds the fp8 flavour of
        the device.
    slot_mapping : [T], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token.
    quant_block_size : int
        Elements that share a scale: a power of two from 16 on that divides ``d``.
    scale_fmt : str or None
        ``"ue8m0"`` rounds scales up to powers of two, which are stored as fp32 too; ``"fp32"``,
        ``""`` and None do not.
    preshuffle : bool
        Blocks are stored in 16-token tiles of 16-byte lanes; ``block_size`` is a multiple of 16.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. A scale is ``max(amax, 1e-4)`` over the largest fp8 number. Differences from the
    originals: keys are divided by their scale, which is rounded correctly; fp8 saturates; 64-bit
    offsets; wrong shapes and words raise.
    """
    op = "indexer_k_quant_and_cache"
    check_tensor(op, "k", k, shape=("T", "d"), dtypes=ROWS, device=k.device)
    _check_slots(op, slot_mapping, k)
    cache, spec = _bound(op, k, kv_cache, quant_block_size, scale_fmt, preshuffle)
    rows.require_kernel(op, arch_of(k.device))
    target = rows.target_of(cache, "kv_c", k[: slot_mapping.shape[0]])
    rows.write(spec, target, None, slot_mapping, cache.num_slots)


@uncompiled
def indexer_qk_rope_quant_and_cache(
    q: torch.Tensor,
    q_out: torch.Tensor,
    weights: torch.Tensor,
    weights_out: torch.Tensor,
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    epsilon: float,
    quant_block_size: int,
    scale_fmt: str | None,
    weights_scale: float,
    preshuffle: bool = False,
    is_neox: bool = True,
    *,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> None:
    """Rotate and quantise an indexer's queries, fold their scales into its weights, write its keys.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q : [T, h, d], bf16, fp16 or fp32, last dim contiguous
    q_out : [T, h, d], fp8 or uint8
        Rotated and divided by a scale for each head; uint8 holds the fp8 flavour of the device.
    weights : [T, h], bf16, fp16 or fp32
    weights_out : [T, h], fp32
        Gets ``weights * scale of the query * weights_scale``.
    k : [T, d], bf16, fp16 or fp32
    kv_cache, scale_fmt, preshuffle
        As in `indexer_k_quant_and_cache`.
    slot_mapping : [at most T], int64 or int32
        As there; tokens past its end are not written.
    norm_weight, norm_bias : [d], bf16, fp16 or fp32, or None
        Of the keys' LayerNorm, which comes first; without both there is none.
    positions : [>= T], int64 or int32
        Clamped into the tables.
    cos_cache, sin_cache : [max_position, rotary_dim / 2 or rotary_dim], bf16, fp16 or fp32
        May also be [max_position, 1, 1, columns].
    epsilon : float
        Added to the variance.
    quant_block_size : int
        ``d``, a power of two, since a query has one scale.
    weights_scale : float
        Of the scores, ``d ** -0.5`` and what else is constant.
    is_neox : bool
        True pairs element ``i`` with ``i + rotary_dim / 2`` (half split), False ``2 i`` with
        ``2 i + 1``.
    offs : like ``positions``, or None
        Added to them.
    rotary_dim, dim_offset : int
        Elements ``dim_offset .. dim_offset + rotary_dim - 1`` turn, by default the first ones, two
        for each column of the tables.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Norm and rotation are fp32, and quantised before they are rounded. Reads
    ``(h + 1) * d`` elements, ``h`` weights, a slot, a position and a row of both tables for each
    token; writes ``h * (d + 4)`` bytes and ``d + 4`` of the cache. Differences from aiter: any
    width and number of heads, either flavour of fp8, the norm may be left out; 64-bit offsets;
    wrong shapes raise.
    """
    op = "indexer_qk_rope_quant_and_cache"
    device = q.device
    check_tensor(op, "q", q, shape=("T", "h", "d"), dtypes=ROWS, device=device)
    num_tokens, heads, width = q.shape
    dtypes = (torch.uint8, *FP8_OF)
    check_tensor(op, "q_out", q_out, shape=tuple(q.shape), dtypes=dtypes, device=device)
    shape: tuple[int | str, ...] = (num_tokens, heads)
    check_tensor(op, "weights", weights, shape=shape, dtypes=ROWS, device=device)
    dtypes = (torch.float32,)
    check_tensor(op, "weights_out", weights_out, shape=shape, dtypes=dtypes, device=device)
    check_tensor(op, "k", k, shape=(num_tokens, width), dtypes=ROWS, device=device)
    _check_slots(op, slot_mapping, k)
    if (norm_weight is None) != (norm_bias is None):
        raise LayoutError(f"{op}: norm_weight and norm_bias must be given together, got one")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            check_tensor(op, name, tensor, shape=(width,), dtypes=ROWS, device=device)
    if quant_block_size != width:
        raise LayoutError(
            f"{op}: quant_block_size must be {width}, the width of a query, which has one scale, "
            f"got {quant_block_size}"
        )
    cache, spec = _bound(op, k, kv_cache, quant_block_size, scale_fmt, preshuffle)
    if rotary_dim is None:
        rotary_dim = min(2 * cos_cache.shape[-1], width)
    turn = rotation_of(
        op,
        cos=cos_cache,
        sin=sin_cache,
        positions=positions,
        offsets=offs,
        num_tokens=num_tokens,
        width=width,
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
        names=("cos_cache", "sin_cache"),
    )
    arch = arch_of(device)
    rows.require_kernel(op, arch)
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.indexer_rows import indexer_rows_kernel

    block_h, num_warps = schedule(num_tokens, max(heads, 1), width)
    block_t, key_warps = spec.schedule(num_tokens)
    num_kv_programs = -(-num_tokens // block_t) if cache.num_slots else 0
    num_programs = num_kv_programs + num_tokens * -(-heads // block_h)
    if not num_programs:
        return
    flavour = FP8_OF.get(q_out.dtype, fp8_of_arch(arch))
    _, by_query = _rows_of(width, width, flavour, False, 1, arch, _FORMATS[scale_fmt])
    keys, scales = cache.field_bytes("kv_c"), cache.field_bytes("kv_c_scale")
    launch(
        indexer_rows_kernel,
        (num_programs,),
        q,
        q_out.view(torch.uint8),
        weights,
        weights_out,
        k,
        norm_weight,
        norm_bias,
        slot_mapping,
        turn.positions,
        turn.offsets,
        turn.cos,
        turn.sin,
        keys,
        scales,
        float(epsilon),
        float(weights_scale),
        num_kv_programs,
        num_tokens,
        slot_mapping.shape[0],
        cache.num_slots,
        turn.cos.shape[0],
        turn.cos.stride(0),
        turn.sin.stride(0),
        q.stride(0),
        q.stride(1),
        q_out.stride(0),
        q_out.stride(1),
        weights.stride(0),
        weights_out.stride(0),
        k.stride(0),
        keys.stride(0),
        scales.stride(0),
        HEADS=max(heads, 1),
        ROPE=turn.rope,
        PAGE_SIZE=cache.page_size,
        SHAPE=spec.a.shape,
        Q_CODEC=by_query.a.codec,
        CODEC=spec.a.codec,
        PLACE=spec.a.place,
        SCALES=spec.a.scales_place,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=max(num_warps, key_warps),
        # Products and sums round on their own: rotated rows have the same bits on every chip.
        enable_fp_fusion=False,
    )


def _check_slots(op: str, slots: torch.Tensor, k: torch.Tensor) -> None:
    check_tensor(op, "slot_mapping", slots, shape=("T",), dtypes=SLOTS, device=k.device)
    if slots.shape[0] > k.shape[0]:
        raise LayoutError(
            f"{op}: slot_mapping must have at most as many slots as there are keys, {k.shape[0]}, "
            f"got {slots.shape[0]}"
        )


def _bound(
    op: str,
    k: torch.Tensor,
    kv_cache: torch.Tensor,
    group: int,
    scale_fmt: str | None,
    is_tiled: bool,
) -> tuple[LatentCache, rows.Rows]:
    """Check the cache of ``k`` [T, d]; return it bound to its layout, and how it is written.

    Raises
    ------
    LayoutError
    """
    width = k.shape[1]
    if group < 16 or group & (group - 1) or width % group or not width:
        raise LayoutError(
            f"{op}: quant_block_size must be a power of two from 16 on that divides the width "
            f"{width}, got {group}"
        )
    if scale_fmt not in _FORMATS:
        words = ", ".join(repr(word) for word in _FORMATS)
        raise LayoutError(f"{op}: scale_fmt must be one of {words}, got {scale_fmt!r}")
    dtype = "fp8_e4m3fnuz" if fp8_suffix(op, "kv_cache", kv_cache) else "fp8_e4m3"
    shape = ("num_blocks", "block_size", width + 4 * (width // group))
    dtypes = (kv_cache.dtype,)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=k.device)
    check_dense(op, kv_cache)
    page_size = kv_cache.shape[1]
    if not page_size or page_size % (16 if is_tiled else 1):
        raise LayoutError(
            f"{op}: kv_cache must have a block_size that is a positive multiple of "
            f"{16 if is_tiled else 1} with preshuffle={is_tiled}, got {page_size}"
        )
    is_power = _FORMATS[scale_fmt]
    layout, spec = _rows_of(
        width, group, dtype, is_tiled, page_size, arch_of(k.device), is_power
    )  # fmt: skip
    pages = kv_cache.view(torch.uint8)
    return LatentCache.bind(layout, MLADims(1, width, 0), page_size, pages), spec


@functools.cache
def _rows_of(
    width: int, group: int, dtype: str, is_tiled: bool, page_size: int, arch: str, is_power: bool
) -> tuple[Layout, rows.Rows]:
    """Return an indexer's layout, which the catalog has for 128 numbers in one group, and rows."""
    if (width, group) == (128, 128):
        name = "indexer_shuffled" if is_tiled else "indexer"
        layout = get(name + ("_fnuz" if dtype == "fp8_e4m3fnuz" else ""))
    else:
        layout = Layout(
            f"indexer{width}_{group}",
            "indexer_shuffled" if is_tiled else "indexer",
            f"sparse indexer: {dtype} keys of {width}, then an fp32 scale for each {group}",
            GroupScaled(dtype, group, min_amax=_MIN_AMAX),
            Cast("bf16"),
            arrange.indexer_shuffled if is_tiled else arrange.indexer,
            page_multiple=16 if is_tiled else 1,
        )
    spec = rows.of_layout(layout, MLADims(1, width, 0), page_size, arch)
    if is_power:
        part = replace(spec.a, codec=rows.with_powers_of_two(spec.a.codec))
        spec = rows.rows_of(part, None, page_size)
    return layout, spec
