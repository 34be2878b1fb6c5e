"""Query rows that meet an fp8 cache: brought to fp16 by a power of two each, or to bf16."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from mla_triton.kernels.hopper._gluon import barrier


@gluon.jit
def load_columns(ptr, column, is_row, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Return columns of rows [rows, WIDTH], zeros where there is no row."""
    d = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return gl.load(ptr[:, None] + d[None, :], mask=is_row[:, None], other=0.0)


@gluon.jit
def largest_of(x):
    """Return the largest magnitude of each row."""
    return gl.max(gl.abs(x.to(gl.float32)), 1)


@gluon.jit
def powers_of(largest):
    """Return powers of two that multiply rows before they become fp16, and take that back.

    The largest element of a row becomes one of [2**14, 2**15), short of fp16's range.
    """
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) & 255
    exponent = gl.where(largest == 0.0, 127 + 14, gl.maximum(exponent, 127 - 100))
    factor = ((254 + 14 - exponent) << 23).to(gl.float32, bitcast=True)
    divisor = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    return factor, divisor


@gluon.jit
def load_converted_rows(rows, q_begin, q_len, first_row):
    """Store query rows in halves, for wgmma; return what each row was divided by.

    Rows in fp16 were, see `powers_of`. They are read twice, the second time from a cache: registers
    would not hold 64 rows.
    """
    M: gl.constexpr = rows.nope.shape[1]
    HALF: gl.constexpr = rows.nope.shape[2]
    R: gl.constexpr = rows.rope.shape[1]
    dtype: gl.constexpr = rows.nope.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = first_row + gl.arange(0, M, layout=gl.SliceLayout(1, layout))
    nope, rope, is_row = rows.find(q_begin, q_len, row)
    q_pe = load_columns(rope, 0, is_row, R, layout)
    factor = gl.full([M], 1.0, gl.float32, gl.SliceLayout(1, layout))
    divisor = factor
    if dtype == gl.float16:
        largest = largest_of(q_pe)
        for half in gl.static_range(2):
            largest = gl.maximum(
                largest, largest_of(load_columns(nope, half * HALF, is_row, HALF, layout))
            )
        factor, divisor = powers_of(largest)
    barrier()  # every warp is done with the rows before
    for half in gl.static_range(2):
        x = load_columns(nope, half * HALF, is_row, HALF, layout)
        rows.nope.index(half).store((x.to(gl.float32) * factor[:, None]).to(dtype))
    rows.rope.store((q_pe.to(gl.float32) * factor[:, None]).to(dtype))
    fence_async_shared()
    barrier()
    return divisor
