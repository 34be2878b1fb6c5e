"""Carrying a schedule to the next step: hand-made cases, and growth over many random steps."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.metadata import DeviceProfile, WorkList, decode_sizes, decode_update, plan_v1_2

CU4 = DeviceProfile("gfx942", 4)


def _indptr(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _plan(q_len, kv_lens, num_heads=16, profile=CU4, **options):
    """A schedule in buffers with room to spare, as graph users hold it."""
    batch_size = len(kv_lens)
    work = plan_v1_2(
        _indptr([q_len] * batch_size),
        _indptr(kv_lens),
        torch.ones(batch_size, dtype=torch.int32),
        num_heads=num_heads,
        profile=profile,
        max_seqlen_qo=q_len,
        **options,
    )
    sizes = decode_sizes(batch_size, q_len, num_heads, profile=profile)
    buffers = WorkList.empty(sizes)
    work.copy_into(buffers)
    return work, buffers


def _live(buffers, work):
    """The used part of ``buffers``."""
    return WorkList(
        buffers.work_indptr,
        buffers.work_info[: work.num_works],
        buffers.reduce_indptr[: work.reduce_indptr.numel()],
        buffers.reduce_final_map[: work.reduce_final_map.shape[0]],
        buffers.reduce_partial_map[: work.reduce_partial_map.numel()],
    )


def test_one_more_token():
    work, buffers = _plan(1, [40, 300, 130])
    decode_update(buffers, _indptr([41, 301, 131]), num_heads=16, profile=CU4)
    assert buffers.work_info[:4, :7].tolist() == [
        [0, -1, 0, 1, 0, 41, 0],
        [1, 0, 1, 2, 41, 57, 285],
        [1, 1, 1, 2, 57, 342, 0],
        [2, -1, 2, 3, 342, 473, 0],
    ]
    assert buffers.work_info[4:].eq(0).all()
    assert buffers.reduce_final_map.tolist() == [[0, 0], [1, 2], [0, 0]]
    assert buffers.reduce_partial_map.tolist() == [0, 1, 0, 0, 0, 0]
    for name in ("work_indptr", "reduce_indptr"):
        live = getattr(work, name)
        assert torch.equal(getattr(buffers, name)[: live.numel()], live)


def test_after_a_verify_step_rows_shrink_to_one():
    """Four query rows become one; two of three drafts were rejected in the second request."""
    work, buffers = _plan(4, [30, 600])
    assert work.reduce_partial_map.tolist() == [0, 4, 8]
    rejected = torch.tensor([0, 2], dtype=torch.int32)
    decode_update(
        buffers, _indptr([31, 599]), num_heads=16, profile=CU4, max_seqlen_qo=4,
        num_reject_tokens=rejected,
    )  # fmt: skip
    live = _live(buffers, work)
    live.validate()
    assert live.work_info[:, :7].tolist() == [
        [0, -1, 0, 1, 0, 31, 0],
        [1, 0, 1, 2, 31, 31 + 288, 599 - 288],
        [1, 1, 1, 2, 31 + 288, 31 + 576, 599 - 576],
        [1, 2, 1, 2, 31 + 576, 630, 0],
    ]
    assert live.reduce_partial_map.tolist() == [0, 1, 2]
    assert live.reduce_final_map.tolist() == [[0, 0], [1, 2]]


def test_folded_heads():
    work, buffers = _plan(1, [100, 37], num_heads=48)
    decode_update(buffers, _indptr([101, 38]), num_heads=48, profile=CU4)
    live = _live(buffers, work)
    live.validate()
    assert live.work_info[:, 2].tolist() == list(range(6))
    assert live.work_info[:, 4:7].tolist() == [[0, 101, 0]] * 3 + [[101, 139, 0]] * 3


def test_pieces_past_a_shorter_end_become_empty_and_grow_back():
    work, buffers = _plan(1, [1024])
    cuts = work.work_info[:, 5].tolist()[:-1]
    for new_len, reject in ((100, 925), (0, 101), (700, -699)):
        decode_update(
            buffers, _indptr([new_len]), num_heads=16, profile=CU4,
            num_reject_tokens=torch.tensor([reject], dtype=torch.int32),
        )  # fmt: skip
        live = _live(buffers, work)
        live.validate()
        ends = live.work_info[:, 5].tolist()
        assert live.work_info[0, 4] == 0
        assert live.work_info[1:, 4].tolist() == ends[:-1]
        assert ends[-1] == new_len
        assert live.work_info[:, 6].tolist() == [new_len - end for end in ends]
        if new_len == 100:
            assert ends[:-1] == [min(cut, 100) for cut in cuts]


@settings(deadline=None, max_examples=30)
@given(
    kv_lens=st.lists(st.integers(4, 700), min_size=1, max_size=5),
    q_len=st.integers(1, 4),
    num_cu=st.integers(1, 9),
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    num_heads=st.sampled_from([16, 32]),
)
def test_every_step_covers_every_request(kv_lens, q_len, num_cu, steps, num_heads):
    profile = DeviceProfile("gfx942", num_cu)
    work, buffers = _plan(q_len, kv_lens, num_heads, profile)
    for step in steps:
        rejected = [(step + b) % q_len for b in range(len(kv_lens))]
        kv_lens = [max(0, n + 1 - r) for n, r in zip(kv_lens, rejected, strict=True)]
        decode_update(
            buffers, _indptr(kv_lens), num_heads=num_heads, profile=profile, max_seqlen_qo=q_len,
            num_reject_tokens=torch.tensor(rejected, dtype=torch.int32),
        )  # fmt: skip
        live = _live(buffers, work)
        live.validate()
        start = [0, *itertools.accumulate(kv_lens)]
        ranges = {}
        for group, _, begin, end, kv_begin, kv_end, offset, _ in live.work_info.tolist():
            b = group // (num_heads // 16)
            assert (begin, end) == (group, group + 1)
            assert offset == start[b + 1] - kv_end
            ranges.setdefault(group, []).append((kv_begin, kv_end))
        assert sorted(ranges) == list(range(len(kv_lens) * num_heads // 16))
        for group, pieces in ranges.items():
            b = group // (num_heads // 16)
            assert pieces[0][0] == start[b]
            assert pieces[-1][1] == start[b + 1]
            assert all(x[1] == y[0] for x, y in itertools.pairwise(pieces))


@pytest.mark.gpu
def test_updates_inside_a_captured_graph():
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    kv_lens = torch.randint(1, 9000, (64,), generator=generator).tolist()
    profile = DeviceProfile("sm90", 132)
    _, host = _plan(1, kv_lens, profile=profile)
    device = WorkList(**{f.name: getattr(host, f.name).cuda() for f in fields(host)})
    kv_indptr = _indptr(kv_lens).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_update(device, kv_indptr, num_heads=16, profile=profile)
    for _ in range(3):
        kv_lens = [n + 1 for n in kv_lens]
        kv_indptr.copy_(_indptr(kv_lens))
        graph.replay()
        decode_update(host, _indptr(kv_lens), num_heads=16, profile=profile)
        for field in fields(host):
            assert torch.equal(getattr(device, field.name).cpu(), getattr(host, field.name))


def test_nothing_to_update():
    empty, _ = _plan(1, [])
    decode_update(empty, _indptr([]), num_heads=16, profile=CU4)
    assert empty.num_works == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_indptr": torch.tensor([0, 9])}, "kv_indptr must be 1-D int32 on cpu"),
        (
            {"kv_indptr": torch.empty(2, dtype=torch.int32, device="meta")},
            "kv_indptr must be 1-D int32 on cpu .* on meta",
        ),
        (
            {"num_reject_tokens": torch.zeros(3, dtype=torch.int32)},
            r"num_reject_tokens must be \[batch_size\]=\(1,\), got \(3,\)",
        ),
        ({"num_reject_tokens": torch.zeros(1)}, "num_reject_tokens must be 1-D int32"),
    ],
)
def test_bad_input(change, message):
    work, _ = _plan(1, [8])
    good = {"kv_indptr": _indptr([9]), "num_heads": 16, "profile": CU4}
    with pytest.raises(LayoutError, match=f"decode_update: {message}"):
        decode_update(work, **{**good, **change})
