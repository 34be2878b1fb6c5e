"""The device planner writes what the host planner does, bit for bit; it also replays in a graph."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import BackendUnavailableError, LayoutError, UnsupportedProblemError
from mla_core.metadata import (
    DeviceProfile,
    WorkList,
    WorkListSizes,
    decode_sizes,
    device,
    plan_v1_2,
    plan_v1_2_device,
    scratch_size,
)
from mla_core.metadata.tiling import HeadTiling

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
CU4 = DeviceProfile("gfx942", 4)


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    if HAS_TRITON and DEVICE == "cpu":
        from mla_core.testing import interpreter

        interpreter.enable()


def _indptr(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _inputs(q_lens, kv_lens, page_size):
    pages = [-(-n // page_size) for n in kv_lens]
    last = [(n - 1) % page_size + 1 if n else 0 for n in kv_lens]
    return _indptr(q_lens), _indptr(pages), torch.tensor(last, dtype=torch.int32)


def _poisoned(sizes, room=0):
    """Buffers with ``room`` entries to spare, full of a number that must not stay."""
    larger = WorkListSizes(
        sizes.num_workgroups + room,
        sizes.max_works + 2 * room,
        sizes.max_tiles + 3 * room,
        sizes.max_partials + 4 * room,
    )
    buffers = WorkList.empty(larger, DEVICE)
    for field in fields(buffers):
        getattr(buffers, field.name).fill_(-77)
    return buffers


def _check_equal(q_lens, kv_lens, *, room=0, scratch=None, **options):
    page_size = options.get("page_size", 1)
    tensors = _inputs(q_lens, kv_lens, page_size)
    known = {"max_seqlen_qo": max([1, *q_lens]), **options}
    sizes = decode_sizes(
        len(q_lens),
        known["max_seqlen_qo"],
        known["num_heads"],
        profile=known["profile"],
        q_dtype=known.get("q_dtype", "bf16"),
        kv_dtype=known.get("kv_dtype", "bf16"),
        is_sparse=known.get("topk", -1) >= 0,
        max_split_per_batch=known.get("max_split_per_batch", -1),
        tiling=known.get("tiling"),
    )
    expected, got = _poisoned(sizes, room), _poisoned(sizes, room)
    work = plan_v1_2(*tensors, **known)
    work.copy_into(expected)
    plan_v1_2_device(got, *(t.to(DEVICE) for t in tensors), **known, scratch=scratch)
    for field in fields(WorkList):
        name = field.name
        assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
    return work


SHAPES = [
    ("gfx942", "bf16", 16, (1, 9)),
    ("gfx942", "bf16", 48, (1, 4)),
    ("gfx942", "fp8_e4m3fnuz", 128, (1, 4)),
    ("gfx950", "bf16", 56, (1, 9)),
    ("gfx950", "bf16", 24, (3, 5)),
    ("sm90", "bf16", 5, (1, 60)),
]


def _tilings(num_heads):
    """Ways in which a kernel of one's own may tile: whole rows, one token, heads in two groups."""
    yield HeadTiling(1, num_heads, 3 * num_heads, one_tile=False)
    yield HeadTiling(1, num_heads, num_heads, one_tile=False)
    yield HeadTiling(1, num_heads, 64, one_tile=False)
    if num_heads % 2 == 0:
        yield HeadTiling(2, num_heads // 2, 2 * num_heads, one_tile=False)


def _lists(values, size):
    return st.lists(values, min_size=size, max_size=size)


@needs_triton
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_the_host_planner(data):
    draw = data.draw
    arch, dtype, num_heads, (low, high) = draw(st.sampled_from(SHAPES))
    longest, size = draw(st.integers(low, high)), draw(st.integers(1, 6))
    q_lens = draw(st.permutations([longest, *draw(_lists(st.integers(0, longest), size - 1))]))
    work = _check_equal(
        q_lens,
        draw(_lists(st.integers(0, 900) | st.integers(0, 40), size)),
        num_heads=num_heads,
        profile=DeviceProfile(arch, draw(st.integers(1, 12))),
        page_size=draw(st.sampled_from([1, 1, 3, 4, 64])),
        tiling=draw(st.sampled_from([None, None, *_tilings(num_heads)])),
        kv_granularity=draw(st.sampled_from([1, 4, 16])),
        is_causal=draw(st.booleans()),
        is_cp_round_robin=draw(st.sampled_from([False, False, True])),
        topk=draw(st.sampled_from([-1, -1, 0, 5, 100])),
        max_split_per_batch=draw(st.sampled_from([-1, -1, 0, 1, 3])),
        q_dtype=dtype,
        kv_dtype=dtype,
        room=draw(st.integers(0, 2)),
    )
    work.validate()


@needs_triton
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "options"),
    [
        ([1, 1, 1], [40, 300, 130], {"num_heads": 16}),
        (
            [2, 2],
            [100, 37],
            {"num_heads": 128, "q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3"},
        ),
        ([1, 1], [100, 37], {"num_heads": 48}),
        ([1, 1], [6341, 2368], {"num_heads": 16, "page_size": 64, "kv_granularity": 64}),
        ([1, 1], [50, 60], {"num_heads": 16, "uni_seqlen_qo": 3, "max_seqlen_qo": 3}),
        ([2, 2], [50, 60], {"num_heads": 32, "uni_seqlen_qo": 2, "topk": 20}),
        ([0, 0], [50, 60], {"num_heads": 16}),
        ([], [], {"num_heads": 16}),
        ([7], [57], {"num_heads": 16, "kv_granularity": 1}),
        ([8], [57], {"num_heads": 16, "kv_granularity": 1}),
    ],
)
def test_chosen_cases(q_lens, kv_lens, options):
    _check_equal(q_lens, kv_lens, profile=DeviceProfile("gfx942", 3), room=1, **options)


