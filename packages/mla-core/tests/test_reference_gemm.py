"""Absorbed products against einsum over the dequantised operands."""

from __future__ import annotations

import pytest
import torch

from mla_core.reference.gemm import batched_gemm, batched_gemm_a8w8, batched_gemm_mxfp4
from mla_core.reference.prefill import absorb_query
from mla_core.reference.quant import (
    dequantize_mxfp4,
    quantize_mxfp4,
    quantize_per_tensor,
    to_fp8,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("transpose_in", [False, True])
@pytest.mark.parametrize("transpose_out", [False, True])
def test_batched_gemm(rng, transpose_in, transpose_out):
    x, w, bias = draw(rng, 3, 4, 5).double(), draw(rng, 3, 6, 5).double(), draw(rng, 3, 6).double()
    y = batched_gemm(
        x.transpose(0, 1) if transpose_in else x,
        w,
        bias=bias,
        transpose_in=transpose_in,
        transpose_out=transpose_out,
    )
    for b in range(3):
        expected = x[b] @ w[b].T + bias[b]
        torch.testing.assert_close(y[:, b] if transpose_out else y[b], expected, **CLOSE)


def test_w_uk_as_a_weight_is_the_absorbed_query(rng):
    """The checkpoint's W_UK [H, nope, rank] becomes the GEMM weight [H, rank, nope]."""
    q_nope, w_uk = draw(rng, 4, 3, 5), draw(rng, 3, 5, 7)
    y = batched_gemm(q_nope.transpose(0, 1), w_uk.transpose(1, 2), transpose_out=True)
    torch.testing.assert_close(y, absorb_query(q_nope, w_uk), **CLOSE)


@pytest.mark.parametrize("fp8", ["fp8_e4m3", "fp8_e4m3fnuz"])
@pytest.mark.parametrize("k", [64, 256])
def test_fp8_activations_are_quantised_per_token_and_group(rng, fp8, k):
    # Rows and groups of very different size tell one scale for each from any coarser choice.
    x = draw(rng, 2, 3, k) * torch.tensor([1.0, 1e-2, 1e2])[:, None]
    x[..., : k // 2] *= 1e3
    w, w_scale = quantize_per_tensor(draw(rng, 2, 6, k), fp8=fp8)
    y = batched_gemm_a8w8(x, w, w_scale, fp8=fp8)
    group = min(128, k)
    for b in range(2):
        for m in range(3):
            row = []
            for part in x[b, m].split(group):
                scale = part.abs().max() / torch.finfo(w.dtype).max
                row.append(to_fp8(part / scale, fp8).double() * scale.double())
            expected = (w[b].double() * w_scale.double()) @ torch.cat(row)
            torch.testing.assert_close(y[b, m], expected, **CLOSE)


def test_fp8_transposes_bias_and_power_of_two_scales(rng):
    x, bias = draw(rng, 4, 2, 128), draw(rng, 2, 5)
    w = to_fp8(draw(rng, 2, 5, 128))
    y = batched_gemm_a8w8(
        x, w, 0.5, bias=bias, scale_format="ue8m0", transpose_in=True, transpose_out=True
    )
    assert y.shape == (4, 2, 5)
    for m in range(4):
        for b in range(2):
            scale = 2.0 ** torch.ceil(torch.log2(x[m, b].abs().max() / 448))
            stored = to_fp8(x[m, b] / scale).double() * scale.double()
            expected = 0.5 * w[b].double() @ stored + bias[b].double()
            torch.testing.assert_close(y[m, b], expected, **CLOSE)


def test_fp8_zero_rows(rng):
    w = to_fp8(draw(rng, 1, 3, 128))
    assert (batched_gemm_a8w8(torch.zeros(1, 2, 128), w, 1.0) == 0).all()


@pytest.mark.parametrize("is_quantised", [False, True])
def test_mxfp4(rng, is_quantised):
    x, w = draw(rng, 2, 3, 64), draw(rng, 2, 5, 64)
    packed_x, x_scales = quantize_mxfp4(x)
    packed_w, w_scales = quantize_mxfp4(w)
    y = batched_gemm_mxfp4(
        packed_x if is_quantised else x,
        packed_w,
        w_scales,
        x_scales=x_scales if is_quantised else None,
    )
    real_x, real_w = dequantize_mxfp4(packed_x, x_scales), dequantize_mxfp4(packed_w, w_scales)
    torch.testing.assert_close(y, torch.einsum("bmk,bnk->bmn", real_x, real_w), **CLOSE)
    assert (y - x.double() @ w.double().transpose(1, 2)).norm() < 0.4 * y.norm()


def test_mxfp4_transposes(rng):
    x, (w, w_scales) = draw(rng, 2, 3, 32), quantize_mxfp4(draw(rng, 2, 4, 32))
    plain = batched_gemm_mxfp4(x, w, w_scales)
    turned = batched_gemm_mxfp4(
        x.transpose(0, 1), w, w_scales, transpose_in=True, transpose_out=True
    )
    assert torch.equal(turned, plain.transpose(0, 1))
