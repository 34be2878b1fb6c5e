"""The v1.2 planner against schedules worked out by hand, and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata import DeviceProfile, plan_v1_2
from mla_core.metadata.tiling import HeadTiling

CU4 = DeviceProfile("gfx942", 4)
FP8 = {"q_dtype": "fp8_e4m3fnuz", "kv_dtype": "fp8_e4m3fnuz"}


def _indptr(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _plan(q_lens, kv_pages, last=None, *, num_heads=16, profile=CU4, **options):
    last = torch.tensor(last or [1] * len(kv_pages), dtype=torch.int32)
    options.setdefault("max_seqlen_qo", max(q_lens, default=1))
    work = plan_v1_2(
        _indptr(q_lens), _indptr(kv_pages), last, num_heads=num_heads, profile=profile, **options
    )
    work.validate()
    return work


def _check(work, work_info, work_indptr, reduce_indptr, final_map, partial_map):
    assert [tuple(row[:7]) for row in work.work_info.tolist()] == work_info
    assert work.work_info[:, 7].eq(0).all()
    assert work.work_indptr.tolist() == work_indptr
    assert work.reduce_indptr.tolist() == reduce_indptr
    split = {t: tuple(rows) for t, rows in enumerate(work.reduce_final_map.tolist()) if any(rows)}
    assert split == final_map
    assert work.reduce_partial_map.tolist() == partial_map


def test_one_cut():
    """Payload ceil(79 / 4) + 16 = 36; the last unit is idle, short requests are not worth a cut."""
    _check(
        _plan([1, 1, 1], [40, 300, 130]),
        [
            (0, -1, 0, 1, 0, 40, 0),
            (1, 0, 1, 2, 40, 56, 284),
            (1, 1, 1, 2, 56, 340, 0),
            (2, -1, 2, 3, 340, 470, 0),
        ],
        [0, 2, 3, 4, 4],
        [0, 0, 2, 2],
        {1: (1, 2)},
        [0, 1],
    )


def test_a_kernel_may_bring_its_own_tiling():
    """Twelve heads suit no row of gfx942's table; a tile of 48 rows takes four tokens of them."""
    with pytest.raises(UnsupportedProblemError, match="multiple of 16"):
        _plan([6, 1], [40, 30], num_heads=12)
    tiling = HeadTiling(fold=1, num_heads=12, packed_rows=48, one_tile=False)
    work = _plan([6, 1], [40, 30], num_heads=12, tiling=tiling)
    assert work.work_info[:, 2:4].tolist() == [[0, 3], [3, 6], [6, 7]]
    assert work.work_info[:, 0].tolist() == [0, 0, 1]


def test_a_tile_per_token_is_trimmed():
    """128 heads: causality lies in kv_end alone, one entry less for each later token."""
    _check(
        _plan([2, 2], [100, 37], num_heads=128, **FP8),
        [
            (0, -1, 0, 1, 0, 99, 1),
            (0, -1, 1, 2, 0, 100, 0),
            (1, -1, 2, 3, 100, 136, 1),
            (1, 0, 3, 4, 100, 132, 5),
            (1, 1, 3, 4, 132, 137, 0),
        ],
        [0, 1, 2, 4, 5],
        [0, 0, 0, 0, 2],
        {3: (3, 4)},
        [0, 1],
    )


@pytest.mark.parametrize("option", [{"is_causal": False}, {"is_cp_round_robin": True}])
def test_nothing_is_trimmed_without_a_local_causal_mask(option):
    work = _plan([2, 2], [100, 37], num_heads=128, **FP8, **option)
    ends = {(row[0], row[2]): row[5] for row in work.work_info.tolist()}
    assert ends == {(0, 0): 100, (0, 1): 100, (1, 2): 137, (1, 3): 137}


