"""Normalise, rotate and quantise rows whose value includes the rotary part (DeepSeek-V4).

Such a row is ``nope`` in fp8 with a power-of-two scale for each group, followed by a rotary tail
that stays bf16. Attention returns rotated values, so its output is rotated back afterwards.
"""

from __future__ import annotations

import torch

from mla_core.reference.norm import rms_norm
from mla_core.reference.quant import quantize_groups
from mla_core.reference.rope import rope

#: Floor of a group's scale before it is rounded up to a power of two.
MIN_SCALE = 1e-4


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    is_neox: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """RMS-normalise each row, then rotate its tail.

    Parameters
    ----------
    x : [num_tokens, ..., head_dim]
        The last ``2 * cos.shape[-1]`` elements of each row are rotary.
    weight : [head_dim], optional
        Ones by default.
    positions : [num_tokens], integer
    cos, sin : [max_position, rotary_dim / 2]
    """
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    normed, _ = rms_norm(x, weight, eps, dtype=dtype)
    nope, pe = _split_tail(normed, cos)
    return torch.cat([nope, rope(pe, positions, cos, sin, is_neox=is_neox, dtype=dtype)], dim=-1)


def norm_rope_group_quant(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    is_neox: bool = False,
    group_size: int = 64,
    fp8: str = "fp8_e4m3",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`norm_rope`, then quantise all but the rotary tail.

    Returns
    -------
    nope : [num_tokens, ..., head_dim - rotary_dim], fp8
    scales : [num_tokens, ..., (head_dim - rotary_dim) / group_size], fp32 powers of two
    pe : [num_tokens, ..., rotary_dim], bf16
    """
    rows = norm_rope(x, weight, positions, cos, sin, eps=eps, is_neox=is_neox, dtype=dtype)
    nope, pe = _split_tail(rows, cos)
    stored, scales = quantize_groups(
        nope, group_size, fp8=fp8, scale_format="ue8m0", min_scale=MIN_SCALE
    )
    return stored, scales, pe.bfloat16()


def inverse_rope_group_quant(
    out: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_groups: int,
    is_neox: bool = False,
    group_size: int = 128,
    fp8: str = "fp8_e4m3",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the rotation of attention outputs whose values include the rotary part; quantise.

    Parameters
    ----------
    out : [num_tokens, num_heads, head_dim]
        The last ``2 * cos.shape[-1]`` elements of each head are rotary.
    positions : [num_tokens], integer
    cos, sin : [max_position, rotary_dim / 2]
    num_groups : int
        Heads are dealt out to so many output groups, each of one row for each token.

    Returns
    -------
    stored : [num_tokens, num_groups, num_heads * head_dim / num_groups], fp8
    scales : [num_tokens, num_groups, columns / group_size], fp32 powers of two
    """
    nope, pe = _split_tail(out.to(dtype), cos)
    pe = rope(pe, positions, cos, sin, is_neox=is_neox, inverse=True, dtype=dtype)
    rows = torch.unflatten(torch.cat([nope, pe], dim=-1).flatten(1), 1, (num_groups, -1))
    return quantize_groups(rows, group_size, fp8=fp8, scale_format="ue8m0", min_scale=MIN_SCALE)


def _split_tail(x: torch.Tensor, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split rows before their rotary elements, two for each column of ``cos``."""
    nope_dim = x.shape[-1] - 2 * cos.shape[-1]
    return x[..., :nope_dim], x[..., nope_dim:]
