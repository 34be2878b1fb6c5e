"""Softmax attention over a stream of cached rows, the inner loop of decode and sparse decode."""

from __future__ import annotations

from collections.abc import Iterable

import torch

#: Cached rows per step: 1024 fp32 rows of 576 are 2.3 MB, which stay in a core's cache between the
#: two products that use them.
TILE = 1024

#: Most query rows attended at once, so that one score tile stays below 64 MB.
MAX_QUERY_ROWS = 16384


def attend(
    queries: torch.Tensor,
    tiles: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    value_dim: int,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Online softmax of pre-scaled queries over tiles of rows.

    Parameters
    ----------
    queries : [M, D], fp32
        Already multiplied by ``sm_scale``.
    tiles : iterable of (rows [N, D] fp32, visible [M or 1, N] bool or None)
        ``None`` means every query sees every row.
    value_dim : int
        The value of a row is its first ``value_dim`` entries.
    softcap : float
        0 for none.
    sink : [M], fp32, optional
        Extra logit of each query row, with a zero value.
    start : (out [M, value_dim], lse [M]), fp32, optional
        Normalised result over rows already seen, to continue from; without the sink.

    Returns
    -------
    out : [M, value_dim], fp32
        0 for a query that sees nothing.
    lse : [M], fp32
        Natural log; -inf for a query that sees nothing and has no sink.
    """
    num_rows = queries.shape[0]
    if start is None:
        running_max = queries.new_full((num_rows, 1), float("-inf"))
        denom = queries.new_zeros((num_rows, 1))
        acc = queries.new_zeros((num_rows, value_dim))
    else:
        acc, running_max = start[0], start[1][:, None]
        denom = (running_max != float("-inf")).float()
    for rows, visible in tiles:
        scores = queries @ rows.T
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        new_max = torch.maximum(running_max, scores.amax(dim=1, keepdim=True))
        # While nothing was visible the maximum is -inf; 0 in its place makes every weight
        # exp(-inf) = 0 instead of exp(-inf + inf).
        shift = new_max.masked_fill(new_max == float("-inf"), 0.0)
        weights = torch.exp(scores - shift)
        decay = torch.exp(running_max - shift)
        denom = denom * decay + weights.sum(dim=1, keepdim=True)
        acc = torch.addmm(acc * decay, weights, rows[:, :value_dim])
        running_max = new_max
    log_denom = torch.log(denom)
    # Asked this way round, a NaN stays one instead of passing for a row that sees nothing.
    is_nothing = denom == 0
    lse = torch.where(is_nothing, float("-inf"), running_max + log_denom)
    out = torch.where(is_nothing, 0.0, acc / denom)
    if sink is not None:
        total = torch.logaddexp(lse, sink[:, None])
        out = torch.where(is_nothing, 0.0, out * torch.exp(lse - total))
        lse = total
    return out, lse[:, 0]
