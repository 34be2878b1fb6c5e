"""Writers of latent caches under the names that engines call: thin forms of `write_kv_cache`."""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import fp8_of_arch
from mla_core.errors import LayoutError
from mla_core.layouts import Layout, arrange, get
from mla_core.layouts.codecs import Cast
from mla_core.ops import write_kv_cache
from mla_fusions.compiling import uncompiled

ROWS = (torch.bfloat16, torch.float16, torch.float32)
SLOTS = (torch.int64, torch.int32)
FP8_WORDS = ("fp8", "fp8_e4m3")
_NAME_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SUFFIX_OF = {torch.float8_e4m3fn: "", torch.float8_e4m3fnuz: "_fnuz"}

#: Pages of two segments without scales, which the catalog of layouts has in fp8 alone.
_SEGMENTED = {
    dtype: Layout(
        f"{name}_seg",
        "seg576",
        f"{name} latents, then ropes",
        Cast(name),
        Cast(name),
        arrange.segmented,
    )
    for dtype, name in _NAME_OF.items()
}


@uncompiled
def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """Write ``kv_c`` followed by ``k_pe`` into each token's slot, in place.

    Call-compatible with the op of the same name in ROCm/aiter and vLLM.

    Parameters
    ----------
    kv_c : [>= T, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [>= T, r], like ``kv_c``
    kv_cache : [num_blocks, block_size, c + r], dense inside a block
        Of the dtype of ``kv_c`` for ``"auto"``, fp8 or uint8 for ``"fp8"``; uint8 then holds the
        flavour of the device. For ``"fp8_ds_mla"`` uint8 [num_blocks, block_size, 656].
    slot_mapping : [T], int64 or int32
        ``block * block_size + offset``, distinct; a negative one skips its token, and tokens
        past its end are not written.
    kv_cache_dtype : str
        ``"auto"`` copies bits, ``"fp8"`` or ``"fp8_e4m3"`` store ``x / scale``, and
        ``"fp8_ds_mla"`` FlashMLA's token, with a scale for each 128 numbers.
    scale : fp32, one element
        Read for ``"fp8"`` alone.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from the originals: numbers beyond the range of fp8 saturate, where some of them
    store NaN; slots past the end of the cache are refused on the CPU and under ``MLA_CHECK=1``,
    and skipped by the Triton kernel; wrong shapes and dtypes raise. Any backend may run.
    """
    op = "concat_and_cache_mla"
    dims = _dims(op, kv_c, k_pe)
    layout = _layout_of(op, kv_c, kv_cache, kv_cache_dtype, by_group=True)
    width = 656 if layout.family == "ds656" else dims.latent_dim
    shape = ("num_blocks", "block_size", width)
    if kv_cache.ndim == 4 and kv_cache.shape[2] == 1:
        kv_cache = kv_cache[:, :, 0]
    dtypes = (kv_cache.dtype,)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=kv_c.device)
    write(op, layout, dims, kv_cache.shape[1], kv_cache, kv_c, k_pe, slot_mapping, scale)


@uncompiled
def concat_and_cache_mla_seg(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """Write rows into pages of two segments, every token's latent and then every token's rope.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    kv_c, k_pe, slot_mapping, kv_cache_dtype, scale
        As in `concat_and_cache_mla`, without ``"fp8_ds_mla"``.
    kv_cache : [num_blocks, page_size * (c + r)], dense inside a block
        Of the dtype of ``kv_c`` for ``"auto"``, fp8 or uint8 for ``"fp8"``.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter: as for `concat_and_cache_mla`, and the page size follows from the shape
    of a block, so blocks may have gaps between them; aiter derives it from their stride.
    """
    op = "concat_and_cache_mla_seg"
    dims = _dims(op, kv_c, k_pe)
    layout = _layout_of(op, kv_c, kv_cache, kv_cache_dtype, by_group=False)
    shape, dtypes = ("num_blocks", f"page_size * {dims.latent_dim}"), (kv_cache.dtype,)
    check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=kv_c.device)
    page_size, rest = divmod(kv_cache.shape[1], dims.latent_dim)
    if rest or not page_size:
        raise LayoutError(
            f"{op}: kv_cache must be [num_blocks, page_size * {dims.latent_dim}], got "
            f"{tuple(kv_cache.shape)}"
        )
    if kv_cache_dtype == "auto":
        layout = _SEGMENTED[kv_c.dtype]
    else:
        layout = get(layout.name.replace("fp8", "fp8_seg576"))
    pages = kv_cache.view(torch.uint8)
    write(op, layout, dims, page_size, pages, kv_c, k_pe, slot_mapping, scale)


def as_scale(
    op: str, name: str, scale: torch.Tensor | float | None, device: torch.device
) -> torch.Tensor:
    """Return a dequantisation factor as fp32 [1]; None is 1, a number is copied to the device.

    Raises
    ------
    LayoutError
        It is not one element of fp32 on the device.
    """
    if scale is None or not isinstance(scale, torch.Tensor):
        return torch.full((1,), 1.0 if scale is None else float(scale), device=device)
    if scale.numel() != 1:
        raise LayoutError(f"{op}: {name} must be fp32 with one element, got {tuple(scale.shape)}")
    scale = scale.reshape(1)
    check_tensor(op, name, scale, shape=(1,), dtypes=(torch.float32,), device=device)
    return scale


