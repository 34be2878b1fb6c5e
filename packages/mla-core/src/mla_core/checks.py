"""Argument checks shared by the public ops. Each failure names the argument and its value."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_core.cache import LatentCache
from mla_core.errors import LayoutError


def check_tensor(
    op: str,
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Check rank, sizes, dtype, device and a contiguous last dimension.

    ``shape`` mixes sizes and names; a name accepts any size and stands in the message.

    Raises
    ------
    LayoutError
    """
    expected = f"[{', '.join(map(str, shape))}]"
    if tensor.ndim != len(shape) or any(
        isinstance(want, int) and want != got
        for want, got in zip(shape, tensor.shape, strict=False)
    ):
        raise LayoutError(f"{op}: {name} must be {expected}, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LayoutError(f"{op}: {name} must be {wanted}, got {tensor.dtype}")
    if tensor.device != device:
        raise LayoutError(f"{op}: {name} must be on {device}, got {tensor.device}")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise LayoutError(
            f"{op}: {name} must have a contiguous last dimension, got strides {tensor.stride()}; "
            "call .contiguous()"
        )


def visible_slots(
    indices: torch.Tensor, num_slots: int, topk_length: torch.Tensor | None
) -> torch.Tensor:
    """Return the slots that sparse attention reads, as int64 with -1 for masked entries.

    Parameters
    ----------
    indices : [total_q, topk], int32
        Entries below 0 or not below ``num_slots`` are masked.
    topk_length : [total_q], int32, or None
        Entries from ``topk_length[t]`` on are masked in row ``t``.
    """
    is_valid = (indices >= 0) & (indices < num_slots)
    if topk_length is not None:
        column = torch.arange(indices.shape[1], device=indices.device)
        is_valid &= column < topk_length[:, None]
    return torch.where(is_valid, indices.long(), -1)


def check_live_rows(op: str, cache: LatentCache, slots: torch.Tensor) -> None:
    """Raise when a live cache row holds a NaN (``MLA_CHECK=1`` only: reads every row).

    Raises
    ------
    LayoutError
    """
    live = slots[slots >= 0]
    for part in live.split(65536):
        kv_c, k_pe = cache.read(part, torch.float32)
        bad = kv_c.isnan().any(1) | k_pe.isnan().any(1)
        if bool(bad.any()):
            slot = int(part[bad.int().argmax()])
            raise LayoutError(
                f"{op}: live cache rows must not hold NaN, got one in slot {slot}; "
                "was the row written?"
            )
