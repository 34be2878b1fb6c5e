"""Indexer scores against scalar loops, and selection against torch.topk and sorted lists."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference.indexer import (
    mqa_logits,
    paged_mqa_logits,
    qk_rope_quant,
    top_k_per_row,
    top_k_per_row_decode,
)
from mla_core.reference.quant import to_fp8
from mla_core.reference.rope import rope, rope_tables

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NEG_INF = float("-inf")


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng)


@settings(deadline=None, max_examples=25)
@given(
    total_q=st.integers(0, 4),
    total_k=st.integers(0, 6),
    heads=st.integers(1, 3),
    has_scales=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_logits_by_scalar_loop(total_q, total_k, heads, has_scales, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k = to_fp8(draw(rng, total_q, heads, 5)), to_fp8(draw(rng, total_k, 5))
    weights = draw(rng, total_q, heads)
    scales = draw(rng, total_k).abs() if has_scales else None
    starts = torch.randint(0, 4, (total_q,), generator=rng)
    ends = torch.randint(0, 8, (total_q,), generator=rng)
    logits = mqa_logits(q, k, weights, starts, ends, k_scales=scales)
    assert logits.shape == (total_q, total_k)
    for t in range(total_q):
        for s in range(total_k):
            if not starts[t] <= s < ends[t]:
                assert logits[t, s] == NEG_INF
                continue
            expected = 0.0
            for h in range(heads):
                dot = sum(a * b for a, b in zip(q[t, h].tolist(), k[s].tolist(), strict=True))
                dot *= 1.0 if scales is None else scales[s].item()
                expected += weights[t, h].item() * max(dot, 0.0)
            assert logits[t, s].item() == pytest.approx(expected, abs=1e-9)


def test_paged_logits_are_causal_and_padded(rng):
    kv_lens, next_n = [5, 1, 0, 3], 2
    q = draw(rng, 4, next_n, 3, 6)
    keys = [draw(rng, n, 6) for n in kv_lens]
    scales = [draw(rng, n).abs() for n in kv_lens]
    weights = draw(rng, 8, 3)
    logits = paged_mqa_logits(q, keys, weights, max_kv_len=7, k_scales=scales)
    assert logits.shape == (8, 7)
    for b, kv_len in enumerate(kv_lens):
        for n in range(next_n):
            row = logits[b * next_n + n]
            for p in range(7):
                if p >= kv_len or p > kv_len - next_n + n:
                    assert row[p] == NEG_INF
                    continue
                dots = (q[b, n].double() @ keys[b][p].double()).relu() * scales[b][p].double()
                expected = (dots * weights[b * next_n + n].double()).sum()
                torch.testing.assert_close(row[p], expected, **CLOSE)
    unscaled = paged_mqa_logits(q, keys, weights, max_kv_len=7)
    torch.testing.assert_close(unscaled[0, 0] * scales[0][0].double(), logits[0, 0], **CLOSE)


@settings(deadline=None, max_examples=40)
@given(
    columns=st.integers(1, 12),
    k=st.integers(1, 14),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_top_k_takes_the_smallest_index_of_ties(columns, k, levels, seed):
    rng = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are common.
    logits = torch.randint(0, levels, (3, columns), generator=rng).float()
    starts = torch.randint(0, columns, (3,), generator=rng)
    ends = torch.randint(0, columns + 1, (3,), generator=rng)
    got = top_k_per_row(logits, starts, ends, k)
    assert got.dtype == torch.int32
    for row in range(3):
        start, end = starts[row].item(), ends[row].item()
        values = logits[row].tolist()
        order = sorted(range(start, end), key=lambda i: (-values[i], i))[:k]
        expected = sorted(i - start for i in order)
        assert got[row].tolist() == expected + [-1] * (k - len(expected))


def test_top_k_agrees_with_torch_without_ties(rng):
    logits = torch.stack([torch.randperm(50, generator=rng) for _ in range(4)]).float()
    got = top_k_per_row(logits, torch.zeros(4).long(), torch.full((4,), 50), 9)
    expected = logits.topk(9, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(got.long(), expected)


def test_top_k_ignores_what_lies_outside(rng):
    logits = torch.tensor([[9.0, 1.0, 3.0, 2.0, 9.0], [float("nan"), 1.0, 0.0, 0.0, float("inf")]])
    got = top_k_per_row(logits, torch.tensor([1, 1]), torch.tensor([4, 4]), 2)
    assert got.tolist() == [[1, 2], [0, 1]]


def test_top_k_keeps_minus_infinity_inside_the_range():
    logits = torch.tensor([[NEG_INF, 1.0, NEG_INF]])
    got = top_k_per_row(logits, torch.tensor([0]), torch.tensor([3]), 2)
    assert got.tolist() == [[0, 1]]


def test_top_k_decode_row_ends(rng):
    """Row b * next_n + n sees kv_len - next_n + n + 1 tokens."""
    logits = draw(rng, 6, 8)
    got = top_k_per_row_decode(logits, 3, torch.tensor([6, 2]), 8)
    lengths = [4, 5, 6, 0, 1, 2]
    for row, length in enumerate(lengths):
        assert got[row].tolist() == list(range(length)) + [-1] * (8 - length)


def test_top_k_needs_a_positive_k():
    with pytest.raises(LayoutError, match="k must be >= 1, got 0"):
        top_k_per_row(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([3]), 0)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_qk_rope_quant(rng, is_neox, scale_format):
    q, k, weights = draw(rng, 3, 4, 128), draw(rng, 3, 128), draw(rng, 3, 4)
    norm_weight, norm_bias = draw(rng, 128), draw(rng, 128)
    positions = torch.tensor([4, 0, 7])
    cos, sin = rope_tables(10, 64)
    got = qk_rope_quant(
        q,
        k,
        weights,
        norm_weight,
        norm_bias,
        positions,
        cos,
        sin,
        eps=0.1,
        weights_scale=0.3,
        scale_format=scale_format,
        **({} if is_neox else {"is_neox": False}),
    )
    normed = F.layer_norm(k.double(), (128,), norm_weight.double(), norm_bias.double(), 0.1)

    def turn(x):
        head = rope(x[..., :64], positions, cos, sin, is_neox=is_neox)
        return torch.cat([head, x[..., 64:].double()], dim=-1).float()

    def scale_of(x):
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4) / 448
        return 2.0 ** torch.ceil(torch.log2(scale)) if scale_format == "ue8m0" else scale

    for stored, x in [(got.q, turn(q)), (got.k, turn(normed))]:
        assert torch.equal(stored.view(torch.uint8), to_fp8(x / scale_of(x)).view(torch.uint8))
    torch.testing.assert_close(got.k_scales, scale_of(turn(normed)))
    torch.testing.assert_close(got.weights, weights * scale_of(turn(q)).squeeze(-1) * 0.3)
    # Folding a query's scale into its weight leaves the logits what they were.
    ends = torch.full((3,), 3)
    folded = mqa_logits(
        got.q, got.k, got.weights, torch.zeros(3), ends, k_scales=got.k_scales.squeeze(-1)
    )
    exact = mqa_logits(turn(q), turn(normed), 0.3 * weights, torch.zeros(3), ends)
    # Terms of both signs cancel in a logit, and their rounding errors do not: 0.02 of the terms'
    # sizes is three times the worst of 3000 seeds, and less than half of a typical logit.
    size = mqa_logits(turn(q).abs(), turn(normed).abs(), 0.3 * weights.abs(), torch.zeros(3), ends)
    assert (folded - exact).norm() < 0.02 * size.norm()


def test_qk_rope_quant_wants_one_group_for_each_query():
    x = torch.zeros(1, 1, 64)
    with pytest.raises(LayoutError, match="group_size must be head_dim=64, got 128"):
        qk_rope_quant(
            x, x[0], x[0], x[0, 0], x[0, 0], torch.zeros(1), x[0], x[0], eps=0.1, weights_scale=1.0
        )
