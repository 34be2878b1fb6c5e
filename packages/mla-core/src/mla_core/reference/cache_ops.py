"""Cache writers over dense rows: quantise, rotate, concatenate, scatter by slot.

A cache here is a tensor with one row for each slot (``slot = page * page_size + offset``), and a
row holds the *stored* values. Where the bytes of a row go is a layout's business. Writers return
a new cache; a negative slot skips its token, and the last of several writers of a slot wins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_core.dtypes import FP8_DTYPES, torch_dtype
from mla_core.reference.quant import (
    ScaleFormat,
    dequantize_groups,
    quantize_groups,
    quantize_per_tensor,
    to_fp8,
)
from mla_core.reference.rope import rope

Scale = float | torch.Tensor


class Rotated(NamedTuple):
    """Results of `qk_rope_cat_and_cache_mla`."""

    q_out: torch.Tensor
    decode_q_pe: torch.Tensor
    k_pe: torch.Tensor
    q_nope_zeros: torch.Tensor
    cache: torch.Tensor


def store(x: torch.Tensor, dtype: str, scale: Scale | None = None) -> torch.Tensor:
    """Convert to a cache's dtype: saturated ``x / scale`` for fp8, a plain cast otherwise."""
    if dtype not in FP8_DTYPES:
        return x.to(torch_dtype(dtype))
    return to_fp8(x, dtype) if scale is None else quantize_per_tensor(x, scale, fp8=dtype)[0]


def write_rows(cache: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """Return ``cache`` with ``rows[t]`` in slot ``slot_mapping[t]``.

    Parameters
    ----------
    cache : [num_slots, ...]
    rows : [num_tokens, ...], of the cache's dtype
    slot_mapping : [at most num_tokens], integer
        Tokens past its end are not written.
    """
    cache = cache.clone()
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot] = rows[token]
    return cache


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_dtype: str,
    scale: Scale | None = None,
) -> torch.Tensor:
    """Write ``kv_c`` followed by ``k_pe``, one scale for both.

    Parameters
    ----------
    kv_c : [num_tokens, ..., kv_lora_rank]
    k_pe : [num_tokens, ..., qk_rope_head_dim]
    cache : [num_slots, ..., kv_lora_rank + qk_rope_head_dim], of ``cache_dtype``
    slot_mapping : [num_tokens], integer
    cache_dtype : str
        Short dtype name.
    scale : one element, optional
        fp8 only: dequantisation factor, stored = x / scale.
    """
    rows = store(torch.cat([kv_c, k_pe], dim=-1), cache_dtype, scale)
    return write_rows(cache, rows, slot_mapping)


