"""Model dimensions: the table against published configurations, derived widths, refusals."""

from __future__ import annotations

import math

import pytest

from mla_core.dims import MODELS, MLADims
from mla_core.errors import LayoutError

# model, heads, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim
PUBLISHED = [
    ("deepseek-v2", 128, 512, 64, 128, 128),
    ("deepseek-v2-lite", 16, 512, 64, 128, 128),
    ("moonlight", 16, 512, 64, 128, 128),
    ("deepseek-v3", 128, 512, 64, 128, 128),
    ("deepseek-r1", 128, 512, 64, 128, 128),
    ("deepseek-v3.2", 128, 512, 64, 128, 128),
    ("deepseek-v4-flash", 64, 448, 64, 448, 512),
    ("deepseek-v4-pro", 128, 448, 64, 448, 512),
    ("deepseek-v4.1-flash", 64, 448, 64, 448, 512),
    ("kimi-k2", 64, 512, 64, 128, 128),
    ("kimi-linear-48b", 32, 512, 64, 128, 128),
    ("kimi-k3", 96, 512, 64, 128, 128),
    ("longcat-flash", 64, 512, 64, 128, 128),
    ("glm-4.7-flash", 20, 512, 64, 192, 256),
    ("glm-5", 64, 512, 64, 192, 256),
    ("glm-5.3-flash", 64, 512, 0, 256, 256),
    ("minicpm3-4b", 40, 256, 32, 64, 64),
    ("mistral-small-4", 32, 256, 64, 64, 128),
    ("mistral-large-3", 128, 512, 64, 128, 128),
    ("ling-2.5-1t", 64, 512, 64, 128, 128),
    # Head widths of these two are not all published; the cached row is.
    ("hy4-preview", 64, 512, 64, 128, 128),
    ("dots3-note", 64, 1024, 64, 192, 128),
]


@pytest.mark.parametrize(("name", "heads", "rank", "rope", "nope", "v"), PUBLISHED)
def test_models(name: str, heads: int, rank: int, rope: int, nope: int, v: int) -> None:
    dims = MODELS[name]
    assert dims.num_heads == heads
    assert (dims.kv_lora_rank, dims.qk_rope_head_dim) == (rank, rope)
    assert (dims.qk_nope_head_dim, dims.v_head_dim) == (nope, v)
    assert dims.value_includes_rope == name.startswith("deepseek-v4")


def test_every_model_is_checked() -> None:
    assert {row[0] for row in PUBLISHED} == set(MODELS)


@pytest.mark.parametrize(
    ("name", "latent_dim", "value_dim", "qk_head_dim"),
    [
        ("deepseek-v3", 576, 512, 192),
        ("deepseek-v4-pro", 512, 512, 512),
        ("minicpm3-4b", 288, 256, 96),
        ("glm-5.3-flash", 512, 512, 256),
        ("glm-5", 576, 512, 256),
        ("dots3-note", 1088, 1024, 256),
    ],
)
def test_derived_widths(name: str, latent_dim: int, value_dim: int, qk_head_dim: int) -> None:
    dims = MODELS[name]
    assert (dims.latent_dim, dims.value_dim, dims.qk_head_dim) == (
        latent_dim,
        value_dim,
        qk_head_dim,
    )
    assert dims.sm_scale == pytest.approx(1 / math.sqrt(qk_head_dim))


def test_tensor_parallel_splits_heads_only() -> None:
    dims = MODELS["kimi-k3"].tensor_parallel(8)
    assert dims == MODELS["kimi-k3"].with_heads(12)
    with pytest.raises(LayoutError, match="world_size must divide num_heads=96, got 5"):
        MODELS["kimi-k3"].tensor_parallel(5)
    with pytest.raises(LayoutError, match="got 0"):
        MODELS["kimi-k3"].tensor_parallel(0)


@pytest.mark.parametrize("rank", [32, 256, 448, 512, 1024])
@pytest.mark.parametrize("rope", [0, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 7, 128])
def test_accepted(heads: int, rank: int, rope: int) -> None:
    dims = MLADims(heads, kv_lora_rank=rank, qk_rope_head_dim=rope)
    assert dims.latent_dim == rank + rope


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 0, "num_heads must be 1..128, got 0"),
        ("num_heads", 129, "num_heads must be 1..128, got 129"),
        ("kv_lora_rank", 500, "kv_lora_rank must be a multiple of 32 in 32..1024, got 500"),
        ("kv_lora_rank", 0, "got 0"),
        ("kv_lora_rank", 1056, "got 1056"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim must be an even number in 0..128, got 63"),
        ("qk_rope_head_dim", -2, "got -2"),
        ("qk_rope_head_dim", 130, "got 130"),
        ("qk_nope_head_dim", 0, "qk_nope_head_dim must be in 1..1024, got 0"),
        ("v_head_dim", 1025, "v_head_dim must be in 1..1024, got 1025"),
        ("v_head_dim", 128.0, "v_head_dim must be int, got float"),
        ("num_heads", True, "num_heads must be int, got bool"),
        ("value_includes_rope", 1, "value_includes_rope must be bool, got int"),
    ],
)
def test_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        MLADims(**{"num_heads": 16, field: value})  # type: ignore[arg-type]
