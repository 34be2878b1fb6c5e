"""The v1.2 work list on the device: the host planner's schedule, bit for bit, without a host sync.

All tiles of a request cost the same, so a schedule is a walk along the running total of tile costs:
a workgroup's budget ends at some point of it, and where that point falls into a tile, the tile is
cut. Three launches, all lengths read on the device:

    request_prefix   running totals of tiles and cost over requests, one program
    deal             one point per workgroup -> cuts and work_indptr, one program, sequential
    fill             works, reduce maps and tails from the cuts, one lane per entry
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def _ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def _query_tiles(q_len, HEADS: tl.constexpr, PACKED_ROWS: tl.constexpr, ONE_TILE: tl.constexpr):
    """Tiles of a request and query tokens of each but the last; 0 and 0 without queries."""
    if ONE_TILE:
        tiles = tl.minimum(q_len, 1)
    elif 2 * HEADS > PACKED_ROWS:
        tiles = q_len
    else:
        wanted = _ceil_div(q_len * HEADS, PACKED_ROWS)
        size = _ceil_div(q_len, tl.maximum(wanted, 1))
        tiles = _ceil_div(q_len, tl.maximum(size, 1))
    return tiles, _ceil_div(q_len, tl.maximum(tiles, 1))


@triton.jit
def _request(request, exists, qo_indptr_ptr, kv_indptr_ptr, uni_seqlen_qo):
    """First query row, query tokens, first cache entry and pages; 0 where it does not exist."""
    q_start = tl.load(qo_indptr_ptr + request, mask=exists, other=0)
    q_len = tl.load(qo_indptr_ptr + request + 1, mask=exists, other=0) - q_start
    if uni_seqlen_qo >= 1:
        q_start = tl.where(exists, request * uni_seqlen_qo, 0).to(tl.int32)
        q_len = tl.where(exists, uni_seqlen_qo, 0).to(tl.int32)
    kv_start = tl.load(kv_indptr_ptr + request, mask=exists, other=0)
    kv_pages = tl.load(kv_indptr_ptr + request + 1, mask=exists, other=0) - kv_start
    return q_start, q_len, kv_start, kv_pages


@triton.jit
def _count_up_to(sorted_ptr, length, value, steps):
    """How many of the first ``length`` rising entries are <= value, per lane."""
    low = value * 0
    high = low + length
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        entry = tl.load(sorted_ptr + middle, mask=is_open, other=0)
        goes_up = is_open & (entry <= value)
        low = tl.where(goes_up, middle + 1, low)
        high = tl.where(is_open & (entry > value), middle, high)
    return low


#: Lengths vary from step to step: no variant for each that is 1 or divisible by 16.
_RUNTIME = [
    "batch_size", "num_workgroups", "max_split_per_batch", "uni_seqlen_qo", "max_pages",
    "kv_granularity", "overhead", "indptr_len", "max_works", "reduce_indptr_len", "max_tiles",
    "max_partials", "search_steps",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME[:1] + _RUNTIME[3:7])
def request_prefix_kernel(
    cost_before_ptr,  # [batch_size + 1] i64, cost of all tiles of earlier requests
    tiles_before_ptr,  # [batch_size + 1] i64
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    batch_size,
    uni_seqlen_qo,
    max_pages,  # sparse: entries of an index row
    kv_granularity,
    overhead,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    PACKED_ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up tiles and their cost over requests."""
    cost_total = tl.full([], 0, tl.int64)
    tiles_total = tl.full([], 0, tl.int64)
    for start in range(0, batch_size, BLOCK):
        request = start + tl.arange(0, BLOCK)
        exists = request < batch_size
        _, q_len, _, pages = _request(request, exists, qo_indptr_ptr, kv_indptr_ptr, uni_seqlen_qo)
        if IS_SPARSE:
            tiles = q_len * FOLD
            pages = tl.minimum(pages, max_pages)
        else:
            tiles = _query_tiles(q_len, HEADS, PACKED_ROWS, ONE_TILE)[0] * FOLD
        tiles = tiles.to(tl.int64)
        cost = (_ceil_div(pages, kv_granularity) + overhead) * tiles
        tl.store(tiles_before_ptr + request, tiles_total + tl.cumsum(tiles) - tiles, mask=exists)
        tl.store(cost_before_ptr + request, cost_total + tl.cumsum(cost) - cost, mask=exists)
        tiles_total += tl.sum(tiles)
        cost_total += tl.sum(cost)
    tl.store(tiles_before_ptr + batch_size, tiles_total)
    tl.store(cost_before_ptr + batch_size, cost_total)


