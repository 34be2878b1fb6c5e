"""Rotating queries and newest keys before attending, for the ``reference`` backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.batch import PagedKV
from mla_core.dtypes import FP8_DTYPES, dtype_name
from mla_core.plan import AttentionOptions
from mla_core.rope import FusedRope, RopeInputs


@dataclass(frozen=True, slots=True)
class NewestKeys:
    """The keys of one request's own query tokens, rotated and rounded as the cache would.

    Parameters
    ----------
    first : int
        Local index of the first of them in the request.
    rotated : [N, qk_rope_head_dim], fp32
        Before rounding, to write back.
    k_pe : [N, qk_rope_head_dim], fp32
        As read back after a write.
    slots : [N], int64
        -1 for a hidden one, whose row holds zeros.
    """

    first: int
    rotated: torch.Tensor
    k_pe: torch.Tensor
    slots: torch.Tensor

    def overlay(self, rows: torch.Tensor, begin: int, is_read: torch.Tensor) -> None:
        """Put the keys into rows ``begin ..`` [M, latent_dim] wherever ``is_read`` [M]."""
        end = begin + rows.shape[0]
        low = max(begin, self.first)
        if low >= end:
            return
        width = self.k_pe.shape[1]
        part = self.k_pe[low - self.first : end - self.first]
        target = rows[low - begin :, rows.shape[1] - width :]
        target.copy_(torch.where(is_read[low - begin :, None], part, target))


def rotate(
    x: torch.Tensor, tokens: torch.Tensor, fused: FusedRope, inputs: RopeInputs
) -> torch.Tensor:
    """Rotate rows by the positions of their query tokens, in fp32.

    Parameters
    ----------
    x : [N, ..., qk_rope_head_dim], fp32
    tokens : [N], int64
        Query token of each row.

    Returns
    -------
    rotated : like ``x``
        NaN in the turned elements of a row whose position has no row in the table.
    """
    table = inputs.cos_sin_cache
    place = inputs.positions[tokens].long() + fused.position_offset
    in_table = (place >= 0) & (place < table.shape[0])
    row = x.new_full((place.numel(), fused.rotary_dim), torch.nan)
    row[in_table] = table[place[in_table]].float()
    per_row = (place.numel(),) + (1,) * (x.ndim - 2) + (fused.rotary_dim // 2,)
    cos, sin = (part.reshape(per_row) for part in row.chunk(2, dim=-1))
    begin, end = fused.dim_offset, fused.dim_offset + fused.rotary_dim
    turning = x[..., begin:end]
    if fused.is_neox:
        a, b = turning.chunk(2, dim=-1)
    else:
        a, b = turning[..., 0::2], turning[..., 1::2]
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.cat(turned, dim=-1) if fused.is_neox else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat((x[..., :begin], joined, x[..., end:]), dim=-1)


def rotate_queries(q_pe: torch.Tensor, fused: FusedRope, inputs: RopeInputs) -> torch.Tensor:
    """Return rotated queries, in their dtype; fp8 ones, rotated before their scale, as bf16."""
    tokens = torch.arange(q_pe.shape[0], device=q_pe.device)
    dtype = torch.bfloat16 if dtype_name(q_pe.dtype) in FP8_DTYPES else q_pe.dtype
    return rotate(q_pe.float(), tokens, fused, inputs).to(dtype)


def newest_keys(
    kv: PagedKV,
    slots: torch.Tensor,
    q_begin: int,
    q_end: int,
    global_len: int,
    options: AttentionOptions,
    inputs: RopeInputs,
) -> NewestKeys:
    """Rotate the keys of a request's query tokens and fill their rows of ``k_pe_tokens``.

    Parameters
    ----------
    slots : [kv_len], int64
        Of the whole request; -1 where hidden.
    q_begin, q_end : int
        Its query tokens.
    global_len : int
        Its length over all context-parallel ranks.
    """
    assert options.rope is not None
    index = torch.arange(slots.numel(), device=slots.device)
    position = index * options.cp_world_size + options.cp_rank
    # Key at position p of the request is that of query p - (global_len - q_len).
    query = position - (global_len - (q_end - q_begin))
    first = int((query < 0).sum())
    tokens, own = query[first:] + q_begin, slots[first:]
    _, k_pe = kv.cache.read(own, torch.float32)
    rotated = rotate(k_pe, tokens, options.rope, inputs)
    k_pe = kv.cache.round_rope(rotated)
    k_pe = torch.where((own >= 0)[:, None], k_pe, 0.0)
    if inputs.k_pe_tokens is not None:
        inputs.k_pe_tokens[q_begin:q_end] = 0
        inputs.k_pe_tokens[tokens] = k_pe.to(inputs.k_pe_tokens.dtype)
    return NewestKeys(first, rotated, k_pe, own)
