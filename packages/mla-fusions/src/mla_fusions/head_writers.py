"""Writers of paged per-head keys and values, under the names that engines call.

These caches are not latent ones: they belong to the grouped-query layers beside MLA. The kernel is
the one that writes latent rows; keys are one part of a row and values the other.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from mla_core import layouts
from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.dtypes import dtype_name, itemsize
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_core.layouts import Digit, Field
from mla_core.layouts.codecs import Cast, Codec, PerTensor, TokenScaled
from mla_fusions import rows
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import FP8_WORDS, ROWS, SLOTS, as_scale, fp8_suffix

_MAX_WIDTH = 1024
#: Elements of the tile that blocks are written by.
_TILE = 2048


@uncompiled
def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    asm_layout: bool = False,
) -> None:
    """Write keys and values into pages whose innermost run is 16 bytes of one token.

    Call-compatible with the op of the same name in ROCm/aiter and vLLM.

    Parameters
    ----------
    key : [>= T, h, d], bf16, fp16 or fp32, last dim contiguous
    value : [>= T, h, dv], like ``key``
    key_cache : [num_blocks, h, d / x, block_size, x], x elements are 16 bytes, dense inside a head
        Of the dtype of ``key`` for ``"auto"``, fp8 or uint8 for ``"fp8"``.
    value_cache : [num_blocks, h, dv, block_size], dense inside a head
        With ``asm_layout`` [num_blocks, h, block_size / x, dv, x].
    slot_mapping : [T], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token, and
        tokens past its end are not written.
    kv_cache_dtype : str
        ``"auto"`` copies bits, ``"fp8"`` or ``"fp8_e4m3"`` store ``x / scale``.
    k_scale, v_scale : fp32, one element, or None
        For ``"fp8"``; None is 1. A number is copied to the device in each call.
    asm_layout : bool

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from the originals: heads may be any distance apart in ``key`` and ``value``, whose
    head dims may differ; fp8 saturates; slots past the end are skipped; offsets are 64-bit.
    """
    op = "reshape_and_cache"
    page_size = check_rows(op, key, value, key_cache, slot_mapping)
    caches = as_bytes(op, key, kv_cache_dtype, key_cache, value_cache)
    codec = codec_of(op, key, kv_cache_dtype, key_cache)
    fields = lane_fields(op, key, value, caches, page_size, codec, is_shuffled=asm_layout)
    factors = _factors(op, codec, key, k_scale, v_scale)
    _write(op, key, value, caches, 1, fields, codec, slot_mapping, factors=factors)


@uncompiled
def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | float | None,
    v_scale: torch.Tensor | float | None,
) -> None:
    """Write keys and values into pages of whole rows, all heads of a token together.

    Call-compatible with the op of the same name in ROCm/aiter and vLLM.

    Parameters
    ----------
    key, value, slot_mapping, kv_cache_dtype, k_scale, v_scale
        As in `reshape_and_cache`.
    key_cache, value_cache : [num_blocks, block_size, h, d], [num_blocks, block_size, h, dv]
        Last dim contiguous; blocks, tokens and heads may be any distance apart, so the halves of
        one interleaved buffer will do.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from the originals: as for `reshape_and_cache`, and the two caches may have
    different strides.
    """
    op = "reshape_and_cache_flash"
    check_rows(op, key, value, key_cache, slot_mapping, page_dim=1)
    page_size = key_cache.shape[1]
    caches = as_bytes(op, key, kv_cache_dtype, key_cache, value_cache)
    codec = codec_of(op, key, kv_cache_dtype, key_cache)
    fields = flash_fields(op, key, value, caches, page_size, codec)
    factors = _factors(op, codec, key, k_scale, v_scale)
    _write(op, key, value, caches, 2, fields, codec, slot_mapping, factors=factors)


@uncompiled
def reshape_and_cache_with_pertoken_quant(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_dequant_scales: torch.Tensor,
    v_dequant_scales: torch.Tensor,
    slot_mapping: torch.Tensor,
    asm_layout: bool,
) -> None:
    """Write fp8 keys and values with a scale for each head of each token.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    key, value, slot_mapping, asm_layout
        As in `reshape_and_cache`.
    key_cache, value_cache
        As in `reshape_and_cache`, fp8 or uint8.
    k_dequant_scales, v_dequant_scales : [h, num_slots or more], fp32, last dim contiguous
        The scale of a slot's row is stored where the slot is: ``real = stored * scale``.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter: a row of zeros stores zeros and the smallest normal scale, not NaN; head
    dims up to 1024, where aiter takes 512; the largest magnitude becomes the largest number of the
    cache's own fp8 flavour. int8 caches are refused.
    """
    op = "reshape_and_cache_with_pertoken_quant"
    page_size = check_rows(op, key, value, key_cache, slot_mapping)
    caches = as_bytes(op, key, "fp8", key_cache, value_cache)
    codec = TokenScaled(codec_of(op, key, "fp8", key_cache).dtype)
    fields = lane_fields(op, key, value, caches, page_size, codec, is_shuffled=asm_layout)
    num_slots = key_cache.shape[0] * page_size
    scales = (k_dequant_scales, v_dequant_scales)
    for name, each in zip(("k_dequant_scales", "v_dequant_scales"), scales, strict=True):
        shape = (key.shape[1], "num_slots")
        check_tensor(op, name, each, shape=shape, dtypes=(torch.float32,), device=key.device)
        if each.shape[1] < num_slots:
            raise LayoutError(
                f"{op}: {name} must be [{key.shape[1]}, {num_slots} or more], got "
                f"{tuple(each.shape)}; every slot has a scale"
            )
    _write(op, key, value, caches, 1, fields, codec, slot_mapping, scales=scales)


@uncompiled
def reshape_and_cache_with_block_quant(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_dequant_scales: torch.Tensor,
    v_dequant_scales: torch.Tensor,
    slot_mapping: torch.Tensor,
    asm_layout: bool,
) -> None:
    """Write fp8 keys and values with a scale for each head of each block, which may grow.

    Call-compatible with the op of the same name in ROCm/aiter. A block is filled from its
    beginning. Where new tokens have larger numbers than its scale allows for, the scale grows and
    the tokens before them are quantised again; the first tokens of a block set its scale anew.

    Parameters
    ----------
    key : [batch, seq, h, d] or [T, h, d], bf16, fp16 or fp32, last dim contiguous
    value : [batch, seq, h, dv] or [T, h, dv], like ``key``
    key_cache, value_cache, asm_layout
        As in `reshape_and_cache`, fp8 or uint8.
    k_dequant_scales, v_dequant_scales : [h, num_blocks], fp32, read and written
        With ``asm_layout`` [num_blocks, h]. ``real = stored * scale``.
    slot_mapping : [T], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token. Tokens of
        one block must stand together, without a skipped one between them.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter: any number of tokens of each sequence, in any order inside a block;
    divided by the scale, not multiplied by its rounded reciprocal; fp8 saturates. int8 caches are
    refused.
    """
    _write_blocks(
        "reshape_and_cache_with_block_quant",
        *(key, value, key_cache, value_cache, k_dequant_scales, v_dequant_scales, slot_mapping),
        asm_layout,
        key_cache.shape[3] if key_cache.ndim == 5 else 1,
    )


@uncompiled
def reshape_and_cache_with_block_quant_for_asm_pa(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_dequant_scales: torch.Tensor,
    v_dequant_scales: torch.Tensor,
    slot_mapping: torch.Tensor,
    asm_layout: bool,
    ori_block_size: int = 128,
) -> None:
    """Write as `reshape_and_cache_with_block_quant`, with a scale for several blocks.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    key, value, key_cache, value_cache, slot_mapping, asm_layout
        As in `reshape_and_cache_with_block_quant`.
    k_dequant_scales, v_dequant_scales : [h, num_blocks * block_size / ori_block_size], fp32
        With ``asm_layout`` [num_blocks * block_size / ori_block_size, h].
    ori_block_size : int
        Tokens of one scale, a multiple of the block size.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    _write_blocks(
        "reshape_and_cache_with_block_quant_for_asm_pa",
        *(key, value, key_cache, value_cache, k_dequant_scales, v_dequant_scales, slot_mapping),
        asm_layout,
        ori_block_size,
    )


