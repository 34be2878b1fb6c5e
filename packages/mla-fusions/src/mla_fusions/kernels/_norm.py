"""Norms of rows that are tiles [BLOCK_T, GROUPS, GROUP] in fp32, their elements in order.

Elements behind the width of a row are 0.
"""

from __future__ import annotations

import triton
from triton import language as tl


@triton.jit
def row_sums(x):
    """Return the sum of each row: [BLOCK_T]."""
    return tl.sum(tl.sum(x, axis=2), axis=1)


@triton.jit
def inverse_root(squares, eps, WIDTH: tl.constexpr):
    """Return ``1 / sqrt(squares / WIDTH + eps)``, each operation rounded correctly."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / WIDTH + eps))


@triton.jit
def normed(
    x,
    mean,  # [BLOCK_T], or None for 0
    inverse,  # [BLOCK_T]
    weight_ptr,
    bias_ptr,  # or None
    e,  # elements of ``x``, which broadcast to its shape
    mask,
    IS_GEMMA: tl.constexpr,
):
    """Return ``(x - mean) * inverse * weight + bias``; ``IS_GEMMA`` weights are stored less 1."""
    if mean is not None:
        x = x - mean[:, None, None]
    weight = tl.load(weight_ptr + e, mask=mask, other=0).to(tl.float32)
    if IS_GEMMA:
        weight += 1.0
    x = x * inverse[:, None, None] * weight
    if bias_ptr is not None:
        x += tl.load(bias_ptr + e, mask=mask, other=0).to(tl.float32)
    return x
