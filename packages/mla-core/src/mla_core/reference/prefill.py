"""Attention over expanded per-head keys and values, forward and backward, and the absorbed forms.

s = sm_scale * q @ k.T;  out = softmax(s) @ v, each request of a ragged batch on its own.

`absorb_query`, `expand_latent` and `project_output` are the identities behind MLA: attention over
``expand_latent`` equals absorbed attention over the latents between the other two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_core.errors import LayoutError
from mla_core.reference.attention import NEG_INF, cap_scores, masked_softmax, visible_mask

Indptr = torch.Tensor | Sequence[int]


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Indptr,
    cu_seqlens_k: Indptr,
    *,
    sm_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    q_scale: float | torch.Tensor = 1.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query token to its request's keys (causal masks are bottom-right aligned).

    Parameters
    ----------
    q : [total_q, num_heads, qk_head_dim]
    k : [total_k, num_kv_heads, qk_head_dim]
        Key head ``g`` serves the query heads ``g * ratio`` to ``(g + 1) * ratio``, where
        ``ratio = num_heads / num_kv_heads``.
    v : [total_k, num_kv_heads, v_head_dim]
    cu_seqlens_q, cu_seqlens_k : [batch_size + 1]
        Prefix sums of the requests' query and key lengths.
    sm_scale, causal, window, softcap, sink :
        As in `mla_core.reference.attention.decode`.
    q_scale, k_scale, v_scale : float or tensor of one element
        Dequantisation factors.
    dtype : torch.dtype
        Everything is converted to it first.

    Returns
    -------
    out : [total_q, num_heads, v_head_dim]
    lse : [total_q, num_heads]
        Natural logarithm. A row that sees nothing has ``out`` 0 and ``lse`` -inf.
    """
    q, k, v = q.to(dtype) * q_scale, k.to(dtype) * k_scale, v.to(dtype) * v_scale
    ratio = _head_ratio(q, k)
    out = q.new_zeros((*q.shape[:2], v.shape[-1]))
    lse = q.new_full(q.shape[:2], NEG_INF)
    for rows, cols in _requests(cu_seqlens_q, cu_seqlens_k):
        keys, values = (x[cols].repeat_interleave(ratio, dim=1) for x in (k, v))
        scores = cap_scores(torch.einsum("qhd,nhd->qhn", q[rows], keys) * sm_scale, softcap)
        mask = visible_mask(
            scores.shape[0], scores.shape[2], causal=causal, window=window, device=q.device
        )
        probs, lse[rows] = masked_softmax(scores, mask[:, None, :], sink)
        out[rows] = torch.einsum("qhn,nhd->qhd", probs, values)
    return out, lse


def prefill_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: Indptr,
    cu_seqlens_k: Indptr,
    *,
    sm_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    dlse: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `prefill` from its saved results, written out.

    probs = exp(s - lse), dv = probs.T @ dout, delta = rowsum(out * dout),
    ds = probs * (dout @ v.T - delta + dlse), dq = sm_scale * ds @ k, dk = sm_scale * ds.T @ q;
    with a softcap ``ds`` is further multiplied by ``1 - (s / softcap) ** 2``.

    Parameters
    ----------
    dout : [total_q, num_heads, v_head_dim]
        Gradient of ``out``.
    q, k, v, cu_seqlens_q, cu_seqlens_k, sm_scale, causal, window, softcap :
        As given to `prefill`, without scales.
    out, lse :
        As `prefill` returned them; a sink is already in them and needs nothing more.
    dlse : [total_q, num_heads], optional
        Gradient of ``lse``, for callers that merge several passes by it.

    Returns
    -------
    dq, dk, dv : like ``q``, ``k`` and ``v``, in ``dtype``
        Key heads shared by several query heads receive the sum of their gradients.
    """
    dout, q, k, v, out, lse = (x.to(dtype) for x in (dout, q, k, v, out, lse))
    ratio = _head_ratio(q, k)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    delta = (out * dout).sum(dim=-1)
    if dlse is not None:
        delta = delta - dlse.to(dtype)
    for rows, cols in _requests(cu_seqlens_q, cu_seqlens_k):
        keys, values = (x[cols].repeat_interleave(ratio, dim=1) for x in (k, v))
        scores = cap_scores(torch.einsum("qhd,nhd->qhn", q[rows], keys) * sm_scale, softcap)
        mask = visible_mask(
            scores.shape[0], scores.shape[2], causal=causal, window=window, device=q.device
        )[:, None, :]
        probs = torch.where(mask, torch.exp(scores - lse[rows][..., None]), 0.0)
        dprobs = torch.einsum("qhd,nhd->qhn", dout[rows], values)
        dscores = probs * (dprobs - delta[rows][..., None])
        if softcap > 0:
            dscores = dscores * (1.0 - (scores / softcap).square())
        dq[rows] = sm_scale * torch.einsum("qhn,nhd->qhd", dscores, keys)
        dk[cols] = sm_scale * _sum_groups(torch.einsum("qhn,qhd->nhd", dscores, q[rows]), ratio)
        dv[cols] = _sum_groups(torch.einsum("qhn,qhd->nhd", probs, dout[rows]), ratio)
    return dq, dk, dv


def split_kv_b_proj(
    weight: torch.Tensor, num_heads: int, qk_nope_head_dim: int, v_head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a checkpoint's ``kv_b_proj`` weight into W_UK and W_UV.

    Parameters
    ----------
    weight : [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]

    Returns
    -------
    w_uk : [num_heads, qk_nope_head_dim, kv_lora_rank]
    w_uv : [num_heads, v_head_dim, kv_lora_rank]
    """
    heads = weight.reshape(num_heads, qk_nope_head_dim + v_head_dim, -1)
    return heads[:, :qk_nope_head_dim], heads[:, qk_nope_head_dim:]


