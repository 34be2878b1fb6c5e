"""Moving data: gathers, masks, layouts through LDS, descriptors, every width of access."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def copy(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Copy n values, the last block masked."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def transpose(x_ptr, o_ptr, M, N, BLOCK: tl.constexpr):
    """Transpose a tile through LDS; both sides coalesced."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :])
    tl.store(
        o_ptr + n[:, None] * M + m[None, :], tl.trans(x), mask=(n < N)[:, None] & (m < M)[None, :]
    )


@triton.jit
def gather_rows(table_ptr, index_ptr, o_ptr, width, BLOCK: tl.constexpr):
    """Copy the rows that an index names; a negative index leaves zeros."""
    i = tl.arange(0, BLOCK)
    row = tl.load(index_ptr + tl.program_id(0)).to(tl.int64)
    x = tl.load(table_ptr + row * width + i, mask=(i < width) & (row >= 0), other=0.0)
    tl.store(o_ptr + tl.program_id(0) * width + i, x, mask=i < width)


@triton.jit
def scatter(x_ptr, index_ptr, o_ptr, N: tl.constexpr):
    """o[index[i]] = x[i] with 64-bit addresses."""
    i = tl.arange(0, N)
    at = tl.load(index_ptr + i)
    tl.store(o_ptr + at, tl.load(x_ptr + i), mask=at >= 0)


@triton.jit
def gather_in_tile(x_ptr, index_ptr, o_ptr, M: tl.constexpr, N: tl.constexpr):
    """Pick values within a tile along its first axis."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    at = m[:, None] * N + n[None, :]
    x, index = tl.load(x_ptr + at), tl.load(index_ptr + at)
    tl.store(o_ptr + at, tl.gather(x, index, axis=0))


@triton.jit
def shuffle(x_ptr, y_ptr, o_ptr, N: tl.constexpr):
    """Interleave, split, flip, reshape and permute."""
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    both = tl.interleave(x, y)
    low, high = tl.split(tl.reshape(both, [N, 2]))
    tl.store(o_ptr + tl.arange(0, 2 * N), both)
    tl.store(o_ptr + 2 * N + i, tl.flip(low, 0))
    cube = tl.permute(tl.reshape(high, [4, 2, N // 8]), (2, 0, 1))
    tl.store(o_ptr + 3 * N + i, tl.reshape(cube, [N]))
    tl.store(o_ptr + 4 * N + tl.arange(0, 2 * N), tl.reshape(tl.join(x, y), [2 * N]))


@triton.jit
def descriptor_copy(x_ptr, o_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add one to a matrix through tensor descriptors, whose edges are cut."""
    source = tl.make_tensor_descriptor(
        x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_M, BLOCK_N]
    )
    target = tl.make_tensor_descriptor(
        o_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK_M, BLOCK_N]
    )
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    target.store([m, n], source.load([m, n]) + 1.0)


@triton.jit
def cached_copy(x_ptr, o_ptr, N: tl.constexpr):
    """Loads and stores with each cache modifier and eviction policy."""
    i = tl.arange(0, N)
    a = tl.load(x_ptr + i, cache_modifier=".ca")
    b = tl.load(x_ptr + N + i, cache_modifier=".cg", eviction_policy="evict_first")
    c = tl.load(x_ptr + 2 * N + i, cache_modifier=".cv", volatile=True)
    tl.store(o_ptr + i, a, cache_modifier=".wb")
    tl.store(o_ptr + N + i, b, cache_modifier=".cs", eviction_policy="evict_last")
    tl.store(o_ptr + 2 * N + i, c, cache_modifier=".wt")


@triton.jit
def spilling(x_ptr, o_ptr, N: tl.constexpr, ROUNDS: tl.constexpr):
    """Hold far more values than registers: the compiler must spill to scratch."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    total = x
    for turn in range(ROUNDS):
        total = total * 0.5 + tl.sum(x * (turn + 1), 0)
    tl.store(o_ptr + i, total + x)


@triton.jit
def stencil(x_ptr, o_ptr, n, BLOCK: tl.constexpr):
    """Mean of each value and its neighbours, unaligned loads included."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x_ptr + i - 1, mask=(i > 0) & (i < n), other=0.0)
    here = tl.load(x_ptr + i, mask=i < n, other=0.0)
    right = tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(o_ptr + i, (left + here + right) / 3, mask=i < n)


@triton.jit
def arguments(
    o_ptr,
    flag,
    small,
    large,
    real,
    nothing,
    byte_ptr,
    N: tl.constexpr = 8,
    SIGN: tl.constexpr = True,
):
    """Every kind of scalar argument."""
    i = tl.arange(0, N)
    value = large.to(tl.float64) + small + real
    if flag:
        value = value * 2
    if nothing is None:
        value = value + tl.load(byte_ptr)
    if SIGN:
        value = -value
    tl.store(o_ptr + i, value + i.to(tl.float64))
