"""Batched matrix products of the absorbed projections, with quantised weights and activations.

y[b] = x[b] @ w[b].T (+ bias[b]), the batch being the heads: W_UK folded into the query before
attention, W_UV applied to the output after it.
"""

from __future__ import annotations

import torch

from mla_core.reference.quant import (
    ScaleFormat,
    dequantize_groups,
    dequantize_mxfp4,
    quantize_groups,
    quantize_mxfp4,
)


def batched_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    transpose_in: bool = False,
    transpose_out: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Multiply each ``x[b]`` with the transpose of ``w[b]``.

    Parameters
    ----------
    x : [batch, m, k], or [m, batch, k] with ``transpose_in``
    w : [batch, n, k]
    bias : [batch, n], optional

    Returns
    -------
    y : [batch, m, n], or [m, batch, n] with ``transpose_out``
    """
    x = x.to(dtype)
    if transpose_in:
        x = x.transpose(0, 1)
    y = x @ w.to(dtype).transpose(1, 2)
    if bias is not None:
        y = y + bias.to(dtype)[:, None, :]
    return y.transpose(0, 1) if transpose_out else y


def batched_gemm_a8w8(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor | float,
    *,
    fp8: str = "fp8_e4m3",
    group_size: int = 128,
    scale_format: ScaleFormat = "fp32",
    bias: torch.Tensor | None = None,
    transpose_in: bool = False,
    transpose_out: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Quantise activations per token and group to fp8, then multiply with fp8 weights.

    Parameters
    ----------
    x, bias, transpose_in, transpose_out :
        As in `batched_gemm`.
    w : [batch, n, k], fp8
    w_scale : one element
        Dequantisation factor of all weights.
    group_size : int
        Elements of ``k`` that share a scale; the whole of ``k`` if it is shorter.
    scale_format : "fp32" or "ue8m0"
    """
    stored, scales = quantize_groups(
        x, min(group_size, x.shape[-1]), fp8=fp8, scale_format=scale_format, min_amax=1e-10
    )
    return batched_gemm(
        dequantize_groups(stored, scales, dtype=dtype),
        w.to(dtype) * w_scale,
        bias=bias,
        transpose_in=transpose_in,
        transpose_out=transpose_out,
        dtype=dtype,
    )


def batched_gemm_mxfp4(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    transpose_in: bool = False,
    transpose_out: bool = False,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Multiply MXFP4 activations, quantised here if need be, with MXFP4 weights.

    Parameters
    ----------
    x : [batch, m, k], or uint8 [batch, m, k / 2] when ``x_scales`` are given
    w : [batch, n, k / 2], uint8
    w_scales : [batch, n, k / 32], uint8
    x_scales : [batch, m, k / 32], uint8, optional
    transpose_in, transpose_out :
        As in `batched_gemm`.
    """
    if x_scales is None:
        x, x_scales = quantize_mxfp4(x)
    return batched_gemm(
        dequantize_mxfp4(x, x_scales, dtype=dtype),
        dequantize_mxfp4(w, w_scales, dtype=dtype),
        transpose_in=transpose_in,
        transpose_out=transpose_out,
        dtype=dtype,
    )