def test_folded_heads():
    """48 heads are three groups of 16; every group reads the whole cache of its request."""
    _check(
        _plan([1, 1], [100, 37], num_heads=48),
        [
            (0, -1, 0, 1, 0, 100, 0),
            (1, -1, 1, 2, 0, 100, 0),
            (2, -1, 2, 3, 0, 100, 0),
            (3, -1, 3, 4, 100, 137, 0),
            (4, -1, 4, 5, 100, 137, 0),
            (5, -1, 5, 6, 100, 137, 0),
        ],
        [0, 2, 4, 6, 6],
        [0] * 7,
        {},
        [],
    )


def test_folded_heads_with_ragged_queries_and_long_pages():
    """Rows of a group are consecutive, and the last page is that of the request."""
    work = _plan([2, 1], [3, 9], [5, 7], num_heads=32, page_size=64, kv_granularity=1)
    # (3 + 1) * 2 + (9 + 1) * 2 = 28 blocks over 4 units, and 1: payload 8
    _check(
        work,
        [
            (0, -1, 0, 2, 0, 3, 0),
            (1, -1, 2, 4, 0, 3, 0),
            (2, 0, 4, 5, 3, 10, 1 * 64 + 7),
            (2, 1, 4, 5, 10, 12, 0),
            (3, 2, 5, 6, 3, 7, 4 * 64 + 7),
            (3, 3, 5, 6, 7, 12, 0),
        ],
        [0, 2, 3, 5, 6],
        [0, 0, 0, 2, 4],
        {2: (4, 5), 3: (5, 6)},
        [0, 1, 2, 3],
    )


def test_pages_of_64():
    """Blocks of 64 pages, overhead 1, payload 3."""
    _check(
        _plan([1, 1], [100, 37], [5, 64], page_size=64, kv_granularity=64),
        [(0, -1, 0, 1, 0, 100, 0), (1, -1, 1, 2, 100, 137, 0)],
        [0, 1, 2, 2, 2],
        [0, 0, 0],
        {},
        [],
    )


def test_requests_without_cache_have_a_work():
    work = _plan([1, 2, 1], [0, 5, 0])
    rows = [(row[0], row[1], row[4], row[5], row[6]) for row in work.work_info.tolist()]
    assert rows == [(0, -1, 0, 0, 0), (1, -1, 0, 5, 0), (2, -1, 5, 5, 0)]


def test_requests_without_queries_have_none():
    work = _plan([0, 1, 0], [7, 5, 3])
    assert [row[:6] for row in work.work_info.tolist()] == [[1, -1, 0, 1, 7, 12]]
    empty = _plan([], [])
    assert (empty.num_works, empty.work_indptr.tolist(), empty.reduce_indptr.tolist()) == (
        0,
        [0] * 5,
        [0],
    )


def test_more_queries_than_cache():
    """Query tokens before the first cached one see nothing."""
    work = _plan([3], [2], num_heads=128, **FP8)
    rows = [(row[2], row[4], row[5], row[6]) for row in work.work_info.tolist()]
    assert rows == [(0, 0, 0, 2), (1, 0, 1, 1), (2, 0, 2, 0)]


def test_a_short_rest_is_not_cut_off():
    """A piece that leaves fewer entries than the request has queries takes them along."""
    three = DeviceProfile("gfx942", 3)

    def ends(q_len):
        work = _plan([q_len], [57], profile=three, kv_granularity=1)
        return work.work_info[:, 5].tolist()

    # 57 + 16 blocks over 3 units and 16 are 41: cuts at 25 and 50; 7 are left for the third unit
    assert ends(1) == [25, 50, 57]
    assert ends(7) == [25, 50, 57]
    assert ends(8) == [25, 57]


def test_split_limit():
    """64 blocks and 16 over 4 units are 36 a unit; over one share all of it is one piece."""
    assert _plan([1], [1024]).num_works == 4
    assert _plan([1], [1024], max_split_per_batch=2).num_works == 2
    assert _plan([1], [1024], max_split_per_batch=1).num_works == 1
    assert _plan([1], [1024], max_split_per_batch=0).num_works == 1


