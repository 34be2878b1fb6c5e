"""Absorbed MLA decode for more than 32 query rows (query token x head) of a request.

s = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(s) @ kv_c

A program owns 64 rows. Their fp32 output of 512 columns fills half the register file, so two warp
groups hold half the columns each: the left one forms the scores, the softmax and its half of the
output; the right one multiplies the same probabilities with the other half; a third loads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_triton.kernels.hopper._gluon import aggregate
from mla_triton.kernels.hopper.load import TILE, load_rows
from mla_triton.kernels.hopper.queries import load_converted_rows
from mla_triton.kernels.hopper.schedule import deal, next_item, view_of
from mla_triton.kernels.hopper.score import finish_rows, finite_or_zero, hide, scale_scores

#: Rows of a program.
M = gl.constexpr(64)


@aggregate
class Exchange:
    """What the left warp group hands to the right one, each tile and once at the end of an item."""

    p: gl.shared_memory_descriptor  # [M, TILE] probabilities
    factor: gl.shared_memory_descriptor  # [M] f32: rescales the accumulator first
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, p, factor, ready, free):
        self.p = p
        self.factor = factor
        self.ready = ready
        self.free = free


@gluon.jit
def _issue_scores(rows, tiles, count, s_layout: gl.constexpr):
    """Start the products of the queries with the count-th tile: three asynchronous operations."""
    s = gl.zeros([M, TILE], gl.float32, s_layout)
    a = tiles.wait_a(count)
    fence_async_shared()
    key = tiles.a.index(a).permute((1, 0))
    s = warpgroup_mma(rows.nope.index(0), key, s, use_acc=False, is_async=True)
    s = warpgroup_mma(rows.rope, tiles.rope.index(a).permute((1, 0)), s, is_async=True)
    b = tiles.wait_b(count)
    fence_async_shared()
    key = tiles.b.index(b).permute((1, 0))
    return warpgroup_mma(rows.nope.index(1), key, s, is_async=True)


@gluon.jit
def left_partition(task, rows, tiles, exchange, IS_PACKED: gl.constexpr):
    """Form scores and probabilities, and the left half of the output.

    Query rows over an fp8 cache may have been divided, which the scores take back.
    """
    batch, shares, output, scaling = task.batch, task.shares, task.output, task.scaling
    worker, block = task.worker, task.block
    HALF: gl.constexpr = output.D // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = rows.nope.dtype
    local = gl.arange(0, M, layout=s_rows)
    row = block * M + local
    count = worker * 0  # tiles so far
    handed = worker * 0  # hand-overs so far
    work = deal(batch, shares, worker)
    kv_scale = scaling.of_cache()
    sm_scale_log2 = scaling.sm_scale_log2 * kv_scale * scaling.of_queries()
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
            m = gl.full([M], float("-inf"), gl.float32, s_rows)
            denom = gl.zeros([M], gl.float32, s_rows)
            acc = gl.zeros([M, HALF], gl.float32, o_layout)
            divisor = gl.full([M], 1.0, gl.float32, s_rows)
            if item.first < item.last:
                # The right warp group may still read its half of the last output from there.
                mbarrier.wait(exchange.free, (handed & 1) ^ 1)
                if IS_PACKED:
                    divided_by = load_converted_rows(rows, item.q_begin, item.q_len, block * M)
                    divisor = gl.convert_layout(divided_by, s_rows)
                else:
                    load_rows(
                        rows, item.q_begin, item.q_len, block * M, M, output.D, rows.rope.shape[1]
                    )
            for tile in range(item.first, item.last):
                s = _issue_scores(rows, tiles, count, s_layout)
                s = warpgroup_mma_wait(0, deps=[s])
                if IS_PACKED:
                    s *= divisor[:, None]
                s = scale_scores(s, sm_scale_log2, scaling.softcap, scaling.HAS_SOFTCAP)
                s += tiles.bias.index(count % tiles.STAGES_A).load(s_columns)[None, :]
                if view.hides(tile * TILE, TILE):
                    token = tile * TILE + gl.arange(0, TILE, layout=s_columns)
                    s = hide(
                        s,
                        token[None, :],
                        view.limit[:, None],
                        view.lowest[:, None],
                        view.HAS_WINDOW,
                    )
                m_new = gl.maximum(m, gl.max(s, 1))
                m_safe = finite_or_zero(m_new)
                p = gl.exp2(s - m_safe[:, None])
                alpha = gl.exp2(m - m_safe)
                denom = denom * alpha + gl.sum(p, 1)
                m = m_new
                p = p.to(dtype)
                mbarrier.wait(exchange.free, (handed & 1) ^ 1)
                exchange.p.store(p)
                exchange.factor.store(alpha)
                fence_async_shared()
                mbarrier.arrive(exchange.ready, count=1)
                acc = acc * gl.convert_layout(alpha, o_rows)[:, None]
                value = tiles.a.index(count % tiles.STAGES_A)
                acc = warpgroup_mma(gl.convert_layout(p, p_layout), value, acc, is_async=True)
                # The next tile may be long in coming: first let the one after it in.
                acc = warpgroup_mma_wait(0, deps=[acc])
                tiles.release_a(count)
                count += 1
                handed += 1
            is_whole = item.is_begin & item.is_end
            factor, lse = finish_rows(
                m, denom, output.sink_ptr, row % output.num_heads, is_row, is_whole, output.HAS_SINK
            )
            factor *= kv_scale
            mbarrier.wait(exchange.free, (handed & 1) ^ 1)
            exchange.factor.store(factor)
            mbarrier.arrive(exchange.ready, count=1)
            handed += 1
            partial_row = output.partial_row(worker, item.is_begin, block, M)
            output.store_lse(lse, local, row, item.q_begin, is_row, is_whole, partial_row)
            acc = acc * gl.convert_layout(factor, o_rows)[:, None]
            output.store(
                acc,
                rows.nope.index(0),
                0,
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
def right_partition(task, rows, tiles, exchange):
    """Form the right half of the output."""
    batch, shares, output = task.batch, task.shares, task.output
    worker, block = task.worker, task.block
    HALF: gl.constexpr = output.D // 2
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    count = worker * 0
    handed = worker * 0
    work = deal(batch, shares, worker)
    request = work.request
    begin = work.begin
    place = work.place
    while (place < work.finish) & (request < batch.batch_size):
        item = next_item(batch, work, request, begin, place)
        if item.is_item & (block * M < item.q_len * output.num_heads):
            acc = gl.zeros([M, HALF], gl.float32, o_layout)
            for _ in range(item.first, item.last):
                b = tiles.wait_b(count)
                mbarrier.wait(exchange.ready, handed & 1)
                acc = acc * exchange.factor.load(o_rows)[:, None]
                fence_async_shared()
                acc = warpgroup_mma(exchange.p, tiles.b.index(b), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(exchange.free, count=1)
                tiles.release_b(count)
                count += 1
                handed += 1
            mbarrier.wait(exchange.ready, handed & 1)
            acc = acc * exchange.factor.load(o_rows)[:, None]
            partial_row = output.partial_row(worker, item.is_begin, block, M)
            output.store(
                acc,
                rows.nope.index(1),
                HALF,
                block * M,
                item.q_begin,
                item.q_len,
                item.is_begin & item.is_end,
                partial_row,
            )
            mbarrier.arrive(exchange.free, count=1)
            handed += 1
        begin = item.next_begin
        place = item.next_begin
        request += 1


@gluon.jit
def allocate_exchange(dtype: gl.constexpr):
    """Allocate what the two warp groups share, and initialise its barriers."""
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, TILE], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(free, count=1)
    return Exchange(
        gl.allocate_shared_memory(dtype, [M, TILE], square),
        gl.allocate_shared_memory(gl.float32, [M], flat),
        ready,
        free,
    )
