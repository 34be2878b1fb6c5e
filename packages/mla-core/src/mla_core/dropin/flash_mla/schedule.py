"""What `flash_mla_with_kvcache` takes as schedule: the lazy object or the older tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.plan import DecodePlan

#: Ints of one row of ``tile_scheduler_metadata``.
SCHEDULE_WIDTH = 8

#: Query rows (tokens times heads) that one FlashMLA thread block works on.
_ROWS_PER_BLOCK = 64


@dataclass(slots=True, eq=False)
class FlashMLASchedMeta:
    """Scheduler state that `flash_mla_with_kvcache` fills at its first dense call.

    It keeps the plan for the next layers of a step. Plans read all lengths from device memory, so
    unlike FlashMLA's object it never goes stale: a call with other shapes plans again, and changed
    lengths need nothing, inside a captured CUDA graph as well.
    """

    plan: DecodePlan | None = None
    planned_for: tuple[object, ...] = ()


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta | torch.Tensor, torch.Tensor | None]:
    """Return what `flash_mla_with_kvcache` takes as schedule.

    Parameters
    ----------
    cache_seqlens : [B], int32, optional
        Without it the result is ``(FlashMLASchedMeta(), None)``, the form of current versions.
    num_q_tokens_per_head_k : int
        Query tokens per request times query heads, with ``cache_seqlens`` only, like the rest.
    num_heads_k : int
        Must be 1.
    num_heads_q : int, optional
    is_fp8_kvcache : bool
    topk : int, optional
        With sparse attention, the number of indices per query token.

    Returns
    -------
    tile_scheduler_metadata : FlashMLASchedMeta, or [num_sm_parts, 8] int32
    num_splits : None, or [B + 1] int32
        Prefix sums of the splits of each request.

    Raises
    ------
    LayoutError

    Notes
    -----
    In the older, tensor form both tensors describe a valid schedule, each request whole on one of
    the parts, made without a host sync. It is advisory: each backend schedules itself. A row holds
    first request, first token, last request, end of its tokens, first split, and three zeros;
    a part without work starts at request B.
    """
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    op = "get_mla_metadata"
    device, int32 = cache_seqlens.device, (torch.int32,)
    check_tensor(op, "cache_seqlens", cache_seqlens, shape=("B",), dtypes=int32, device=device)
    if num_q_tokens_per_head_k is None or num_q_tokens_per_head_k < 1:
        raise LayoutError(
            f"{op}: num_q_tokens_per_head_k must be >= 1 with cache_seqlens, "
            f"got {num_q_tokens_per_head_k}"
        )
    if num_heads_k != 1:
        raise LayoutError(f"{op}: num_heads_k must be 1, got {num_heads_k}; MLA has one key head")
    del num_heads_q, is_fp8_kvcache
    batch_size = cache_seqlens.numel()
    blocks = -(-num_q_tokens_per_head_k // _ROWS_PER_BLOCK)
    num_parts = max(1, _num_processors(device) // blocks)
    part = torch.arange(num_parts + 1, dtype=torch.int32, device=device)
    bounds = part * batch_size // num_parts
    first, last = bounds[:-1], bounds[1:] - 1
    has_work = last >= first
    schedule = cache_seqlens.new_zeros((num_parts, SCHEDULE_WIDTH))
    schedule[:, 0] = torch.where(has_work, first, batch_size)
    schedule[:, 2] = torch.where(has_work, last, batch_size)
    if batch_size:
        ends = cache_seqlens[last.clamp(min=0).long()]
        ends = ends if topk is None else torch.full_like(ends, topk)
        schedule[:, 3] = torch.where(has_work, ends, 0)
    return schedule, torch.arange(batch_size + 1, dtype=torch.int32, device=device)


def check_schedule(
    op: str,
    q: torch.Tensor,
    schedule: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None,
) -> None:
    """Check that the two arguments are what `get_mla_metadata` returns, in either form."""
    if isinstance(schedule, FlashMLASchedMeta):
        if num_splits is not None:
            raise LayoutError(
                f"{op}: num_splits must be None with a FlashMLASchedMeta, "
                f"got {tuple(num_splits.shape)}"
            )
        return
    if not isinstance(schedule, torch.Tensor) or num_splits is None:
        raise LayoutError(
            f"{op}: tile_scheduler_metadata and num_splits must be the two results of "
            f"get_mla_metadata, got {type(schedule).__name__} and {type(num_splits).__name__}"
        )
    int32, device = (torch.int32,), q.device
    name, shape = "tile_scheduler_metadata", ("num_sm_parts", SCHEDULE_WIDTH)
    check_tensor(op, name, schedule, shape=shape, dtypes=int32, device=device)
    splits_shape = (q.shape[0] + 1,)
    check_tensor(op, "num_splits", num_splits, shape=splits_shape, dtypes=int32, device=device)


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