def test_sparse_tokens():
    """Every token has an index row of topk entries, and no causal cut."""
    work = _plan([2, 2], [100, 6], topk=10)
    assert [row[:7] for row in work.work_info.tolist()] == [
        [0, -1, 0, 1, 0, 10, 1],
        [0, -1, 1, 2, 10, 20, 0],
        [1, -1, 2, 3, 20, 26, 1],
        [1, -1, 3, 4, 30, 36, 0],
    ]


def test_sparse_tokens_with_folded_heads():
    work = _plan([1, 1], [100, 6], topk=10, num_heads=32)
    assert [row[:7] for row in work.work_info.tolist()] == [
        [0, -1, 0, 1, 0, 10, 0],
        [1, -1, 1, 2, 0, 10, 0],
        [2, -1, 2, 3, 10, 16, 0],
        [3, -1, 3, 4, 10, 16, 0],
    ]


def test_sparse_pages():
    """10 tokens are 3 pages of 4; only a request's own last page may be short."""
    work = _plan([1, 1], [7, 2], [2, 3], topk=10, page_size=4, kv_granularity=1)
    kv = [[row[4], row[5], row[6]] for row in work.work_info.tolist()]
    assert kv == [[0, 3, 0], [3, 5, 0]]
    single = DeviceProfile("gfx942", 8)
    work = _plan([1], [70], [2], topk=256, page_size=4, kv_granularity=1, profile=single)
    assert work.work_info[0, 4:7].tolist() == [0, 9, 55 * 4]


def test_uniform_queries_replace_the_indptr():
    work = _plan([1, 1], [40, 30], uni_seqlen_qo=2)
    assert [row[2:4] for row in work.work_info.tolist()] == [[0, 2], [2, 4]]


def test_two_workgroups_per_unit():
    fp8 = {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3"}
    profile = DeviceProfile("gfx950", 4, experimental=True)
    assert _plan([1], [900], num_heads=64, profile=profile, **fp8).work_indptr.numel() == 9


GOOD = {
    "qo_indptr": _indptr([1, 1]),
    "kv_indptr": _indptr([3, 4]),
    "kv_last_page_len": torch.ones(2, dtype=torch.int32),
    "num_heads": 16,
    "profile": CU4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_indptr": torch.tensor([1, 3, 7], dtype=torch.int32)}, "kv_indptr must start at 0"),
        ({"qo_indptr": torch.tensor([2, 3, 7], dtype=torch.int32)}, "qo_indptr must start at 0"),
        (
            {"kv_indptr": torch.tensor([0, 3, 2], dtype=torch.int32)},
            "kv_indptr must not decrease, got a smaller value at 2",
        ),
        ({"kv_indptr": torch.tensor([0, 3, 7])}, "kv_indptr must be a contiguous 1-D int32"),
        ({"kv_indptr": _indptr([3])}, r"both be \[batch_size \+ 1\], got \(3,\) and \(2,\)"),
        ({"kv_last_page_len": _indptr([1, 1])}, r"kv_last_page_len must be \[batch_size\]=\(2,\)"),
        (
            {"qo_indptr": torch.empty(3, dtype=torch.int32, device="meta")},
            "qo_indptr must be on the CPU, got meta",
        ),
        ({"page_size": 0}, "page_size must be >= 1, got 0"),
        ({"kv_granularity": 0}, "kv_granularity must be a power of two, got 0"),
        (
            {"page_size": 4, "kv_last_page_len": torch.tensor([1, 5], dtype=torch.int32)},
            "kv_last_page_len must be in 1..page_size=4",
        ),
        (
            {"page_size": 4, "kv_last_page_len": torch.tensor([0, 4], dtype=torch.int32)},
            "kv_last_page_len must be in 1..page_size=4",
        ),
        ({"num_heads": 0}, "num_heads must be >= 1"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(LayoutError, match=f"plan_v1_2: .*{message}"):
        plan_v1_2(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads_k": 2}, "num_heads_k must be 1, got 2"),
        ({"num_heads": 24}, "num_heads must be a multiple of 16 .* got num_heads=24"),
    ],
)
def test_unsupported(change, message):
    with pytest.raises(UnsupportedProblemError, match=message):
        plan_v1_2(**{**GOOD, **change})
