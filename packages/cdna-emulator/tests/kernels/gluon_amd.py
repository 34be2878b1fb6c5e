"""Gluon kernels: layouts, matrix instructions and copies chosen by hand."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import cdna3, cdna4


@gluon.jit
def mfma(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,  # [M, N]
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    VERSION: gl.constexpr,
    INSTRUCTION: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    K_WIDTH: gl.constexpr,
    ACC: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One product with a chosen instruction; operands come straight from memory."""
    layout: gl.constexpr = gl.amd.AMDMFMALayout(
        version=VERSION, instr_shape=INSTRUCTION, transposed=TRANSPOSED, warps_per_cta=WARPS
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, K_WIDTH)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, layout, K_WIDTH)
    am = gl.arange(0, M, gl.SliceLayout(1, a_layout))
    ak = gl.arange(0, K, gl.SliceLayout(0, a_layout))
    bk = gl.arange(0, K, gl.SliceLayout(1, b_layout))
    bn = gl.arange(0, N, gl.SliceLayout(0, b_layout))
    a = cdna3.buffer_load(a_ptr, am[:, None] * K + ak[None, :])
    b = cdna3.buffer_load(b_ptr, bk[:, None] * N + bn[None, :])
    c = cdna3.mfma(a, b, gl.zeros([M, N], ACC, layout))
    cm = gl.arange(0, M, gl.SliceLayout(1, layout))
    cn = gl.arange(0, N, gl.SliceLayout(0, layout))
    cdna3.buffer_store(c, c_ptr, cm[:, None] * N + cn[None, :])


@gluon.jit
def mfma_through_lds(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    VERSION: gl.constexpr,
    INSTRUCTION: gl.constexpr,
    K_WIDTH: gl.constexpr,
    VECTOR: gl.constexpr,
    PHASES: gl.constexpr,
):
    """Both operands lie in LDS with their rows swizzled; on gfx950 B is read transposed."""
    layout: gl.constexpr = gl.amd.AMDMFMALayout(
        version=VERSION, instr_shape=INSTRUCTION, transposed=True, warps_per_cta=[2, 2]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, K_WIDTH)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, layout, K_WIDTH)
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [8, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, PHASES, order=[1, 0])
    m = gl.arange(0, M, gl.SliceLayout(1, blocked))
    ka = gl.arange(0, K, gl.SliceLayout(0, blocked))
    kb = gl.arange(0, K, gl.SliceLayout(1, blocked))
    n = gl.arange(0, N, gl.SliceLayout(0, blocked))
    a = cdna3.buffer_load(a_ptr, m[:, None] * K + ka[None, :])
    b = cdna3.buffer_load(b_ptr, kb[:, None] * N + n[None, :])
    a_tile = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [M, K], shared, a)
    b_tile = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [K, N], shared, b)
    c = cdna3.mfma(
        a_tile.load(a_layout), b_tile.load(b_layout), gl.zeros([M, N], gl.float32, layout)
    )
    cm = gl.arange(0, M, gl.SliceLayout(1, layout))
    cn = gl.arange(0, N, gl.SliceLayout(0, layout))
    cdna3.buffer_store(c, c_ptr, cm[:, None] * N + cn[None, :])


@gluon.jit
def async_matmul(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,
    K,
    M: gl.constexpr,
    N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    FROM_GLOBAL: gl.constexpr,
):
    """Copies to LDS run ahead of a loop over K in two buffers; gfx950 only."""
    layout: gl.constexpr = gl.amd.AMDMFMALayout(
        version=4, instr_shape=[16, 16, 32], transposed=True, warps_per_cta=[2, 2]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 8)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 8)
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [8, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    m = gl.arange(0, M, gl.SliceLayout(1, blocked))
    ka = gl.arange(0, BLOCK_K, gl.SliceLayout(0, blocked))
    kb = gl.arange(0, BLOCK_K, gl.SliceLayout(1, blocked))
    n = gl.arange(0, N, gl.SliceLayout(0, blocked))
    a_at, b_at = m[:, None] * K + ka[None, :], kb[:, None] * N + n[None, :]
    a_tiles = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [2, M, BLOCK_K], shared)
    b_tiles = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [2, BLOCK_K, N], shared)
    steps = K // BLOCK_K
    _copy_tile(a_tiles.index(0), a_ptr, a_at, FROM_GLOBAL)
    _copy_tile(b_tiles.index(0), b_ptr, b_at, FROM_GLOBAL)
    cdna4.async_copy.commit_group()
    acc = gl.zeros([M, N], gl.float32, layout)
    for step in range(steps - 1):
        ahead = (step + 1) % 2
        a_at += BLOCK_K
        b_at += BLOCK_K * N
        _copy_tile(a_tiles.index(ahead), a_ptr, a_at, FROM_GLOBAL)
        _copy_tile(b_tiles.index(ahead), b_ptr, b_at, FROM_GLOBAL)
        cdna4.async_copy.commit_group()
        cdna4.async_copy.wait_group(1)
        a = cdna4.async_copy.load_shared_relaxed(a_tiles.index(step % 2), a_layout)
        b = cdna4.async_copy.load_shared_relaxed(b_tiles.index(step % 2), b_layout)
        acc = cdna4.mfma(a, b, acc)
    cdna4.async_copy.wait_group(0)
    a = a_tiles.index((steps - 1) % 2).load(a_layout)
    b = b_tiles.index((steps - 1) % 2).load(b_layout)
    acc = cdna4.mfma(a, b, acc)
    cm = gl.arange(0, M, gl.SliceLayout(1, layout))
    cn = gl.arange(0, N, gl.SliceLayout(0, layout))
    cdna3.buffer_store(acc, c_ptr, cm[:, None] * N + cn[None, :])


