"""Norms against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mla_core.reference.norm import layer_norm, rms_norm

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_norms_match_torch(rng, shape):
    x, weight, bias = draw(rng, *shape), draw(rng, 7), draw(rng, 7)
    # An eps this large would show if it were added in the wrong place.
    torch.testing.assert_close(
        rms_norm(x, weight, 0.3)[0], F.rms_norm(x, (7,), weight, 0.3), **CLOSE
    )
    torch.testing.assert_close(
        layer_norm(x, weight, bias, 0.3), F.layer_norm(x, (7,), weight, bias, 0.3), **CLOSE
    )


def test_residual_and_gemma_weights(rng):
    x, residual, weight = draw(rng, 4, 5), draw(rng, 4, 5), draw(rng, 5)
    normed, total = rms_norm(x, weight, 1e-6, residual=residual, is_gemma=True)
    torch.testing.assert_close(total, x + residual, **CLOSE)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (5,), weight + 1.0, 1e-6), **CLOSE)


def test_inputs_are_upcast_first(rng):
    x, weight = draw(rng, 2, 8).bfloat16(), draw(rng, 8).bfloat16()
    normed, total = rms_norm(x, weight, 1e-6)
    assert normed.dtype == torch.float64
    assert torch.equal(total, x.double())
    torch.testing.assert_close(normed, F.rms_norm(x.double(), (8,), weight.double(), 1e-6), **CLOSE)