def _write_blocks(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    slots: torch.Tensor,
    is_shuffled: bool,
    scale_tokens: int,
) -> None:
    """Check and launch; ``scale_tokens`` is the number of tokens of a scale."""
    if key.ndim == 4 and value.ndim == 4:
        key, value = key.flatten(0, 1), value.flatten(0, 1)
    page_size = check_rows(op, key, value, key_cache, slots)
    caches = as_bytes(op, key, "fp8", key_cache, value_cache)
    codec = codec_of(op, key, "fp8", key_cache)
    fields = lane_fields(op, key, value, caches, page_size, codec, is_shuffled=is_shuffled)
    num_blocks, heads, num_tokens = key_cache.shape[0], key.shape[1], slots.shape[0]
    if scale_tokens < page_size or scale_tokens % page_size:
        raise LayoutError(
            f"{op}: ori_block_size must be a multiple of the block size {page_size}, got "
            f"{scale_tokens}"
        )
    num_scales = num_blocks * page_size // scale_tokens
    if num_scales * scale_tokens != num_blocks * page_size:
        raise LayoutError(
            f"{op}: key_cache must have a multiple of {scale_tokens // page_size} blocks, got "
            f"{num_blocks}"
        )
    scales = []
    for name, each in (("k_dequant_scales", k_scales), ("v_dequant_scales", v_scales)):
        shape = (num_scales, heads) if is_shuffled else (heads, num_scales)
        check_tensor(op, name, each, shape=shape, dtypes=(torch.float32,), device=key.device)
        scales.append(each if is_shuffled else each.t())
    if not num_tokens or not num_blocks:
        return
    arch = arch_of(key.device)
    rows.require_kernel(op, arch)
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.write_blocks import write_blocks_kernel

    parts = [rows.part_of(f.name, codec, f.width, f, None, arch) for f in fields]
    _, bias, is_native, _ = parts[0].codec
    launch(
        write_blocks_kernel,
        (num_tokens, heads),
        key,
        value,
        slots,
        *caches,
        *scales,
        num_tokens,
        num_blocks * page_size,
        *(stride for part in (key, value) for stride in part.stride()[:2]),
        *(stride for cache in caches for stride in cache.stride()[:2]),
        *(stride for each in scales for stride in each.stride()),
        PAGE_SIZE=page_size,
        SCALE_TOKENS=scale_tokens,
        BLOCK_S=rows.power_of_two(scale_tokens),
        K_WIDTH=key.shape[2],
        K_BLOCK=parts[0].shape[2],
        K_PLACE=parts[0].place,
        V_WIDTH=value.shape[2],
        V_BLOCK=parts[1].shape[2],
        V_PLACE=parts[1].place,
        CHUNK=max(1, min(16, _TILE // max(part.shape[2] for part in parts))),
        BIAS=bias,
        IS_NATIVE=is_native,
        num_warps=4,
    )


def check_rows(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    slots: torch.Tensor,
    page_dim: int = 3,
    names: tuple[str, str] = ("key", "value"),
) -> int:
    """Check what all writers take alike; return the page size."""
    device, dtypes = key.device, (key.dtype,)
    check_tensor(op, names[0], key, shape=("T", "h", "d"), dtypes=ROWS, device=device)
    shape = (key.shape[0], key.shape[1], "dv")
    check_tensor(op, names[1], value, shape=shape, dtypes=dtypes, device=device)
    check_tensor(op, "slot_mapping", slots, shape=("T",), dtypes=SLOTS, device=device)
    if slots.shape[0] > key.shape[0]:
        raise LayoutError(
            f"{op}: slot_mapping must have at most as many slots as there are tokens, "
            f"{key.shape[0]}, got {slots.shape[0]}"
        )
    for name, tensor in zip(names, (key, value), strict=True):
        if not 1 <= tensor.shape[2] <= _MAX_WIDTH:
            raise LayoutError(
                f"{op}: {name} must have a head dim in 1..{_MAX_WIDTH}, got {tensor.shape[2]}"
            )
    num_dims = 5 if page_dim == 3 else 4
    if key_cache.ndim != num_dims or key_cache.shape[page_dim] < 1:
        raise LayoutError(
            f"{op}: key_cache must have {num_dims} dimensions and blocks of a token or more, got "
            f"shape {tuple(key_cache.shape)}"
        )
    return key_cache.shape[page_dim]


def codec_of(op: str, key: torch.Tensor, kv_cache_dtype: str, key_cache: torch.Tensor) -> Codec:
    """Return how rows are stored."""
    if kv_cache_dtype == "auto":
        return Cast(dtype_name(key.dtype))
    suffix = fp8_suffix(op, "key_cache", key_cache)
    return PerTensor("fp8_e4m3fnuz" if suffix else "fp8_e4m3")


def as_bytes(
    op: str, key: torch.Tensor, kv_cache_dtype: str, *caches: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the dtype of both caches, and return fp8 ones as bytes."""
    if kv_cache_dtype not in ("auto", *FP8_WORDS):
        raise LayoutError(
            f"{op}: kv_cache_dtype must be one of auto, {', '.join(FP8_WORDS)}, got "
            f"{kv_cache_dtype!r}"
        )
    key_cache, value_cache = caches
    if value_cache.dtype != key_cache.dtype:
        raise LayoutError(
            f"{op}: value_cache must be {key_cache.dtype} like key_cache, got {value_cache.dtype}"
        )
    if kv_cache_dtype == "auto":
        if key_cache.dtype != key.dtype:
            raise LayoutError(
                f"{op}: key_cache must be {key.dtype} like key for 'auto', got {key_cache.dtype}"
            )
        return key_cache, value_cache
    fp8_suffix(op, "key_cache", key_cache)
    return key_cache.view(torch.uint8), value_cache.view(torch.uint8)


def flash_fields(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    page_size: int,
    codec: Codec,
) -> tuple[Field, Field]:
    """Return where keys and values lie in a head of a page of whole rows, after checking shapes."""
    fields = []
    for name, part, cache in (("key", key, caches[0]), ("value", value, caches[1])):
        shape = (caches[0].shape[0], page_size, key.shape[1], part.shape[2])
        dtypes = (cache.dtype,)
        check_tensor(op, f"{name}_cache", cache, shape=shape, dtypes=dtypes, device=key.device)
        fields.append(field_of_rows(name, codec, cache, page_size, part.shape[2]))
    return fields[0], fields[1]


def field_of_rows(
    name: str, codec: Codec, cache: torch.Tensor, page_size: int, width: int, token_dim: int = 1
) -> Field:
    """Return where whole rows lie in a head of a page; ``token_dim`` is the dimension of tokens."""
    size = cache.element_size()
    tokens, elems = Digit(page_size, cache.stride(token_dim) * size), Digit(width, size)
    return Field(name, codec.dtype, 0, 0, (tokens,), (elems,))


def lane_fields(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    page_size: int,
    codec: Codec,
    *,
    is_shuffled: bool,
) -> tuple[Field, Field]:
    """Return where keys and values lie in a head of a page, after checking the caches' shapes."""
    family = "gqa_shuffled" if is_shuffled else "gqa"
    dims = (key.shape[2], value.shape[2], page_size)
    blocks = _blocks(family, codec.dtype, *dims)
    heads, num_blocks = key.shape[1], caches[0].shape[0]
    for name, cache, (_, shape) in zip(("key_cache", "value_cache"), caches, blocks, strict=True):
        wanted = (num_blocks, heads, *shape)
        dtypes = (cache.dtype,)
        check_tensor(op, name, cache, shape=wanted, dtypes=dtypes, device=key.device)
        if num_blocks and heads and not cache[0, 0].is_contiguous():
            raise LayoutError(
                f"{op}: {name} must be dense inside a head of a block, got strides {cache.stride()}"
            )
    return blocks[0][0], blocks[1][0]


@functools.lru_cache(maxsize=256)
def _blocks(
    family: str, dtype: str, key_dim: int, value_dim: int, page_size: int
) -> tuple[tuple[Field, tuple[int, ...]], ...]:
    """Return fields and block shapes of a family of layouts, for any dtype that has lanes."""
    named = next(layout for layout in layouts.HEADS.values() if layout.family == family)
    multiple = 16 // itemsize(dtype) if family == "gqa_shuffled" else 1
    layout = replace(named, name=f"{family}_{dtype}", codec=Cast(dtype), page_multiple=multiple)
    return layout.blocks(key_dim, value_dim, page_size)


def _factors(
    op: str,
    codec: Codec,
    key: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    v_scale: torch.Tensor | float | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the factors of keys and of values, where the codec has one for all."""
    if not isinstance(codec, PerTensor):
        return None, None
    device = key.device
    return as_scale(op, "k_scale", k_scale, device), as_scale(op, "v_scale", v_scale, device)


def _write(
    op: str,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
    fields: tuple[Field, Field],
    codec: Codec,
    slots: torch.Tensor,
    *,
    factors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Launch; ``head_dim`` is the dimension of heads in the caches."""
    arch = arch_of(key.device)
    rows.require_kernel(op, arch)
    spec = spec_of(codec, arch, fields, scales is not None)
    num_blocks, page_size = caches[0].shape[0], fields[0].page_size
    by_block: list[torch.Tensor | None] = [None, None]
    if scales is not None:
        by_block = [
            each[:, : num_blocks * page_size].unflatten(1, (num_blocks, page_size)).transpose(0, 1)
            for each in scales
        ]
    a, b = (
        target_of(*each, head_dim)
        for each in zip((key, value), caches, by_block, factors, strict=True)
    )
    rows.write(spec, a, b, slots, num_blocks * page_size, key.shape[1])


def target_of(
    part: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    factor: torch.Tensor | None,
    head_dim: int,
) -> rows.Target:
    """Return keys or values and where they go; ``head_dim`` is the dimension of heads there."""
    stride_h = 0 if scales is None else scales.stride(1)
    return rows.Target(
        part, part.stride(1), cache, cache.stride(head_dim), scales, stride_h, factor
    )


@functools.lru_cache(maxsize=256)
def spec_of(codec: Codec, arch: str, fields: tuple[Field, Field], has_scales: bool) -> rows.Rows:
    """Return what a launch needs to know of two parts, stored in pages by head."""
    page_size = fields[0].page_size
    scales = Field("scale", "fp32", 0, 0, (Digit(page_size, 4),), (Digit(1, 4),))
    a, b = (
        rows.part_of(field.name, codec, field.width, field, scales if has_scales else None, arch)
        for field in fields
    )
    return rows.rows_of(a, b, page_size)
