"""aiter's metadata functions: signatures, buffer sizes and the worked schedules, in the buffers."""

from __future__ import annotations

import contextvars
import inspect
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import LayoutError
from mla_core.batch import indptr_of
from mla_core.dropin import aiter
from mla_core.dropin.aiter import metadata
from mla_core.metadata import DeviceProfile, plan_v1_0, plan_v1_1
from mla_core.testing import interpreter
from mla_core.testing.assertions import assert_close

REQUIRED = inspect.Parameter.empty
GFX942 = DeviceProfile("gfx942", 4)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fnuz
OUTPUTS = (
    "work_metadata_ptrs",
    "work_info_set",
    "work_indptr",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)

needs_interpreter = pytest.mark.skipif(
    not interpreter.is_enabled(), reason="kernels take CPU tensors in Triton's interpreter only"
)


def parameters_of(function) -> list[tuple[str, object]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def required(*names: str) -> list[tuple[str, object]]:
    return [(name, REQUIRED) for name in names]


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_signatures():
    assert parameters_of(aiter.get_mla_metadata_info_v1) == [
        *required("batch_size", "max_seqlen_qo", "num_head_qo", "q_dtype", "kv_dtype", "is_sparse"),
        ("fast_mode", True),
        ("num_kv_splits", 32),
        ("intra_batch_mode", False),
        ("max_split_per_batch", -1),
    ]
    inputs = required(
        "seqlens_qo_indptr",
        "seqlens_kv_indptr",
        "kv_last_page_lens",
        "num_heads_per_head_k",
        "num_heads_k",
        "is_causal",
        *OUTPUTS,
    )
    assert parameters_of(aiter.get_mla_metadata_v1) == [
        *inputs,
        ("page_size", 1),
        ("kv_granularity", 16),
        ("max_seqlen_qo", -1),
        ("uni_seqlen_qo", -1),
        ("fast_mode", True),
        ("topk", -1),
        ("max_split_per_batch", -1),
        ("intra_batch_mode", False),
        ("is_cp_round_robin", False),
        ("mla_version", 0),
        ("dtype_q_nope", None),
        ("dtype_q_rope", None),
        ("dtype_kv_nope", None),
        ("dtype_kv_rope", None),
        ("dtype_q", None),
        ("dtype_kv", None),
    ]
    assert parameters_of(aiter.decode_update_mla_metadata_v1) == [
        *inputs,
        ("page_size", 1),
        ("kv_granularity", 16),
        ("max_seqlen_qo", 1),
        ("dtype_q", BF16),
        ("dtype_kv", BF16),
        ("num_reject_tokens", None),
    ]
    assert parameters_of(aiter.get_ps_metadata_info_v1) == [
        *required("batch_size", "num_head_k", "max_qlen"),
        ("qlen_granularity", 256),
    ]
    assert parameters_of(aiter.get_ps_metadata_v1) == [
        *required(
            "seqlens_qo_indptr",
            "pages_kv_indptr",
            "context_lens",
            "gqa_ratio",
            "num_heads_k",
            "work_metadata_ptrs",
            "work_indptr",
            "work_info",
            "reduce_indptr",
            "reduce_final_map",
            "reduce_partial_map",
        ),
        ("qhead_granularity", 1),
        ("qlen_granularity", 256),
        ("kvlen_granularity", 16),
        ("block_size", 16),
        ("is_causal", True),
    ]


def test_info_of_a_dense_step():
    # 304 compute units, 8 requests of one token, 16 heads: one tile for each request.
    with aiter.planning_for(DeviceProfile("gfx942", 304)):
        info = aiter.get_mla_metadata_info_v1(8, 1, 16, BF16, BF16, False)
    assert info == (
        (2, torch.uint64),
        (305, torch.int32),
        ((8 + 304 - 1, 8), torch.int32),
        (9, torch.int32),
        ((8, 2), torch.int32),
        (8 + 304 - 1, torch.int32),
    )


def test_info_honours_every_argument():
    def sizes(*arguments, **keywords):
        with aiter.planning_for(DeviceProfile("gfx942", 4)):
            info = aiter.get_mla_metadata_info_v1(*arguments, **keywords)
        return [shape[0] if isinstance(shape, tuple) else shape for shape, _ in info]

    # 5 requests of 2 tokens, 48 heads: six tiles each of 16 packed rows.
    assert sizes(5, 2, 48, BF16, BF16, False) == [2, 5, 8 * 6, 31, 30, 6 * 6]
    # Sparse: 10 single tokens, three tiles each.
    assert sizes(5, 2, 48, BF16, BF16, True) == [2, 5, 13 * 3, 31, 30, 6 * 3]
    assert sizes(5, 2, 128, FP8, FP8, False) == [2, 5, 8 * 2, 11, 10, 6 * 2]
    assert sizes(5, 2, 16, BF16, BF16, False, fast_mode=False) == [2, 5, 20, 6, 5, 20]
    assert sizes(
        5, 2, 16, BF16, BF16, False, fast_mode=False, num_kv_splits=7, intra_batch_mode=True
    ) == [2, 5, 35, 6, 5, 35]
    assert sizes(5, 2, 16, BF16, BF16, False, max_split_per_batch=3)[-1] == 5 + 4


def decode_buffers(*info_arguments, **info_keywords) -> dict[str, torch.Tensor]:
    """Allocate poisoned buffers of the sizes asked for, by the names of the metadata call."""
    pointers, indptr, info, *reduce = aiter.get_mla_metadata_info_v1(
        *info_arguments, **info_keywords
    )
    names = ("work_metadata_ptrs", "work_indptr", "work_info_set", *OUTPUTS[3:])
    return {
        name: torch.full(shape if isinstance(shape, tuple) else (shape,), 77, dtype=dtype)
        for name, (shape, dtype) in zip(names, (pointers, indptr, info, *reduce), strict=True)
    }


def plan(qo_indptr, kv_indptr, last, heads, buffers, is_causal=True, **keywords):
    """Call with every buffer in its place: work_info_set goes before work_indptr."""
    result = aiter.get_mla_metadata_v1(
        qo_indptr, kv_indptr, last, heads, 1, is_causal, *(buffers[name] for name in OUTPUTS),
        **keywords,
    )  # fmt: skip
    assert result is None
    return buffers


def works(buffers) -> list[tuple[int, ...]]:
    """Return (batch, partial, qo_start, qo_end, kv_start, kv_end, kv_offset) of each work."""
    used = int(buffers["work_indptr"][-1])
    info = buffers["work_info_set"]
    assert not info[used:].any()
    assert not info[:, 7].any()
    return [tuple(row[:7]) for row in info[:used].tolist()]


@pytest.fixture(autouse=True)
def _on_a_small_gfx942():
    with aiter.planning_for(GFX942):
        yield


@needs_interpreter
@pytest.mark.parametrize("where", ["host", "device"])
def test_example_ragged_decode(where, monkeypatch):
    monkeypatch.setattr(metadata, "_plans_on_device", lambda index: where == "device")
    buffers = decode_buffers(3, 1, 16, BF16, BF16, False)
    plan(i32(0, 1, 2, 3), i32(0, 40, 340, 470), i32(1, 1, 1), 16, buffers, max_seqlen_qo=1)
    assert works(buffers) == [
        (0, -1, 0, 1, 0, 40, 0),
        (1, 0, 1, 2, 40, 56, 284),
        (1, 1, 1, 2, 56, 340, 0),
        (2, -1, 2, 3, 340, 470, 0),
    ]
    assert buffers["work_indptr"].tolist() == [0, 2, 3, 4, 4]
    assert buffers["reduce_indptr"].tolist() == [0, 0, 2, 2]
    assert buffers["reduce_final_map"].tolist() == [[0, 0], [1, 2], [0, 0]]
    assert buffers["reduce_partial_map"][:2].tolist() == [0, 1]
    assert not buffers["reduce_partial_map"][2:].any()
    assert buffers["work_metadata_ptrs"].tolist() == [
        buffers["work_indptr"].data_ptr(),
        buffers["work_info_set"].data_ptr(),
    ]


@pytest.mark.parametrize(
    "dtypes",
    [
        {"dtype_q_nope": FP8, "dtype_kv_nope": FP8},
        {"dtype_q": FP8, "dtype_kv": torch.float8_e4m3fn},
        # The specific names win over the older ones.
        {"dtype_q_nope": FP8, "dtype_kv_nope": FP8, "dtype_q": BF16, "dtype_kv": BF16},
    ],
)
def test_example_one_tile_per_token(dtypes):
    buffers = decode_buffers(2, 2, 128, FP8, FP8, False)
    plan(
        i32(0, 2, 4), i32(0, 100, 137), i32(1, 1), 128, buffers, max_seqlen_qo=2, uni_seqlen_qo=2,
        **dtypes,
    )  # fmt: skip
    assert works(buffers) == [
        (0, -1, 0, 1, 0, 99, 1),
        (0, -1, 1, 2, 0, 100, 0),
        (1, -1, 2, 3, 100, 136, 1),
        (1, 0, 3, 4, 100, 132, 5),
        (1, 1, 3, 4, 132, 137, 0),
    ]
    assert buffers["work_indptr"].tolist() == [0, 1, 2, 4, 5]
    assert buffers["reduce_indptr"].tolist() == [0, 0, 0, 0, 2]
    assert buffers["reduce_partial_map"][:2].tolist() == [0, 1]


@pytest.mark.parametrize("changes", [{"is_causal": False}, {"is_cp_round_robin": True}])
def test_no_trimming_without_a_local_causal_order(changes):
    buffers = decode_buffers(2, 2, 128, FP8, FP8, False)
    plan(
        i32(0, 2, 4), i32(0, 100, 137), i32(1, 1), 128, buffers, max_seqlen_qo=2, uni_seqlen_qo=2,
        dtype_q=FP8, dtype_kv=FP8, **changes,
    )  # fmt: skip
    ends = {row[2]: row[5] for row in works(buffers) if row[6] == 0}
    assert ends == {0: 100, 1: 100, 2: 137, 3: 137}


def test_example_folded_heads():
    buffers = decode_buffers(2, 1, 48, BF16, BF16, False)
    plan(i32(0, 1, 2), i32(0, 100, 137), i32(1, 1), 48, buffers, max_seqlen_qo=1, uni_seqlen_qo=1)
    rows = works(buffers)
    assert [row[:4] for row in rows] == [(b, -1, b, b + 1) for b in range(6)]
    assert [row[4:6] for row in rows] == [(0, 100)] * 3 + [(100, 137)] * 3
    assert buffers["work_indptr"].tolist() == [0, 2, 4, 6, 6]


def test_example_pages_of_64():
    buffers = decode_buffers(2, 1, 16, BF16, BF16, False)
    plan(
        i32(0, 1, 2), i32(0, 100, 137), i32(5, 64), 16, buffers, page_size=64, kv_granularity=64,
        max_seqlen_qo=1,
    )  # fmt: skip
    assert works(buffers) == [(0, -1, 0, 1, 0, 100, 0), (1, -1, 1, 2, 100, 137, 0)]


@needs_interpreter
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_host_and_device_fill_the_same_bytes(data):
    lens = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    page_size = data.draw(st.sampled_from([1, 4]))
    q_len = data.draw(st.integers(1, 2))
    heads = data.draw(st.sampled_from([16, 48]))
    pages = -(-torch.tensor(lens) // page_size)
    last = (torch.tensor(lens) - (pages - 1).clamp(min=0) * page_size).to(torch.int32)
    batch = (torch.arange(len(lens) + 1, dtype=torch.int32) * q_len, indptr_of(pages), last, heads)
    options = {
        "is_causal": data.draw(st.booleans()),
        "page_size": page_size,
        "max_seqlen_qo": q_len,
        "uni_seqlen_qo": data.draw(st.sampled_from([-1, q_len])),
        "max_split_per_batch": data.draw(st.sampled_from([-1, 2])),
        "is_cp_round_robin": data.draw(st.booleans()),
    }
    filled = []
    for on_device in (False, True):
        buffers = decode_buffers(len(lens), q_len, heads, BF16, BF16, False)
        with mock.patch.object(metadata, "_plans_on_device", return_value=on_device):
            plan(*batch, buffers, **options)
        filled.append(buffers)
    for name in OUTPUTS[1:]:
        assert torch.equal(filled[0][name], filled[1][name]), name


def run_work(buffers, q, rows, batch_of, qo_indptr, sm_scale):
    """Do what a persistent kernel does with a work list: out, lse and the partials."""
    total_q, heads, _ = q.shape
    num_partials = buffers["reduce_partial_map"].numel() * 2
    out, lse = torch.full((total_q, heads, 64), torch.nan), torch.full((total_q, heads), torch.nan)
    partial_out = torch.full((num_partials, 1, heads, 64), torch.nan)
    partial_lse = torch.full((num_partials, 1, heads, 1), torch.nan)
    for batch, partial, begin, end, kv_start, kv_end, kv_offset in works(buffers):
        for row in range(begin, end):
            assert batch_of[row] == batch
            behind = int(qo_indptr[batch + 1]) - 1 - row
            visible = rows[kv_start : max(kv_start, kv_end - max(0, behind - kv_offset))]
            scores = sm_scale * q[row] @ visible.T
            row_lse = scores.logsumexp(1)
            weights = torch.exp(scores - row_lse.masked_fill(row_lse == -torch.inf, 0)[:, None])
            row_out = weights @ visible[:, :64]
            if partial < 0:
                out[row], lse[row] = row_out, row_lse
            else:
                partial_out[partial + row - begin, 0] = row_out
                partial_lse[partial + row - begin, 0, :, 0] = row_lse
    return out, lse, partial_out, partial_lse


# Longest request first never cuts with 128 heads: merging costs more than it gains.
@pytest.mark.parametrize(("heads", "fast_mode"), [(16, True), (128, True), (16, False)])
def test_a_work_list_and_the_reduce_give_what_decode_gives(heads, fast_mode, rng):
    q_len = 2
    # One long request for four workgroups: it must be cut.
    lens = torch.randint(2000, 3000, (4,), generator=rng)
    lens[1:] = torch.tensor([0, 1, 40])
    qo_indptr = torch.arange(5, dtype=torch.int32) * q_len
    kv_indptr, last = indptr_of(lens), torch.ones(4, dtype=torch.int32)
    q = torch.randn(8, heads, 96, generator=rng)
    kv_buffer = torch.randn(int(kv_indptr[-1]), 1, 1, 96, generator=rng)
    kv_indices = torch.arange(len(kv_buffer), dtype=torch.int32)
    dtype = BF16 if heads == 16 else FP8
    buffers = decode_buffers(4, q_len, heads, dtype, dtype, False, fast_mode=fast_mode)
    plan(
        qo_indptr, kv_indptr, last, heads, buffers, max_seqlen_qo=q_len, uni_seqlen_qo=q_len,
        fast_mode=fast_mode, dtype_q=dtype, dtype_kv=dtype,
    )  # fmt: skip
    assert buffers["reduce_indptr"][-1] > 0
    out, lse, partial_out, partial_lse = run_work(
        buffers, q, kv_buffer.flatten(1), torch.arange(8) // q_len, qo_indptr, 0.1
    )
    aiter.mla_reduce_v1(
        partial_out,
        partial_lse,
        buffers["reduce_indptr"],
        buffers["reduce_final_map"],
        buffers["reduce_partial_map"],
        q_len,
        0,
        out,
        lse,
    )
    o = torch.full((8, heads, 64), torch.nan)
    _, final_lse = aiter.mla_decode_fwd(
        q,
        kv_buffer,
        o,
        qo_indptr,
        kv_indptr,
        kv_indices,
        last,
        q_len,
        sm_scale=0.1,
        return_lse=True,
        **{"work_meta_data" if name == OUTPUTS[0] else name: buffers[name] for name in OUTPUTS},
    )
    assert_close(out, o, what="out")
    assert_close(lse, final_lse, what="lse")


@pytest.mark.gpu
def test_planning_can_be_captured_and_replayed():
    with aiter.planning_for(DeviceProfile("gfx942", 132)):
        on_host = decode_buffers(3, 1, 16, BF16, BF16, False)
        buffers = {name: tensor.cuda() for name, tensor in on_host.items()}
        qo_indptr, last = i32(0, 1, 2, 3), i32(1, 1, 1)
        kv_indptr = i32(0, 40, 340, 470).cuda()
        batch = (qo_indptr.cuda(), kv_indptr, last.cuda(), 16, buffers)
        plan(*batch, max_seqlen_qo=1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan(*batch, max_seqlen_qo=1)
        changed = i32(0, 4000, 4001, 9000)
        kv_indptr.copy_(changed)
        graph.replay()
        plan(qo_indptr, changed, last, 16, on_host, max_seqlen_qo=1)
    for name in OUTPUTS[1:]:
        assert torch.equal(buffers[name].cpu(), on_host[name]), name
    assert buffers["work_metadata_ptrs"].tolist()[0] == buffers["work_indptr"].data_ptr()


# The second is the recipe of aiter's sparse test: it speaks of one query token per list.
@pytest.mark.parametrize(
    "lengths", [{"uni_seqlen_qo": 2}, {"max_seqlen_qo": 1, "uni_seqlen_qo": 1}]
)
def test_sparse_schedules_one_index_row_for_each_token(lengths):
    buffers = decode_buffers(2, 2, 16, BF16, BF16, True)
    plan(i32(0, 2, 4), i32(0, 100, 107), i32(1, 1), 16, buffers, topk=32, **lengths)
    ranges = {}
    for row in works(buffers):
        ranges.setdefault(row[2], []).append(row[4:6])
    covered = {token: (min(r)[0], max(r)[1]) for token, r in ranges.items()}
    assert covered == {0: (0, 32), 1: (32, 64), 2: (64, 71), 3: (96, 103)}


@pytest.mark.parametrize(
    ("mode", "planner"),
    [({"intra_batch_mode": True}, plan_v1_0), ({}, plan_v1_1)],
)
def test_other_modes_choose_their_planner(mode, planner):
    indices = (i32(0, 1, 2, 3), i32(0, 4000, 4000, 4130), i32(1, 0, 1))
    buffers = decode_buffers(3, 1, 16, BF16, BF16, False, fast_mode=False, num_kv_splits=5, **mode)
    plan(*indices, 16, buffers, fast_mode=False, max_seqlen_qo=1, **mode)
    limit = {"num_kv_splits": 5} if mode else {}
    expected = planner(*indices, num_heads=16, profile=GFX942, max_seqlen_qo=1, **limit)
    assert expected.num_works > 3
    assert works(buffers) == [tuple(row[:7]) for row in expected.work_info.tolist()]
    used = expected.work_indptr.numel()
    assert buffers["work_indptr"][:used].tolist() == expected.work_indptr.tolist()


def test_max_split_per_batch_bounds_the_pieces():
    buffers = decode_buffers(1, 1, 16, BF16, BF16, False)
    batch = (i32(0, 1), i32(0, 4000), i32(1), 16)
    assert len(works(plan(*batch, buffers, max_seqlen_qo=1))) == 4
    assert len(works(plan(*batch, buffers, max_seqlen_qo=1, max_split_per_batch=2))) == 2


def test_update_equals_a_new_plan_where_nothing_is_cut():
    buffers = decode_buffers(2, 1, 16, BF16, BF16, False)
    plan(i32(0, 1, 2), i32(0, 40, 60), i32(1, 1), 16, buffers, max_seqlen_qo=1)
    before = works(buffers)
    assert [row[1] for row in before] == [-1, -1]
    grown = indptr_of(i32(41, 21))
    buffers["work_metadata_ptrs"].fill_(0)
    aiter.decode_update_mla_metadata_v1(
        i32(0, 1, 2), grown, i32(1, 1), 16, 1, True, *(buffers[name] for name in OUTPUTS)
    )
    assert works(buffers) == [(0, -1, 0, 1, 0, 41, 0), (1, -1, 1, 2, 41, 62, 0)]
    assert buffers["work_metadata_ptrs"][1] == buffers["work_info_set"].data_ptr()


def test_update_moves_cut_requests_and_rejected_tokens():
    buffers = decode_buffers(3, 1, 16, BF16, BF16, False)
    plan(i32(0, 1, 2, 3), i32(0, 40, 340, 470), i32(1, 1, 1), 16, buffers, max_seqlen_qo=1)
    # One token more, none, and two fewer.
    lens = i32(41, 300, 128)
    aiter.decode_update_mla_metadata_v1(
        i32(0, 1, 2, 3), indptr_of(lens), i32(1, 1, 1), 16, 1, True,
        *(buffers[name] for name in OUTPUTS), num_reject_tokens=i32(0, 1, 3),
    )  # fmt: skip
    assert works(buffers) == [
        (0, -1, 0, 1, 0, 41, 0),
        (1, 0, 1, 2, 41, 57, 284),
        (1, 1, 1, 2, 57, 341, 0),
        (2, -1, 2, 3, 341, 469, 0),
    ]


PS_NAMES = (
    "work_metadata_ptrs",
    "work_indptr",
    "work_info",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)


def prefill_buffers(*arguments, **keywords) -> dict[str, torch.Tensor]:
    info = aiter.get_ps_metadata_info_v1(*arguments, **keywords)
    return {
        name: torch.full(shape if isinstance(shape, tuple) else (shape,), 77, dtype=dtype)
        for name, (shape, dtype) in zip(PS_NAMES, info, strict=True)
    }


def test_prefill_info():
    # gcd(6, 4) = 2 clusters of 2 workgroups; 3 tiles of each of 5 requests.
    assert aiter.get_ps_metadata_info_v1(5, 6, 600) == (
        (2, torch.uint64),
        (5, torch.int32),
        (((5 + 1) * 3 * 6, 8), torch.int32),
        (16, torch.int32),
        ((15, 2), torch.int32),
        (2 * 3, torch.int32),
    )
    assert aiter.get_ps_metadata_info_v1(5, 6, 600, 128)[3] == (26, torch.int32)


def test_example_prefill():
    buffers = prefill_buffers(1, 1, 600)
    result = aiter.get_ps_metadata_v1(
        i32(0, 600), i32(0, 600), i32(600), 1, 1, *buffers.values(), 1, 256, 128, 1, True
    )
    assert result is None
    rows = buffers["work_info"][:6].tolist()
    assert [tuple(row[1:7]) for row in rows] == [
        (-1, 0, 256, 0, 256, 0),
        (0, 512, 600, 0, 128, 472),
        (256, 512, 600, 128, 512, 88),
        (512, 512, 600, 512, 600, 0),
        (768, 256, 512, 0, 256, 344),
        (1024, 256, 512, 256, 512, 0),
    ]
    assert buffers["work_indptr"].tolist() == [0, 2, 3, 5, 6]
    assert buffers["reduce_final_map"][:2].tolist() == [[256, 512], [512, 600]]
    assert buffers["reduce_indptr"].tolist() == [0, 2, 5, 5]
    assert buffers["reduce_partial_map"][:5].tolist() == [768, 1024, 0, 256, 512]
    # The planner leaves the addresses to its caller.
    assert buffers["work_metadata_ptrs"].tolist() == [77, 77]


def test_prefill_honours_causality_and_block_size():
    buffers = prefill_buffers(1, 1, 256)
    aiter.get_ps_metadata_v1(
        i32(0, 256), i32(0, 8), i32(512), 1, 1, *buffers.values(), kvlen_granularity=128,
        block_size=64, is_causal=False,
    )  # fmt: skip
    rows = buffers["work_info"][: int(buffers["work_indptr"][-1])]
    assert rows[:, 4].tolist() == [0, 2, 4, 6]
    assert rows[:, 5].tolist() == [2, 4, 6, 8]


def test_default_profile_is_the_current_device():
    with aiter.planning_for(GFX942):
        assert aiter.get_mla_metadata_info_v1(1, 1, 16, BF16, BF16, False)[1][0] == 5
    num_workgroups = torch.get_num_threads()
    if torch.cuda.is_available():
        num_workgroups = torch.cuda.get_device_properties(0).multi_processor_count
    # A fresh context has left every `planning_for` block.
    arguments = (1, 1, 16, BF16, BF16, False)
    info = contextvars.Context().run(aiter.get_mla_metadata_info_v1, *arguments)
    assert info[1][0] == num_workgroups + 1


def plan_badly(**changes):
    buffers = decode_buffers(2, 1, 16, BF16, BF16, False)
    arguments = {
        "seqlens_qo_indptr": i32(0, 1, 2),
        "seqlens_kv_indptr": i32(0, 40, 100),
        "kv_last_page_lens": i32(1, 1),
        "num_heads_per_head_k": 16,
        "num_heads_k": 1,
        "is_causal": True,
        **buffers,
        "max_seqlen_qo": 1,
    }
    aiter.get_mla_metadata_v1(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_k": 2}, "num_heads_k must be 1, got 2"),
        ({"mla_version": 2}, "mla_version must be 0 or 1, got 2"),
        ({"topk": 64, "fast_mode": False}, "topk must be negative without fast_mode, got 64"),
        ({"page_size": 0}, "page_size must be >= 1, got 0"),
        ({"seqlens_kv_indptr": i32(5, 40, 100)}, "kv_indptr must"),
        ({"work_metadata_ptrs": torch.zeros(2, dtype=torch.int64)}, "work_metadata_ptrs must be"),
        ({"work_info_set": torch.zeros(1, 8, dtype=torch.int32)}, "work_info must be at least"),
        ({"work_indptr": torch.zeros(5, dtype=torch.int64)}, "work_indptr must be contiguous"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(LayoutError, match=message):
        plan_badly(**changes)


@pytest.mark.parametrize("mla_version", [0, 1])
def test_both_versions_are_planned(mla_version):
    plan_badly(mla_version=mla_version)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 16}, "page_size must be 1, got 16"),
        ({"num_heads_k": 2}, "num_heads_k must be 1, got 2"),
        ({"kv_granularity": 8}, "kv_granularity must be >= 16, got 8"),
        ({"seqlens_qo_indptr": i32(0, 1)}, r"seqlens_qo_indptr must be \[B \+ 1\]"),
        ({"num_reject_tokens": i32(1)}, "num_reject_tokens must be"),
    ],
)
def test_bad_updates(changes, message):
    buffers = decode_buffers(2, 1, 16, BF16, BF16, False)
    plan(i32(0, 1, 2), i32(0, 40, 60), i32(1, 1), 16, buffers, max_seqlen_qo=1)
    arguments = {
        "seqlens_qo_indptr": i32(0, 1, 2),
        "seqlens_kv_indptr": i32(0, 41, 62),
        "kv_last_page_lens": i32(1, 1),
        "num_heads_per_head_k": 16,
        "num_heads_k": 1,
        "is_causal": True,
        **buffers,
    }
    with pytest.raises(LayoutError, match=message):
        aiter.decode_update_mla_metadata_v1(**arguments | changes)


def test_bad_prefill():
    buffers = prefill_buffers(1, 1, 600)
    with pytest.raises(LayoutError, match="granularity must be a power of two, got 100"):
        aiter.get_ps_metadata_v1(
            i32(0, 600), i32(0, 600), i32(600), 1, 1, *buffers.values(), kvlen_granularity=100,
            block_size=64,
        )  # fmt: skip
