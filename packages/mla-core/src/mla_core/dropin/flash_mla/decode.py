"""`flash_mla_with_kvcache`: dense and sparse decode over a paged cache."""

from __future__ import annotations

import torch

from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dropin.flash_mla.arguments import bind_cache, with_sink
from mla_core.dropin.flash_mla.schedule import FlashMLASchedMeta, check_schedule
from mla_core.dropin.flash_mla.sparse import Source, attend_sparse
from mla_core.errors import LayoutError
from mla_core.ops import decode
from mla_core.ops.arguments import OUT_DTYPES
from mla_core.plan import AttentionOptions, plan_decode
from mla_core.select import preference


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode over a paged cache: dense, or sparse with ``indices``.

    Parameters
    ----------
    q : [B, s_q, H, D], bf16, fp16 or fp32, last dim contiguous
        Absorbed and rotated queries, latent part first.
    k_cache : [num_blocks, page_size, 1, D] of q's dtype
        With ``is_fp8_kvcache``: fp8_e4m3 or uint8 tokens of 656 bytes for D = 576 (512 fp8, 4 fp32
        scales, 64 bf16), of 584 bytes for D = 512 (DeepSeek-V4: per block, first 448 fp8 and 64
        bf16 of every token, then 8 scale bytes of every token; the value is the whole row).
    block_table : [B, max_blocks], int32
        Required without ``indices``, not read with them.
    cache_seqlens : [B], int32
        Likewise; 0 is allowed.
    head_dim_v : int
        Width of the latent, and of the output: 512 for released models.
    tile_scheduler_metadata, num_splits
        The two results of `get_mla_metadata`.
    softmax_scale : float, optional
        Default: ``D ** -0.5``, which is not what DeepSeek models use.
    causal : bool
        Bottom-right aligned; not with ``indices``.
    is_fp8_kvcache : bool
    indices : [B, s_q, topk], int32, optional
        ``block * page_size + offset`` of the tokens to attend to; entries below 0 or past the end
        of the cache are masked.
    attn_sink : [H], fp32, optional
        Scales the output by ``exp(lse) / (exp(lse) + exp(attn_sink))``; not in the returned lse.
    extra_k_cache, extra_indices_in_kvcache : optional
        A second cache and the tokens to attend to in it, besides those of ``indices``; page size
        and number of indices may differ from the first.
    topk_length, extra_topk_length : [B], int32, optional
        Read only the first so many indices of each row.

    Returns
    -------
    out : [B, s_q, H, head_dim_v], dtype of ``q``
    softmax_lse : [B, H, s_q], fp32, natural log

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from FlashMLA, besides those of this module: dense attention also takes fp8 caches
    and ``attn_sink``, sparse attention also bf16 and fp16 caches.
    """
    op = "flash_mla_with_kvcache"
    shape = ("B", "s_q", "H", "D")
    check_tensor(op, "q", q, shape=shape, dtypes=OUT_DTYPES, device=q.device)
    check_schedule(op, q, tile_scheduler_metadata, num_splits)
    cache = bind_cache(op, "k_cache", k_cache, q, head_dim_v, is_fp8_kvcache)
    scale = float(q.shape[3] ** -0.5) if softmax_scale is None else softmax_scale
    if indices is None:
        for name, given in (
            ("extra_k_cache", extra_k_cache),
            ("extra_indices_in_kvcache", extra_indices_in_kvcache),
            ("topk_length", topk_length),
            ("extra_topk_length", extra_topk_length),
        ):
            if given is not None:
                raise LayoutError(f"{op}: {name} must be None without indices, got a tensor")
        if block_table is None or cache_seqlens is None:
            missing = "block_table" if block_table is None else "cache_seqlens"
            raise LayoutError(f"{op}: {missing} must be given without indices, got None")
        kv = PagedKV.from_block_table(cache, block_table, cache_seqlens)
        out, lse = _dense(op, q, kv, tile_scheduler_metadata, scale, causal, attn_sink)
    else:
        if causal:
            raise LayoutError(f"{op}: causal must be False with indices, got True")
        if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
            raise LayoutError(
                f"{op}: extra_k_cache and extra_indices_in_kvcache must be given together, "
                f"got only {'the indices' if extra_k_cache is None else 'the cache'}"
            )
        if extra_topk_length is not None and extra_k_cache is None:
            raise LayoutError(
                f"{op}: extra_topk_length must be None without extra_k_cache, got a tensor"
            )
        sources = [_source(op, "", q, cache, indices, topk_length)]
        if extra_k_cache is not None and extra_indices_in_kvcache is not None:
            extra = bind_cache(op, "extra_k_cache", extra_k_cache, q, head_dim_v, is_fp8_kvcache)
            sources.append(
                _source(op, "extra_", q, extra, extra_indices_in_kvcache, extra_topk_length)
            )
        out, lse = attend_sparse(op, q.flatten(0, 1), sources, scale, attn_sink)
    out = out.reshape(*q.shape[:2], *out.shape[1:])
    return out, lse.reshape(*q.shape[:3]).transpose(1, 2)


def _source(
    op: str,
    prefix: str,
    q: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
) -> Source:
    """Check one set of indices [B, s_q, topk] and give each query token its row."""
    batch_size, q_len = q.shape[:2]
    name = "extra_indices_in_kvcache" if prefix else "indices"
    int32, device = (torch.int32,), q.device
    indices_shape = (batch_size, q_len, "topk")
    check_tensor(op, name, indices, shape=indices_shape, dtypes=int32, device=device)
    if topk_length is not None:
        name, shape = f"{prefix}topk_length", (batch_size,)
        check_tensor(op, name, topk_length, shape=shape, dtypes=int32, device=device)
        topk_length = topk_length.repeat_interleave(q_len)
    return Source(cache, indices.flatten(0, 1), topk_length)


def _dense(
    op: str,
    q: torch.Tensor,
    kv: PagedKV,
    schedule: FlashMLASchedMeta | torch.Tensor,
    sm_scale: float,
    causal: bool,
    attn_sink: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B * s_q, H, V] and lse of dense attention."""
    batch_size, q_len = q.shape[:2]
    if kv.batch_size != batch_size:
        raise LayoutError(
            f"{op}: block_table must be [B={batch_size}, max_blocks] like q, "
            f"got {kv.batch_size} rows"
        )
    cache = kv.cache
    max_seqlen_k = kv.kv_page_indices.numel() // max(batch_size, 1) * kv.page_size
    planned_for = (
        batch_size,
        q_len,
        q.dtype,
        q.device,
        cache.dims,
        cache.layout.name,
        kv.page_size,
        max_seqlen_k,
        causal,
        preference(),
        # A captured graph must own the buffers it writes, and outlives this object.
        q.is_cuda and torch.cuda.is_current_stream_capturing(),
    )
    kept = schedule if isinstance(schedule, FlashMLASchedMeta) else FlashMLASchedMeta()
    if kept.plan is None or kept.planned_for != planned_for:
        qo_indptr = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * q_len
        kept.plan = plan_decode(
            cache.dims,
            qo_indptr,
            kv,
            q_dtype=q.dtype,
            # One query token sees everything either way, and causal kernels are the common ones.
            options=AttentionOptions(causal=causal or q_len == 1),
            total_q=batch_size * q_len,
            max_seqlen_q=q_len,
            max_seqlen_k=max_seqlen_k,
        )
        kept.planned_for = planned_for
    flat = q.flatten(0, 1)
    rank, total_q, num_heads = cache.dims.kv_lora_rank, flat.shape[0], flat.shape[1]
    dtype = q.dtype if attn_sink is None else torch.float32
    out = q.new_empty((total_q, num_heads, cache.dims.value_dim), dtype=dtype)
    lse = q.new_empty((total_q, num_heads), dtype=torch.float32)
    nope, pe = flat[..., :rank], flat[..., rank:]
    decode(nope, pe, kv, kept.plan, sm_scale=sm_scale, out=out, lse=lse)
    return with_sink(op, out, lse, attn_sink, q.dtype), lse
