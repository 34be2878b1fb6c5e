"""Sparse attention over one cache or two, and `flash_mla_sparse_fwd`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.cache import LatentCache
from mla_core.checks import check_tensor, visible_slots
from mla_core.dropin.flash_mla.arguments import bind_cache, with_sink
from mla_core.ops import sparse_decode
from mla_core.ops.arguments import OUT_DTYPES
from mla_core.reduce import reduce_partials

#: Most fp32 elements gathered at once for ``max_logits``: 256 MB.
GATHERED_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class Source:
    """Cached tokens that each query token attends to: slots [total_q, topk] of a cache."""

    cache: LatentCache
    slots: torch.Tensor
    topk_length: torch.Tensor | None


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse prefill: each query token attends to its own list of rows of ``kv``.

    Parameters
    ----------
    q : [s_q, H, D], bf16, fp16 or fp32, last dim contiguous
    kv : [s_kv, 1, D], dtype of ``q``
    indices : [s_q, 1, topk], int32
        Rows of ``kv``; entries below 0 or not below s_kv are masked.
    sm_scale : float
    d_v : int
        The value of a row is its first ``d_v`` entries.
    attn_sink : [H], fp32, optional
        Scales the output by ``exp(lse) / (exp(lse) + exp(attn_sink))``; not in the returned lse.
    topk_length : [s_q], int32, optional
        Read only the first so many indices of each row.

    Returns
    -------
    out : [s_q, H, d_v], dtype of ``q``
    max_logits : [s_q, H], fp32
        Largest scaled score of each row, -inf for a row that sees nothing.
    lse : [s_q, H], fp32, natural log

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    ``max_logits`` costs a second pass over the scores, in torch.
    """
    op = "flash_mla_sparse_fwd"
    check_tensor(op, "q", q, shape=("s_q", "H", "D"), dtypes=OUT_DTYPES, device=q.device)
    kv_shape = ("s_kv", 1, q.shape[2])
    check_tensor(op, "kv", kv, shape=kv_shape, dtypes=(q.dtype,), device=q.device)
    int32, shape = (torch.int32,), (q.shape[0], 1, "topk")
    check_tensor(op, "indices", indices, shape=shape, dtypes=int32, device=q.device)
    cache = bind_cache(op, "kv", kv[:, None], q, d_v, is_fp8=False)
    source = Source(cache, indices[:, 0], topk_length)
    out, lse = attend_sparse(op, q, [source], sm_scale, attn_sink)
    return out, _max_logits(q, source, sm_scale), lse


def attend_sparse(
    op: str,
    q: torch.Tensor,
    sources: list[Source],
    sm_scale: float,
    attn_sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [total_q, H, V] and lse of sparse attention over one cache or two."""
    dims = sources[0].cache.dims
    rank, (total_q, num_heads, _) = dims.kv_lora_rank, q.shape
    is_final = len(sources) == 1 and attn_sink is None
    dtype = q.dtype if is_final else torch.float32
    outs = q.new_empty((total_q, len(sources), num_heads, dims.value_dim), dtype=dtype)
    lses = q.new_empty((total_q, len(sources), num_heads), dtype=torch.float32)
    for i, source in enumerate(sources):
        sparse_decode(
            q[..., :rank],
            q[..., rank:],
            source.cache,
            source.slots,
            sm_scale=sm_scale,
            topk_length=source.topk_length,
            out=outs[:, i],
            lse=lses[:, i],
        )
    out, lse = outs[:, 0], lses[:, 0]
    if len(sources) > 1:
        out, lse = reduce_partials(outs, lses)
    return with_sink(op, out, lse, attn_sink, q.dtype), lse


def _max_logits(q: torch.Tensor, source: Source, sm_scale: float) -> torch.Tensor:
    """Return the largest scaled score of each query token and head, [total_q, H] fp32."""
    slots = visible_slots(source.slots, source.cache.num_slots, source.topk_length)
    result = q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    if not slots.numel():
        return result
    step = max(1, GATHERED_ELEMENTS // (slots.shape[1] * q.shape[2]))
    for first in range(0, q.shape[0], step):
        block = slice(first, first + step)
        kv_c, k_pe = source.cache.read(slots[block].flatten())
        rows = torch.cat((kv_c, k_pe), dim=1).view(*slots[block].shape, q.shape[2])
        scores = torch.einsum("thd,tkd->thk", q[block].float(), rows) * sm_scale
        scores = scores.masked_fill((slots[block] < 0)[:, None], float("-inf"))
        result[block] = scores.amax(dim=2)
    return result
