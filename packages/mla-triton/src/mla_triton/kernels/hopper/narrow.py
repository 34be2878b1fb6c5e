"""Absorbed MLA decode for up to 32 query rows (query token x head) of a request.

s.T = sm_scale * (kv_c @ ql_nope.T + k_pe @ q_pe.T);  out.T = kv_c.T @ softmax(s).T

wgmma multiplies 64 rows at least, so the tokens take that side and the query rows the narrow one:
few heads need no padding to 64. One warp group computes, another loads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_triton.kernels.hopper._gluon import barrier
from mla_triton.kernels.hopper.load import TILE, load_rows
from mla_triton.kernels.hopper.schedule import deal, next_item, view_of
from mla_triton.kernels.hopper.score import finish_rows, finite_or_zero, hide, scale_scores


@gluon.jit
def narrow_partition(task, rows, tiles, weights_smem):
    """Form scores, probabilities and output of M rows."""
    batch, shares, output, scaling = task.batch, task.shares, task.output, task.scaling
    worker, block = task.worker, task.block
    M: gl.constexpr = rows.nope.shape[1]
    HALF: gl.constexpr = output.D // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    tokens: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = rows.nope.dtype
    local = gl.arange(0, M, layout=columns)
    row = block * M + local
    count = worker * 0
    work = deal(batch, shares, worker)
    request = work.request
    begin = work.begin
    place = work.place
    output.clear_note(worker, block)
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        output.note_end(work, item, worker, block)
        if item.is_item & (block * M < item.q_len * output.num_heads):
            q_idx = row // output.num_heads
            is_row = q_idx < item.q_len
            view = view_of(batch, item, q_idx)
            m = gl.full([M], float("-inf"), gl.float32, columns)
            # Summed over tokens at the end: one reduction across warps instead of one a tile.
            weights = gl.zeros([TILE, M], gl.float32, layout)
            left = gl.zeros([HALF, M], gl.float32, layout)
            right = gl.zeros([HALF, M], gl.float32, layout)
            if item.first < item.last:
                load_rows(
                    rows, item.q_begin, item.q_len, block * M, M, output.D, rows.rope.shape[1]
                )
            for tile in range(item.first, item.last):
                start = tile * TILE
                s = gl.zeros([TILE, M], gl.float32, layout)
                a = tiles.wait_a(count)
                fence_async_shared()
                query = rows.nope.index(0).permute((1, 0))
                s = warpgroup_mma(tiles.a.index(a), query, s, use_acc=False, is_async=True)
                query = rows.rope.permute((1, 0))
                s = warpgroup_mma(tiles.rope.index(a), query, s, is_async=True)
                bias = tiles.bias.index(a).load(tokens)
                b = tiles.wait_b(count)
                fence_async_shared()
                query = rows.nope.index(1).permute((1, 0))
                s = warpgroup_mma(tiles.b.index(b), query, s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                s = scale_scores(s, scaling.sm_scale_log2, scaling.softcap, scaling.HAS_SOFTCAP)
                s += bias[:, None]
                if view.hides(start, TILE):
                    token = start + gl.arange(0, TILE, layout=tokens)
                    s = hide(
                        s,
                        token[:, None],
                        view.limit[None, :],
                        view.lowest[None, :],
                        view.HAS_WINDOW,
                    )
                m_new = gl.maximum(m, gl.max(s, 0))
                m_safe = finite_or_zero(m_new)
                p = gl.exp2(s - m_safe[None, :])
                alpha = gl.exp2(m - m_safe)
                m = m_new
                weights_smem.store(p.to(dtype).permute((1, 0)))
                fence_async_shared()
                weights = weights * alpha[None, :] + p
                left = left * alpha[None, :]
                right = right * alpha[None, :]
                barrier()
                weight = weights_smem.permute((1, 0))
                value = tiles.a.index(a).permute((1, 0))
                left = warpgroup_mma(value, weight, left, is_async=True)
                value = tiles.b.index(b).permute((1, 0))
                right = warpgroup_mma(value, weight, right, is_async=True)
                left = warpgroup_mma_wait(1, deps=[left])
                tiles.release_a(count)
                right = warpgroup_mma_wait(0, deps=[right])
                tiles.release_b(count)
                count += 1
            is_whole = item.is_begin & item.is_end
            factor, lse = finish_rows(
                m,
                gl.sum(weights, 0),
                output.sink_ptr,
                row % output.num_heads,
                is_row,
                is_whole,
                output.HAS_SINK,
            )
            partial_row = output.partial_row(worker, item.is_begin, block, M)
            output.store_lse(lse, local, row, item.q_begin, is_row, is_whole, partial_row)
            left = left * factor[None, :]
            right = right * factor[None, :]
            output.store(
                left.permute((1, 0)),
                rows.nope.index(0),
                0,
                block * M,
                item.q_begin,
                item.q_len,
                is_whole,
                partial_row,
            )
            output.store(
                right.permute((1, 0)),
                rows.nope.index(1),
                HALF,
                block * M,
                item.q_begin,
                item.q_len,
                is_whole,
                partial_row,
            )
        begin = item.next_begin
        place = item.next_begin
        request += 1


@gluon.jit
def allocate_weights(dtype: gl.constexpr, M: gl.constexpr):
    """Allocate shared memory for the probabilities of a tile, [M, TILE]."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    return gl.allocate_shared_memory(dtype, [M, TILE], layout)
