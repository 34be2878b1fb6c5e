"""Join the pieces of requests that were cut: split-K reduce over the partials of the workers.

The worker that ends a request leaves a note that says where its pieces are. Launched as a
programmatic dependent, so that launching overlaps the last attention programs. Pieces are merged in
their order: the bits depend on the cuts alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_triton.kernels.hopper.score import LN_2, LOG2_E, finite_or_zero


@gluon.jit
def _slot(first_worker, piece, EVEN: gl.constexpr):
    """Return the slot of a piece; of spans, only the first piece begins its request."""
    if EVEN:
        return first_worker + piece
    else:
        return (first_worker + piece) * 2 + (piece == 0).to(gl.int32)


@gluon.jit
def _spread(x, times: gl.constexpr, layout: gl.constexpr):
    """Repeat each element of a vector."""
    ROWS: gl.constexpr = x.shape[0]
    repeated = gl.zeros(
        [ROWS, times], x.dtype, gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    )
    x = gl.convert_layout(x, gl.SliceLayout(1, repeated.type.layout))
    return gl.convert_layout(gl.reshape(repeated + x[:, None], [ROWS * times]), layout)


@gluon.jit(do_not_specialize=["num_heads", "row_blocks", "lse_stride_t", "lse_stride_h"])
def merge_kernel(
    out_ptr,  # [total_q, num_heads, D]
    lse_ptr,  # [total_q, num_heads] f32
    partial_out_ptr,  # [slots, row_blocks, M, D] f32
    partial_lse_ptr,  # [slots, row_blocks, M] f32
    note_ptr,  # [notes, 4] i32: first worker, pieces, first query token and query tokens
    sink_ptr,  # [num_heads] f32; unused without HAS_SINK
    num_heads,
    row_blocks,
    out_stride_t,  # elements
    out_stride_h,
    lse_stride_t,
    lse_stride_h,
    D: gl.constexpr,
    M: gl.constexpr,
    ROWS: gl.constexpr,  # rows of a program; a divisor of M
    UNROLL: gl.constexpr,  # pieces in flight
    EVEN: gl.constexpr,
    HAS_LSE: gl.constexpr,
    HAS_SINK: gl.constexpr,
):
    """Merge ROWS rows of the request of one note, if it was cut."""
    WARPS: gl.constexpr = gl.num_warps()
    note = note_ptr + gl.program_id(1) * 4
    first_row = gl.program_id(0) * ROWS
    gdc_launch_dependents()
    gdc_wait()
    first_worker = gl.load(note)
    num_pieces = gl.load(note + 1)
    q_begin = gl.load(note + 2)
    q_len = gl.load(note + 3)
    if (num_pieces <= 1) | (first_row >= q_len * num_heads):
        return

    # The pieces of ROWS rows in flight together; no load waits for another's result.
    FLIGHT: gl.constexpr = ROWS * UNROLL
    ACROSS: gl.constexpr = D // 128  # warps that cover a row; the others take other pieces
    # Every warp keeps its own statistics.
    flat: gl.constexpr = gl.BlockedLayout([ROWS, 1], [1, 32], [WARPS, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout(
        [FLIGHT * ACROSS // WARPS, 4], [1, 32], [WARPS // ACROSS, ACROSS], [1, 0]
    )
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS // ACROSS, ACROSS], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    nth = gl.arange(0, FLIGHT, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    local = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, flat))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, flat))
    denom = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, flat))
    if HAS_SINK:
        m = gl.load(sink_ptr + local % num_heads) * LOG2_E
        denom = gl.where(m == float("-inf"), 0.0, 1.0)
    acc = gl.zeros([ROWS, D], gl.float32, layout)
    for start in range(0, num_pieces, UNROLL):
        nth_piece = start + nth % UNROLL
        slot = _slot(first_worker, nth_piece, EVEN)
        at = (slot * row_blocks).to(gl.int64) * M + first_row + nth // UNROLL
        is_piece = nth_piece < num_pieces
        # Not masked by the log-sum-exp: one load would wait for the other.
        x = gl.load(
            partial_out_ptr + (at * D)[:, None] + d[None, :], mask=is_piece[:, None], other=0.0
        )
        partial_lse = gl.load(partial_lse_ptr + at, mask=is_piece, other=float("-inf"))
        piece = start + gl.arange(0, UNROLL, layout=gl.SliceLayout(0, flat))
        slot_ = _slot(first_worker, piece, EVEN)
        at_ = (slot_ * row_blocks).to(gl.int64)[None, :] * M + local[:, None]
        piece_lse = gl.load(
            partial_lse_ptr + at_, mask=(piece < num_pieces)[None, :], other=float("-inf")
        )
        piece_lse = piece_lse * LOG2_E
        m_new = gl.maximum(m, gl.max(piece_lse, 1))
        m_safe = finite_or_zero(m_new)
        alpha = gl.exp2(m - m_safe)
        denom = denom * alpha + gl.sum(gl.exp2(piece_lse - m_safe[:, None]), 1)
        m = m_new
        weight = gl.exp2(partial_lse * LOG2_E - _spread(m_safe, UNROLL, gl.SliceLayout(1, wide)))
        x = gl.where((partial_lse > float("-inf"))[:, None], x * weight[:, None], 0.0)
        acc *= gl.convert_layout(alpha, rows)[:, None]
        acc += gl.convert_layout(gl.sum(gl.reshape(x, [ROWS, UNROLL, D]), 1), layout)
    is_nothing = denom == 0.0
    denom = gl.where(is_nothing, 1.0, denom)
    if HAS_LSE:
        lse = gl.where(is_nothing, float("-inf"), (m + gl.log2(denom)) * LN_2)
        place = (q_begin + local // num_heads).to(gl.int64) * lse_stride_t
        place += (local % num_heads).to(gl.int64) * lse_stride_h
        gl.store(lse_ptr + place, lse, mask=local < q_len * num_heads)
    row = first_row + gl.arange(0, ROWS, layout=rows)
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    token = (q_begin + row // num_heads).to(gl.int64)
    head = (row % num_heads).to(gl.int64)
    target = out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + column[None, :]
    scale = gl.convert_layout(1.0 / denom, rows)
    acc = (acc * scale[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(target, acc, mask=(row < q_len * num_heads)[:, None])
