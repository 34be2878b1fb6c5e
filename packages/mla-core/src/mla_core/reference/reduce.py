"""Merging partial attention results by their log-sum-exp.

lse = log(sum_s exp(lse_s));  out = sum_s exp(lse_s - lse) * out_s

Each partial is normalised by its own denominator. An empty partial has ``lse`` -inf, and its
``out`` is never read. A sink counts as one more partial with a zero value.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from mla_core.errors import LayoutError
from mla_core.reference.attention import NEG_INF, masked_softmax

LseBase = Literal["natural", "base2"]

_LN_OF_BASE: dict[str, float] = {"natural": 1.0, "base2": math.log(2.0)}


def merge_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    *,
    sink: torch.Tensor | None = None,
    partial_lse_base: LseBase = "natural",
    lse_base: LseBase = "natural",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge over the first dimension.

    Parameters
    ----------
    partial_out : [num_partials, ..., num_heads, value_dim]
    partial_lse : [num_partials, ..., num_heads]
    sink : [num_heads], optional
        Extra logit with a zero value, always in natural units.
    partial_lse_base, lse_base : "natural" or "base2"
        Unit of ``partial_lse`` and of the returned ``lse``: the logarithm's base.
    dtype : torch.dtype
        Everything is converted to it first.

    Returns
    -------
    out : [..., num_heads, value_dim]
    lse : [..., num_heads]
        Without any non-empty partial ``out`` is 0 and ``lse`` is -inf (or the sink).
    """
    lses = partial_lse.to(dtype) * _ln_of(partial_lse_base)
    has_tokens = lses != NEG_INF
    weights, lse = masked_softmax(lses.movedim(0, -1), has_tokens.movedim(0, -1), sink)
    values = torch.where(has_tokens[..., None], partial_out.to(dtype), 0.0)
    return (weights.movedim(-1, 0)[..., None] * values).sum(dim=0), lse / _ln_of(lse_base)


def reduce_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    reduce_indptr: torch.Tensor,
    *,
    sink: torch.Tensor | None = None,
    lse_base: LseBase = "natural",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a contiguous run of partials for each query token.

    Parameters
    ----------
    partial_out : [num_partials, num_heads, value_dim]
    partial_lse : [num_partials, num_heads], natural logarithm
    reduce_indptr : [total_q + 1], integer
        Query token ``t`` owns the partials ``reduce_indptr[t]`` to ``reduce_indptr[t + 1]``,
        possibly none.

    Returns
    -------
    out : [total_q, num_heads, value_dim]
    lse : [total_q, num_heads]
    """
    starts = [int(x) for x in reduce_indptr]
    total_q = len(starts) - 1
    out = partial_out.new_zeros((total_q, *partial_out.shape[1:]), dtype=dtype)
    lse = partial_lse.new_full((total_q, *partial_lse.shape[1:]), NEG_INF, dtype=dtype)
    for t in range(total_q):
        run = slice(starts[t], starts[t + 1])
        out[t], lse[t] = merge_partials(
            partial_out[run], partial_lse[run], sink=sink, lse_base=lse_base, dtype=dtype
        )
    return out, lse


def reduce_tiles(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor | None,
    reduce_partial_map: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    sink: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge tiles of query rows that a persistent work list scattered over partial rows.

    Parameters
    ----------
    partial_out : [num_rows, num_heads, value_dim]
    partial_lse : [num_rows, num_heads], natural logarithm
    reduce_indptr : [num_tiles + 1], integer
        Tile ``t`` owns the entries ``reduce_indptr[t]`` to ``reduce_indptr[t + 1]`` of
        ``reduce_partial_map``.
    reduce_final_map : [num_tiles, 2], integer, or None
        First and one past the last query row of each tile. None means tiles of equal length, the
        distance of the first two entries of ``reduce_partial_map``.
    reduce_partial_map : [num_entries], integer
        Row of the first query of the tile in each partial; the following rows follow it.
    out, lse : [total_q, num_heads, value_dim], [total_q, num_heads]
        What the rows hold beforehand: rows of a tile without partials were written elsewhere and
        keep their values. A single partial is copied, so that every listed tile gets its lse.

    Returns
    -------
    out, lse :
        Merged copies in ``dtype``; the arguments are not changed.
    """
    out, lse = out.to(dtype, copy=True), lse.to(dtype, copy=True)
    starts = [int(x) for x in reduce_indptr]
    rows_of = [int(x) for x in reduce_partial_map]
    if reduce_final_map is None and len(rows_of) < 2:
        raise LayoutError(
            f"reduce_tiles: reduce_partial_map must have at least 2 entries without a "
            f"reduce_final_map, got {len(rows_of)}; their distance is the tile length"
        )
    for t in range(len(starts) - 1):
        first_rows = rows_of[starts[t] : starts[t + 1]]
        if not first_rows:
            continue
        if reduce_final_map is None:
            tile_len = rows_of[1] - rows_of[0]
            q_begin, q_end = t * tile_len, (t + 1) * tile_len
        else:
            q_begin, q_end = (int(x) for x in reduce_final_map[t])
        for q in range(q_begin, q_end):
            rows = [row + q - q_begin for row in first_rows]
            out[q], lse[q] = merge_partials(
                partial_out[rows], partial_lse[rows], sink=sink, dtype=dtype
            )
    return out, lse


def _ln_of(base: str) -> float:
    try:
        return _LN_OF_BASE[base]
    except KeyError:
        raise LayoutError(
            f"merge_partials: lse_base must be one of {', '.join(_LN_OF_BASE)}, got {base!r}; "
            "natural is this library's unit"
        ) from None
