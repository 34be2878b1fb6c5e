"""Query tiles of a batch, and how pieces of them become a work list.

Planners decide two things: where the cache range of a query tile is cut, and which workgroup gets
which piece. Everything else, shared by all of them, is here and vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla_core.metadata.profile import ceil_div
from mla_core.metadata.ragged import Ragged
from mla_core.metadata.worklist import WorkList


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Query tiles in order of batch and query row; int64 tensors of one entry per tile.

    Parameters
    ----------
    batch_idx : request, or group of heads ``b * fold + g``
    qo_start, qo_end : query rows
    stride : partial rows that one piece takes
    q_len : query rows of the whole request
    kv_start, kv_pages : first cache entry and number of entries of the request
    visible : entries any row of the tile may see; a causal mask hides the rest
    kv_last_page_len : tokens in the request's last page
    later : tokens to count as following the last entry
    page_size, kv_granularity : int
    """

    batch_idx: torch.Tensor
    qo_start: torch.Tensor
    qo_end: torch.Tensor
    stride: torch.Tensor
    q_len: torch.Tensor
    kv_start: torch.Tensor
    kv_pages: torch.Tensor
    visible: torch.Tensor
    kv_last_page_len: torch.Tensor
    later: torch.Tensor
    page_size: int
    kv_granularity: int

    @property
    def blocks(self) -> torch.Tensor:
        """Blocks of each tile's request, whether visible or not."""
        return ceil_div(self.kv_pages, self.kv_granularity)


def dense_tiles(batch: Ragged, num_tiles: Sequence[int], fold: int, *, trims: bool) -> QueryTiles:
    """Cut the query rows of every request into ``num_tiles[b]`` tiles of about equal size.

    Folded heads turn a request into ``fold`` consecutive groups, each with rows of its own: query
    token ``i`` of group ``g`` is row ``q_start * fold + g * q_len + i``.

    With ``trims``, entries that a causal mask hides from every row of a tile are left out. That
    needs one entry per token; with longer pages the kernel masks on its own.
    """
    group = torch.arange(fold).repeat(batch.batch_size)
    request = torch.arange(batch.batch_size).repeat_interleave(fold)
    counts = torch.tensor(num_tiles, dtype=torch.int64)
    row_of = batch.q_start * fold
    size = ceil_div_tensor(batch.q_len, counts)

    per_group = counts[request]
    owner = torch.arange(group.numel()).repeat_interleave(per_group)
    nth = torch.arange(owner.numel()) - (per_group.cumsum(0) - per_group)[owner]
    request, group = request[owner], group[owner]
    q_len, stride, kv_pages = batch.q_len[request], size[request], batch.kv_pages[request]
    begin, end = nth * stride, torch.minimum((nth + 1) * stride, q_len)
    base = row_of[request] + group * q_len
    visible = kv_pages
    if trims and batch.page_size == 1:
        visible = (kv_pages - (q_len - end)).clamp(min=0)
    return QueryTiles(
        batch_idx=owner,
        qo_start=base + begin,
        qo_end=base + end,
        stride=stride,
        q_len=q_len,
        kv_start=batch.kv_start[request],
        kv_pages=kv_pages,
        visible=visible,
        kv_last_page_len=batch.kv_last_page_len[request],
        later=torch.zeros_like(owner),
        page_size=batch.page_size,
        kv_granularity=batch.kv_granularity,
    )


