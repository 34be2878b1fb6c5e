"""aiter's `mla_reduce_v1`: signature, tiles of a work list against the truth, what it refuses."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import LayoutError
from mla_core.dropin.aiter import mla_reduce_v1
from mla_core.reference import reduce
from mla_core.testing.assertions import assert_close

REQUIRED = inspect.Parameter.empty


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_signature():
    parameters = inspect.signature(mla_reduce_v1).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("partial_output", REQUIRED),
        ("partial_lse", REQUIRED),
        ("reduce_indptr", REQUIRED),
        ("reduce_final_map", REQUIRED),
        ("reduce_partial_map", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("num_kv_splits", REQUIRED),
        ("final_output", REQUIRED),
        ("final_lse", None),
    ]


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_matches_the_truth(data):
    seed = data.draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    tile_rows = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    counts = data.draw(
        st.lists(st.integers(0, 4), min_size=len(tile_rows), max_size=len(tile_rows))
    )
    heads, width = data.draw(st.sampled_from([(1, 8), (3, 40)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    bounds = torch.tensor([0, *tile_rows]).cumsum(0).tolist()
    final_map = torch.tensor(list(itertools.pairwise(bounds)), dtype=torch.int32)
    reduce_indptr = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    firsts, row = [], 0
    for rows, count in zip(tile_rows, counts, strict=True):
        for _ in range(count):
            firsts.append(row)
            row += rows
    partial_map = torch.tensor([*firsts, 1 << 30], dtype=torch.int32)
    partial_out = torch.randn(row + 1, heads, width, generator=generator)
    partial_lse = 3 * torch.randn(row + 1, heads, generator=generator)
    is_empty = torch.rand(row + 1, heads, generator=generator) < 0.3
    partial_lse[is_empty] = -torch.inf
    partial_out[is_empty] = torch.nan
    out = torch.randn(bounds[-1], heads, width, generator=generator).to(dtype)
    lse = torch.randn(bounds[-1], heads, generator=generator)
    expected = reduce.reduce_tiles(
        partial_out, partial_lse, reduce_indptr, final_map, partial_map, out, lse
    )
    # Unsplit tiles have garbage in the final map.
    final_map[reduce_indptr.diff() == 0] = 1 << 29
    mla_reduce_v1(
        partial_out[:, None],
        partial_lse[:, None, :, None],
        reduce_indptr,
        final_map,
        partial_map,
        max(tile_rows),
        0,
        out,
        lse,
    )
    assert_close(out, expected[0], what="out", dtype=dtype)
    assert_close(lse, expected[1], what="lse", dtype="fp32")


@pytest.mark.parametrize("lse_shape", [(4, 2), (4, 2, 1), (4, 1, 2), (4, 1, 2, 1)])
@pytest.mark.parametrize("out_shape", [(4, 2, 8), (4, 1, 2, 8)])
def test_partials_may_have_the_split_dimension(lse_shape, out_shape, rng):
    x, lse = torch.randn(4, 2, 8, generator=rng), torch.randn(4, 2, generator=rng)
    out, final_lse = torch.full((1, 2, 8), torch.nan), torch.full((1, 2), torch.nan)
    mla_reduce_v1(
        x.view(out_shape), lse.view(lse_shape), i32(0, 4), i32(0, 1)[None], i32(0, 1, 2, 3), 1, 4,
        out, final_lse,
    )  # fmt: skip
    expected_out, expected_lse = reduce.merge_partials(x, lse)
    assert_close(out[0], expected_out, what="out", dtype="fp32")
    assert_close(final_lse[0], expected_lse, what="lse", dtype="fp32")


def test_without_a_final_map_tiles_have_equal_length(rng):
    x, lse = torch.randn(8, 2, 8, generator=rng), torch.randn(8, 2, generator=rng)
    out = torch.full((4, 2, 8), torch.nan)
    assert mla_reduce_v1(x, lse, i32(0, 2, 4), None, i32(0, 2, 4, 6), 2, 2, out) is None
    expected = reduce.merge_partials(
        torch.stack((x[[0, 1, 4, 5]], x[[2, 3, 6, 7]])),
        torch.stack((lse[[0, 1, 4, 5]], lse[[2, 3, 6, 7]])),
    )[0]
    assert_close(out, expected, what="out", dtype="fp32")


def test_tiles_marked_unsplit_keep_what_stage_one_wrote(rng):
    x, lse = torch.randn(2, 1, 8, generator=rng), torch.randn(2, 1, generator=rng)
    out, final_lse = torch.full((3, 1, 8), 5.0), torch.full((3, 1), 7.0)
    tiles = torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32)
    # The first tile's single partial is marked -1, the second has two, the third one real one.
    mla_reduce_v1(x, lse, i32(0, 1, 3, 4), tiles, i32(-1, 0, 1, 1), 1, 4, out, final_lse)
    assert out[0].eq(5).all()
    assert final_lse[0].eq(7).all()
    assert_close(out[1], reduce.merge_partials(x, lse)[0], what="merged", dtype="fp32")
    assert_close(out[2], x[1], what="single", dtype="fp32")
    assert_close(final_lse[2], lse[1], what="single lse", dtype="fp32")


def test_nothing_to_merge_writes_nothing():
    out = torch.full((2, 1, 8), 5.0)
    empty = torch.zeros(0, dtype=torch.int32)
    mla_reduce_v1(torch.zeros(0, 1, 8), torch.zeros(0, 1), i32(0, 0), None, empty, 1, 4, out)
    assert out.eq(5).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_output": torch.zeros(4, 8)}, r"partial_output must be \[rows, H, DV\]"),
        ({"partial_output": torch.zeros(4, 2, 2, 8)}, "partial_output must be"),
        ({"partial_lse": torch.zeros(2, 4)}, r"partial_lse must be \[rows=4, \(1,\) H=2"),
        ({"reduce_indptr": i32()}, r"reduce_indptr must be \[tiles \+ 1\]"),
        ({"reduce_final_map": i32(0, 1)}, r"reduce_final_map must be \[tiles, 2\]=\(1, 2\)"),
        (
            {"reduce_final_map": None, "reduce_partial_map": i32(0)},
            "reduce_partial_map must have at least 2 entries",
        ),
        ({"reduce_final_map": i32(0, 3)[None]}, "max_seqlen_q must be at least .* 3, got 1"),
        ({"final_output": torch.zeros(1, 3, 8)}, r"out must be \[1, 2, 8\]"),
        ({"final_lse": torch.zeros(2, 2)}, r"lse must be \[1, 2\]"),
    ],
)
def test_bad_input(changes, message):
    arguments = {
        "partial_output": torch.zeros(4, 2, 8),
        "partial_lse": torch.zeros(4, 2),
        "reduce_indptr": i32(0, 4),
        "reduce_final_map": i32(0, 1)[None],
        "reduce_partial_map": i32(0, 1, 2, 3),
        "max_seqlen_q": 1,
        "num_kv_splits": 4,
        "final_output": torch.zeros(1, 2, 8),
    }
    with pytest.raises(LayoutError, match=message):
        mla_reduce_v1(**arguments | changes)