@needs_triton
def test_more_requests_than_one_block():
    """Searches and prefix sums go on in the next block of 128 requests."""
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    kv_lens = torch.randint(0, 60, (300,), generator=generator).tolist()
    kv_lens[:150] = [0] * 150
    scratch = torch.empty(scratch_size(300, 5), dtype=torch.int64, device=DEVICE)
    profile = DeviceProfile("gfx942", 5)
    _check_equal([1] * 300, kv_lens, num_heads=16, profile=profile, scratch=scratch)


@pytest.mark.gpu
def test_replans_inside_a_captured_graph():
    profile = DeviceProfile("sm90", 132)
    options = {"num_heads": 16, "max_seqlen_qo": 2, "profile": profile}
    static = [t.to(DEVICE) for t in _inputs([1] * 64, [100] * 64, 1)]
    buffers = _poisoned(decode_sizes(64, 2, 16, profile=profile))
    plan_v1_2_device(buffers, *static, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_v1_2_device(buffers, *static, **options)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q_lens = torch.randint(0, 3, (64,), generator=generator).tolist()
        kv_lens = torch.randint(0, 20000, (64,), generator=generator).tolist()
        tensors = _inputs(q_lens, kv_lens, 1)
        for held, new in zip(static, tensors, strict=True):
            held.copy_(new)
        graph.replay()
        expected = _poisoned(decode_sizes(64, 2, 16, profile=profile))
        plan_v1_2(*tensors, **options).copy_into(expected)
        for field in fields(WorkList):
            assert torch.equal(getattr(buffers, field.name), getattr(expected, field.name))


def _good():
    sizes = decode_sizes(2, 1, 16, profile=CU4)
    return {
        "buffers": WorkList.empty(sizes),
        "qo_indptr": _indptr([1, 1]),
        "kv_indptr": _indptr([3, 4]),
        "kv_last_page_len": torch.ones(2, dtype=torch.int32),
        "num_heads": 16,
        "max_seqlen_qo": 1,
        "profile": CU4,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seqlen_qo": 2, "topk": 4}, r"work_info must be at least \(7, 8\)"),
        ({"kv_indptr": torch.tensor([0, 3, 7])}, "kv_indptr must be a contiguous 1-D int32"),
        (
            {"kv_indptr": torch.empty(3, dtype=torch.int32, device="meta")},
            "must be on cpu like the buffers, got one on meta",
        ),
        ({"page_size": 0}, "page_size must be >= 1, got 0"),
        ({"scratch": torch.empty(3, dtype=torch.int64)}, r"scratch must be \[25\] int64 or longer"),
        ({"scratch": torch.empty(99)}, r"scratch must be .* got \(99,\) torch.float32"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(LayoutError, match=f"plan_v1_2_device: .*{message}"):
        plan_v1_2_device(**{**_good(), **change})


def test_unknown_query_length():
    with pytest.raises(LayoutError, match="max_seqlen_qo must be >= 1, got -1"):
        plan_v1_2_device(**{**_good(), "max_seqlen_qo": -1})


def test_one_kv_head():
    with pytest.raises(UnsupportedProblemError, match="num_heads_k must be 1, got 2"):
        plan_v1_2_device(**_good(), num_heads_k=2)


def test_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="triton must be installed"):
        plan_v1_2_device(**_good())


def test_wrong_code_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.8.1")
    with pytest.raises(BackendUnavailableError, match=r"triton must be 3\.9 or later on AMD GPUs"):
        device._refuse_miscompiled(torch.device("cuda"))
    device._refuse_miscompiled(torch.device("cpu"))
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    device._refuse_miscompiled(torch.device("cuda"))
