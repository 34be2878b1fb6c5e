"""Every decode planner, on random batches: coverage, reduce maps, load and buffer bounds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.metadata import DeviceProfile, decode_sizes, plan_v1_0, plan_v1_1, plan_v1_2
from mla_core.metadata.v1_1 import load_limit

#: (arch, dtype, heads, fold, accepted q_len, two workgroups a unit)
SHAPES = [
    ("gfx942", "bf16", 16, 1, (1, 9)),
    ("gfx942", "bf16", 48, 3, (1, 4)),
    ("gfx942", "fp8_e4m3fnuz", 128, 1, (1, 4)),
    ("gfx950", "bf16", 56, 1, (1, 9)),
    ("gfx950", "bf16", 24, 1, (3, 5)),
    ("sm90", "bf16", 5, 1, (1, 60)),
]


@dataclass(frozen=True)
class Case:
    """A random batch; `q_lens` need not be equal."""

    arch: str
    dtype: str
    num_heads: int
    fold: int
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    granularity: int
    num_cu: int
    is_causal: bool
    knows_max: bool

    @property
    def profile(self):
        return DeviceProfile(self.arch, self.num_cu)

    @property
    def max_q(self):
        return max([1, *self.q_lens])

    def tensors(self):
        pages = [-(-n // self.page_size) for n in self.kv_lens]
        last = [(n - 1) % self.page_size + 1 if n else 0 for n in self.kv_lens]
        indptrs = [torch.tensor([0, *itertools.accumulate(x)]) for x in (self.q_lens, pages)]
        return [t.int() for t in (*indptrs, torch.tensor(last))]

    def plan(self, planner, **options):
        work = planner(
            *self.tensors(),
            num_heads=self.num_heads,
            profile=self.profile,
            page_size=self.page_size,
            kv_granularity=self.granularity,
            max_seqlen_qo=self.max_q if self.knows_max else -1,
            q_dtype=self.dtype,
            kv_dtype=self.dtype,
            is_causal=self.is_causal,
            **options,
        )
        work.validate()
        return work

    def sizes(self, **options):
        return decode_sizes(
            len(self.q_lens),
            self.max_q,
            self.num_heads,
            profile=self.profile,
            q_dtype=self.dtype,
            kv_dtype=self.dtype,
            **options,
        )


@st.composite
def cases(draw):
    arch, dtype, heads, fold, (low, high) = draw(st.sampled_from(SHAPES))
    # Tiling of these shapes depends on the longest request, so one has exactly that length.
    longest = draw(st.integers(low, high))
    size = draw(st.integers(1, 6))
    q_lens = draw(st.permutations([longest, *draw(_lists(st.integers(0, longest), size - 1))]))
    return Case(
        arch,
        dtype,
        heads,
        fold,
        tuple(q_lens),
        tuple(draw(_lists(st.integers(0, 900) | st.integers(0, 40), size))),
        draw(st.sampled_from([1, 1, 4, 64])),
        draw(st.sampled_from([1, 4, 16])),
        draw(st.integers(1, 12)),
        draw(st.booleans()),
        # Where tiles get narrower with the row count, buffers assume that it is known.
        draw(st.booleans()) or arch == "gfx950",
    )


def _lists(values, size):
    return st.lists(values, min_size=size, max_size=size)


def _check_coverage(case, work):
    """Every query row sees each token that its mask allows exactly once, and no other.

    A row reads the tokens of a work up to ``kv_offset`` before the request's end, and those its own
    causal limit allows, which is what kernels compute.
    """
    pages = [-(-n // case.page_size) for n in case.kv_lens]
    page_start = [0, *itertools.accumulate(pages)]
    row_start = [0, *itertools.accumulate(q * case.fold for q in case.q_lens)]
    seen = {}
    for group, _, begin, end, kv_begin, kv_end, offset, pad in work.work_info.tolist():
        request, g = divmod(group, case.fold)
        q_len, kv_len = case.q_lens[request], case.kv_lens[request]
        base = row_start[request] + g * q_len
        assert base <= begin < end <= base + q_len
        assert pad == 0
        assert page_start[request] <= kv_begin <= kv_end <= page_start[request + 1]
        first = (kv_begin - page_start[request]) * case.page_size
        last = kv_len - offset
        assert kv_end == page_start[request] - (-last // case.page_size)
        for row in range(begin, end):
            limit = kv_len - (q_len - 1 - (row - base)) if case.is_causal else kv_len
            counts = seen.setdefault(row, torch.zeros(kv_len, dtype=torch.int64))
            counts[first : max(first, min(last, limit))] += 1
    assert sorted(seen) == list(range(row_start[-1]))
    for request, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        for i in range(q_len * case.fold):
            limit = kv_len - (q_len - 1 - i % q_len) if case.is_causal else kv_len
            expected = (torch.arange(kv_len) < limit).long()
            assert torch.equal(seen[row_start[request] + i], expected)


def _check_sizes(work, sizes, max_q):
    assert work.work_indptr.numel() == sizes.num_workgroups + 1
    assert work.num_works <= sizes.max_works
    assert work.reduce_final_map.shape[0] <= sizes.max_tiles
    assert work.reduce_partial_map.numel() <= sizes.max_partials
    assert work.num_partial_rows <= sizes.max_partials * max_q


def _loads(work, cost):
    """Sum of ``cost(work_info row)`` over each workgroup."""
    info, indptr = work.work_info.tolist(), work.work_indptr.tolist()
    return [sum(map(cost, info[a:b])) for a, b in itertools.pairwise(indptr)]


@settings(deadline=None, max_examples=40)
@given(case=cases(), max_splits=st.sampled_from([-1, -1, 0, 1, 3]))
def test_v1_2(case, max_splits):
    work = case.plan(plan_v1_2, max_split_per_batch=max_splits)
    _check_coverage(case, work)
    _check_sizes(work, case.sizes(max_split_per_batch=max_splits), case.max_q)

    # No workgroup is above an equal share, one overhead, and the tail it may take along.
    overhead = max(1, -(-16 // case.page_size))

    def cost(row):
        return -(-(row[5] - row[4]) // case.granularity) + overhead

    tiles = work.reduce_final_map.shape[0]
    total, counted = 0, set()
    for row in work.work_info.tolist():
        key = (row[2], row[3])
        if key not in counted:
            counted.add(key)
            pages = -(-case.kv_lens[row[0] // case.fold] // case.page_size)
            total += -(-pages // case.granularity) + overhead
    assert len(counted) == tiles
    shares = case.num_cu
    if max_splits >= 0:
        shares = max(1, min(shares, max_splits * len(case.q_lens) * case.fold))
    tail = -(-case.max_q // case.granularity)
    assert max(_loads(work, cost)) <= -(-total // shares) + overhead + tail


@settings(deadline=None, max_examples=40)
@given(case=cases())
def test_v1_1(case):
    work = case.plan(plan_v1_1)
    _check_coverage(case, work)
    _check_sizes(work, case.sizes(fast_mode=False), case.max_q)

    # Filled up to the limit, or by one shortest piece above the mean.
    heads = case.num_heads // case.fold

    def cost(row):
        return 2 * heads * (row[3] - row[2]) + (row[5] - row[4]) * case.page_size

    loads = _loads(work, cost)
    rows = max((row[3] - row[2] for row in work.work_info.tolist()), default=0) * heads
    limit = load_limit(
        total=sum(loads),
        num_batches=len(case.q_lens) * case.fold,
        max_rows=rows,
        num_cu=case.num_cu,
        granularity=case.granularity * case.page_size,
    )
    longest = -(-max(case.kv_lens) // case.page_size)
    floor = -(-longest // case.num_cu) + case.granularity
    shortest = floor * case.page_size
    above_mean = sum(loads) / case.num_cu + shortest
    assert max(loads) <= max(limit, above_mean) + 2 * rows + max(16, case.page_size)


@settings(deadline=None, max_examples=40)
@given(
    case=cases(), max_splits=st.sampled_from([-1, 1, 5]), num_kv_splits=st.sampled_from([1, 7, 32])
)
def test_v1_0(case, max_splits, num_kv_splits):
    work = case.plan(plan_v1_0, max_split_per_batch=max_splits, num_kv_splits=num_kv_splits)
    _check_coverage(case, work)
    _check_sizes(
        work,
        case.sizes(fast_mode=False, intra_batch_mode=True, num_kv_splits=num_kv_splits),
        case.max_q,
    )
    works = work.work_indptr.diff()
    assert int(works.max()) - int(works.min()) <= 1
    most = num_kv_splits
    if case.arch != "gfx942" and max_splits >= 1:
        most = min(most, max_splits)
    assert int(work.reduce_indptr.diff().max()) <= most


@settings(deadline=None, max_examples=40)
@given(case=cases(), topk=st.integers(0, 300))
def test_sparse(case, topk):
    """Every token reads the first entries of its own index row once, whatever its position."""
    work = case.plan(plan_v1_2, topk=topk)
    width = -(-topk // case.page_size)
    owner = [b for b, q in enumerate(case.q_lens) for _ in range(q)]
    fold = 3 if case.fold == 3 else 1
    seen = {row: [] for row in range(len(owner) * fold)}
    for batch, _, begin, end, kv_begin, kv_end, offset, _ in work.work_info.tolist():
        assert end == begin + 1
        token = begin // fold
        pages = min(-(-case.kv_lens[owner[token]] // case.page_size), width)
        assert batch == (begin if fold > 1 else owner[token])
        seen[begin].append((kv_begin - token * width, kv_end - token * width))
        if fold == 1:
            nth = token - owner.index(owner[token])
            offset -= case.q_lens[owner[token]] - 1 - nth
        left = pages - (kv_end - token * width)
        assert (left - 1) * case.page_size < offset <= left * case.page_size
    for row, ranges in seen.items():
        pages = min(-(-case.kv_lens[owner[row // fold]] // case.page_size), width)
        ranges.sort()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == pages
        assert [r[1] for r in ranges[:-1]] == [r[0] for r in ranges[1:]]
    _check_sizes(work, case.sizes(is_sparse=True), case.max_q)


@pytest.mark.parametrize("planner", [plan_v1_0, plan_v1_1, plan_v1_2])
@pytest.mark.parametrize("num_cu", [80, 304])
def test_a_large_ragged_batch(planner, num_cu):
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    q_lens = torch.randint(1, 3, (150,), generator=generator).tolist()
    kv_lens = torch.randint(0, 3000, (150,), generator=generator).tolist()
    case = Case("gfx942", "bf16", 16, 1, tuple(q_lens), tuple(kv_lens), 1, 16, num_cu, True, True)
    _check_coverage(case, case.plan(planner))
