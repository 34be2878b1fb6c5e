"""The prefill planner: a schedule worked out by hand, coverage of random batches, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.metadata import DeviceProfile, plan_prefill, prefill_sizes

CU4 = DeviceProfile("gfx950", 4)


def _indptr(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _plan(q_lens, kv_lens, page_size=1, **options):
    pages = [-(-n // page_size) for n in kv_lens]
    options.setdefault("profile", CU4)
    options.setdefault("kvlen_granularity", 128)
    kv = torch.tensor(kv_lens, dtype=torch.int32)
    work = plan_prefill(_indptr(q_lens), _indptr(pages), kv, page_size=page_size, **options)
    work.validate()
    return work


def test_worked_example():
    """Tiles in the order first, last, middle need 2, 5 and 4 units: shares of 3, 3, 3 and 2."""
    work = _plan([600], [600])
    assert [tuple(row) for row in work.work_info.tolist()] == [
        (0, -1, 0, 256, 0, 256, 0, 1 << 16),
        (0, 0, 512, 600, 0, 128, 472, 1 << 16),
        (0, 256, 512, 600, 128, 512, 88, 1 << 16),
        (0, 512, 512, 600, 512, 600, 0, 1 << 16),
        (0, 768, 256, 512, 0, 256, 344, 1 << 16),
        (0, 1024, 256, 512, 256, 512, 0, 1 << 16),
    ]
    assert work.work_indptr.tolist() == [0, 2, 3, 5, 6]
    assert work.reduce_final_map.tolist() == [[256, 512], [512, 600]]
    assert work.reduce_indptr.tolist() == [0, 2, 5]
    assert work.reduce_partial_map.tolist() == [768, 1024, 0, 256, 512]


def test_heads_in_clusters():
    """6 KV heads on 4 units: 2 clusters of 2 units, each running its 3 heads in turn."""
    work = _plan([8], [256], num_heads_k=6, gqa_ratio=2)
    assert work.work_indptr.tolist() == [0, 3, 6, 9, 12]
    heads = [(row & 0xFFFF, row >> 16) for row in work.work_info[:, 7].tolist()]
    first, second = [(0, 2), (2, 4), (4, 6)], [(6, 8), (8, 10), (10, 12)]
    assert heads == first * 2 + second * 2
    one_unit = [[0, 0, 0, 8, 0, 128, 128]] * 3 + [[0, 256, 0, 8, 128, 256, 0]] * 3
    assert work.work_info[:, :7].tolist() == one_unit * 2
    assert work.reduce_partial_map.tolist() == [0, 256]


def test_pages_end_with_the_request():
    work = _plan([1, 1], [130, 3], page_size=16, kvlen_granularity=32)
    kv = [tuple(row[4:7]) for row in work.work_info.tolist()]
    # 5 + 1 units over 4 workgroups: shares of 2, 2, 1 and 1
    assert kv == [(0, 4, 66), (4, 8, 2), (8, 9, 0), (9, 10, 0)]


def test_nothing_to_do():
    work = _plan([], [])
    assert work.work_indptr.tolist() == [0] * 5
    assert (work.num_works, work.reduce_indptr.tolist()) == (0, [0])
    blind = _plan([3], [0])
    assert [row[:7] for row in blind.work_info.tolist()] == [[0, -1, 0, 3, 0, 0, 0]]


@settings(deadline=None, max_examples=40)
@given(
    lens=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), max_size=5),
    page_size=st.sampled_from([1, 4, 16]),
    units=st.sampled_from([1, 2, 4]),
    qlen_granularity=st.sampled_from([8, 32]),
    num_heads_k=st.integers(1, 6),
    num_cu=st.integers(1, 12),
    is_causal=st.booleans(),
)
def test_coverage(lens, page_size, units, qlen_granularity, num_heads_k, num_cu, is_causal):
    q_lens, kv_lens = [q for q, _ in lens], [kv for _, kv in lens]
    profile = DeviceProfile("gfx950", num_cu)
    work = _plan(
        q_lens, kv_lens, page_size, kvlen_granularity=units * page_size, num_heads_k=num_heads_k,
        qlen_granularity=qlen_granularity, is_causal=is_causal, profile=profile,
    )  # fmt: skip
    block = units * page_size
    q_start = [0, *itertools.accumulate(q_lens)]
    page_start = [0, *itertools.accumulate(-(-n // page_size) for n in kv_lens)]
    info = work.work_info.tolist()

    # every head of every tile covers every visible page once, in order
    pieces: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for b, partial, qs, qe, ks, ke, offset, heads in info:
        pieces.setdefault((heads, b, qs, qe), []).append((ks, ke, partial, offset))
    expected = {}
    for b, (q_len, kv_len) in enumerate(lens):
        for begin in range(0, q_len, qlen_granularity):
            end = min(begin + qlen_granularity, q_len)
            seen = max(0, kv_len - q_len + end) if is_causal else kv_len
            for head in range(num_heads_k):
                key = (head | (head + 1) << 16, b, q_start[b] + begin, q_start[b] + end)
                expected[key] = seen
    assert set(pieces) == set(expected)
    for key, ranges in pieces.items():
        b = key[1]
        ranges.sort()
        assert ranges[0][0] == page_start[b]
        assert ranges[-1][1] == page_start[b] - (-expected[key] // page_size)
        assert [r[1] for r in ranges[:-1]] == [r[0] for r in ranges[1:]]
        assert all(r[1] > r[0] for r in ranges[:-1])
        assert ranges[-1][3] == 0
        assert all(r[3] == kv_lens[b] - (r[1] - page_start[b]) * page_size for r in ranges[:-1])
        assert (ranges[0][2] == -1) == (len(ranges) == 1)

    # loads of workgroups differ by at most one unit per head
    heads = num_heads_k // math.gcd(num_heads_k, num_cu)
    loads = []
    for c in range(num_cu):
        works = info[work.work_indptr[c] : work.work_indptr[c + 1]]
        loads.append(sum(-(-(w[5] - w[4]) * page_size // block) for w in works))
    assert max(loads) - min(loads) <= heads

    sizes = prefill_sizes(
        len(lens),
        num_heads_k,
        max([1, *q_lens]),
        profile=profile,
        qlen_granularity=qlen_granularity,
    )
    assert work.work_indptr.numel() == sizes.num_workgroups + 1
    assert work.num_works <= sizes.max_works
    assert work.reduce_final_map.shape[0] <= sizes.max_tiles
    assert work.reduce_partial_map.numel() <= sizes.max_partials


GOOD = {
    "qo_indptr": _indptr([1, 1]),
    "kv_indptr": _indptr([3, 4]),
    "kv_lens": torch.tensor([3, 4], dtype=torch.int32),
    "page_size": 1,
    "profile": CU4,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": torch.tensor([3, 5], dtype=torch.int32)}, "kv_lens must be in 0..pages"),
        ({"kv_lens": torch.tensor([-1, 4], dtype=torch.int32)}, "kv_lens must be in 0..pages"),
        ({"kv_lens": torch.tensor([3], dtype=torch.int32)}, r"kv_lens must be \[batch_size\]"),
        ({"kv_indptr": torch.tensor([1, 3, 7], dtype=torch.int32)}, "kv_indptr must start at 0"),
        ({"gqa_ratio": 0}, "gqa_ratio must be >= 1, got 0"),
        ({"num_heads_k": 0}, "num_heads_k must be >= 1, got 0"),
        ({"qlen_granularity": 0}, "qlen_granularity must be >= 1, got 0"),
        ({"qhead_granularity": 2}, "qhead_granularity must be gqa_ratio=1, got 2"),
        ({"kvlen_granularity": 16, "page_size": 32}, "multiple of page_size=32, got 16"),
        ({"kvlen_granularity": 24}, "kv_granularity must be a power of two, got 24"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(LayoutError, match=f"plan_prefill: .*{message}"):
        plan_prefill(**{**GOOD, **change})