def sparse_tiles(batch: Ragged, topk: int, fold: int) -> QueryTiles:
    """Make every query token a tile over an index row of its own, ``ceil(topk / page_size)`` wide.

    The selector has applied causality, so without folding ``later`` makes up for the rows that
    follow a token in its request and a kernel's causal mask hides nothing.
    """
    width = ceil_div(topk, batch.page_size)
    request = torch.arange(batch.batch_size).repeat_interleave(batch.q_len)
    token = torch.arange(request.numel())
    nth = token - (batch.q_len.cumsum(0) - batch.q_len)[request]
    later = batch.q_len[request] - 1 - nth
    batch_idx = request
    if fold > 1:
        token, request = token.repeat_interleave(fold), request.repeat_interleave(fold)
        batch_idx, later = torch.arange(token.numel()), torch.zeros_like(token)
    row = torch.arange(token.numel())
    kv_pages = batch.kv_pages[request].clamp(max=width)
    is_whole = kv_pages == batch.kv_pages[request]
    return QueryTiles(
        batch_idx=batch_idx,
        qo_start=row,
        qo_end=row + 1,
        stride=torch.ones_like(row),
        q_len=torch.ones_like(row),
        kv_start=token * width,
        kv_pages=kv_pages,
        visible=kv_pages,
        kv_last_page_len=torch.where(is_whole, batch.kv_last_page_len[request], batch.page_size),
        later=later,
        page_size=batch.page_size,
        kv_granularity=batch.kv_granularity,
    )


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where tiles are cut, in order of tile and position; int64 tensors of one entry per cut.

    Parameters
    ----------
    tile : the tile that is cut
    page : the entry, counted from the tile's first, before which it is cut
    """

    tile: torch.Tensor
    page: torch.Tensor


def assemble(
    tiles: QueryTiles, cuts: Cuts, work_indptr: torch.Tensor, owner: torch.Tensor | None = None
) -> WorkList:
    """Turn cut tiles into a work list.

    Parameters
    ----------
    tiles, cuts
        Every cut lies inside the visible range of its tile.
    work_indptr : [num_workgroups + 1]
        Pieces, in order of tile and position, of each workgroup.
    owner : [num_pieces], optional
        Workgroup of each piece, when workgroups do not own consecutive pieces.
    """
    num_tiles, num_cuts = tiles.qo_start.numel(), cuts.tile.numel()
    pieces_of = 1 + torch.bincount(cuts.tile, minlength=num_tiles)
    tile = torch.arange(num_tiles).repeat_interleave(pieces_of)

    begin, end = torch.zeros_like(tile), tiles.visible[tile]
    before_cut = cuts.tile + torch.arange(num_cuts)  # piece that each cut ends
    end[before_cut] = cuts.page
    begin[before_cut + 1] = cuts.page

    pages_left = tiles.kv_pages[tile] - end
    tokens_left = (pages_left - 1) * tiles.page_size + tiles.kv_last_page_len[tile]
    tokens_left = torch.where(pages_left > 0, tokens_left, 0)

    is_cut = pieces_of > 1
    in_cut_tile = is_cut[tile]
    rows = torch.where(in_cut_tile, tiles.stride[tile], 0)
    partial = torch.where(in_cut_tile, rows.cumsum(0) - rows, -1)
    work_info = torch.stack(
        [
            tiles.batch_idx[tile],
            partial,
            tiles.qo_start[tile],
            tiles.qo_end[tile],
            tiles.kv_start[tile] + begin,
            tiles.kv_start[tile] + end,
            tokens_left + tiles.later[tile],
            torch.zeros_like(tile),
        ],
        dim=1,
    )
    if owner is not None:
        work_info = work_info[owner.argsort(stable=True)]
    partials_of = torch.where(is_cut, pieces_of, 0)
    tile_rows = torch.stack([tiles.qo_start, tiles.qo_end], dim=1)
    return WorkList(
        work_indptr=work_indptr.int(),
        work_info=work_info.int(),
        reduce_indptr=indptr_of(partials_of).int(),
        reduce_final_map=torch.where(is_cut[:, None], tile_rows, 0).int(),
        reduce_partial_map=partial[in_cut_tile].int(),
    )


def indptr_of(counts: torch.Tensor) -> torch.Tensor:
    """Return the prefix sums ``[0, c0, c0 + c1, ...]``."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def ceil_div_tensor(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Quotient of two tensors rounded up; 0 where ``b`` is 0."""
    divisor = b.clamp(min=1)
    return torch.where(b > 0, (a + divisor - 1) // divisor, 0)
