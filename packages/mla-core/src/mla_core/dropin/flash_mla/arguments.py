"""Binding a FlashMLA cache, and the sink that its functions share."""

from __future__ import annotations

import torch

from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.errors import LayoutError

_STANDARD = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Bytes per token of an fp8 cache by query width, with the layout and dims they stand for.
_FP8_CACHES = {
    576: (656, "fp8_ds656", MLADims(1, kv_lora_rank=512)),
    512: (584, "v4_584", MLADims(1, kv_lora_rank=448, value_includes_rope=True)),
}


def bind_cache(
    op: str, name: str, k_cache: torch.Tensor, q: torch.Tensor, head_dim_v: int, is_fp8: bool
) -> LatentCache:
    """Bind [num_blocks, page_size, 1, width] in the layout that ``q`` and ``is_fp8`` stand for."""
    num_heads, head_dim = q.shape[-2:]
    if not 1 <= head_dim_v <= head_dim:
        raise LayoutError(f"{op}: head_dim_v must be in 1..{head_dim} like q, got {head_dim_v}")
    if is_fp8:
        if head_dim not in _FP8_CACHES or head_dim_v != 512:
            raise LayoutError(
                f"{op}: q must have head_dim 576 or 512, and head_dim_v be 512, with fp8 caches, "
                f"got head_dim {head_dim} and head_dim_v {head_dim_v}"
            )
        width, layout, dims = _FP8_CACHES[head_dim]
        dims = dims.with_heads(num_heads)
        accepted: tuple[torch.dtype, ...] = (torch.float8_e4m3fn, torch.uint8)
    else:
        width, layout, accepted = head_dim, _STANDARD[q.dtype], (q.dtype,)
        dims = MLADims(num_heads, kv_lora_rank=head_dim_v, qk_rope_head_dim=head_dim - head_dim_v)
    is_shaped = k_cache.ndim == 4 and tuple(k_cache.shape[2:]) == (1, width)
    if not is_shaped or k_cache.shape[1] < 1 or k_cache.dtype not in accepted:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise LayoutError(
            f"{op}: {name} must be [num_blocks, page_size, 1, {width}] {wanted} for q "
            f"{tuple(q.shape)} {q.dtype} with is_fp8_kvcache={is_fp8}, got "
            f"{tuple(k_cache.shape)} {k_cache.dtype}"
        )
    if k_cache.device != q.device:
        raise LayoutError(f"{op}: {name} must be on {q.device} like q, got {k_cache.device}")
    return LatentCache.bind(layout, dims, k_cache.shape[1], k_cache)


def with_sink(
    op: str,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Scale ``out`` by the share of the softmax that a sink leaves, and round it to ``dtype``."""
    if attn_sink is None:
        return out.to(dtype)
    shape, fp32 = (lse.shape[1],), (torch.float32,)
    check_tensor(op, "attn_sink", attn_sink, shape=shape, dtypes=fp32, device=out.device)
    # Rows that see nothing stay 0, also where a sink of -inf would give (-inf) - (-inf).
    share = torch.sigmoid(lse - attn_sink).masked_fill(lse == float("-inf"), 0.0)
    return (out * share[..., None]).to(dtype)
