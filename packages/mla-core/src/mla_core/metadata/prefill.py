"""Schedule of a prefill over persistent workgroups: equal shares of (query tile, KV range) area.

Query tiles of fixed size differ widely in work under a causal mask, so tiles of one request are
taken alternately from its front and back, and the running total of cache blocks is cut into equal
shares. There is no cost per piece, so the cuts follow from prefix sums alone.

Heads multiply the work evenly. Workgroups are divided into ``gcd(num_heads_k, num_cu)`` clusters;
each owns some KV heads and runs the same schedule for every one of them.

The schedule is that of AITER's "ps" metadata (ROCm/aiter).
"""

from __future__ import annotations

import math

import torch

from mla_core.errors import LayoutError
from mla_core.metadata.profile import DeviceProfile, ceil_div
from mla_core.metadata.ragged import check_host_tensors, check_units
from mla_core.metadata.tiles import indptr_of
from mla_core.metadata.worklist import WorkList

_OP = "plan_prefill"


def plan_prefill(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    profile: DeviceProfile,
    gqa_ratio: int = 1,
    num_heads_k: int = 1,
    qhead_granularity: int | None = None,
    qlen_granularity: int = 256,
    kvlen_granularity: int = 16,
    page_size: int = 16,
    is_causal: bool = True,
) -> WorkList:
    """Plan a prefill on the host.

    Parameters
    ----------
    qo_indptr, kv_indptr : [batch_size + 1], int32, CPU
        Prefix sums of query tokens and of cache pages; start at 0.
    kv_lens : [batch_size], int32, CPU
        Cached tokens of each request, including those of its queries.
    profile : DeviceProfile
    gqa_ratio, num_heads_k : int
        Query heads per KV head, and KV heads.
    qhead_granularity : int, optional
        Query heads of one work; a work always covers the ``gqa_ratio`` heads of one KV head.
    qlen_granularity, kvlen_granularity : int
        Query tokens of a tile, and cached tokens of a block; the latter a multiple of page_size.
    page_size : int
        Tokens per page.
    is_causal : bool
        Leave out what the bottom-right aligned mask hides from a whole tile.

    Returns
    -------
    WorkList
        ``reduce_indptr`` and ``reduce_final_map`` hold the cut tiles alone, by query row. Pieces
        lie ``qlen_granularity`` partial rows apart, whatever the tile's size.

    Raises
    ------
    LayoutError
        An argument is not what it must be.

    Notes
    -----
    ``kv_offset`` counts from the end of the request, and is 0 for a tile's last piece: kernels
    mask by position, which ``qo_start`` and ``kv_start`` give.
    """
    _check(
        qo_indptr, kv_indptr, kv_lens, gqa_ratio, num_heads_k, qhead_granularity,
        qlen_granularity, kvlen_granularity, page_size,
    )  # fmt: skip
    q_len, kv_len = qo_indptr.long().diff(), kv_lens.long()

    # tiles of each request in the order 0, n - 1, 1, n - 2, ...
    per_request = ceil_div(q_len, qlen_granularity)
    request = torch.arange(q_len.numel()).repeat_interleave(per_request)
    turn = torch.arange(request.numel()) - (per_request.cumsum(0) - per_request)[request]
    nth = torch.where(turn % 2 == 0, turn // 2, per_request[request] - 1 - turn // 2)
    begin = nth * qlen_granularity
    end = torch.minimum(begin + qlen_granularity, q_len[request])
    visible = kv_len[request]
    if is_causal:
        visible = (visible - q_len[request] + end).clamp(min=0)
    units = ceil_div(visible, kvlen_granularity)

    # equal shares of the running total of units
    clusters = math.gcd(num_heads_k, profile.num_cu)
    workgroups = profile.num_cu // clusters
    ends = units.cumsum(0)
    share, extra = divmod(int(units.sum()), workgroups)
    nth_workgroup = torch.arange(1, workgroups + 1)
    limits = nth_workgroup * share + nth_workgroup.clamp(max=extra)
    finished = torch.searchsorted(ends, limits, right=True)
    done = torch.where(finished > 0, ends[(finished - 1).clamp(min=0)], 0) if len(ends) else limits
    is_cut = limits > done
    cut_tile, cut_unit = finished[is_cut], (limits - done)[is_cut]
    work_indptr = indptr_of((finished + is_cut.cumsum(0)).diff(prepend=torch.zeros(1).long()))

    # one row per piece, for one head
    pieces_of = 1 + torch.bincount(cut_tile, minlength=request.numel())
    tile = torch.arange(request.numel()).repeat_interleave(pieces_of)
    before_cut = cut_tile + torch.arange(cut_tile.numel())
    cut_page = cut_unit * (kvlen_granularity // page_size)
    first, last = torch.zeros_like(tile), ceil_div(visible, page_size)[tile]
    is_final = torch.ones_like(tile, dtype=torch.bool)
    is_final[before_cut] = False
    last[before_cut] = cut_page
    first[before_cut + 1] = cut_page
    is_split = (pieces_of > 1)[tile]
    partial = torch.where(is_split, (is_split.cumsum(0) - 1) * qlen_granularity, -1)
    q_start, page_start = qo_indptr.long()[request], kv_indptr.long()[request][tile]
    left = torch.where(is_final, 0, kv_len[request][tile] - last * page_size)
    columns = [
        request[tile],
        partial,
        (q_start + begin)[tile],
        (q_start + end)[tile],
        page_start + first,
        page_start + last,
        left,
        torch.zeros_like(tile),
    ]
    one_head = torch.stack(columns, dim=1)

    split_tile = tile[is_split]
    by_row = torch.stack([columns[2][is_split], partial[is_split]], dim=1)
    order = _lexicographic(by_row)
    cut_tiles, counts = torch.unique_consecutive(split_tile[order], return_counts=True)
    rows = torch.stack([q_start + begin, q_start + end], dim=1)
    indptr, info = _repeat_for_heads(one_head, work_indptr, clusters, num_heads_k, gqa_ratio)
    return WorkList(
        work_indptr=indptr.int(),
        work_info=info.int(),
        reduce_indptr=indptr_of(counts).int(),
        reduce_final_map=rows[cut_tiles].int(),
        reduce_partial_map=partial[is_split][order].int(),
    )


def _repeat_for_heads(
    one_head: torch.Tensor,
    work_indptr: torch.Tensor,
    clusters: int,
    num_heads_k: int,
    gqa_ratio: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every cluster's workgroups the schedule once for each of the cluster's KV heads."""
    heads = num_heads_k // clusters
    workgroup = torch.arange(work_indptr.numel() - 1).repeat_interleave(work_indptr.diff())
    by_workgroup = workgroup.repeat(heads).argsort(stable=True)
    info = one_head.repeat(heads, 1)[by_workgroup].repeat(clusters, 1)
    head = torch.arange(heads).repeat_interleave(one_head.shape[0])[by_workgroup]
    head = (head + heads * torch.arange(clusters)[:, None]).flatten()
    info[:, 7] = (head * gqa_ratio) | ((head + 1) * gqa_ratio << 16)
    return indptr_of((work_indptr.diff() * heads).repeat(clusters)), info


def _lexicographic(rows: torch.Tensor) -> torch.Tensor:
    """Return the order that sorts rows by their first column, then by their second."""
    order = rows[:, 1].argsort(stable=True)
    return order[rows[order, 0].argsort(stable=True)]


def _check(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    gqa_ratio: int,
    num_heads_k: int,
    qhead_granularity: int | None,
    qlen_granularity: int,
    kvlen_granularity: int,
    page_size: int,
) -> None:
    check_units(_OP, page_size=page_size, kv_granularity=kvlen_granularity)
    check_host_tensors(_OP, qo_indptr, kv_indptr, kv_lens, "kv_lens")
    for name, value in (
        ("gqa_ratio", gqa_ratio),
        ("num_heads_k", num_heads_k),
        ("qlen_granularity", qlen_granularity),
    ):
        if value < 1:
            raise LayoutError(f"{_OP}: {name} must be >= 1, got {value}")
    if qhead_granularity not in (None, gqa_ratio):
        raise LayoutError(
            f"{_OP}: qhead_granularity must be gqa_ratio={gqa_ratio}, got {qhead_granularity}"
        )
    if kvlen_granularity % page_size:
        raise LayoutError(
            f"{_OP}: kvlen_granularity must be a multiple of page_size={page_size}, got "
            f"{kvlen_granularity}"
        )
    if bool((kv_lens < 0).any() or (ceil_div(kv_lens, page_size) > kv_indptr.diff()).any()):
        raise LayoutError(
            f"{_OP}: kv_lens must be in 0..pages * page_size of each request, got one outside"
        )
