"""Balanced schedule of a decode step in one sweep; the default planner.

Every workgroup gets the same budget ``payload`` of blocks. Each piece costs its blocks plus a fixed
overhead. Tiles are dealt out in order: a workgroup finishes tiles while their rest and the overhead
fit what is left of its budget, then spends what remains beyond the overhead on a piece of the next
tile. Only the hand-over from one workgroup to the next is sequential: which tiles a workgroup
finishes is a binary search in the prefix sums of the cost.

The schedule is that of the "v1.2" metadata of AITER (ROCm/aiter), with these repairs: tiles without
visible entries have a work, trimming follows each tile's true rows, and folded heads work with
ragged query lengths and any page size.
"""

from __future__ import annotations

from bisect import bisect_right

import torch

from mla_core.metadata.profile import DeviceProfile, ceil_div
from mla_core.metadata.ragged import check_one_kv_head, ragged
from mla_core.metadata.tiles import Cuts, QueryTiles, assemble, dense_tiles, sparse_tiles
from mla_core.metadata.tiling import HeadTiling, Shape, head_tiling, workgroups_per_cu
from mla_core.metadata.worklist import WorkList

#: Tokens read in the time a piece costs on top of its blocks.
OVERHEAD_TOKENS = 16


def plan_v1_2(
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
    topk: int = -1,
    max_split_per_batch: int = -1,
    is_cp_round_robin: bool = False,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    tiling: HeadTiling | None = None,
) -> WorkList:
    """Plan a decode step on the host.

    Parameters
    ----------
    qo_indptr, kv_indptr : [batch_size + 1], int32, CPU
        Prefix sums of query tokens and of cache pages; start at 0.
    kv_last_page_len : [batch_size], int32, CPU
        Tokens in the last page; used when ``page_size > 1``.
    num_heads, num_heads_k : int
        Local query heads before folding; ``num_heads_k`` must be 1.
    profile : DeviceProfile
        The machine the schedule is for.
    is_causal : bool
        Leave out entries that the bottom-right aligned mask hides from a whole tile.
    page_size, kv_granularity : int
        Tokens per page, any number; pages per block, a power of two.
    max_seqlen_qo : int
        Most query tokens of a request; below 1 when unknown.
    uni_seqlen_qo : int
        When >= 1, every request has this many query tokens and ``qo_indptr`` is not used.
    topk : int
        When >= 0, every query token attends to ``min(kv_len, topk)`` entries of an index row of
        its own, ``ceil(topk / page_size)`` wide.
    max_split_per_batch : int
        When >= 0, aim at no more pieces per request than this.
    is_cp_round_robin : bool
        The cache holds every W-th token of each request, so positions say nothing of causality.
    q_dtype, kv_dtype : str
        Short dtype names; with ``num_heads`` they decide tiling and folding.
    tiling : HeadTiling, optional
        How the kernel tiles query rows, when it is not one of the table's.

    Returns
    -------
    WorkList

    Raises
    ------
    LayoutError
        An argument is not what it must be.
    UnsupportedProblemError
        ``num_heads`` or ``num_heads_k`` suit no kernel of the architecture.
    """
    check_one_kv_head("plan_v1_2", num_heads_k)
    batch = ragged(
        "plan_v1_2",
        qo_indptr,
        kv_indptr,
        kv_last_page_len,
        page_size=page_size,
        kv_granularity=kv_granularity,
        uni_seqlen_qo=uni_seqlen_qo,
    )
    q_len = 1 if topk >= 0 else max_seqlen_qo
    tiling = tiling or head_tiling("plan_v1_2", num_heads, q_len, q_dtype, kv_dtype, profile)
    if topk >= 0:
        tiles = sparse_tiles(batch, topk, tiling.fold)
        rows = int(batch.q_len.sum()) * tiling.fold
    else:
        counts = [tiling.num_tiles(n) for n in batch.q_len.tolist()]
        trims = is_causal and not is_cp_round_robin
        tiles = dense_tiles(batch, counts, tiling.fold, trims=trims)
        rows = batch.batch_size * tiling.fold
    shape = Shape.of(num_heads, max_seqlen_qo, q_dtype, kv_dtype, profile)
    workgroups = profile.num_cu * workgroups_per_cu(shape)
    shares = workgroups
    if max_split_per_batch >= 0:
        shares = max(1, min(workgroups, max_split_per_batch * rows))
    return assemble(tiles, *_sweep(tiles, workgroups, shares))


def overhead_blocks(page_size: int) -> int:
    """Cost of a piece beyond its blocks, in blocks."""
    return max(1, ceil_div(OVERHEAD_TOKENS, page_size))


def _sweep(tiles: QueryTiles, workgroups: int, shares: int) -> tuple[Cuts, torch.Tensor]:
    """Deal out all tiles; return the cuts and the prefix sums of pieces per workgroup."""
    overhead = overhead_blocks(tiles.page_size)
    cost = [0, *(tiles.blocks + overhead).cumsum(0).tolist()]  # of all tiles before each
    pages, q_len = tiles.kv_pages.tolist(), tiles.q_len.tolist()
    num_tiles = len(pages)
    payload = ceil_div(cost[-1], shares) + overhead
    cut_tile: list[int] = []
    cut_page: list[int] = []
    work_indptr = [0]
    tile = done = 0  # `done` blocks of `tile` are dealt out
    for _ in range(workgroups):
        if tile < num_tiles:
            limit = cost[tile] + done + payload
            first = bisect_right(cost, limit, lo=tile) - 1  # tile that does not fit any more
            left = payload
            if first > tile:
                tile, done, left = first, 0, limit - cost[first]
            if tile < num_tiles and left > overhead:
                done += left - overhead
                page = done * tiles.kv_granularity
                # A causal mask reaches q_len - 1 tokens back: keep those in one piece.
                if tiles.page_size == 1 and pages[tile] - page < q_len[tile]:
                    tile, done = tile + 1, 0
                else:
                    cut_tile.append(tile)
                    cut_page.append(page)
        work_indptr.append(tile + len(cut_tile))
    assert tile == num_tiles, "the payload covers every tile"
    cuts = Cuts(
        torch.tensor(cut_tile, dtype=torch.int64), torch.tensor(cut_page, dtype=torch.int64)
    )
    return cuts, torch.tensor(work_indptr)
