"""The selector of sparse attention: cheap scores of every cached token, then the best k.

logits[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s] * k_scale[s])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mla_core.errors import LayoutError
from mla_core.reference.cache_ops import indexer_k_quant
from mla_core.reference.norm import layer_norm
from mla_core.reference.quant import ScaleFormat
from mla_core.reference.rope import rope

NEG_INF = float("-inf")


class IndexerInputs(NamedTuple):
    """Results of `qk_rope_quant`."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scales: torch.Tensor


def mqa_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    k_scales: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Score the keys ``starts[t] <= s < ends[t]`` for each query token.

    Parameters
    ----------
    q : [total_q, num_heads, head_dim]
    k : [total_k, head_dim]
    weights : [total_q, num_heads]
        The queries' own scales are folded in.
    starts, ends : [total_q], integer
    k_scales : [total_k], optional
        Dequantisation factors of the keys.

    Returns
    -------
    logits : [total_q, total_k]
        -inf outside each row's range.
    """
    keys = k.to(dtype) if k_scales is None else k.to(dtype) * k_scales.to(dtype)[:, None]
    scores = torch.relu(torch.einsum("qhd,kd->qhk", q.to(dtype), keys))
    logits = torch.einsum("qhk,qh->qk", scores, weights.to(dtype))
    column = torch.arange(k.shape[0], device=k.device)
    inside = (column >= starts[:, None]) & (column < ends[:, None])
    return torch.where(inside, logits, NEG_INF)


def paged_mqa_logits(
    q: torch.Tensor,
    k: Sequence[torch.Tensor],
    weights: torch.Tensor,
    *,
    max_kv_len: int,
    k_scales: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Score every request's cached keys for its newest tokens, causally.

    Parameters
    ----------
    q : [batch_size, next_n, num_heads, head_dim]
    k : one [kv_len, head_dim] for each request
        The new tokens' own keys are the last.
    weights : [batch_size * next_n, num_heads]
    max_kv_len : int
        Columns of the result.
    k_scales : one [kv_len] for each request, optional

    Returns
    -------
    logits : [batch_size * next_n, max_kv_len]
        Row ``b * next_n + n`` is -inf past position ``kv_len - next_n + n``.
    """
    batch_size, next_n = q.shape[:2]
    logits = q.new_full((batch_size * next_n, max_kv_len), NEG_INF, dtype=dtype)
    for b in range(batch_size):
        kv_len = k[b].shape[0]
        ends = torch.arange(kv_len - next_n, kv_len, device=q.device) + 1
        rows = slice(b * next_n, (b + 1) * next_n)
        logits[rows, :kv_len] = mqa_logits(
            q[b],
            k[b],
            weights[rows],
            torch.zeros_like(ends),
            ends,
            k_scales=None if k_scales is None else k_scales[b],
            dtype=dtype,
        )
    return logits


def top_k_per_row(
    logits: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, k: int
) -> torch.Tensor:
    """Select the ``k`` largest logits of each row's range.

    Equal logits are taken from the smallest index on, so every rank selects the same set.

    Parameters
    ----------
    logits : [rows, columns]
        Values outside the range are never looked at.
    starts, ends : [rows], integer
    k : int

    Returns
    -------
    indices : [rows, k], int32
        Relative to ``starts``, in ascending order, then -1.
    """
    if k < 1:
        raise LayoutError(f"top_k_per_row: k must be >= 1, got {k}; ask for at least one index")
    indices = torch.full((logits.shape[0], k), -1, dtype=torch.int32, device=logits.device)
    for row in range(logits.shape[0]):
        start, end = int(starts[row]), int(ends[row])
        order = torch.sort(logits[row, start : max(start, end)], descending=True, stable=True)
        chosen = order.indices[:k].sort().values
        indices[row, : chosen.numel()] = chosen.to(torch.int32)
    return indices


def top_k_per_row_decode(
    logits: torch.Tensor, next_n: int, kv_lens: torch.Tensor, k: int
) -> torch.Tensor:
    """`top_k_per_row` for rows ``b * next_n + n`` that see ``kv_lens[b] - next_n + n + 1`` tokens.

    Parameters
    ----------
    logits : [batch_size * next_n, columns]
    kv_lens : [batch_size], integer
    """
    row = torch.arange(logits.shape[0], device=logits.device)
    ends = (kv_lens[row // next_n] - next_n + row % next_n + 1).clamp(min=0)
    return top_k_per_row(logits, torch.zeros_like(ends), ends, k)


def qk_rope_quant(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    weights_scale: float,
    is_neox: bool = True,
    group_size: int = 128,
    scale_format: ScaleFormat = "fp32",
    fp8: str = "fp8_e4m3",
) -> IndexerInputs:
    """Prepare an indexer's queries, weights and keys: LayerNorm on keys, rotation, fp8.

    Parameters
    ----------
    q : [num_tokens, num_heads, head_dim]
        One quantisation group: ``head_dim`` equals ``group_size``.
    k : [num_tokens, head_dim]
    weights : [num_tokens, num_heads]
    norm_weight, norm_bias : [head_dim]
    positions : [num_tokens], integer
    cos, sin : [max_position, rotary_dim / 2]
        The first ``rotary_dim`` elements of queries and keys are rotated.
    weights_scale : float
        Multiplied into the weights, as is each query's own scale.

    Returns
    -------
    IndexerInputs
        ``q`` and ``k`` in fp8, ``weights`` [num_tokens, num_heads] and ``k_scales``
        [num_tokens, 1] in fp32.
    """
    if q.shape[-1] != group_size:
        raise LayoutError(
            f"qk_rope_quant: group_size must be head_dim={q.shape[-1]}, got {group_size}; a query "
            "folds one scale into its weight"
        )
    rotary_dim = 2 * cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return rope(x, positions, cos, sin, is_neox=is_neox, rotary_dim=rotary_dim)

    def quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return indexer_k_quant(x, group_size=group_size, scale_format=scale_format, fp8=fp8)

    q_fp8, q_scales = quant(rotate(q))
    k_fp8, k_scales = quant(rotate(layer_norm(k, norm_weight, norm_bias, eps)))
    folded = weights.float() * q_scales.squeeze(-1) * weights_scale
    return IndexerInputs(q_fp8, folded, k_fp8, k_scales)
