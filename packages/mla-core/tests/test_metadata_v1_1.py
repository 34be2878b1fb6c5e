"""Planning by load: the limit and two schedules worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from mla_core.metadata import DeviceProfile, plan_v1_1
from mla_core.metadata.v1_1 import load_limit


def _plan(kv_lens):
    indptr = torch.arange(len(kv_lens) + 1, dtype=torch.int32)
    kv_indptr = torch.tensor([0, *itertools.accumulate(kv_lens)], dtype=torch.int32)
    last = torch.ones(len(kv_lens), dtype=torch.int32)
    work = plan_v1_1(indptr, kv_indptr, last, num_heads=16, profile=DeviceProfile("gfx942", 2))
    work.validate()
    return work


@pytest.mark.parametrize(
    ("total", "limit"), [(16, 32), (18, 64), (34, 128), (66, 192), (130, 65), (131, 66), (0, 32)]
)
def test_limit_of_small_loads(total, limit):
    assert load_limit(total=total, num_batches=0, max_rows=0, num_cu=2, granularity=1) == limit


def test_limit_rises_with_the_cost_of_a_cut():
    """A mean of 100 and (1 + 1 + 10) * 2 * 10 are 340, in blocks of 16: 352."""
    assert load_limit(total=200, num_batches=100, max_rows=10, num_cu=2, granularity=16) == 352


def test_longest_first():
    """Limit 1552 + 817 = 2369, rounded up to 2384: the long request is cut there."""
    work = _plan([40, 3000])
    assert work.work_indptr.tolist() == [0, 1, 3]
    assert work.work_info[:, :7].tolist() == [
        [1, 0, 1, 2, 40, 2424, 616],
        [0, -1, 0, 1, 0, 40, 0],
        [1, 1, 1, 2, 2424, 3040, 0],
    ]
    assert work.reduce_indptr.tolist() == [0, 0, 2]
    assert work.reduce_final_map.tolist() == [[0, 0], [1, 2]]
    assert work.reduce_partial_map.tolist() == [0, 1]


def test_a_short_tail_is_not_cut_off():
    """Limits 1056 and 1072 leave 4 and 28 tokens."""
    assert _plan([1060]).work_info[:, 5].tolist() == [1060]
    assert _plan([1100]).work_info[:, 5].tolist() == [1072, 1100]