def expand_latent(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Materialise every head's keys and values from latents.

    Parameters
    ----------
    kv_c : [total_k, kv_lora_rank]
    k_pe : [total_k, qk_rope_head_dim]
        Rotated; the same for all heads.
    w_uk, w_uv :
        See `split_kv_b_proj`.

    Returns
    -------
    k : [total_k, num_heads, qk_nope_head_dim + qk_rope_head_dim]
    v : [total_k, num_heads, v_head_dim]
    """
    k_nope = torch.einsum("nc,hpc->nhp", kv_c.to(dtype), w_uk.to(dtype))
    v = torch.einsum("nc,hvc->nhv", kv_c.to(dtype), w_uv.to(dtype))
    shared = k_pe.to(dtype)[:, None, :].expand(-1, w_uk.shape[0], -1)
    return torch.cat([k_nope, shared], dim=-1), v


def absorb_query(
    q_nope: torch.Tensor, w_uk: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Fold W_UK into the query: [total_q, H, qk_nope_head_dim] to [total_q, H, kv_lora_rank]."""
    return torch.einsum("qhp,hpc->qhc", q_nope.to(dtype), w_uk.to(dtype))


def project_output(
    out: torch.Tensor, w_uv: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Apply W_UV to absorbed outputs: [total_q, H, kv_lora_rank] to [total_q, H, v_head_dim]."""
    return torch.einsum("qhc,hvc->qhv", out.to(dtype), w_uv.to(dtype))


def _head_ratio(q: torch.Tensor, k: torch.Tensor) -> int:
    ratio, rest = divmod(q.shape[1], k.shape[1])
    if rest:
        raise LayoutError(
            f"prefill: num_heads must be a multiple of num_kv_heads={k.shape[1]}, got "
            f"{q.shape[1]}; repeat the key heads"
        )
    return ratio


def _requests(cu_seqlens_q: Indptr, cu_seqlens_k: Indptr) -> list[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each request."""
    q_starts, k_starts = [int(x) for x in cu_seqlens_q], [int(x) for x in cu_seqlens_k]
    if len(q_starts) != len(k_starts):
        raise LayoutError(
            f"prefill: cu_seqlens_k must have {len(q_starts)} entries like cu_seqlens_q, got "
            f"{len(k_starts)}; a request without keys repeats its predecessor's end"
        )
    return [
        (slice(q_starts[b], q_starts[b + 1]), slice(k_starts[b], k_starts[b + 1]))
        for b in range(len(q_starts) - 1)
    ]


def _sum_groups(gradient: torch.Tensor, ratio: int) -> torch.Tensor:
    """Add up the gradients of the query heads that share a key head."""
    return torch.unflatten(gradient, 1, (-1, ratio)).sum(dim=2)
