"""The number of splits, and the ranges a kernel cuts."""

from __future__ import annotations

import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton import language as tl

from mla_core.dims import MLADims
from mla_core.errors import UnsupportedProblemError
from mla_core.plan import AttentionOptions, PlanRequest
from mla_core.problem import Problem
from mla_triton.decode import MIN_SPLIT_TOKENS, make_schedule, plan_decode
from mla_triton.kernels._math import split_range
from mla_triton.splits import choose_splits
from mla_triton.tuning import DecodeConfig

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def split_ranges_kernel(ranges_ptr, kv_len, split_blocks, BLOCK_N: tl.constexpr):
    split = tl.program_id(0)
    begin, end = split_range(kv_len, split, tl.num_programs(0), split_blocks, BLOCK_N)
    tl.store(ranges_ptr + split * 2, begin)
    tl.store(ranges_ptr + split * 2 + 1, end)


def h200(steps=64, **changes):
    asked = {"num_programs": 1, "mean_steps": steps, "merge_cost": 0.02}
    return choose_splits(**(asked | {"concurrent_programs": 132, "max_splits": 64} | changes))


def test_a_full_device_does_not_split():
    assert h200(num_programs=132) == 1
    assert h200(num_programs=264) == 1


def test_few_programs_split_to_fill_the_device():
    assert 16 <= h200(num_programs=2) <= 64
    assert h200(num_programs=16) * 16 <= 132


def test_short_contexts_do_not_split():
    for steps in range(4):
        assert h200(steps) == 1


@pytest.mark.parametrize(("longest", "is_ragged"), [(4096, False), (5000, False), (40000, True)])
def test_ragged_lengths_get_splits_of_one_length(longest, is_ragged):
    problem = Problem("decode", "sm90", "bf16", "bf16", MLADims(16), page_size=64)
    request = PlanRequest(problem, AttentionOptions(), 64, 64, 1, longest, 64 * 64)
    config = DecodeConfig(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2, programs_per_sm=2)
    schedule = make_schedule(request, config)
    length = schedule.config["split_blocks"] * 64
    if is_ragged:
        assert schedule.num_kv_splits * length >= longest
        assert length <= 4096
    else:
        assert length == MIN_SPLIT_TOKENS


def test_a_batch_larger_than_a_grid_is_refused():
    problem = Problem("decode", "sm90", "bf16", "bf16", MLADims(16), page_size=64)
    request = PlanRequest(problem, AttentionOptions(), 65536, 65536, 1, 64, 65536)
    with pytest.raises(UnsupportedProblemError, match=r"batch_size must be in 0\.\.65535, got"):
        plan_decode(request)


def test_an_expensive_merge_splits_less():
    assert h200(merge_cost=2.0) < h200(merge_cost=0.0)


@settings(deadline=None, max_examples=40)
@given(
    programs=st.integers(1, 1000),
    longest=st.integers(0, 4096),
    share=st.floats(0, 1),
    slots=st.integers(1, 300),
    cost=st.floats(0, 10),
    most=st.integers(0, 64),
)
def test_stays_within_its_limits(programs, longest, share, slots, cost, most):
    splits = choose_splits(
        num_programs=programs,
        mean_steps=share * longest,
        concurrent_programs=slots,
        merge_cost=cost,
        max_splits=most,
    )
    assert 1 <= splits <= max(1, most)


@settings(deadline=None, max_examples=40)
@given(
    kv_len=st.integers(0, 3000),
    num_splits=st.integers(1, 20),
    min_blocks=st.integers(1, 4),
    block_n=st.sampled_from([16, 64]),
)
@example(kv_len=0, num_splits=3, min_blocks=1, block_n=16)
@example(kv_len=17, num_splits=20, min_blocks=1, block_n=16)
def test_ranges_cover_every_token_once(kv_len, num_splits, min_blocks, block_n):
    ranges = torch.full((num_splits, 2), -1, dtype=torch.int32, device=DEVICE)
    split_ranges_kernel[(num_splits,)](ranges, kv_len, split_blocks=min_blocks, BLOCK_N=block_n)
    position = 0
    for begin, end in ranges.tolist():
        assert begin % block_n == 0 or begin == kv_len
        if begin < end:
            assert begin == position
            assert end == kv_len or (end - begin) >= min(min_blocks, 1) * block_n
            position = end
    assert position == kv_len
    sizes = [-(-(end - begin) // block_n) for begin, end in ranges.tolist() if begin < end]
    assert not sizes or max(sizes) - min(sizes) <= 1
