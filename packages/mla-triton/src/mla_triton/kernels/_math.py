"""Pieces of the decode kernels: which tokens, which pages, which rows, and the score's shape.

Everything that may change between two replays of a captured graph (lengths, page ids) is read here
from device memory. The query tokens and heads of a request are folded into rows,
``row = q_idx * num_heads + head``, so one tile serves any mix of the two.
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def request_bounds(
    request,
    qo_indptr_ptr,  # [batch_size + 1] i32
    kv_indptr_ptr,  # [batch_size + 1] i32, pages
    kv_last_page_len_ptr,  # [batch_size] i32
    PAGE_SIZE: tl.constexpr,
):
    """Return the request's first query token, its query tokens, first page entry and keys."""
    q_begin = tl.load(qo_indptr_ptr + request)
    q_len = tl.load(qo_indptr_ptr + request + 1) - q_begin
    page_begin = tl.load(kv_indptr_ptr + request)
    num_pages = tl.load(kv_indptr_ptr + request + 1) - page_begin
    last_page_len = tl.load(kv_last_page_len_ptr + request)
    kv_len = tl.where(num_pages > 0, (num_pages - 1) * PAGE_SIZE + last_page_len, 0)
    return q_begin, q_len, page_begin, kv_len


@triton.jit
def split_range(
    kv_len,
    split,
    num_splits,
    split_blocks,
    BLOCK_N: tl.constexpr,
):
    """Return the token range [begin, end) of one split; it depends on the request alone.

    A request is cut into equal runs of whole blocks: as many as make them about split_blocks long,
    and at most num_splits. The splits that are left over are empty.
    """
    num_blocks = tl.cdiv(kv_len, BLOCK_N)
    used = tl.minimum(tl.cdiv(num_blocks, split_blocks), num_splits)
    used = tl.maximum(used, 1)
    begin = tl.minimum(split, used) * num_blocks // used * BLOCK_N
    end = tl.minimum(split + 1, used) * num_blocks // used * BLOCK_N
    return tl.minimum(begin, kv_len), tl.minimum(end, kv_len)


@triton.jit
def query_rows(row_block, q_len, num_heads, BLOCK_M: tl.constexpr):
    """Return the query token of the request, the head and the existence of BLOCK_M rows."""
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_idx = row // num_heads
    head = (row % num_heads).to(tl.int64)  # its stride may be that of many tokens
    return q_idx, head, q_idx < q_len


@triton.jit
def seen_tokens(
    q_idx,  # [M] i32, query token of each row
    is_row,  # [M] i1
    q_len,
    kv_len,
    global_len,  # keys over all context-parallel ranks; kv_len without HAS_CP
    cp_world_size,  # unused without HAS_CP
    cp_rank,
    window,  # unused without HAS_WINDOW
    IS_CAUSAL: tl.constexpr,
    HAS_CP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Return the cached tokens [low, high) that each row sees; ``low`` only with HAS_WINDOW.

    Causality is bottom-right aligned: the last query token sees every key. With HAS_CP, local token
    ``j`` has the position ``j * cp_world_size + cp_rank``, so positions below ``p`` are the local
    tokens below ``ceil((p - cp_rank) / cp_world_size)``. Either bound may lie outside the cached
    tokens. A row that does not exist sees nothing and widens no range.
    """
    high = tl.zeros_like(q_idx) + global_len
    if IS_CAUSAL:
        high = global_len - (q_len - 1 - q_idx)
    low = high - window
    if HAS_CP:
        # Division rounds towards zero, which is down for these.
        high = tl.maximum(high - cp_rank + cp_world_size - 1, 0) // cp_world_size
        high = tl.minimum(high, kv_len)
        low = tl.maximum(low - cp_rank + cp_world_size - 1, 0) // cp_world_size
    return tl.where(is_row, low, kv_len), tl.where(is_row, high, 0)


@triton.jit
def seen_range(
    begin,
    end,
    low,  # [M] i32
    high,  # [M] i32
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Narrow [begin, end) to what any row sees, in whole blocks; also return the lowest token."""
    end = tl.minimum(end, tl.max(high, 0))
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(tl.min(low, 0), 0)
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)
    return begin, end, lowest


@triton.jit
def token_rows(
    start,  # multiple of BLOCK_N
    end,
    page_begin,
    kv_page_indices_ptr,  # [>= kv_indptr[-1]] i32
    num_cache_pages,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return token number, page, offset in the page and liveness of BLOCK_N tokens.

    A token past ``end``, or on a page id outside the cache, is not live.
    """
    token = start + tl.arange(0, BLOCK_N)
    entry_ptr = kv_page_indices_ptr + page_begin
    if PAGE_SIZE % BLOCK_N == 0:
        # The block lies in one page: one scalar load, and rows one after another.
        page = tl.load(entry_ptr + start // PAGE_SIZE)
        offset = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
        is_live = token < tl.where((page >= 0) & (page < num_cache_pages), end, 0)
    else:
        if PAGE_SIZE > 1 and BLOCK_N % PAGE_SIZE == 0:
            # Whole pages: one id each. The compiler then knows that a page's tokens share it,
            # which nearly halves the time at page 16.
            nth = tl.arange(0, BLOCK_N // PAGE_SIZE)
            begins = start + nth * PAGE_SIZE
            pages = tl.load(entry_ptr + start // PAGE_SIZE + nth, mask=begins < end, other=-1)
            pages = tl.broadcast_to(pages[:, None], [BLOCK_N // PAGE_SIZE, PAGE_SIZE])
            page = tl.reshape(pages, [BLOCK_N])
        else:
            page = tl.load(entry_ptr + token // PAGE_SIZE, mask=token < end, other=-1)
        offset = token % PAGE_SIZE
        is_live = (token < end) & (page >= 0) & (page < num_cache_pages)
    return token, page.to(tl.int64), offset, is_live


@triton.jit
def scale_scores(s, sm_scale_log2, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale raw scores to base-2 logits, ``softcap * tanh(. / softcap)`` applied on the way."""
    s *= sm_scale_log2
    if HAS_SOFTCAP:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / softcap)))
        s = tanh * (softcap * 1.4426950408889634)
    return s


@triton.jit
def finite_or_zero(m):
    """Replace -inf, so that ``exp2(-inf - m)`` is 0 and not NaN while nothing was seen."""
    return tl.where(m == float("-inf"), 0.0, m)
