"""Joined queries and keys against torch's concatenation and the fp32 rotation, bit for bit."""

from __future__ import annotations

import pytest
import torch

import mla_fusions
from mla_core import LayoutError
from mla_core.reference.rope import rope
from mla_core.testing.poison import poison_

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rows(dtype, *shape):
    """Return rows that are slices of wider, poisoned ones."""
    *outer, width = shape
    wide = poison_(torch.empty(*outer, width + 16, dtype=dtype, device=DEVICE))
    wide[..., 8 : 8 + width] = (4 * torch.randn(shape, device=DEVICE)).to(dtype)
    return wide[..., 8 : 8 + width]


def equal(got, want):
    assert got.dtype == want.dtype
    got, want = (each.cpu().contiguous().view(torch.uint8) for each in (got, want))
    return torch.equal(got, want)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize(
    ("dtype", "key_dtype", "heads", "key_heads", "widths"),
    [
        (BF16, BF16, 8, 1, (128, 64)),
        (FP16, FP16, 3, 2, (96, 8)),
        (FP32, FP32, 1, 3, (1, 40)),
        (BF16, FP32, 16, 16, (48, 48)),
    ],
    ids=str,
)
def test_cat(dtype, key_dtype, heads, key_heads, widths, num_tokens, seed, poisoned_empty):
    q1, q2 = (rows(dtype, num_tokens, heads, width) for width in widths)
    k1, k2 = (rows(key_dtype, num_tokens, key_heads, width) for width in widths)
    q_out, k_out = mla_fusions.fused_qk_cat(q1, q2, k1, k2)
    assert equal(q_out, torch.cat([q1, q2], -1))
    assert equal(k_out, torch.cat([k1, k2], -1).to(dtype))


@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize("is_full", [False, True], ids=["pairs", "elements"])
@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "width", "named"),
    [
        (BF16, 6, 1, 32, {}),
        (FP32, 1, 2, 40, {"rotary_dim": 24, "dim_offset": 6}),
        (FP16, 5, 5, 16, {"rotary_dim": 16}),
    ],
    ids=str,
)
def test_rope_cat(dtype, heads, key_heads, width, named, is_full, is_neox, seed, poisoned_empty):
    q_nope, q_pe = (rows(dtype, 5, heads, n) for n in (64, width))
    k_nope, k_pe = (rows(dtype, 5, key_heads, n) for n in (64, width))
    turning = named.get("rotary_dim", width)
    columns = turning if is_full else turning // 2
    cos, sin = (torch.randn(50, columns, device=DEVICE) for _ in range(2))
    # Positions and offsets that run over the tables at both ends.
    positions = torch.tensor([0, 5, 49, 40, -7], dtype=torch.int32, device=DEVICE)
    offs = torch.tensor([1, 0, 30, -3, 2], device=DEVICE)
    got = mla_fusions.fused_qk_rope_cat(
        q_nope, q_pe, k_nope, k_pe, positions, cos[:, None, None], sin[:, None, None], is_neox,
        offs=offs, **named,
    )  # fmt: skip
    where = (positions + offs).cpu().clamp(0, 49)
    for out, nope, pe in zip(got, (q_nope, k_nope), (q_pe, k_pe), strict=True):
        turned = rope(
            pe.cpu(), where, cos.cpu(), sin.cpu(), is_neox=is_neox, dtype=FP32, **named
        )  # fmt: skip
        assert equal(out, torch.cat([nope.cpu(), turned.to(dtype)], -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q2": torch.zeros(4, 3, 16)}, r"q2 must be \[4, 2, r\], got shape \(4, 3, 16\)"),
        ({"k1": torch.zeros(4, 1, 63)}, r"k1 must be \[4, kh, 64\], got shape \(4, 1, 63\)"),
        ({"k2": torch.zeros(3, 1, 16)}, r"k2 must be \[4, 1, 16\], got shape \(3, 1, 16\)"),
        ({"k2": torch.zeros(4, 1, 16).half()}, "k2 must be float32"),
        ({"q1": torch.zeros(4, 2, 64).int()}, "q1 must be .*float"),
        (
            {"q2": torch.zeros(4, 2, 0), "k2": torch.zeros(4, 1, 0)},
            "q2 must have at least one column",
        ),
        (
            {"k1": torch.zeros(4, 0, 64), "k2": torch.zeros(4, 0, 16)},
            "k1 must have at least one head",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        **{"q1": torch.zeros(4, 2, 64), "q2": torch.zeros(4, 2, 16)},
        **{"k1": torch.zeros(4, 1, 64), "k2": torch.zeros(4, 1, 16)},
    }
    with pytest.raises(LayoutError, match=f"fused_qk_cat: {message}"):
        mla_fusions.fused_qk_cat(**(good | change))


def test_bad_rotation_is_refused():
    parts = (torch.zeros(4, h, n) for h in (2, 1) for n in (64, 16))
    with pytest.raises(
        LayoutError, match="fused_qk_rope_cat: pos must be contiguous with at least 4"
    ):
        mla_fusions.fused_qk_rope_cat(
            *parts, torch.arange(3), torch.zeros(9, 8), torch.zeros(9, 8), True
        )
