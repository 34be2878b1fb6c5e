"""Upper bounds of a work list, so that its buffers can be allocated before lengths are known.

A schedule cuts at most once per workgroup boundary. With ``n`` query tiles and ``g`` workgroups it
has at most ``n + g - 1`` works, and a tile that is cut contributes its pieces as partials: at most
two per cut, and at most one per cut plus one per tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mla_core.errors import LayoutError
from mla_core.metadata.profile import DeviceProfile, ceil_div
from mla_core.metadata.tiling import HeadTiling, Shape, buffer_tiles, workgroups_per_cu


@dataclass(frozen=True, slots=True)
class WorkListSizes:
    """Buffer lengths of a work list.

    Parameters
    ----------
    num_workgroups : int
        ``work_indptr`` has one entry more.
    max_works : int
        Rows of ``work_info``.
    max_tiles : int
        Rows of ``reduce_final_map``; ``reduce_indptr`` has one entry more.
    max_partials : int
        Length of ``reduce_partial_map``.
    """

    num_workgroups: int
    max_works: int
    max_tiles: int
    max_partials: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each int32 buffer, by its name in `WorkList`."""
        return {
            "work_indptr": (self.num_workgroups + 1,),
            "work_info": (self.max_works, 8),
            "reduce_indptr": (self.max_tiles + 1,),
            "reduce_final_map": (self.max_tiles, 2),
            "reduce_partial_map": (self.max_partials,),
        }


def decode_sizes(
    batch_size: int,
    max_seqlen_qo: int,
    num_heads: int,
    *,
    profile: DeviceProfile,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    is_sparse: bool = False,
    fast_mode: bool = True,
    num_kv_splits: int = 32,
    intra_batch_mode: bool = False,
    max_split_per_batch: int = -1,
    tiling: HeadTiling | None = None,
) -> WorkListSizes:
    """Bound the work lists of the decode planners for any lengths of a batch.

    Parameters
    ----------
    batch_size, max_seqlen_qo, num_heads : int
        Most requests, most query tokens of one, local query heads before folding.
    is_sparse : bool
        Every query token attends to an index list of its own.
    fast_mode : bool
        For `plan_v1_2`; else for `plan_v1_1`, or `plan_v1_0` with ``intra_batch_mode``.
    num_kv_splits : int
        Most pieces of a tile; only with ``intra_batch_mode``.
    max_split_per_batch : int
        As given to the planner; below 1 for no limit.
    tiling : HeadTiling, optional
        As given to `plan_v1_2`: the bounds are then tight, and those of ``fast_mode`` alone.

    Raises
    ------
    LayoutError
        A count is out of range.
    """
    _at_least("decode_sizes", "batch_size", batch_size, 0)
    for name, value in (
        ("max_seqlen_qo", max_seqlen_qo),
        ("num_heads", num_heads),
        ("num_kv_splits", num_kv_splits),
    ):
        _at_least("decode_sizes", name, value, 1)
    shape = Shape.of(num_heads, max_seqlen_qo, q_dtype, kv_dtype, profile)
    workgroups = profile.num_cu * workgroups_per_cu(shape)
    rows = batch_size * max_seqlen_qo if is_sparse else batch_size
    if tiling is not None:
        per_row = 1 if is_sparse else tiling.max_tiles(max_seqlen_qo)
        tiles, cuts = rows * tiling.fold * per_row, workgroups - 1
        return WorkListSizes(workgroups, tiles + cuts, tiles, min(tiles + cuts, 2 * cuts))
    per_row = buffer_tiles(
        Shape.of(num_heads, 1 if is_sparse else max_seqlen_qo, q_dtype, kv_dtype, profile)
    )
    tiles = rows * per_row
    if intra_batch_mode:
        return WorkListSizes(workgroups, tiles * num_kv_splits, tiles, tiles * num_kv_splits)
    works = partials = tiles * workgroups
    if fast_mode:
        works = (rows + workgroups - 1) * per_row
        partials = min(rows + workgroups - 1, 2 * (workgroups - 1)) * per_row
    if max_split_per_batch > 0:
        partials = max(partials, tiles + min(workgroups, max_split_per_batch * rows))
    return WorkListSizes(workgroups, works, tiles, partials)


def prefill_sizes(
    batch_size: int,
    num_heads_k: int,
    max_qlen: int,
    *,
    profile: DeviceProfile,
    qlen_granularity: int = 256,
) -> WorkListSizes:
    """Bound the work lists of `plan_prefill` for any lengths of a batch.

    Raises
    ------
    LayoutError
        A count is out of range.
    """
    _at_least("prefill_sizes", "batch_size", batch_size, 0)
    for name, value in (
        ("num_heads_k", num_heads_k),
        ("max_qlen", max_qlen),
        ("qlen_granularity", qlen_granularity),
    ):
        _at_least("prefill_sizes", name, value, 1)
    per_cluster = profile.num_cu // math.gcd(num_heads_k, profile.num_cu)
    per_row = ceil_div(max_qlen, qlen_granularity)
    cuts = per_cluster - 1
    return WorkListSizes(
        num_workgroups=profile.num_cu,
        max_works=(batch_size + cuts) * per_row * num_heads_k,
        max_tiles=batch_size * per_row,
        max_partials=min(batch_size + cuts, 2 * cuts) * per_row,
    )


def _at_least(op: str, name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise LayoutError(f"{op}: {name} must be >= {minimum}, got {value}")
