"""How many parts to cut every request's cache into, when all requests get the same number.

A split grid of ``batch_size * n`` workgroups runs in waves of ``num_cu``. More splits fill the last
wave better but each costs a fixed time, so the choice maximises

    occupancy(n) * efficiency(n),  occupancy(n) = work / (waves * num_cu),
    efficiency(n) = avg / (avg + 84.1 * n)

where ``avg`` is the mean number of cached index entries per request. The rule, its constant and
the floor table of fp8 queries are those of AITER's MLA decode (ROCm/aiter), so that both choose
alike.
"""

from __future__ import annotations

import torch

from mla_core.dtypes import FP8_DTYPES
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata.profile import DeviceProfile, ceil_div

MAX_SPLITS = 16
#: Cost of one more split, in cached entries read in the same time.
SPLIT_COST = 84.1
#: Fewest tokens an fp8 split may hold, by ``num_heads * q_len``.
FP8_MIN_TOKENS = {8: 64, 16: 128, 24: 128, 32: 128, 48: 64, 64: 64} | {
    rows: 32 for rows in (128, 256, 384, 512)
}


def choose_num_kv_splits(
    batch_size: int,
    total_kv: int,
    *,
    num_heads: int,
    q_len: int,
    q_dtype: str,
    profile: DeviceProfile,
    num_kv_splits: int | None = None,
    tile_groups: int = 1,
    ignore_total_kv: bool = False,
) -> int:
    """Choose one split count for every request of a batch.

    Parameters
    ----------
    batch_size, total_kv : int
        Requests, and index entries (pages) over all of them.
    num_heads, q_len, q_dtype : int, int, str
        Query heads, query tokens per request, short dtype name.
    profile : DeviceProfile
    num_kv_splits : int, optional
        A wish; fp8 queries may still lower it, so that no split becomes too short.
    tile_groups : int
        Workgroups per request and split.
    ignore_total_kv : bool
        Choose by occupancy alone.

    Returns
    -------
    int
        At least 1; at most 16 unless a larger number was asked for.

    Raises
    ------
    LayoutError
        A count is out of range.
    UnsupportedProblemError
        fp8 queries with a ``num_heads * q_len`` that has no shortest split.
    """
    for name, value in (("batch_size", batch_size), ("tile_groups", tile_groups)):
        if value < 1:
            raise LayoutError(f"choose_num_kv_splits: {name} must be >= 1, got {value}")
    if total_kv < 0:
        raise LayoutError(f"choose_num_kv_splits: total_kv must be >= 0, got {total_kv}")
    if num_kv_splits is not None and num_kv_splits < 1:
        raise LayoutError(
            f"choose_num_kv_splits: num_kv_splits must be None or >= 1, got {num_kv_splits}"
        )
    splits = num_kv_splits
    if splits is None:
        average = None if ignore_total_kv else total_kv / batch_size
        splits = _best_split(batch_size * tile_groups, average, profile.num_cu)
    if q_dtype in FP8_DTYPES and not ignore_total_kv:
        shortest = _shortest_fp8_split(num_heads * q_len)
        splits = min(splits, max(1, ceil_div(total_kv, batch_size * shortest)))
        if splits > 1:
            splits = min(splits, int(abs(total_kv / batch_size - q_len) // shortest) + 1)
    return splits


def split_indptr(batch_size: int, num_kv_splits: int, device: torch.device) -> torch.Tensor:
    """Return int32 ``[0, n, 2n, ..., batch_size * n]``, the splits of each request."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * num_kv_splits


def _best_split(workgroups: int, average_kv: float | None, num_cu: int) -> int:
    """First split count with the best product of occupancy and efficiency."""

    def score(splits: int) -> float:
        total = workgroups * splits
        occupancy = total / (ceil_div(total, num_cu) * num_cu)
        if average_kv is None:
            return occupancy
        return occupancy * average_kv / (average_kv + SPLIT_COST * splits)

    return max(range(1, MAX_SPLITS + 1), key=score)


def _shortest_fp8_split(rows: int) -> int:
    try:
        return FP8_MIN_TOKENS[rows]
    except KeyError:
        accepted = ", ".join(map(str, FP8_MIN_TOKENS))
        raise UnsupportedProblemError(
            f"choose_num_kv_splits: num_heads * q_len must be one of {accepted} for fp8 queries, "
            f"got {rows}; give num_kv_splits and its indptr yourself"
        ) from None