def qk_rope_concat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    cache_dtype: str,
    q_dtype: str,
    k_scale: Scale | None = None,
    q_scale: Scale | None = None,
    is_nope_first: bool = True,
    compute_all_q_rope: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys, concatenate each with its latent part, and cache the keys.

    Parameters
    ----------
    q_nope : [num_tokens, num_heads, kv_lora_rank]
    q_pe : [num_tokens, num_heads, qk_rope_head_dim]
    kv_c : [num_tokens, ..., kv_lora_rank]
    k_pe : [num_tokens, ..., qk_rope_head_dim]
    cache : [num_slots, ..., kv_lora_rank + qk_rope_head_dim], of ``cache_dtype``
    q_out : [num_tokens, num_heads, at least kv_lora_rank + qk_rope_head_dim], of ``q_dtype``
        What the queries hold beforehand: tokens with a negative slot keep it, unless
        ``compute_all_q_rope``, and so do elements past the query's width.
    slot_mapping : [num_tokens], integer
    positions : [num_tokens], integer
        Clamped into the tables.
    cos, sin : [max_position, qk_rope_head_dim / 2]
    k_scale, q_scale : one element, optional
        Dequantisation factors of an fp8 cache and of fp8 queries.
    is_nope_first : bool
        Whether the latent part comes before the rotary part, in queries and cache alike.

    Returns
    -------
    q_out, cache :
        Updated copies.
    """
    positions = positions.clamp(0, cos.shape[0] - 1)

    def joined(nope: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
        pe = rope(pe, positions, cos, sin, is_neox=is_neox, dtype=dtype)
        nope = nope.to(dtype)
        return torch.cat([nope, pe] if is_nope_first else [pe, nope], dim=-1)

    query = store(joined(q_nope, q_pe), q_dtype, q_scale)
    written = slot_mapping >= 0
    if compute_all_q_rope:
        written = torch.ones_like(written)
    q_out = q_out.clone()
    q_out[..., : query.shape[-1]] = torch.where(
        written[:, None, None], query.to(dtype), q_out[..., : query.shape[-1]].to(dtype)
    ).to(query.dtype)
    rows = store(joined(kv_c, k_pe), cache_dtype, k_scale)
    return q_out, write_rows(cache, rows, slot_mapping)


def qk_rope_cat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    cache_dtype: str,
    k_scale: Scale | None = None,
    num_decode_tokens: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Rotated:
    """Rotate the tokens that have queries; cache them and the already rotated ones behind them.

    Parameters
    ----------
    q_nope : [num_q_tokens, num_heads, kv_lora_rank]
    q_pe : [num_q_tokens, num_heads, qk_rope_head_dim]
    k_nope : [num_k_tokens, num_kv_heads, kv_lora_rank]
    k_pe : [num_k_tokens, num_kv_heads, qk_rope_head_dim]
        The first ``num_q_tokens`` are rotated, the rest are taken as they are.
    cache : [num_slots, num_kv_heads, kv_lora_rank + qk_rope_head_dim], of ``cache_dtype``
    slot_mapping : [num_q_tokens to num_k_tokens], integer
    positions : [at least num_q_tokens], integer
    cos, sin : [max_position, qk_rope_head_dim / 2 or qk_rope_head_dim]
    num_decode_tokens : int
        Leading tokens whose rotated ``q_pe`` is also returned alone, beside zeros for ``q_nope``.

    Returns
    -------
    Rotated
        ``q_out`` [num_q_tokens, num_heads, kv_lora_rank + qk_rope_head_dim], ``decode_q_pe``
        [num_decode_tokens, num_heads, qk_rope_head_dim], ``k_pe`` like the argument (never
        scaled; callers read the rows with a slot >= 0 only), ``q_nope_zeros``
        [num_decode_tokens, num_heads, kv_lora_rank], and the updated cache.
    """
    num_q = q_nope.shape[0]
    positions = positions[:num_q]
    q_pe = rope(q_pe, positions, cos, sin, is_neox=is_neox, dtype=dtype)
    turned = rope(k_pe[:num_q], positions, cos, sin, is_neox=is_neox, dtype=dtype)
    k_pe = torch.cat([turned, k_pe[num_q:].to(dtype)])
    q_nope = q_nope.to(dtype)
    return Rotated(
        q_out=torch.cat([q_nope, q_pe], dim=-1),
        decode_q_pe=q_pe[:num_decode_tokens],
        k_pe=k_pe,
        q_nope_zeros=torch.zeros_like(q_nope[:num_decode_tokens]),
        cache=concat_and_cache_mla(
            k_nope.to(dtype), k_pe, cache, slot_mapping, cache_dtype=cache_dtype, scale=k_scale
        ),
    )


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_dtype: str,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write per-head keys and values into token-major pages.

    Parameters
    ----------
    key, value : [num_tokens, num_kv_heads, head_dim]
    key_cache, value_cache : [num_pages, page_size, num_kv_heads, head_dim], of ``cache_dtype``

    Returns
    -------
    key_cache, value_cache :
        Updated copies.
    """
    key, value = store(key, cache_dtype, k_scale), store(value, cache_dtype, v_scale)
    return (
        write_rows(key_cache.flatten(0, 1), key, slot_mapping).view_as(key_cache),
        write_rows(value_cache.flatten(0, 1), value, slot_mapping).view_as(value_cache),
    )


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_dtype: str,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    is_value_shuffled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write per-head keys and values into dimension-major pages.

    Parameters
    ----------
    key, value : [num_tokens, num_kv_heads, head_dim]
    key_cache : [num_pages, num_kv_heads, head_dim / x, page_size, x], of ``cache_dtype``
        ``x`` elements are 16 bytes.
    value_cache : [num_pages, num_kv_heads, head_dim, page_size], of ``cache_dtype``
        With ``is_value_shuffled`` [num_pages, num_kv_heads, page_size / x, head_dim, x].

    Returns
    -------
    key_cache, value_cache :
        Updated copies.
    """
    key, value = store(key, cache_dtype, k_scale), store(value, cache_dtype, v_scale)
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    page_size, x = key_cache.shape[3:]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, page_size)
        key_cache[page, :, :, offset, :] = torch.unflatten(key[token], -1, (-1, x))
        if is_value_shuffled:
            value_cache[page, :, offset // x, :, offset % x] = value[token]
        else:
            value_cache[page, :, :, offset] = value[token]
    return key_cache, value_cache


def per_token_quant(x: torch.Tensor, fp8: str = "fp8_e4m3") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each head of each token on its own: [..., head_dim] to fp8 and fp32 scales [...]."""
    stored, scales = quantize_groups(x, x.shape[-1], fp8=fp8)
    return stored, scales.squeeze(-1)


def indexer_k_quant(
    k: torch.Tensor,
    *,
    group_size: int = 128,
    scale_format: ScaleFormat = "fp32",
    fp8: str = "fp8_e4m3",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise indexer keys: [num_tokens, head_dim] to fp8 and [num_tokens, head_dim / group].

    scale = max(amax, 1e-4) / fp8_max, rounded up to a power of two for ``ue8m0``.
    """
    return quantize_groups(k, group_size, fp8=fp8, scale_format=scale_format, min_amax=1e-4)


def dequantize_per_token(
    stored: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Undo `per_token_quant`."""
    return dequantize_groups(stored, scales[..., None], dtype=dtype)
