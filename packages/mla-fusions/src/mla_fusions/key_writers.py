"""The writer of latent caches whose keys have heads, under the name that engines call."""

from __future__ import annotations

import torch

from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.errors import LayoutError
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS, as_scale, keys_layout, write
from mla_fusions.rope_writers import check_slots, keys_of
from mla_fusions.rotation import Rotation, queries_of, rotate_and_write


@uncompiled
def cat_and_cache_mla(
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    apply_scale: bool = True,
    shuffled_kv_cache: bool = False,
) -> None:
    """Write ``k_nope`` followed by ``k_pe`` for each key head, without rotating anything.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    k_nope : [>= T, h, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [>= T, h, r], like ``k_nope``
    kv_cache : [num_slots, h, c + r], or [num_blocks, h, block_size, c + r] if shuffled
        bf16, fp16, fp32 or fp8; dense inside a head, which may be any distance from the next.
        Shuffled ones may also be uint8 with ``(c + r) * 9 / 16`` columns, which is NVFP4.
    slot_mapping : [T], int64 or int32
        As in `concat_and_cache_mla`.
    k_scale : fp32, one element, or None
        Rows are divided by it before they are stored, unless it is None or not ``apply_scale``.
        A number is copied to the device in each call.
    apply_scale : bool
    shuffled_kv_cache : bool
        Blocks are stored in 16-token tiles of 16-byte lanes.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: rows are divided by the scale, not multiplied by its rounded
    reciprocal; fp8 saturates; fewer slots than rows are legal. Of one head, fp8 rows and rows
    without a scale are written by `mla_core.write_kv_cache`, so any backend may run.
    """
    op = "cat_and_cache_mla"
    device = k_nope.device
    shape: tuple[int | str, ...] = ("T", "heads", "c")
    check_tensor(op, "k_nope", k_nope, shape=shape, dtypes=ROWS, device=device)
    num_rows, heads, rank = k_nope.shape
    if not heads:
        raise LayoutError(f"{op}: k_nope must have a head or more, got {tuple(k_nope.shape)}")
    shape, dtypes = (num_rows, heads, "r"), (k_nope.dtype,)
    check_tensor(op, "k_pe", k_pe, shape=shape, dtypes=dtypes, device=device)
    check_slots(op, slot_mapping, num_rows, device)
    scale = None
    if k_scale is not None and apply_scale:
        scale = as_scale(op, "k_scale", k_scale, device)
    dims = MLADims(1, rank, k_pe.shape[2])
    layout, row = keys_layout(op, kv_cache, dims, is_shuffled=shuffled_kv_cache)
    if heads == 1 and (scale is None or layout.needs_scale):
        shape = ("num_blocks", 1, "block_size", row) if shuffled_kv_cache else ("num_slots", 1, row)
        dtypes = (kv_cache.dtype,)
        check_tensor(op, "kv_cache", kv_cache, shape=shape, dtypes=dtypes, device=device)
        page_size = kv_cache.shape[2] if shuffled_kv_cache else 1
        pages = kv_cache[:, 0] if shuffled_kv_cache else kv_cache
        rows = k_nope[:, 0], k_pe[:, 0]
        write(op, layout, dims, page_size, pages, *rows, slot_mapping, scale)
        return
    num_tokens = slot_mapping.shape[0]
    keys = keys_of(
        op,
        k_nope[:num_tokens],
        k_pe[:num_tokens],
        kv_cache,
        slot_mapping,
        scale,
        is_shuffled=shuffled_kv_cache,
    )
    # No queries, and nothing turns: positions and tables are not read.
    none = k_nope[:0, :, :0]
    turn = Rotation(slot_mapping, k_nope, k_nope, None, None)
    rotate_and_write(op, turn, queries_of(op, None, none, none, None), keys)
