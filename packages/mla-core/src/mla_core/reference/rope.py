"""Rotary position embedding in both pairings, and the tables it reads.

out = x * cos + rot(x) * sin, where rot maps each pair (a, b) to (-b, a). NeoX models pair element
``i`` with ``i + rotary_dim / 2`` (half split), GPT-J models ``2 i`` with ``2 i + 1`` (adjacent).
"""

from __future__ import annotations

import math

import torch

from mla_core.errors import LayoutError


def rope(
    x: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    rotary_dim: int | None = None,
    offset: int | torch.Tensor = 0,
    dim_offset: int = 0,
    inverse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Rotate ``rotary_dim`` elements of each row by its position.

    Parameters
    ----------
    x : [num_tokens, ..., head_dim]
        Elements ``dim_offset .. dim_offset + rotary_dim - 1`` turn, the others pass through.
    positions : [num_tokens], integer
    cos, sin : [max_position, rotary_dim / 2] or [max_position, rotary_dim]
        One column for each pair, or one for each element.
    is_neox : bool
        True pairs the two halves, False adjacent elements.
    rotary_dim : int, optional
        Even; everything from ``dim_offset`` on by default.
    offset : int or [num_tokens]
        Added to ``positions``.
    dim_offset : int
    inverse : bool
        Rotate backwards: with one column for each pair this undoes the rotation.
    dtype : torch.dtype
        Everything is converted to it first.

    Returns
    -------
    rotated : like ``x``, in ``dtype``

    Raises
    ------
    LayoutError
        ``rotary_dim`` is odd or too wide, or the tables fit it in neither form.
    """
    head_dim = x.shape[-1]
    if not 0 <= dim_offset <= head_dim:
        raise LayoutError(f"rope: dim_offset must be in 0..{head_dim}, got {dim_offset}")
    widest = head_dim - dim_offset
    rotary_dim = widest if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= widest:
        raise LayoutError(
            f"rope: rotary_dim must be an even number in 0..{widest}, got {rotary_dim}; "
            "a rotation turns pairs"
        )
    if cos.shape != sin.shape or cos.shape[-1] not in (rotary_dim // 2, rotary_dim):
        raise LayoutError(
            f"rope: cos and sin must be [max_position, {rotary_dim // 2} or {rotary_dim}], got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}; split a combined table first"
        )
    rows = positions.long() + offset
    per_row = (x.shape[0],) + (1,) * (x.dim() - 2) + (rotary_dim,)
    row_cos, row_sin = (
        _per_element(table[rows].to(dtype), rotary_dim, is_neox).reshape(per_row)
        for table in (cos, sin)
    )
    if inverse:
        row_sin = -row_sin
    x = x.to(dtype)
    end = dim_offset + rotary_dim
    turned = x[..., dim_offset:end]
    turned = turned * row_cos + _quarter_turn(turned, is_neox) * row_sin
    return torch.cat([x[..., :dim_offset], turned, x[..., end:]], dim=-1)


def _per_element(columns: torch.Tensor, rotary_dim: int, is_neox: bool) -> torch.Tensor:
    """Widen a table of pairs to one column for each element."""
    if columns.shape[-1] == rotary_dim:
        return columns
    if is_neox:
        return torch.cat([columns, columns], dim=-1)
    return columns.repeat_interleave(2, dim=-1)


def _quarter_turn(x: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Map each pair (a, b) to (-b, a)."""
    if is_neox:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([-b, a], dim=-1).flatten(-2)


def rope_tables(
    max_position: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of ``position * base ** (-2 i / rotary_dim)``, one column for each pair.

    Returns
    -------
    cos, sin : [max_position, rotary_dim / 2]
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def split_cos_sin_cache(cos_sin_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a [max_position, rotary_dim] table of cosines then sines into its halves."""
    if cos_sin_cache.shape[-1] % 2:
        raise LayoutError(
            f"split_cos_sin_cache: the last dimension must be even, got "
            f"{tuple(cos_sin_cache.shape)}; it holds cosines, then as many sines"
        )
    cos, sin = cos_sin_cache.chunk(2, dim=-1)
    return cos, sin


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's attention temperature ``0.1 * mscale * ln(factor) + 1``, 1 up to factor 1.

    DeepSeek models multiply ``sm_scale`` by the square of ``yarn_mscale(factor, mscale_all_dim)``.
    Source: YaRN (arXiv 2309.00071) section 3.4.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
