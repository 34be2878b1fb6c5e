"""Ragged attention over expanded keys and values, forward and backward, in plain torch."""

from __future__ import annotations

import torch

from mla_core.plan import AttentionOptions

#: Query rows per block, so that one [heads, block, keys] score tile stays small.
QUERY_BLOCK = 512


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    sm_scale: float,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write ``out`` [total_q, H, v] and ``lse`` [total_q, H]; see `mla_core.prefill`."""
    for rows, keys, visible in _blocks(cu_seqlens_q, cu_seqlens_k, options, q.device):
        scores, _ = _scores(q[rows], k[keys], sm_scale, options.softcap, visible)
        block_lse = torch.logsumexp(scores, dim=-1)
        probs = _probabilities(scores, block_lse)
        value = _per_query_head(v[keys], q.shape[1])
        out[rows] = (probs @ value).transpose(0, 1).to(out.dtype)
        lse[rows] = block_lse.transpose(0, 1)


def prefill_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    sm_scale: float,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v.

    With ``P = exp(S - lse)``: ``dV = P^T dO``, ``dP = dO V^T`` and
    ``dS = P * (dP - rowsum(dO * O))``, from FlashAttention-2 (arXiv 2307.08691), appendix B.
    """
    num_heads = q.shape[1]
    grad_q = torch.zeros_like(q, dtype=torch.float32)
    grad_k = torch.zeros(k.shape[0], num_heads, k.shape[2], device=k.device)
    grad_v = torch.zeros(v.shape[0], num_heads, v.shape[2], device=v.device)
    delta = (grad_out.float() * out.float()).sum(-1)
    for rows, keys, visible in _blocks(cu_seqlens_q, cu_seqlens_k, options, q.device):
        scores, cap_slope = _scores(q[rows], k[keys], sm_scale, options.softcap, visible)
        probs = _probabilities(scores, lse[rows].transpose(0, 1))
        do = grad_out[rows].float().transpose(0, 1)
        value = _per_query_head(v[keys], num_heads)
        key = _per_query_head(k[keys], num_heads)
        grad_scores = probs * (do @ value.transpose(1, 2) - delta[rows].T[:, :, None])
        if cap_slope is not None:
            grad_scores = grad_scores * cap_slope
        grad_scores = grad_scores * sm_scale
        query = q[rows].float().transpose(0, 1)
        grad_q[rows] = (grad_scores @ key).transpose(0, 1)
        grad_k[keys] += (grad_scores.transpose(1, 2) @ query).transpose(0, 1)
        grad_v[keys] += (probs.transpose(1, 2) @ do).transpose(0, 1)
    return (
        grad_q.to(q.dtype),
        _sum_groups(grad_k, k.shape[1]).to(k.dtype),
        _sum_groups(grad_v, v.shape[1]).to(v.dtype),
    )


def _blocks(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: AttentionOptions,
    device: torch.device,
) -> list[tuple[slice, slice, torch.Tensor]]:
    """List (query rows, key rows, visible [rows, keys]) blocks covering the ragged batch."""
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    blocks = []
    for b in range(len(q_bounds) - 1):
        q_end, k_begin, k_end = q_bounds[b + 1], k_bounds[b], k_bounds[b + 1]
        key_position = torch.arange(k_end - k_begin, device=device)
        for first in range(q_bounds[b], q_end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, q_end)
            token = torch.arange(first, last, device=device)
            position = (k_end - k_begin) - (q_end - token)
            visible = torch.ones(last - first, k_end - k_begin, dtype=torch.bool, device=device)
            if options.causal:
                visible &= key_position <= position[:, None]
            if options.window is not None:
                visible &= key_position > position[:, None] - options.window
            blocks.append((slice(first, last), slice(k_begin, k_end), visible))
    return blocks


def _scores(
    q: torch.Tensor, k: torch.Tensor, sm_scale: float, softcap: float, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return masked scores [H, rows, keys] and, with a soft cap, d(capped)/d(raw)."""
    key = _per_query_head(k, q.shape[1])
    scores = sm_scale * (q.float().transpose(0, 1) @ key.transpose(1, 2))
    slope = None
    if softcap:
        squashed = torch.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - squashed * squashed
    return scores.masked_fill(~visible, float("-inf")), slope


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Return ``exp(scores - lse)``, 0 for rows that see nothing."""
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(scores - shift[..., None])


def _per_query_head(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return [H, keys, dim] fp32, repeating each kv head for its group of query heads."""
    heads = tensor.float().transpose(0, 1)
    return heads.repeat_interleave(num_heads // heads.shape[0], dim=0)


def _sum_groups(grad: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Sum the gradients of the query heads that share a kv head."""
    tokens, _, dim = grad.shape
    return grad.view(tokens, num_kv_heads, -1, dim).sum(2)
