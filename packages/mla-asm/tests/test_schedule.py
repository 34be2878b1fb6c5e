"""Which kernel of a catalog is chosen, and how the work is cut; no kernel runs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from mla_asm import emulation, schedule
from mla_asm.schedule import INVARIANT_SPLITS, choose_row, find_row, make_schedule, plan_work
from mla_core import AttentionOptions, MLADims, Problem
from mla_core.errors import UnsupportedProblemError
from mla_core.metadata import DeviceProfile, WorkList
from mla_core.plan import PlanRequest

M16, M64 = "mla_decode_bf16_m16", "mla_decode_bf16_m64"


@pytest.fixture(autouse=True)
def catalog(make_row, monkeypatch):
    """Two tiles, each non-persistent and persistent."""
    rows = tuple(
        make_row(symbol=f"{symbol}{'_ps' * ps}", tile_rows=tile_rows, is_persistent=ps)
        for symbol, tile_rows in ((M64, 64), (M16, 16))
        for ps in (False, True)
    )
    monkeypatch.setattr(schedule, "catalog_rows", lambda arch: rows)
    with emulation("gfx942"):
        yield rows


def request(kv_lens=(100, 100), q_lens=None, heads=16, page_size=16, fixed=False, **changes):
    q_lens = q_lens or (1,) * len(kv_lens)
    features = changes.pop("features", frozenset({"lse"}))
    problem = Problem(
        "decode",
        "cpu",
        "bf16",
        "bf16",
        MLADims(heads),
        page_size=page_size,
        q_len=max(1, *q_lens),
        features=features,
    )
    made = PlanRequest(
        problem,
        AttentionOptions(),
        batch_size=len(kv_lens),
        total_q=sum(q_lens),
        max_seqlen_q=max(q_lens),
        max_seqlen_k=max(kv_lens),
        total_pages=sum(-(-n // page_size) for n in kv_lens),
        q_lens=tuple(q_lens) if fixed else None,
        kv_lens=tuple(kv_lens) if fixed else None,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("heads", "q_len", "symbol"),
    [(1, 1, M16), (16, 1, M16), (4, 4, M16), (4, 5, M64), (17, 1, M64), (128, 4, M64)],
)
def test_the_smallest_tile_that_holds_the_rows(heads, q_len, symbol):
    asked = request(heads=heads, q_lens=(q_len, 1))
    assert choose_row(asked).symbol == symbol


def test_a_batch_invariant_tile_goes_by_the_heads_alone():
    asked = {"features": frozenset({"lse", "batch_invariant"}), "heads": 16}
    short, long = request(**asked), request(**asked, q_lens=(1, 9))
    assert choose_row(short).symbol == choose_row(long).symbol == M16
    for made in (short, long):
        assert make_schedule(made, choose_row(made)).num_kv_splits == INVARIANT_SPLITS
    # Not even when the lengths are known: a work list cuts a request by its batch mates.
    assert choose_row(request((500, 1), fixed=True, **asked)).symbol == M16


@pytest.mark.parametrize(
    ("changes", "symbol"),
    [
        ({"fixed": True}, f"{M16}_ps"),
        ({"fixed": True, "heads": 64}, f"{M64}_ps"),
        ({"fixed": False}, M16),
        ({"fixed": True, "num_kv_splits": 3}, M16),
        ({"fixed": True, "kv_lens": (100, 90)}, M16),
        ({"fixed": True, "kv_lens": (0, 0)}, M16),
    ],
)
def test_a_work_list_for_ragged_batches_of_fixed_lengths(changes, symbol):
    assert choose_row(request(**{"kv_lens": (1000, 10), **changes})).symbol == symbol


def test_only_persistent_kernels_need_fixed_lengths(catalog, monkeypatch):
    only = tuple(row for row in catalog if row.is_persistent)
    monkeypatch.setattr(schedule, "catalog_rows", lambda arch: only)
    assert choose_row(request(fixed=True)).symbol == f"{M16}_ps"
    with pytest.raises(UnsupportedProblemError, match="with lengths that may change"):
        choose_row(request())
    with pytest.raises(UnsupportedProblemError, match="pass fixed_lengths=True to plan_decode"):
        make_schedule(request(), only[0])


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    assert find_row("gfx942", M64).tile_rows == 64
    with pytest.raises(UnsupportedProblemError, match=rf"{M16}_ps, got 'mla_other'"):
        find_row("gfx942", "mla_other")


@pytest.mark.parametrize(
    ("kv_lens", "wish", "splits"),
    [
        ((4000,), None, 4),
        ((4000,) * 4, None, 1),
        ((100,), None, 1),
        ((100,), 7, 7),
        ((0,), None, 1),
    ],
)
def test_equal_splits_fill_the_device(catalog, kv_lens, wish, splits):
    asked = request(kv_lens, num_kv_splits=wish)
    made = make_schedule(asked, choose_row(asked))
    assert (made.kernel, made.num_kv_splits, made.tables) == (M16, splits, {})
    assert "emulated" in made.because
    if splits == 1:
        assert made.workspace == {}
        return
    shapes = {name: shape for name, (shape, _) in made.workspace.items()}
    assert shapes == {
        "partial_out": (1, splits, 16, 512),
        "partial_lse": (1, splits, 16),
        "lse": (1, 16),
    }


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_work_list_covers_each_key_once(page_size, catalog):
    asked = request((9000, 0, 17, 1, 260), (2, 1, 3, 0, 1), page_size=page_size, fixed=True)
    row = find_row("gfx942", f"{M16}_ps")
    made = make_schedule(asked, row)
    work = WorkList(**made.tables)
    work.validate()
    assert work.work_indptr.numel() == 1 + made.config["num_workers"] == 5
    assert made.num_kv_splits > 1
    assert made.workspace["partial_out"][0] == (work.num_partial_rows, 16, 512)
    starts = [0]
    for length in asked.kv_lens:
        starts.append(starts[-1] + -(-length // page_size))
    seen = {}
    for request_idx, _, begin, end, first, last, _, _ in work.work_info.tolist():
        # With 16 heads a tile of 16 rows is one token.
        assert end == begin + 1
        seen.setdefault((request_idx, begin), []).append((first, last))
    assert sorted(seen) == [(0, 0), (0, 1), (1, 2), (2, 3), (2, 4), (2, 5), (4, 6)]
    for (index, token), ranges in seen.items():
        assert ranges[0][0] == starts[index]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        hidden = asked.q_lens[index] - 1 - (token - sum(asked.q_lens[:index]))
        hidden = hidden if page_size == 1 else 0
        assert ranges[-1][1] == max(starts[index], starts[index + 1] - hidden)


def test_works_are_cut_between_steps_of_the_kernel():
    asked = request((4096, 300), page_size=16, fixed=True)
    work = plan_work(asked, 16, DeviceProfile("gfx942", 8))
    lengths = work.work_info[:, 5] - work.work_info[:, 4]
    inner = lengths[work.work_info[:, 6] > 0]
    assert inner.numel() > 0
    assert (inner * 16 % 64 == 0).all()


def test_a_tile_holds_as_many_tokens_as_fit():
    asked = request((500,), (9,), heads=5, fixed=True)
    work = plan_work(asked, 16, DeviceProfile("gfx942", 1))
    assert (work.work_info[:, 3] - work.work_info[:, 2]).tolist() == [3, 3, 3]


def test_nothing_to_do_has_no_tables_to_merge():
    asked = request((0,), (0,), fixed=True)
    made = make_schedule(replace(asked, total_q=0), find_row("gfx942", f"{M16}_ps"))
    assert made.tables["work_info"].shape == (0, 8)
    assert (made.workspace, made.num_kv_splits) == ({}, 1)
    assert made.tables["work_indptr"].dtype == torch.int32
