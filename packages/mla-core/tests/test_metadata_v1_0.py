"""Equal splits: cuts and dealing worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from mla_core.errors import LayoutError
from mla_core.metadata import DeviceProfile, plan_v1_0


def _plan(kv_lens, arch="gfx942", **options):
    indptr = torch.arange(len(kv_lens) + 1, dtype=torch.int32)
    kv_indptr = torch.tensor([0, *itertools.accumulate(kv_lens)], dtype=torch.int32)
    last = torch.ones(len(kv_lens), dtype=torch.int32)
    profile = DeviceProfile(arch, 4)
    work = plan_v1_0(indptr, kv_indptr, last, num_heads=16, profile=profile, **options)
    work.validate()
    return work


def _ends(*args, **options):
    return _plan(*args, **options).work_info[:, 5].tolist()


def test_sixteen_splits_on_gfx942():
    """19 blocks in 16 pieces are 2 blocks each; 10 pieces over 4 units are 3, 3, 2 and 2."""
    work = _plan([300])
    assert work.work_info[:, 5].tolist() == [*range(32, 300, 32), 300]
    assert work.work_info[:, 6].tolist() == [*range(268, 0, -32), 0]
    assert work.work_info[:, 1].tolist() == list(range(10))
    assert work.work_indptr.tolist() == [0, 3, 6, 8, 10]


def test_a_tail_of_four_tokens_is_not_worth_a_piece():
    assert _ends([292]) == [*range(32, 288, 32), 292]
    assert _ends([293]) == [*range(32, 293, 32), 293]


def test_buffers_bound_the_pieces():
    """19 blocks in at most 2 pieces are 10 blocks each."""
    assert _ends([300], num_kv_splits=2) == [160, 300]
    assert _ends([300], num_kv_splits=1) == [300]


def test_pieces_of_196_tokens_elsewhere():
    """49 blocks: 783 // 196 = 3 pieces of 17, 784 // 196 = 4 of 13; never more than units."""
    assert _ends([783], "sm90") == [272, 544, 783]
    assert _ends([784], "sm90") == [208, 416, 624, 784]
    assert _ends([1984], "sm90") == [496, 992, 1488, 1984]
    assert _ends([784], "sm90", max_split_per_batch=2) == [400, 784]
    assert _ends([195], "sm90") == [195]


def test_few_splits_for_many_requests():
    """3 requests on 4 units: at most ceil(4 / 3) pieces each."""
    assert _ends([512, 512, 512], "sm90") == [256, 512, 768, 1024, 1280, 1536]


def test_zero_splits_is_an_error():
    with pytest.raises(LayoutError, match="plan_v1_0: num_kv_splits must be >= 1, got 0"):
        _plan([1], num_kv_splits=0)
