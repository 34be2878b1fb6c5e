"""Longest request first, each piece to the least loaded workgroup.

A piece of ``q`` packed query rows over ``kv`` tokens costs ``2 * q + kv``. Workgroups are filled up
to a common limit somewhat above the mean load; the more a cut costs, the higher the limit. A tile
is cut when its workgroup reaches the limit, but never into pieces shorter than a floor.

The schedule follows the "v1.1" metadata of AITER (ROCm/aiter).
"""

from __future__ import annotations

import heapq
from dataclasses import replace

import torch

from mla_core.metadata.profile import DeviceProfile, ceil_div, round_up
from mla_core.metadata.ragged import check_one_kv_head, ragged
from mla_core.metadata.tiles import Cuts, QueryTiles, assemble, dense_tiles, indptr_of
from mla_core.metadata.tiling import DEFAULT_PACKED_ROWS, head_tiling
from mla_core.metadata.worklist import WorkList

#: A rest of no more tokens than this joins the piece before it.
MAX_TAIL = 16
#: Cost of one packed query row, in cached tokens.
ROW_COST = 2
#: Load limits for small mean loads: (largest mean load, limit).
SMALL_LIMITS = ((8, 32), (16, 64), (32, 128), (64, 192))


def plan_v1_1(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    num_heads: int,
    profile: DeviceProfile,
    num_heads_k: int = 1,
    is_causal: bool = True,
    page_size: int = 1,
    kv_granularity: int = 16,
    max_seqlen_qo: int = -1,
    uni_seqlen_qo: int = -1,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
) -> WorkList:
    """Plan a decode step by load, on the host.

    Parameters, result and errors are those of `plan_v1_2`. The order of works within a workgroup is
    that of tiles, and the buffers are larger: `decode_sizes` with ``fast_mode=False``.
    """
    check_one_kv_head("plan_v1_1", num_heads_k)
    batch = ragged(
        "plan_v1_1",
        qo_indptr,
        kv_indptr,
        kv_last_page_len,
        page_size=page_size,
        kv_granularity=kv_granularity,
        uni_seqlen_qo=uni_seqlen_qo,
    )
    tiling = head_tiling("plan_v1_1", num_heads, max_seqlen_qo, q_dtype, kv_dtype, profile)
    tiling = replace(tiling, packed_rows=DEFAULT_PACKED_ROWS, one_tile=False)
    counts = [tiling.num_tiles(n) for n in batch.q_len.tolist()]
    tiles = dense_tiles(batch, counts, tiling.fold, trims=is_causal)
    rows = ((tiles.qo_end - tiles.qo_start) * tiling.num_heads).tolist()
    cost = [
        ROW_COST * q + kv * page_size for q, kv in zip(rows, tiles.visible.tolist(), strict=True)
    ]
    limit = load_limit(
        total=sum(cost),
        num_batches=batch.batch_size * tiling.fold,
        max_rows=max(rows, default=0),
        num_cu=profile.num_cu,
        granularity=kv_granularity * page_size,
    )
    cuts, owner = _deal(tiles, rows, limit, profile.num_cu)
    work_indptr = indptr_of(torch.bincount(owner, minlength=profile.num_cu))
    return assemble(tiles, cuts, work_indptr, owner)


def load_limit(
    *, total: int, num_batches: int, max_rows: int, num_cu: int, granularity: int
) -> int:
    """Load up to which a workgroup is filled before a tile is cut."""
    mean = max(1, ceil_div(total, num_cu))
    limit = next((small for largest, small in SMALL_LIMITS if mean <= largest), mean)
    cut_cost = ROW_COST * max_rows
    patience = 0.01 * num_batches + 0.01 * mean + 10
    return round_up(limit + int(patience * cut_cost), granularity)


def _deal(tiles: QueryTiles, rows: list[int], limit: int, num_cu: int) -> tuple[Cuts, torch.Tensor]:
    """Return the cuts, and the workgroup of each piece in order of tile and position."""
    visible, page_size = tiles.visible.tolist(), tiles.page_size
    floors = [
        round_up(ceil_div(pages, num_cu), tiles.kv_granularity) for pages in tiles.kv_pages.tolist()
    ]
    # Requests by falling cost, ties and tiles of a request in order.
    request_cost = ROW_COST * tiles.q_len + tiles.kv_pages * page_size
    order = request_cost.argsort(descending=True, stable=True).tolist()
    loads = [(0, workgroup) for workgroup in range(num_cu)]
    pieces: list[tuple[int, int, int]] = []  # tile, first entry, workgroup
    for tile in order:
        begin = 0
        while True:
            load, workgroup = loads[0]
            left = visible[tile] - begin
            take = min(left, max((limit - load) // page_size, floors[tile], 1))
            if (left - take) * page_size <= MAX_TAIL:
                take = left
            pieces.append((tile, begin, workgroup))
            load += ROW_COST * rows[tile] + take * page_size
            heapq.heapreplace(loads, (load, workgroup))
            begin += take
            if begin >= visible[tile]:
                break
    pieces.sort()
    tile_of, begins, owner = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 3).unbind(1)
    is_cut = begins > 0
    return Cuts(tile_of[is_cut], begins[is_cut]), owner
