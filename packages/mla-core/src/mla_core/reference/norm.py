"""Root-mean-square and layer normalisation over the last dimension."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    is_gemma: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale rows to unit root mean square, then by a weight: ``x / sqrt(mean(x^2) + eps) * w``.

    Parameters
    ----------
    x : [..., dim]
    weight : [dim]
    eps : float
        Added to the mean of the squares.
    residual : [..., dim], optional
        Added to ``x`` before normalising.
    is_gemma : bool
        Weights are stored as their difference from 1.

    Returns
    -------
    normed : [..., dim]
    residual_out : [..., dim]
        ``x + residual``, which the next layer takes; ``x`` without a residual.
    """
    x = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    weight = weight.to(dtype) + 1.0 if is_gemma else weight.to(dtype)
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(mean_square + eps) * weight, x


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Centre rows, scale them to unit variance, then ``* weight + bias``: the indexer's key norm.

    Parameters
    ----------
    x : [..., dim]
    weight, bias : [dim]
    eps : float
        Added to the variance, which divides by ``dim``.

    Returns
    -------
    normed : [..., dim]
    """
    centred = x.to(dtype) - x.to(dtype).mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight.to(dtype) + bias.to(dtype)
