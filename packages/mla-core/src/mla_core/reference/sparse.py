"""Sparse absorbed attention: each query token names the cached slots it attends to.

Which slots those are is the selector's business, so there is no causal mask: an index that is
negative or past the last slot is padding, and an index given twice counts twice.
"""

from __future__ import annotations

import torch

from mla_core.reference.attention import cap_scores, masked_softmax


def sparse_attention(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    topk_length: torch.Tensor | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    q_scale: float | torch.Tensor = 1.0,
    kv_scale: float | torch.Tensor = 1.0,
    value_includes_rope: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend each query token to its listed slots; one function for sparse decode and prefill.

    Several caches (a sliding window beside a compressed context, say) are one cache here:
    concatenate their rows and shift the indices of the later ones.

    Parameters
    ----------
    ql_nope : [total_q, num_heads, kv_lora_rank]
    q_pe : [total_q, num_heads, qk_rope_head_dim]
    kv_c : [num_slots, kv_lora_rank]
    k_pe : [num_slots, qk_rope_head_dim]
        Rows that no valid index names are never read, NaN included.
    indices : [total_q, top_k], integer
    topk_length : [total_q], optional
        Only the first so many indices of each row count; more than ``top_k`` means all.
    sm_scale, softcap, sink, q_scale, kv_scale, value_includes_rope, dtype :
        As in `mla_core.reference.attention.decode`.

    Returns
    -------
    out : [total_q, num_heads, value_dim]
    max_logits : [total_q, num_heads]
        Largest visible scaled score, without the sink; -inf for a row that sees nothing.
    lse : [total_q, num_heads]
        Natural logarithm, with the sink.
    """
    num_slots, top_k = kv_c.shape[0], indices.shape[1]
    valid = (indices >= 0) & (indices < num_slots)
    if topk_length is not None:
        column = torch.arange(top_k, device=indices.device)
        valid = valid & (column < topk_length[:, None])
    query = torch.cat([ql_nope.to(dtype), q_pe.to(dtype)], dim=-1) * q_scale
    cache = torch.cat([kv_c.to(dtype), k_pe.to(dtype)], dim=-1) * kv_scale
    # A last row of zeros stands for every invalid index, so that no stray row is touched.
    cache = torch.cat([cache, cache.new_zeros((1, cache.shape[1]))])
    keys = cache[torch.where(valid, indices, num_slots).long()]
    scores = cap_scores(torch.einsum("qhd,qkd->qhk", query, keys) * sm_scale, softcap)
    mask = valid[:, None, :]
    probs, lse = masked_softmax(scores, mask, sink)
    max_logits = lse.new_full(lse.shape, float("-inf"))
    if top_k:
        max_logits = torch.where(mask, scores, float("-inf")).amax(dim=-1)
    value_dim = cache.shape[1] if value_includes_rope else kv_c.shape[1]
    out = torch.einsum("qhk,qkd->qhd", probs, keys[..., :value_dim])
    return out, max_logits, lse