def _dims(op: str, kv_c: torch.Tensor, k_pe: torch.Tensor) -> MLADims:
    device, dtypes = kv_c.device, (kv_c.dtype,)
    check_tensor(op, "kv_c", kv_c, shape=("num_tokens", "c"), dtypes=ROWS, device=device)
    shape = (kv_c.shape[0], "r")
    check_tensor(op, "k_pe", k_pe, shape=shape, dtypes=dtypes, device=device)
    return MLADims(1, kv_c.shape[1], k_pe.shape[1])


def _layout_of(
    op: str, kv_c: torch.Tensor, kv_cache: torch.Tensor, kv_cache_dtype: str, *, by_group: bool
) -> Layout:
    """Return the standard layout, or FlashMLA's, that a cache's dtype and the word stand for."""
    words = ("auto", *FP8_WORDS, *(("fp8_ds_mla",) if by_group else ()))
    if kv_cache_dtype not in words:
        raise LayoutError(
            f"{op}: kv_cache_dtype must be one of {', '.join(words)}, got {kv_cache_dtype!r}"
        )
    if kv_cache_dtype == "auto":
        if kv_cache.dtype != kv_c.dtype:
            raise LayoutError(
                f"{op}: kv_cache must be {kv_c.dtype} like kv_c for 'auto', got {kv_cache.dtype}"
            )
        return get(_NAME_OF[kv_c.dtype])
    if kv_cache_dtype == "fp8_ds_mla":
        if kv_cache.dtype != torch.uint8:
            raise LayoutError(
                f"{op}: kv_cache must be uint8 for 'fp8_ds_mla', got {kv_cache.dtype}"
            )
        return get("fp8_ds656" + fp8_suffix(op, "kv_cache", kv_cache))
    return get("fp8" + fp8_suffix(op, "kv_cache", kv_cache))


def fp8_suffix(op: str, name: str, cache: torch.Tensor) -> str:
    """Return "" for e4m3 and "_fnuz" for e4m3fnuz; bytes are the flavour of their device.

    Raises
    ------
    LayoutError
        The cache is neither fp8 nor bytes.
    """
    if cache.dtype == torch.uint8:
        return "_fnuz" if fp8_of_arch(arch_of(cache.device)) == "fp8_e4m3fnuz" else ""
    suffix = _SUFFIX_OF.get(cache.dtype)
    if suffix is None:
        raise LayoutError(
            f"{op}: {name} must be float8_e4m3fn, float8_e4m3fnuz or uint8 for fp8, got "
            f"{cache.dtype}"
        )
    return suffix


def check_dense(op: str, kv_cache: torch.Tensor, name: str = "kv_cache") -> None:
    """Check that tokens [num_blocks, block_size, row] of a block stand one behind the other.

    Raises
    ------
    LayoutError
    """
    if kv_cache.shape[1] > 1 and kv_cache.stride(1) != kv_cache.shape[2]:
        raise LayoutError(
            f"{op}: {name} must be dense inside a block, got strides {kv_cache.stride()} for "
            f"shape {tuple(kv_cache.shape)}"
        )


def keys_layout(
    op: str, kv_cache: torch.Tensor, dims: MLADims, *, is_shuffled: bool
) -> tuple[Layout, int]:
    """Return the layout that the dtype of `cat_and_cache_mla`'s cache stands for, and its width."""
    width = dims.latent_dim
    dtype = kv_cache.dtype
    if is_shuffled:
        if dtype == torch.uint8:
            return get("nvfp4_shuffled"), width * 9 // 16
        names = {torch.bfloat16: "shuffled_bf16"}
        names |= {each: f"shuffled_fp8{suffix}" for each, suffix in _SUFFIX_OF.items()}
    else:
        names = dict(_NAME_OF)
        names |= {each: f"fp8{suffix}" for each, suffix in _SUFFIX_OF.items()}
    if dtype not in names:
        accepted = [*names, *((torch.uint8,) if is_shuffled else ())]
        raise LayoutError(
            f"{op}: kv_cache must be one of {', '.join(map(str, accepted))} with "
            f"shuffled_kv_cache={is_shuffled}, got {dtype}"
        )
    return get(names[dtype]), width


def write(
    op: str,
    layout: Layout,
    dims: MLADims,
    page_size: int,
    kv_cache: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | float | None,
) -> None:
    """Bind the cache and write as many rows as there are slots."""
    device = kv_c.device
    check_tensor(op, "slot_mapping", slots, shape=("T",), dtypes=SLOTS, device=device)
    num_tokens = slots.shape[0]
    if num_tokens > kv_c.shape[0]:
        raise LayoutError(
            f"{op}: slot_mapping must have at most as many slots as there are rows, "
            f"{kv_c.shape[0]}, got {num_tokens}"
        )
    if kv_cache.ndim == 3:
        check_dense(op, kv_cache)
    factor = as_scale(op, "scale", scale, device) if layout.needs_scale else None
    cache = LatentCache.bind(layout, dims, page_size, kv_cache, scale=factor)
    write_kv_cache(kv_c[:num_tokens], k_pe[:num_tokens], cache, slots)
