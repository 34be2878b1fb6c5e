"""Where output rows go: whole requests to the result, pieces of cut ones to the partials."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_triton.kernels.hopper._gluon import aggregate


@aggregate
class Output:
    """The result and the partials of a call.

    A run leaves one partial, in the slot of its worker. A span leaves at most two, the end of a
    request begun before it and the beginning of one that goes on after it: the slots ``2 * worker``
    and ``2 * worker + 1``.
    """

    out_ptr: gl.tensor  # [total_q, num_heads, D]
    lse_ptr: gl.tensor  # [total_q, num_heads] f32, natural log; unused without HAS_LSE
    partial_out_ptr: gl.tensor  # [slots, row_blocks, M, D] f32, normalised
    partial_lse_ptr: gl.tensor  # [slots, row_blocks, M] f32
    note_ptr: gl.tensor  # [requests or workers, 4] i32, see the merge
    sink_ptr: gl.tensor  # [num_heads] f32; unused without HAS_SINK
    num_heads: gl.tensor
    out_stride_t: gl.tensor  # elements
    out_stride_h: gl.tensor
    lse_stride_t: gl.tensor
    lse_stride_h: gl.tensor
    row_blocks: gl.tensor
    D: gl.constexpr
    EVEN: gl.constexpr
    HAS_LSE: gl.constexpr
    HAS_SINK: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        out_ptr,
        lse_ptr,
        partial_out_ptr,
        partial_lse_ptr,
        note_ptr,
        sink_ptr,
        num_heads,
        out_stride_t,
        out_stride_h,
        lse_stride_t,
        lse_stride_h,
        row_blocks,
        D,
        EVEN,
        HAS_LSE,
        HAS_SINK,
    ):
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.partial_out_ptr = partial_out_ptr
        self.partial_lse_ptr = partial_lse_ptr
        self.note_ptr = note_ptr
        self.sink_ptr = sink_ptr
        self.num_heads = num_heads
        self.out_stride_t = out_stride_t
        self.out_stride_h = out_stride_h
        self.lse_stride_t = lse_stride_t
        self.lse_stride_h = lse_stride_h
        self.row_blocks = row_blocks
        self.D = gl.constexpr(D)
        self.EVEN = gl.constexpr(EVEN)
        self.HAS_LSE = gl.constexpr(HAS_LSE)
        self.HAS_SINK = gl.constexpr(HAS_SINK)

    @gluon.jit
    def partial_row(self, worker, is_begin, block, M: gl.constexpr):
        """Return the first row of a partial, counted over all slots."""
        slot = worker
        if not self.EVEN:
            slot = worker * 2 + is_begin.to(gl.int32)
        return (slot * self.row_blocks + block).to(gl.int64) * M

    @gluon.jit
    def place(self, row, q_begin):
        """Return the element offset of output rows and that of their log-sum-exp."""
        token = (q_begin + row // self.num_heads).to(gl.int64)
        head = (row % self.num_heads).to(gl.int64)
        out = token * self.out_stride_t + head * self.out_stride_h
        return out, token * self.lse_stride_t + head * self.lse_stride_h

    @gluon.jit
    def store_lse(self, lse, local, row, q_begin, is_row, is_whole, partial_row):
        """Store the log-sum-exp of rows; ``local`` is the row inside the block."""
        if is_whole:
            if self.HAS_LSE:
                _, place = self.place(row, q_begin)
                gl.store(self.lse_ptr + place, lse, mask=is_row)
        else:
            gl.store(self.partial_lse_ptr + partial_row + local, lse)

    @gluon.jit
    def clear_note(self, worker, block):
        """Say that this worker ends no request which others began, unless `note_end` follows."""
        if (not self.EVEN) & (block == 0):
            gl.store(self.note_ptr + worker * 4 + 1, 0)

    @gluon.jit
    def note_end(self, work, item, worker, block):
        """Note for the merge who holds the pieces of a request that ends here."""
        if (block == 0) & item.is_item & item.is_end & (self.EVEN | (not item.is_begin)):
            note = self.note_ptr + work.note(worker) * 4
            first_worker = work.first_worker()
            gl.store(note, first_worker)
            gl.store(note + 1, worker - first_worker + 1)
            gl.store(note + 2, item.q_begin)
            gl.store(note + 3, item.q_len)

    @gluon.jit
    def store(self, acc, staging, column, first_row, q_begin, q_len, is_whole, partial_row):
        """Store normalised columns [M, width] of rows from ``first_row`` on.

        ``staging`` is shared memory of that shape that nobody reads any more: what the matrix unit
        leaves in registers would go out in pieces of a few bytes.
        """
        M: gl.constexpr = acc.shape[0]
        WIDTH: gl.constexpr = acc.shape[1]
        LANES: gl.constexpr = min(32, WIDTH // 8)
        dtype: gl.constexpr = self.out_ptr.dtype.element_ty
        scattered: gl.constexpr = acc.type.layout
        layout: gl.constexpr = gl.BlockedLayout(
            [1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
        )
        if not is_whole:
            local = gl.arange(0, M, layout=gl.SliceLayout(1, scattered))
            d = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, scattered))
            offset = (partial_row + local) * self.D
            gl.store(self.partial_out_ptr + offset[:, None] + d[None, :], acc)
        elif dtype == staging.dtype:
            staging.store(acc.to(dtype))
            row = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
            d_ = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
            place, _ = self.place(row, q_begin)
            is_row = row < q_len * self.num_heads
            gl.store(
                self.out_ptr + place[:, None] + d_[None, :],
                staging.load(layout),
                mask=is_row[:, None],
            )
        else:
            row_ = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, scattered))
            e = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, scattered))
            place_, _ = self.place(row_, q_begin)
            is_row_ = row_ < q_len * self.num_heads
            gl.store(
                self.out_ptr + place_[:, None] + e[None, :], acc.to(dtype), mask=is_row_[:, None]
            )
