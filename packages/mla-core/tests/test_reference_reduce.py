"""Merging partials against the softmax over all their scores at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference.reduce import merge_partials, reduce_partials, reduce_tiles

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NAN, NEG_INF = float("nan"), float("-inf")


def partial(scores, values):
    """Normalised result and natural lse of a run of scores [H, N] and values [N, D]."""
    if scores.shape[1] == 0:
        return torch.full((scores.shape[0], values.shape[1]), NAN).double(), torch.full(
            (scores.shape[0],), NEG_INF
        ).double()
    return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    has_sink=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_merge_equals_one_softmax_over_everything(lengths, heads, has_sink, seed):
    rng = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    scores = 4 * torch.randn(heads, total, generator=rng, dtype=torch.float64)
    values = torch.randn(total, 5, generator=rng, dtype=torch.float64)
    sink = torch.randn(heads, generator=rng, dtype=torch.float64) if has_sink else None
    runs = zip(scores.split(lengths, dim=1), values.split(lengths), strict=True)
    outs, lses = zip(*(partial(s, v) for s, v in runs), strict=True)
    out, lse = merge_partials(torch.stack(outs), torch.stack(lses), sink=sink)
    if has_sink:
        scores = torch.cat([scores, sink[:, None]], dim=1)
        values = torch.cat([values, torch.zeros(1, 5).double()])
    if scores.shape[1] == 0:
        assert (out == 0).all()
        assert (lse == NEG_INF).all()
        return
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ values, **CLOSE)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), **CLOSE)


def test_merge_by_hand():
    outs = torch.tensor([[[1.0]], [[5.0]]])
    lses = torch.tensor([[0.0], [math.log(3.0)]])
    out, lse = merge_partials(outs, lses)
    assert out.item() == pytest.approx(4.0)
    assert lse.item() == pytest.approx(math.log(4.0))


def test_base_two_in_and_out(rng):
    outs = torch.randn(3, 2, 4, generator=rng)
    lses = torch.randn(3, 2, generator=rng)
    out, lse = merge_partials(outs, lses)
    in_two, lse_in_two = merge_partials(
        outs, lses.double() / math.log(2.0), partial_lse_base="base2", lse_base="base2"
    )
    torch.testing.assert_close(in_two, out, **CLOSE)
    torch.testing.assert_close(lse_in_two, torch.log2(lse.exp()), **CLOSE)


def test_the_sink_stays_natural_under_base_two():
    sink = torch.tensor([1.0])
    out, lse = merge_partials(
        torch.zeros(1, 1, 2), torch.full((1, 1), NEG_INF), sink=sink, lse_base="base2"
    )
    assert (out == 0).all()
    assert lse.item() == pytest.approx(1.0 / math.log(2.0))


def test_unknown_base_is_refused():
    with pytest.raises(LayoutError, match="lse_base must be one of natural, base2, got 'ten'"):
        merge_partials(torch.zeros(1, 1, 2), torch.zeros(1, 1), lse_base="ten")


def test_nan_partials_are_not_hidden():
    out, _ = merge_partials(torch.full((1, 1, 2), NAN), torch.zeros(1, 1))
    assert out.isnan().all()


def test_reduce_partials_takes_runs(rng):
    outs = torch.randn(4, 2, 3, generator=rng)
    lses = torch.randn(4, 2, generator=rng)
    sink = torch.randn(2, generator=rng)
    out, lse = reduce_partials(outs, lses, torch.tensor([0, 1, 1, 4]), sink=sink)
    for t, run in enumerate([slice(0, 1), slice(1, 1), slice(1, 4)]):
        expected, expected_lse = merge_partials(outs[run], lses[run], sink=sink)
        torch.testing.assert_close(out[t], expected, **CLOSE)
        torch.testing.assert_close(lse[t], expected_lse, **CLOSE)
    torch.testing.assert_close(lse[1], sink.double(), **CLOSE)


def test_a_single_partial_passes_through(rng):
    outs, lses = torch.randn(1, 2, 3, generator=rng), torch.randn(1, 2, generator=rng)
    out, lse = reduce_partials(outs, lses, torch.tensor([0, 1]))
    torch.testing.assert_close(out, outs.double(), **CLOSE)
    torch.testing.assert_close(lse, lses.double(), **CLOSE)


def test_tiles_find_their_rows(rng):
    outs = torch.randn(9, 2, 3, generator=rng)
    lses = torch.randn(9, 2, generator=rng)
    before = torch.full((6, 2, 3), 7.0), torch.full((6, 2), 8.0)
    out, lse = reduce_tiles(
        outs,
        lses,
        torch.tensor([0, 3, 3, 4]),
        torch.tensor([[0, 2], [2, 3], [4, 6]]),
        torch.tensor([0, 2, 5, 7]),
        *before,
    )
    for q, rows in {0: [0, 2, 5], 1: [1, 3, 6], 4: [7], 5: [8]}.items():
        expected, expected_lse = merge_partials(outs[rows], lses[rows])
        torch.testing.assert_close(out[q], expected, **CLOSE)
        torch.testing.assert_close(lse[q], expected_lse, **CLOSE)
    # Rows 2 (a tile without partials) and 3 (in no tile) were written elsewhere.
    assert (out[2:4] == 7).all()
    assert (lse[2:4] == 8).all()
    assert (before[0] == 7).all()


def test_tiles_without_a_final_map_are_equally_long(rng):
    outs = torch.randn(8, 1, 2, generator=rng)
    lses = torch.randn(8, 1, generator=rng)
    out, lse = reduce_tiles(
        outs,
        lses,
        torch.tensor([0, 2, 4]),
        None,
        torch.tensor([0, 2, 4, 6]),
        torch.zeros(4, 1, 2),
        torch.zeros(4, 1),
    )
    for q, rows in enumerate([[0, 2], [1, 3], [4, 6], [5, 7]]):
        expected, expected_lse = merge_partials(outs[rows], lses[rows])
        torch.testing.assert_close(out[q], expected, **CLOSE)
        torch.testing.assert_close(lse[q], expected_lse, **CLOSE)


def test_a_tile_length_is_the_distance_of_two_entries(rng):
    outs, lses = torch.randn(5, 1, 2, generator=rng), torch.randn(5, 1, generator=rng)
    entries = torch.tensor([1, 3])
    before = torch.zeros(2, 1, 2), torch.zeros(2, 1)
    out, lse = reduce_tiles(outs, lses, torch.tensor([0, 2]), None, entries, *before)
    for q, rows in enumerate([[1, 3], [2, 4]]):
        expected, expected_lse = merge_partials(outs[rows], lses[rows])
        torch.testing.assert_close(out[q], expected, **CLOSE)
        torch.testing.assert_close(lse[q], expected_lse, **CLOSE)


def test_a_tile_length_needs_two_entries():
    with pytest.raises(LayoutError, match="reduce_partial_map must have at least 2 entries"):
        reduce_tiles(
            torch.zeros(1, 1, 2),
            torch.zeros(1, 1),
            torch.tensor([0, 1]),
            None,
            torch.tensor([0]),
            torch.zeros(1, 1, 2),
            torch.zeros(1, 1),
        )
