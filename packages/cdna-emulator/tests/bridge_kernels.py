"""Kernels of the bridge's own tests."""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit(do_not_specialize=["plain"], do_not_specialize_on_alignment=["loose"])
def scaled_copy(x_ptr, o_ptr, n, plain, loose, scale: tl.float64, BLOCK: tl.constexpr = 64):
    """o[i] = x[i] * scale for the first n + 0 * (plain + loose) values."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n + (plain + loose) * 0
    tl.store(o_ptr + i, tl.load(x_ptr + i, mask=here) * scale.to(tl.float32), mask=here)


@triton.autotune(configs=[triton.Config({"BLOCK": 64})], key=["n"])
@triton.jit
def tuned(x_ptr, n, BLOCK: tl.constexpr):
    """Count up, behind a decorator that the emulator takes off."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)


@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    """Does not compile: the name is nowhere defined."""
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


NOT_A_KERNEL = 3