@gluon.jit
def _copy_tile(tile, pointer, at, FROM_GLOBAL: gl.constexpr):
    if FROM_GLOBAL:
        cdna4.async_copy.global_load_to_shared(tile, pointer + at)
    else:
        cdna4.async_copy.buffer_load_to_shared(tile, pointer, at)


@gluon.jit
def async_copy_words(x_ptr, o_ptr, n, BLOCK: gl.constexpr):
    """Copy dwords through LDS, masked; both architectures have this width."""
    blocked: gl.constexpr = gl.BlockedLayout([1], [64], [4], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    i = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, blocked)
    tile = gl.allocate_shared_memory(gl.float32, [BLOCK], shared)
    cdna4.async_copy.buffer_load_to_shared(tile, x_ptr, i, mask=i < n)
    cdna4.async_copy.commit_group()
    cdna4.async_copy.wait_group(0)
    gl.store(o_ptr + i, tile.load(blocked), mask=i < n)


@gluon.jit
def mfma_scaled(
    a_ptr,  # [M, K] or [M, K / 2]
    a_scale_ptr,  # [M, K / 32] e8m0
    b_ptr,
    b_scale_ptr,  # [N, K / 32]
    c_ptr,
    A_FORMAT: gl.constexpr,
    B_FORMAT: gl.constexpr,
    A_PACK: gl.constexpr,
    B_PACK: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    INSTRUCTION: gl.constexpr,
):
    """Block-scaled product of a chosen shape; gfx950 only."""
    layout: gl.constexpr = gl.amd.AMDMFMALayout(
        version=4, instr_shape=INSTRUCTION, transposed=True, warps_per_cta=[1, 1]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 16)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 16)
    a_scale_layout: gl.constexpr = cdna4.get_mfma_scale_layout(a_layout, [M, K // 32])
    b_scale_layout: gl.constexpr = cdna4.get_mfma_scale_layout(b_layout, [N, K // 32])
    am = gl.arange(0, M, gl.SliceLayout(1, a_layout))
    ak = gl.arange(0, K // A_PACK, gl.SliceLayout(0, a_layout))
    bk = gl.arange(0, K // B_PACK, gl.SliceLayout(1, b_layout))
    bn = gl.arange(0, N, gl.SliceLayout(0, b_layout))
    sm = gl.arange(0, M, gl.SliceLayout(1, a_scale_layout))
    sk = gl.arange(0, K // 32, gl.SliceLayout(0, a_scale_layout))
    tn = gl.arange(0, N, gl.SliceLayout(1, b_scale_layout))
    tk = gl.arange(0, K // 32, gl.SliceLayout(0, b_scale_layout))
    a = cdna4.buffer_load(a_ptr, am[:, None] * (K // A_PACK) + ak[None, :])
    b = cdna4.buffer_load(b_ptr, bk[:, None] * N + bn[None, :])
    a_scale = cdna4.buffer_load(a_scale_ptr, sm[:, None] * (K // 32) + sk[None, :])
    b_scale = cdna4.buffer_load(b_scale_ptr, tn[:, None] * (K // 32) + tk[None, :])
    acc = gl.zeros([M, N], gl.float32, layout)
    acc = cdna4.mfma_scaled(a, a_scale, A_FORMAT, b, b_scale, B_FORMAT, acc)
    cm = gl.arange(0, M, gl.SliceLayout(1, layout))
    cn = gl.arange(0, N, gl.SliceLayout(0, layout))
    cdna4.buffer_store(acc, c_ptr, cm[:, None] * N + cn[None, :])


@gluon.jit
def buffer_atomics(x_ptr, o_ptr, n, OP: gl.constexpr, BINS: gl.constexpr, BLOCK: gl.constexpr):
    """Integer atomics of buffer instructions."""
    blocked: gl.constexpr = gl.BlockedLayout([1], [64], [4], [0])
    i = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, blocked)
    x = cdna3.buffer_load(x_ptr, i, mask=i < n, other=0)
    if OP == "add":
        cdna3.buffer_atomic_add(o_ptr, i % BINS, x, mask=i < n, sem="relaxed")
    elif OP == "max":
        cdna3.buffer_atomic_max(o_ptr, i % BINS, x, mask=i < n, sem="relaxed")
    elif OP == "or":
        cdna3.buffer_atomic_or(o_ptr, i % BINS, x, mask=i < n, sem="relaxed")
    else:
        cdna3.buffer_atomic_xor(o_ptr, i % BINS, x, mask=i < n, sem="relaxed")


@gluon.jit
def buffer_atomic_floats(x_ptr, o_ptr, BLOCK: gl.constexpr):
    """Every program adds its floats to the same places."""
    blocked: gl.constexpr = gl.BlockedLayout([2], [64], [4], [0])
    i = gl.arange(0, BLOCK, blocked)
    x = cdna4.buffer_load(x_ptr, gl.program_id(0) * BLOCK + i)
    cdna4.buffer_atomic_add(o_ptr, i, x, sem="relaxed")


@gluon.jit
def convert_layouts(x_ptr, o_ptr, M: gl.constexpr, N: gl.constexpr):
    """Move a tile from rows per wave to columns per wave and through padded LDS."""
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [4, 16], [4, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([4, 1], [16, 4], [1, 4], [0, 1])
    padded: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[32, 4]], [M, N], [1, 0])
    m = gl.arange(0, M, gl.SliceLayout(1, rows))
    n = gl.arange(0, N, gl.SliceLayout(0, rows))
    x = gl.load(x_ptr + m[:, None] * N + n[None, :])
    y = gl.convert_layout(x * 2, columns)
    tile = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [M, N], padded)
    tile.store(y)
    z = tile.load(rows)
    gl.store(o_ptr + m[:, None] * N + n[None, :], x + z)
