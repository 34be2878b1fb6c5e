"""Rotate queries and keys, join the queries and write the keys, in one launch.

`fused_qk_rope_write_kv_cache` does it for every layout of mla-core; the others are the ops of
latent caches that engines call, under their names. All rotate in fp32 and round once, to what is
stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.layouts.codecs import Cast, Codec, PerTensor
from mla_fusions import head_writers, rows
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS, SLOTS, as_scale, fp8_suffix, keys_layout
from mla_fusions.rotation import (
    Keys,
    Queries,
    Rotation,
    queries_of,
    rotate_and_write,
    rotation_of,
    undivided,
)


@uncompiled
def fused_qk_rope_write_kv_cache(
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: LatentCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    q_out: torch.Tensor | None = None,
    q_scale: torch.Tensor | float | None = None,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> torch.Tensor:
    """Rotate queries and keys, join the queries, and write the keys to a cache of any layout.

    Parameters
    ----------
    q_nope : [T, h, c], bf16, fp16 or fp32, last dim contiguous, or None
        After absorbing W_UK. None leaves the latent part of ``q_out``, which must be given, as it
        is: the product that absorbs W_UK may have been written there.
    q_pe : [T, h, r], like ``q_nope``
    kv_c : [T, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [T, r], like ``kv_c``
    cache : LatentCache
    slots : [T], int64 or int32
        ``page * page_size + offset``, distinct; one outside the cache skips its token's key.
    positions : [>= T], int64 or int32
        Clamped into the tables.
    cos, sin : [max_position, rotary_dim / 2 or rotary_dim], bf16, fp16 or fp32
        A column for each pair, or for each element. May also be [max_position, 1, 1, columns].
    is_neox : bool
        True pairs element ``i`` with ``i + rotary_dim / 2`` (half split), False ``2 i`` with
        ``2 i + 1`` (adjacent, GPT-J, DeepSeek).
    q_out : [T, h, c + r or more], bf16, fp16, fp32, fp8 or uint8, or None
        Elements behind ``c + r`` stay; uint8 holds the fp8 flavour of the device.
    q_scale : fp32, one element, or None
        fp8 queries are divided by it; None is 1. A number is copied to the device in each call.
    offs : like ``positions``, or None
        Added to them.
    rotary_dim, dim_offset : int
        Elements ``dim_offset .. dim_offset + rotary_dim - 1`` of the rotary parts turn, by default
        all from ``dim_offset`` on.

    Returns
    -------
    q_out : [T, h, c + r], latent part first, like ``q_nope`` unless given

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Reads queries, keys and a row of each table, writes queries and the live bytes of
    the cache: 2 * h * (c + r) elements and one row of the cache for each token, or 2 * h * r
    without ``q_nope``.
    """
    op = "fused_qk_rope_write_kv_cache"
    turn, queries, keys, q_out = written(
        op,
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        cache,
        slots,
        positions,
        cos,
        sin,
        is_neox=is_neox,
        q_out=q_out,
        q_scale=q_scale,
        offs=offs,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    rotate_and_write(op, turn, queries, keys)
    return q_out


def written(
    op: str,
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: LatentCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    q_out: torch.Tensor | None,
    q_scale: torch.Tensor | float | None,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> tuple[Rotation, Queries, Keys, torch.Tensor]:
    """Check what `fused_qk_rope_write_kv_cache` takes; return what to launch, and ``q_out``."""
    dims, device = cache.dims, q_pe.device
    if q_nope is None:
        check_tensor(op, "q_pe", q_pe, shape=("T", "h", "r"), dtypes=ROWS, device=device)
    else:
        _check_queries(op, q_nope, q_pe)
    num_tokens, heads = q_pe.shape[:2]
    rank = dims.kv_lora_rank if q_nope is None else q_nope.shape[2]
    dtypes = (kv_c.dtype,)
    shape = (num_tokens, dims.kv_lora_rank)
    check_tensor(op, "kv_c", kv_c, shape=shape, dtypes=ROWS, device=device)
    shape = (num_tokens, dims.qk_rope_head_dim)
    check_tensor(op, "k_pe", k_pe, shape=shape, dtypes=dtypes, device=device)
    check_tensor(op, "slots", slots, shape=(num_tokens,), dtypes=SLOTS, device=device)
    if (rank, q_pe.shape[2]) != (dims.kv_lora_rank, dims.qk_rope_head_dim):
        raise LayoutError(
            f"{op}: q_nope and q_pe must have the widths of the cache, {dims.kv_lora_rank} and "
            f"{dims.qk_rope_head_dim}, got {rank} and {q_pe.shape[2]}"
        )
    if cache.device != device:
        raise LayoutError(f"{op}: cache must be on {device}, got {cache.device}")
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=positions,
        offsets=offs,
        num_tokens=num_tokens,
        width=q_pe.shape[2],
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    if q_out is None:
        if q_nope is None:
            raise LayoutError(
                f"{op}: q_out must be [T, h, {dims.latent_dim} or more] without q_nope, got None"
            )
        q_out = q_nope.new_empty(num_tokens, heads, dims.latent_dim)
    part = q_out
    if q_nope is None:
        # The rotary part alone is an output then.
        named = (num_tokens, heads, f"{dims.latent_dim} or more")
        check_tensor(op, "q_out", q_out, shape=named, dtypes=(q_out.dtype,), device=device)
        if q_out.shape[2] < dims.latent_dim:
            raise LayoutError(
                f"{op}: q_out must have at least {dims.latent_dim} elements in a head, got "
                f"{q_out.shape[2]}"
            )
        part = q_out[..., rank:]
    queries = queries_of(op, q_nope, q_pe, part, q_scale)
    spec = rows.of_layout(cache.layout, dims, cache.page_size, arch_of(device))
    a = rows.target_of(cache, "kv_c", kv_c)
    b = None if spec.b is None else rows.target_of(cache, "k_pe", k_pe)
    keys = Keys(spec, a, b, slots, cache.num_slots, 1, num_tokens)
    return turn, queries, keys, q_out


@uncompiled
def fused_qk_rope_concat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    q_scale: torch.Tensor | float | None,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool,
    compute_all_q_rope: bool = False,
    *,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> None:
    """Rotate queries and keys, join both with their latent parts, and write the keys, in place.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope, q_pe, positions, is_neox, offs, rotary_dim, dim_offset
        As in `fused_qk_rope_write_kv_cache`.
    kv_c : [T, c] or [T, kh, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [T, r] or [T, kh, r], like ``kv_c``
    kv_cache : [num_blocks, block_size, c + r] or [num_blocks, block_size, kh, c + r]
        Of the dtype of ``kv_c``, fp8 or uint8, which holds the flavour of the device. Last dim
        contiguous; blocks, tokens and heads may be any distance apart.
    q_out : [T, h, c + r or more], bf16, fp16, fp32, fp8 or uint8
        Elements behind ``c + r`` stay.
    slot_mapping : [at most T], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token's key, and
        tokens past its end have none.
    k_scale, q_scale : fp32, one element, or None
        Rows for fp8 caches, and fp8 queries, are divided by them; None is 1. A number is copied to
        the device in each call.
    cos_cache, sin_cache : [max_position, rotary_dim / 2 or rotary_dim], bf16, fp16 or fp32
    is_nope_first : bool
        Whether latent parts come before rotary ones, in queries and cache alike.
    compute_all_q_rope : bool
        Also for tokens whose slot is negative or missing; otherwise their queries stay as they are.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: rotates in fp32 and rounds once, where it rotates in bf16;
    both orders work for any number of tokens, heads and widths; fp8 queries do not need an fp8
    cache; rows are divided by the scale, and saturate; 64-bit offsets; wrong shapes raise.
    """
    op = "fused_qk_rope_concat_and_cache_mla"
    _check_queries(op, q_nope, q_pe)
    rank, width = q_nope.shape[2], q_pe.shape[2]
    if kv_c.ndim == 2 and k_pe.ndim == 2:
        kv_c, k_pe = kv_c[:, None], k_pe[:, None]
    _check_keys(op, kv_c, k_pe, q_nope, width)
    if kv_cache.ndim == 3:
        kv_cache = kv_cache[:, :, None]
    shape = ("num_blocks", "block_size", kv_c.shape[1], rank + width)
    dtypes = (kv_cache.dtype,)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=q_nope.device)
    if not kv_cache.shape[1] or not kv_cache.shape[2]:
        raise LayoutError(
            f"{op}: kv_cache must have blocks of a token or more and a head or more, got "
            f"{tuple(kv_cache.shape)}"
        )
    if is_nope_first:
        stored = kv_cache[..., :rank], kv_cache[..., rank:]
    else:
        stored = kv_cache[..., width:], kv_cache[..., :width]
    _concat_and_cache(
        op,
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        stored,
        q_out,
        slot_mapping,
        k_scale,
        q_scale,
        positions,
        cos_cache,
        sin_cache,
        is_neox,
        is_nope_first,
        compute_all_q_rope,
        offs,
        rotary_dim,
        dim_offset,
    )


@uncompiled
def fused_qk_rope_concat_and_cache_mla_seg(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    q_scale: torch.Tensor | float | None,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool = True,
    compute_all_q_rope: bool = False,
    *,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> None:
    """Do `fused_qk_rope_concat_and_cache_mla` for pages of all latents and then all rotary parts.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope, q_pe, q_out, slot_mapping, k_scale, q_scale, positions, cos_cache, sin_cache, is_neox
        As in `fused_qk_rope_concat_and_cache_mla`, and so are those not named here.
    kv_c : [T, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [T, r], like ``kv_c``
    kv_cache : [num_blocks, page_size * (c + r)], dense inside a block
        Of the dtype of ``kv_c``, fp8 or uint8; as in `concat_and_cache_mla_seg`.
    is_nope_first : bool
        True: such pages have one order.
    compute_all_q_rope : bool
        As there; the original does not have it.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: those of `fused_qk_rope_concat_and_cache_mla`; any page
    size, which follows from the shape of a block, any width, and any dtype of both outputs.
    """
    op = "fused_qk_rope_concat_and_cache_mla_seg"
    if not is_nope_first:
        raise LayoutError(f"{op}: is_nope_first must be True, got {is_nope_first}")
    _check_queries(op, q_nope, q_pe)
    rank, width, device = q_nope.shape[2], q_pe.shape[2], q_nope.device
    for name, part in (("kv_c", kv_c), ("k_pe", k_pe)):
        check_tensor(op, name, part, shape=("T", "width"), dtypes=ROWS, device=device)
    kv_c, k_pe = kv_c[:, None], k_pe[:, None]
    _check_keys(op, kv_c, k_pe, q_nope, width)
    shape, dtypes = ("num_blocks", f"page_size * {rank + width}"), (kv_cache.dtype,)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=device)
    page_size, rest = divmod(kv_cache.shape[1], rank + width)
    if rest or not page_size:
        raise LayoutError(
            f"{op}: kv_cache must be [num_blocks, page_size * {rank + width}], got "
            f"{tuple(kv_cache.shape)}"
        )
    latents, ropes = kv_cache.split([page_size * rank, page_size * width], 1)
    stored = (
        latents.unflatten(1, (page_size, 1, rank)),
        ropes.unflatten(1, (page_size, 1, width)),
    )
    _concat_and_cache(
        op,
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        stored,
        q_out,
        slot_mapping,
        k_scale,
        q_scale,
        positions,
        cos_cache,
        sin_cache,
        is_neox,
        True,
        compute_all_q_rope,
        offs,
        rotary_dim,
        dim_offset,
    )


def _concat_and_cache(
    op: str,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    stored: tuple[torch.Tensor, torch.Tensor],
    q_out: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    q_scale: torch.Tensor | float | None,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool,
    compute_all_q_rope: bool,
    offsets: torch.Tensor | None,
    rotary_dim: int | None,
    dim_offset: int,
) -> None:
    """Check the rest and launch; ``stored`` are the parts of a cache, [blocks, page, kh, ...]."""
    num_tokens, key_heads = kv_c.shape[:2]
    check_slots(op, slots, num_tokens, kv_c.device)
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=positions,
        offsets=offsets,
        num_tokens=num_tokens,
        width=q_pe.shape[2],
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
        names=("cos_cache", "sin_cache"),
    )
    queries = queries_of(
        op,
        q_nope,
        q_pe,
        q_out,
        q_scale,
        is_nope_first=is_nope_first,
        needs_slot=not compute_all_q_rope,
    )
    codec, factor = _key_codec(op, kv_c, stored[0], k_scale)
    num_blocks, page_size = stored[0].shape[:2]
    fields, targets = [], []
    for name, part, each in (("kv_c", kv_c, stored[0]), ("k_pe", k_pe, stored[1])):
        out = each.view(torch.uint8) if isinstance(codec, PerTensor) else each
        fields.append(head_writers.field_of_rows(name, codec, out, page_size, part.shape[2]))
        targets.append(head_writers.target_of(part[: slots.shape[0]], out, None, factor, 2))
    spec = head_writers.spec_of(codec, arch_of(kv_c.device), (fields[0], fields[1]), False)
    if factor is None:
        spec = undivided(spec)
    num_slots = num_blocks * page_size
    keys = Keys(spec, targets[0], targets[1], slots, num_slots, key_heads, num_tokens)
    rotate_and_write(op, turn, queries, keys)


@uncompiled
def fused_qk_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    is_neox: bool,
    num_decode_toks_for_zeros: int = 0,
    apply_scale: bool = True,
    q_out: torch.Tensor | None = None,
    decode_q_pe_out: torch.Tensor | None = None,
    k_pe_out: torch.Tensor | None = None,
    q_out_dtype: torch.dtype | None = None,
    shuffled_kv_cache: bool = False,
    upcast_operand: bool = False,
    *,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and their keys, join both, and write them and already rotated keys.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope, q_pe, cos, sin, is_neox, offs, rotary_dim, dim_offset
        As in `fused_qk_rope_write_kv_cache`, for B tokens.
    k_nope : [>= B, kh, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : like ``k_nope`` but [..., r]
        Those of the first B tokens turn; the others are taken as they are.
    kv_cache : [num_slots, kh, c + r], or [num_blocks, kh, block_size, c + r] if shuffled
        As in `cat_and_cache_mla`, except that a head may be any distance from the next.
    slot_mapping : [at most as many as keys], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token, and tokens
        past its end are not written.
    pos : [>= B], int64 or int32
    k_scale : fp32, one element, or None
        Rows are divided by it before they are stored, unless it is None or not ``apply_scale``.
        A number is copied to the device in each call.
    num_decode_toks_for_zeros : int in 0..B
        How many of the first tokens get a copy of their rotated ``q_pe``, and zeros.
    q_out : [B, h, c + r or more], or None
    decode_q_pe_out : [num_decode_toks_for_zeros, h, r], bf16, fp16 or fp32, or None
    k_pe_out : like ``k_pe``, or None
        May be ``k_pe`` itself.
    q_out_dtype : torch.dtype, optional
        Of ``q_out`` where that is None, by default that of ``q_nope``. fp8 is not scaled.
    shuffled_kv_cache : bool
        Blocks are stored in 16-token tiles of 16-byte lanes.
    upcast_operand : bool
        Without effect: rotating is always done in fp32.

    Returns
    -------
    q_out : [B, h, c + r]
    decode_q_pe_out : [num_decode_toks_for_zeros, h, r], like ``q_nope``
    k_pe_out : [keys, kh, r], like ``k_pe``
        Rotated, not scaled.
    q_nope_zeros_out : [num_decode_toks_for_zeros, h, c], like ``q_nope``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: zeros are right for any number of tokens, where it writes
    other rows unless that is 0 or B; rotates in fp32 and rounds once; divides by the scale rather
    than multiplying with its rounded reciprocal; fp8 saturates; ``k_pe_out`` is written for tokens
    without a slot too; any number of key heads.
    """
    del upcast_operand
    op = "fused_qk_rope_cat_and_cache_mla"
    _check_queries(op, q_nope, q_pe)
    turn, queries, keys, returned = cat_and_cache(
        op,
        q_nope,
        q_pe,
        k_nope,
        k_pe,
        kv_cache,
        slot_mapping,
        pos,
        cos,
        sin,
        k_scale if apply_scale else None,
        is_neox,
        num_decode_toks_for_zeros,
        dtype=q_nope.dtype,
        q_out=q_out,
        decode_q_pe_out=decode_q_pe_out,
        k_pe_out=k_pe_out,
        q_out_dtype=q_out_dtype,
        is_shuffled=shuffled_kv_cache,
        offs=offs,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    rotate_and_write(op, turn, queries, keys)
    return returned


def cat_and_cache(
    op: str,
    q_nope: torch.Tensor | None,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    is_neox: bool,
    num_extra: int,
    *,
    dtype: torch.dtype,
    q_out: torch.Tensor | None,
    decode_q_pe_out: torch.Tensor | None = None,
    k_pe_out: torch.Tensor | None = None,
    q_out_dtype: torch.dtype | None = None,
    q_scale: torch.Tensor | None = None,
    is_shuffled: bool = False,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
    names: tuple[str, str] = ("k_pe", "pos"),
) -> tuple[
    Rotation,
    Queries,
    Keys,
    tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
]:
    """Check everything but ``q_nope`` and ``q_pe``; return what to launch, and what to return.

    ``q_nope`` is None where something else writes the latent part of queries; ``dtype`` is that of
    queries, and ``names`` are those of ``k_pe`` and ``pos``.
    """
    device = q_pe.device
    num_tokens, heads, width = q_pe.shape
    rank: int | str = "c" if q_nope is None else q_nope.shape[2]
    shape: tuple[int | str, ...] = ("T", "kh", rank)
    check_tensor(op, "k_nope", k_nope, shape=shape, dtypes=ROWS, device=device)
    num_keys, key_heads, rank = k_nope.shape
    shape = (num_keys, key_heads, width)
    check_tensor(op, names[0], k_pe, shape=shape, dtypes=(k_nope.dtype,), device=device)
    if num_keys < num_tokens or not key_heads:
        raise LayoutError(
            f"{op}: k_nope must have a head or more and at least {num_tokens} tokens, as q_nope "
            f"has, got {tuple(k_nope.shape)}"
        )
    check_slots(op, slot_mapping, num_keys, device)
    if not 0 <= num_extra <= num_tokens:
        raise LayoutError(
            f"{op}: num_decode_toks_for_zeros must be in 0..{num_tokens}, got {num_extra}"
        )
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=pos,
        offsets=offs,
        num_tokens=num_tokens,
        width=width,
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
        positions_name=names[1],
    )
    if q_out is None:
        q_out = q_pe.new_empty(num_tokens, heads, rank + width, dtype=q_out_dtype or dtype)
    if decode_q_pe_out is None:
        decode_q_pe_out = q_pe.new_empty(num_extra, heads, width)
    shape = (num_extra, heads, width)
    check_tensor(op, "decode_q_pe_out", decode_q_pe_out, shape=shape, dtypes=ROWS, device=device)
    if k_pe_out is None:
        k_pe_out = k_pe.new_empty(num_keys, key_heads, width)
    shape = (num_keys, key_heads, width)
    check_tensor(op, "k_pe_out", k_pe_out, shape=shape, dtypes=ROWS, device=device)
    zeros = q_pe.new_empty(num_extra, heads, rank, dtype=dtype)
    queries = queries_of(
        op,
        q_nope,
        q_pe,
        q_out if q_nope is not None else q_out[..., rank:],
        q_scale,
        pe_out=decode_q_pe_out if num_extra else None,
        zeros=zeros if num_extra else None,
    )
    keys = keys_of(
        op,
        k_nope,
        k_pe,
        kv_cache,
        slot_mapping,
        k_scale,
        is_shuffled=is_shuffled,
        num_turned=num_tokens,
        out=k_pe_out,
    )
    return turn, queries, keys, (q_out, decode_q_pe_out, k_pe_out, zeros)


def keys_of(
    op: str,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    *,
    is_shuffled: bool,
    num_turned: int = 0,
    out: torch.Tensor | None = None,
) -> Keys:
    """Check the cache and the scale of keys [T, kh, ...], which were checked.

    Raises
    ------
    LayoutError
    """
    device = k_nope.device
    _, key_heads, rank = k_nope.shape
    width = k_pe.shape[2]
    dims = MLADims(1, rank, width)
    layout, row = keys_layout(op, kv_cache, dims, is_shuffled=is_shuffled)
    shape: tuple[int | str, ...] = ("num_slots", key_heads, row)
    if is_shuffled:
        shape = ("num_blocks", key_heads, "block_size", row)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=(kv_cache.dtype,), device=device)
    page_size = kv_cache.shape[2] if is_shuffled else 1
    pages = kv_cache[:, 0] if is_shuffled else kv_cache[:, 0][:, None]
    factor = None
    if k_scale is not None:
        factor = as_scale(op, "k_scale", k_scale, device)
    unread = torch.empty(1, device=device) if layout.needs_scale else None
    cache = LatentCache.bind(layout, dims, page_size, pages, scale=unread)
    spec = rows.of_layout(layout, dims, page_size, arch_of(device))
    if factor is None:
        spec = undivided(spec)
    stride, targets = kv_cache.stride(1), []
    for name, part in (("kv_c", k_nope), ("k_pe", k_pe)):
        if part.shape[2]:
            one = rows.target_of(cache, name, part)
            targets.append(
                replace(
                    one,
                    stride_h=part.stride(1),
                    out=_all_heads(one.out, key_heads, stride),
                    out_stride_h=stride,
                    scales=None
                    if one.scales is None
                    else _all_heads(one.scales, key_heads, stride),
                    scales_stride_h=stride,
                    factor=factor,
                )
            )
    return Keys(
        spec,
        targets[0],
        targets[1] if width else None,
        slots,
        cache.num_slots,
        key_heads,
        num_turned,
        out=out if width else None,
        is_divided=factor is not None and not layout.needs_scale,
    )


def _check_queries(op: str, q_nope: torch.Tensor, q_pe: torch.Tensor) -> None:
    device, dtypes = q_nope.device, (q_nope.dtype,)
    check_tensor(op, "q_nope", q_nope, shape=("T", "h", "c"), dtypes=ROWS, device=device)
    shape = (*q_nope.shape[:2], "r")
    check_tensor(op, "q_pe", q_pe, shape=shape, dtypes=dtypes, device=device)


def _check_keys(
    op: str, kv_c: torch.Tensor, k_pe: torch.Tensor, q_nope: torch.Tensor, width: int
) -> None:
    num_tokens, _, rank = q_nope.shape
    shape: tuple[int | str, ...] = (num_tokens, "kh", rank)
    check_tensor(op, "kv_c", kv_c, shape=shape, dtypes=ROWS, device=q_nope.device)
    shape = (num_tokens, kv_c.shape[1], width)
    check_tensor(op, "k_pe", k_pe, shape=shape, dtypes=(kv_c.dtype,), device=q_nope.device)


def _all_heads(first: torch.Tensor, heads: int, stride: int) -> torch.Tensor:
    """Return all heads of what is given for the first one, so that it ends where they do."""
    if heads == 1:
        return first
    shape, strides = (first.shape[0], heads), (first.stride(0), stride)
    return first.as_strided((*shape, *first.shape[1:]), (*strides, *first.stride()[1:]))


def check_slots(op: str, slots: torch.Tensor, num_rows: int, device: torch.device) -> None:
    """Check slots of at most ``num_rows`` keys.

    Raises
    ------
    LayoutError
    """
    check_tensor(op, "slot_mapping", slots, shape=("T",), dtypes=SLOTS, device=device)
    if slots.shape[0] > num_rows:
        raise LayoutError(
            f"{op}: slot_mapping must have at most as many slots as there are keys, {num_rows}, "
            f"got {slots.shape[0]}"
        )


def _key_codec(
    op: str, kv_c: torch.Tensor, kv_cache: torch.Tensor, scale: torch.Tensor | float | None
) -> tuple[Codec, torch.Tensor | None]:
    """Return how a cache of plain rows stores them, and the factor that they are divided by."""
    if kv_cache.dtype == kv_c.dtype:
        return Cast(dtype_name(kv_c.dtype)), None
    dtype = "fp8_e4m3fnuz" if fp8_suffix(op, "kv_cache", kv_cache) else "fp8_e4m3"
    factor = None if scale is None else as_scale(op, "k_scale", scale, kv_c.device)
    return PerTensor(dtype), factor