@triton.jit(do_not_specialize=_RUNTIME[:7])
def deal_kernel(
    work_indptr_ptr,  # [num_workgroups + 1] i32
    cut_tile_ptr,  # [num_workgroups] i64: tile that is cut
    cut_page_ptr,  # entry of the tile before which it is cut
    cut_row_ptr,  # partial row of the piece before the cut
    cut_entry_ptr,  # place of that piece in reduce_partial_map
    counts_ptr,  # [3] i64: tiles, cuts, partials
    cost_before_ptr,
    tiles_before_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    batch_size,
    num_workgroups,
    max_split_per_batch,
    uni_seqlen_qo,
    max_pages,
    kv_granularity,
    overhead,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    PACKED_ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walk along the running total, one budget per workgroup, and note the cuts."""
    total = tl.load(cost_before_ptr + batch_size)
    num_tiles = tl.load(tiles_before_ptr + batch_size)
    shares = num_tiles * 0 + num_workgroups
    if max_split_per_batch >= 0:
        rows = num_tiles
        if not IS_SPARSE:
            rows = num_tiles * 0 + batch_size * FOLD
        shares = tl.maximum(tl.minimum(shares, rows * max_split_per_batch), 1)
    payload = _ceil_div(total, shares) + overhead

    position = tl.full([], 0, tl.int64)  # along the running total of tile costs
    request = tl.full([], 0, tl.int64)
    finished = tl.full([], 0, tl.int64)  # tiles
    cuts = tl.full([], 0, tl.int64)
    entries = tl.full([], 0, tl.int64)
    row = tl.full([], 0, tl.int64)
    cut_before = tl.full([], -1, tl.int64)  # tile cut last, and the rows of its pieces
    rows_before = tl.full([], 0, tl.int64)
    tl.store(work_indptr_ptr, 0)
    for workgroup in range(0, num_workgroups):
        if position < total:
            limit = position + payload
            passed = tl.full([], BLOCK, tl.int32)
            while passed == BLOCK:
                later = request + 1 + tl.arange(0, BLOCK)
                before = tl.load(cost_before_ptr + later, mask=later <= batch_size, other=0)
                passed = tl.sum(((later <= batch_size) & (before <= limit)).to(tl.int32))
                request += passed
            if request >= batch_size:
                position = total
                finished = num_tiles
            else:
                # the first tile that does not fit: all tiles of a request cost the same
                base = tl.load(cost_before_ptr + request)
                first_tile = tl.load(tiles_before_ptr + request)
                count = tl.load(tiles_before_ptr + request + 1) - first_tile
                tile_cost = (tl.load(cost_before_ptr + request + 1) - base) // count
                nth = (limit - base) // tile_cost
                tile_begin = base + nth * tile_cost
                finished = first_tile + nth
                left = limit - tl.maximum(tile_begin, position)
                if left > overhead:
                    done = tl.maximum(position - tile_begin, 0) + left - overhead
                    page = done * kv_granularity
                    _, q_len, _, pages = _request(
                        request, True, qo_indptr_ptr, kv_indptr_ptr, uni_seqlen_qo
                    )
                    if IS_SPARSE:
                        pages = tl.minimum(pages, max_pages)
                        q_len = q_len * 0 + 1
                        stride = q_len
                    else:
                        stride = _query_tiles(q_len, HEADS, PACKED_ROWS, ONE_TILE)[1]
                    # With pages of one token, what a mask may reach stays in one piece.
                    if PAGE_SIZE > 1:
                        q_len = q_len * 0
                    if pages - page < q_len:
                        position = tile_begin + tile_cost
                        finished += 1
                    else:
                        if (cut_before >= 0) & (cut_before != finished):
                            entries += 1  # the last piece of the tile cut before
                            row += rows_before
                        tl.store(cut_tile_ptr + cuts, finished)
                        tl.store(cut_page_ptr + cuts, page)
                        tl.store(cut_row_ptr + cuts, row)
                        tl.store(cut_entry_ptr + cuts, entries)
                        position = tile_begin + done
                        cuts += 1
                        entries += 1
                        cut_before = finished
                        rows_before = stride.to(tl.int64)
                        row += rows_before
                else:
                    position = tile_begin
        tl.store(work_indptr_ptr + workgroup + 1, (finished + cuts).to(tl.int32))
    tl.store(counts_ptr, num_tiles)
    tl.store(counts_ptr + 1, cuts)
    tl.store(counts_ptr + 2, entries + (cuts > 0).to(tl.int64))


@triton.jit(do_not_specialize=_RUNTIME[:2] + _RUNTIME[3:5] + _RUNTIME[7:])
def fill_kernel(
    work_indptr_ptr,  # entries after num_workgroups; the others are there
    work_info_ptr,  # [max_works, 8] i32
    reduce_indptr_ptr,  # [max_tiles + 1] i32
    reduce_final_map_ptr,  # [max_tiles, 2] i32
    reduce_partial_map_ptr,  # [max_partials] i32
    cut_tile_ptr,
    cut_page_ptr,
    cut_row_ptr,
    cut_entry_ptr,
    counts_ptr,
    tiles_before_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_last_page_len_ptr,  # [batch_size] i32
    batch_size,
    num_workgroups,
    indptr_len,  # entries of work_indptr
    max_works,
    reduce_indptr_len,
    max_tiles,
    max_partials,
    uni_seqlen_qo,
    max_pages,
    search_steps,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    PACKED_ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    TRIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what the cuts imply: every work, both reduce maps, and the unused tails."""
    lane = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    num_tiles = tl.load(counts_ptr)
    num_cuts = tl.load(counts_ptr + 1)
    num_partials = tl.load(counts_ptr + 2)
    num_works = num_tiles + num_cuts

    # tails: idle workgroups, tiles and partials
    is_idle = (lane > num_workgroups) & (lane < indptr_len)
    tl.store(work_indptr_ptr + lane, (lane * 0 + num_works).to(tl.int32), mask=is_idle)
    is_unused = (lane >= num_partials) & (lane < max_partials)
    tl.store(reduce_partial_map_ptr + lane, (lane * 0).to(tl.int32), mask=is_unused)
    tl.store(reduce_indptr_ptr + lane, (lane * 0).to(tl.int32), mask=lane == 0)

    # one lane per work: cut x ends piece cut_tile[x] + x
    is_work = lane < num_works
    low = lane * 0
    high = low + num_cuts
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        is_open = low < high
        ends = tl.load(cut_tile_ptr + middle, mask=is_open, other=0) + middle
        goes_up = is_open & (ends < lane)
        low = tl.where(goes_up, middle + 1, low)
        high = tl.where(is_open & (ends >= lane), middle, high)
    cut = low  # cuts before this piece
    tile = lane - cut
    ends_at_cut = is_work & (cut < num_cuts)
    ends_at_cut &= tl.load(cut_tile_ptr + cut, mask=ends_at_cut, other=-1) == tile
    starts_at_cut = is_work & (cut > 0)
    starts_at_cut &= tl.load(cut_tile_ptr + cut - 1, mask=starts_at_cut, other=-1) == tile
    begin = tl.load(cut_page_ptr + cut - 1, mask=starts_at_cut, other=0)

    group, qo_start, qo_end, stride, kv_start, pages, last, later = _tile(
        tile, is_work, tiles_before_ptr, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr,
        batch_size, uni_seqlen_qo, max_pages, search_steps, PAGE_SIZE,
        HEADS, FOLD, PACKED_ROWS, ONE_TILE, IS_SPARSE,
    )  # fmt: skip
    visible = pages
    if TRIMS:
        visible = tl.maximum(pages - later, 0)
        later = later * 0
    end = tl.load(cut_page_ptr + cut, mask=ends_at_cut, other=0)
    end = tl.where(ends_at_cut, end, visible)
    left = pages - end
    offset = tl.where(left > 0, (left - 1) * PAGE_SIZE + last, 0)
    if IS_SPARSE:
        offset += later
    row_here = tl.load(cut_row_ptr + cut, mask=ends_at_cut, other=0)
    row_after = tl.load(cut_row_ptr + cut - 1, mask=starts_at_cut, other=0) + stride
    is_piece = ends_at_cut | starts_at_cut
    row = tl.where(ends_at_cut, row_here, tl.where(starts_at_cut, row_after, -1))
    entry_here = tl.load(cut_entry_ptr + cut, mask=ends_at_cut, other=0)
    entry_after = tl.load(cut_entry_ptr + cut - 1, mask=starts_at_cut, other=0) + 1
    entry = tl.where(ends_at_cut, entry_here, entry_after)
    tl.store(reduce_partial_map_ptr + entry, row.to(tl.int32), mask=is_piece)

    work_ptr = work_info_ptr + lane * 8
    in_buffer = lane < max_works
    _store_or_zero(work_ptr, group, is_work, in_buffer)
    _store_or_zero(work_ptr + 1, row, is_work, in_buffer)
    _store_or_zero(work_ptr + 2, qo_start, is_work, in_buffer)
    _store_or_zero(work_ptr + 3, qo_end, is_work, in_buffer)
    _store_or_zero(work_ptr + 4, kv_start + begin, is_work, in_buffer)
    _store_or_zero(work_ptr + 5, kv_start + end, is_work, in_buffer)
    _store_or_zero(work_ptr + 6, offset, is_work, in_buffer)
    _store_or_zero(work_ptr + 7, lane * 0, is_work, in_buffer)

    # one lane per tile: the cuts up to and in it
    cut = _count_up_to(cut_tile_ptr, num_cuts, lane, search_steps)
    has_cuts = cut > 0
    partials = tl.load(cut_entry_ptr + cut - 1, mask=has_cuts, other=-2) + 2
    in_indptr = lane + 1 < reduce_indptr_len
    tl.store(reduce_indptr_ptr + lane + 1, partials.to(tl.int32), mask=in_indptr)
    is_cut = has_cuts & (tl.load(cut_tile_ptr + cut - 1, mask=has_cuts, other=-1) == lane)
    _, qo_start, qo_end, _, _, _, _, _ = _tile(
        lane, is_cut, tiles_before_ptr, qo_indptr_ptr, kv_indptr_ptr, kv_last_page_len_ptr,
        batch_size, uni_seqlen_qo, max_pages, search_steps, PAGE_SIZE,
        HEADS, FOLD, PACKED_ROWS, ONE_TILE, IS_SPARSE,
    )  # fmt: skip
    _store_or_zero(reduce_final_map_ptr + lane * 2, qo_start, is_cut, lane < max_tiles)
    _store_or_zero(reduce_final_map_ptr + lane * 2 + 1, qo_end, is_cut, lane < max_tiles)


@triton.jit
def _tile(
    tile,  # [BLOCK] i64
    exists,
    tiles_before_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    kv_last_page_len_ptr,
    batch_size,
    uni_seqlen_qo,
    max_pages,
    search_steps,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    FOLD: tl.constexpr,
    PACKED_ROWS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
):
    """Take a tile number apart; ``later`` counts the request's query rows after the tile."""
    request = _count_up_to(tiles_before_ptr + 1, batch_size, tile, search_steps)
    exists = exists & (request < batch_size)
    nth = tile - tl.load(tiles_before_ptr + request, mask=exists, other=0)
    q_start, q_len, kv_start, pages = _request(
        request, exists, qo_indptr_ptr, kv_indptr_ptr, uni_seqlen_qo
    )
    last = tl.full(tile.shape, 1, tl.int32)
    if PAGE_SIZE > 1:
        last = tl.load(kv_last_page_len_ptr + request, mask=exists, other=0)
    if IS_SPARSE:
        # a query token and head group each, over an index row of max_pages entries
        nth_token = nth // FOLD
        token = q_start + nth_token
        last = tl.where(pages > max_pages, PAGE_SIZE, last)
        pages = tl.minimum(pages, max_pages)
        kv_start = token * max_pages
        qo_start = token * FOLD + nth % FOLD
        qo_end = qo_start + 1
        stride = q_len * 0 + 1
        if FOLD > 1:
            group = qo_start
            later = nth * 0
        else:
            group = request
            later = q_len - 1 - nth_token
    else:
        tiles, stride = _query_tiles(q_len, HEADS, PACKED_ROWS, ONE_TILE)
        tiles = tl.maximum(tiles, 1)
        nth_group = nth // tiles
        group = request * FOLD + nth_group
        base = q_start * FOLD + nth_group * q_len
        tile_begin = (nth % tiles) * stride
        tile_end = tl.minimum(tile_begin + stride, q_len)
        qo_start, qo_end = base + tile_begin, base + tile_end
        later = q_len - tile_end
    return group, qo_start, qo_end, stride, kv_start, pages, last, later


@triton.jit
def _store_or_zero(ptr, value, is_used, in_buffer):
    tl.store(ptr, tl.where(is_used, value, 0).to(tl.int32), mask=in_buffer)
