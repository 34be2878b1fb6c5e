"""Turning the tensors of an aiter call into dims, a bound cache and a checked batch."""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import FP8_DTYPES, dtype_name, fp8_of_arch
from mla_core.errors import LayoutError
from mla_core.ops.arguments import OUT_DTYPES

#: Bytes of one token in the three-segment byte page: 512 fp8, 4 fp32 scales, 64 bf16.
BYTE_ROW = 656

_LAYOUT_OF = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e4m3fnuz: "fp8_fnuz",
}
QUERY_DTYPES = tuple(_LAYOUT_OF)


def dims_of(op: str, q: torch.Tensor, o: torch.Tensor) -> MLADims:
    """Check q [T, H, D] and o [T, H, C] against each other; C is the latent, D - C the rope."""
    shape = ("total_q", "num_heads", "head_dim")
    check_tensor(op, "q", q, shape=shape, dtypes=QUERY_DTYPES, device=q.device)
    total_q, num_heads, head_dim = q.shape
    out_shape = (total_q, num_heads, "kv_lora_rank")
    check_tensor(op, "o", o, shape=out_shape, dtypes=OUT_DTYPES, device=q.device)
    if o.shape[2] > head_dim:
        raise LayoutError(
            f"{op}: o must be at most as wide as q (head_dim={head_dim}), got {tuple(o.shape)}"
        )
    return MLADims(
        num_heads=num_heads, kv_lora_rank=o.shape[2], qk_rope_head_dim=head_dim - o.shape[2]
    )


def bind_cache(
    op: str,
    kv_buffer: torch.Tensor,
    dims: MLADims,
    page_size: int,
    kv_scale: torch.Tensor | None,
) -> LatentCache:
    """Bind ``kv_buffer`` in the layout its shape and dtype stand for."""
    if page_size < 1:
        raise LayoutError(f"{op}: page_size must be >= 1, got {page_size}")
    if kv_buffer.dtype == torch.uint8:
        if kv_buffer.ndim != 2 or kv_buffer.shape[1] != page_size * BYTE_ROW:
            raise LayoutError(
                f"{op}: kv_buffer of uint8 must be [num_page, page_size * {BYTE_ROW}]="
                f"[num_page, {page_size * BYTE_ROW}], got {tuple(kv_buffer.shape)}; "
                "fp8 caches are passed with an fp8 dtype"
            )
        is_fnuz = fp8_of_arch(arch_of(kv_buffer.device)) == "fp8_e4m3fnuz"
        layout = "fp8_seg656_fnuz" if is_fnuz else "fp8_seg656"
        return LatentCache.bind(layout, dims, page_size, kv_buffer)
    expected = (page_size, 1, dims.latent_dim)
    if kv_buffer.ndim != 4 or tuple(kv_buffer.shape[1:]) != expected:
        raise LayoutError(
            f"{op}: kv_buffer must be [num_page, page_size, 1, head_dim]="
            f"[num_page, {page_size}, 1, {dims.latent_dim}] to match q and page_size, "
            f"got {tuple(kv_buffer.shape)}"
        )
    if kv_buffer.dtype not in _LAYOUT_OF:
        raise LayoutError(
            f"{op}: kv_buffer must be {', '.join(map(dtype_name, _LAYOUT_OF))} or uint8, "
            f"got {kv_buffer.dtype}"
        )
    scale = None
    if dtype_name(kv_buffer.dtype) in FP8_DTYPES:
        scale = kv_buffer.new_ones(1, dtype=torch.float32)
        if kv_scale is not None:
            scale = as_scale(op, "kv_scale", kv_scale, kv_buffer.device)
    layout = _LAYOUT_OF[kv_buffer.dtype]
    return LatentCache.bind(layout, dims, page_size, kv_buffer, scale=scale)


def as_scale(op: str, name: str, scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a dequantisation factor, given as fp32 [1] or as a scalar tensor, as fp32 [1]."""
    if scale.numel() != 1:
        raise LayoutError(f"{op}: {name} must be fp32 with one element, got {tuple(scale.shape)}")
    scale = scale.reshape(1)
    check_tensor(op, name, scale, shape=(1,), dtypes=(torch.float32,), device=device)
    return scale


def query_scale(
    op: str, q: torch.Tensor, q_scale: torch.Tensor | None, kv_scale: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the scale of fp8 queries, which come with both scales; ``None`` for other dtypes."""
    if dtype_name(q.dtype) not in FP8_DTYPES:
        return None
    for name, scale in (("q_scale", q_scale), ("kv_scale", kv_scale)):
        if scale is None:
            raise LayoutError(f"{op}: {name} must be given for {q.dtype} queries, got None")
    assert q_scale is not None
    return as_scale(op, "q_scale", q_scale, q.device)


def paged_batch(
    cache: LatentCache,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
) -> PagedKV:
    """Bind the CSR arrays, with last page lengths that mean what ours mean.

    aiter never reads the last page length of an empty request, nor any with one token per page, so
    callers leave anything there.
    """
    if kv_indptr.numel() == kv_last_page_lens.numel() + 1 and kv_indptr.ndim == 1:
        has_pages = kv_indptr.diff() > 0
        used = has_pages.int() if cache.page_size == 1 else kv_last_page_lens
        kv_last_page_lens = torch.where(has_pages, used, 0)
    return PagedKV.from_csr(cache, kv_indptr, kv_indices, kv_last_page_lens)
