"""Work lists: copying into graph buffers, and what `validate` refuses."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from mla_core.errors import LayoutError
from mla_core.metadata import DeviceProfile, WorkList, WorkListSizes, decode_sizes, plan_v1_2
from mla_core.metadata import worklist as columns
from mla_core.metadata.worklist import check_follows


def _i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def work():
    """Three requests on four units; the middle one is cut in two."""
    indptr = _i32(0, 1, 2, 3)
    profile = DeviceProfile("gfx942", 4)
    return plan_v1_2(indptr, _i32(0, 40, 340, 470), _i32(1, 1, 1), num_heads=16, profile=profile)


def test_counts(work):
    assert (work.num_works, work.num_partial_rows) == (4, 2)
    no_cut = plan_v1_2(
        _i32(0, 1), _i32(0, 1), _i32(1), num_heads=16, profile=DeviceProfile("gfx942", 4)
    )
    assert no_cut.num_partial_rows == 0


def test_copy_into_defines_every_entry(work):
    buffers = WorkList.empty(WorkListSizes(6, 9, 5, 4))
    for field in fields(buffers):
        getattr(buffers, field.name).fill_(-77)
    work.copy_into(buffers)
    assert buffers.work_indptr.tolist() == [0, 2, 3, 4, 4, 4, 4]
    assert buffers.work_info[:4].tolist() == work.work_info.tolist()
    assert buffers.work_info[4:].eq(0).all()
    assert buffers.reduce_indptr.tolist() == [0, 0, 2, 2, 2, 2]
    assert buffers.reduce_final_map.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [0, 0]]
    assert buffers.reduce_partial_map.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "buffer", "message"),
    [
        ("work_indptr", torch.zeros(4, dtype=torch.int32), r"at least \(5,\), got \(4,\)"),
        ("work_info", torch.zeros(4, 7, dtype=torch.int32), r"at least \(4, 8\), got \(4, 7\)"),
        ("reduce_final_map", torch.zeros(8, dtype=torch.int32), r"at least \(3, 2\), got \(8,\)"),
        ("reduce_indptr", torch.zeros(4), "must be contiguous int32, got torch.float32"),
        (
            "reduce_partial_map",
            torch.zeros(9, dtype=torch.int32)[::2],
            r"must be contiguous int32, .* strides \(2,\)",
        ),
    ],
)
def test_copy_into_unfit_buffer(work, name, buffer, message):
    sizes = decode_sizes(3, 1, 16, profile=DeviceProfile("gfx942", 4))
    buffers = replace(WorkList.empty(sizes), **{name: buffer})
    with pytest.raises(LayoutError, match=f"{name} must be .*{message.removeprefix('must be ')}"):
        work.copy_into(buffers)


def _changed(work, name, index, value):
    tensor = getattr(work, name).clone()
    tensor[index] = value
    return replace(work, **{name: tensor})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("work_indptr", 4, 3, "work_indptr must rise from 0 to 4"),
        ("work_indptr", 1, 4, "work_indptr must rise"),
        ("reduce_indptr", 0, 1, "reduce_indptr must rise from 0 to 2"),
        ("work_info", (0, columns.KV_END), -1, "columns 4 and 5 must be a range"),
        ("work_info", (0, columns.QO_START), 5, "columns 2 and 3 must be a range"),
        ("work_info", (2, columns.PARTIAL_QO_LOC), -1, "list each piece .* once"),
        ("work_info", (2, columns.PARTIAL_QO_LOC), 5, "list each piece .* once"),
        ("work_info", (1, columns.QO_END), 3, "partial rows must not overlap"),
        ("reduce_partial_map", 1, 0, "list each piece .* once"),
        ("reduce_final_map", (1, 1), 3, "list each piece .* once"),
    ],
)
def test_validate_refuses(work, name, index, value, message):
    work.validate()
    with pytest.raises(LayoutError, match=message):
        _changed(work, name, index, value).validate()


FOLLOWED = {
    "qo_indptr": _i32(0, 1, 2, 3),
    "kv_indptr": _i32(0, 40, 340, 470),
    "kv_lens": _i32(40, 300, 130),
    "page_size": 1,
}


def test_a_list_follows_the_lengths_it_was_made_for(work):
    check_follows("op", work, **FOLLOWED)
    padded = WorkList.empty(decode_sizes(3, 1, 16, profile=DeviceProfile("gfx942", 9)))
    work.copy_into(padded)
    check_follows("op", padded, **FOLLOWED)
    order = torch.tensor([3, 0, 2, 1])
    check_follows("op", replace(work, work_info=work.work_info[order]), **FOLLOWED)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("work_indptr", -1, 5, "work_indptr must rise from 0 to at most 4"),
        ("work_indptr", 0, 1, "work_indptr must rise from 0"),
        ("work_indptr", slice(2, None), 3, "got one that is left out"),
        ("work_info", (0, columns.BATCH_IDX), 3, r"batch_idx of a work must be in 0\.\.2"),
        ("work_info", (0, columns.BATCH_IDX), -1, r"batch_idx of a work must be in 0\.\.2"),
        ("work_info", (0, columns.QO_START), 1, "got one that is left out"),
        ("work_info", (0, columns.QO_START), -1, "rows of a work must be those of its request"),
        ("work_info", (0, columns.QO_END), 2, "rows of a work must be those of its request"),
        ("work_info", (0, columns.QO_END), 0, "got one that is left out"),
        ("work_info", (0, columns.KV_END), 39, "made for the lengths it is used with"),
        ("work_info", (0, columns.KV_END), 41, "made for the lengths it is used with"),
        ("work_info", (1, columns.KV_OFFSET), 283, "made for the lengths it is used with"),
        ("work_info", (1, columns.KV_START), 39, "made for the lengths it is used with"),
        ("work_info", (2, columns.KV_START), 57, "got one that is left out"),
    ],
)
def test_what_follows_no_batch(work, name, index, value, message):
    with pytest.raises(LayoutError, match=f"op: .*{message}"):
        check_follows("op", _changed(work, name, index, value), **FOLLOWED)


@pytest.mark.parametrize("num_heads", [16, 48])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_lists_with_masks_folds_and_empty_requests(num_heads, page_size):
    lens = _i32(300, 0, 5, 77)
    pages = (lens + page_size - 1) // page_size
    batch = {
        "qo_indptr": _i32(0, 4, 6, 14, 14),
        "kv_indptr": _i32(0, *pages.cumsum(0).tolist()),
    }
    last = lens - (pages - 1).clamp(min=0) * page_size
    profile = DeviceProfile("gfx942", 9)
    work = plan_v1_2(
        *batch.values(), last, num_heads=num_heads, page_size=page_size, kv_granularity=1,
        profile=profile,
    )  # fmt: skip
    fold = num_heads // 16
    check_follows("op", work, **batch, kv_lens=lens, page_size=page_size, fold=fold)
    longer = lens + _i32(0, 0, 0, page_size)
    with pytest.raises(LayoutError):
        check_follows("op", work, **batch, kv_lens=longer + 1, page_size=page_size, fold=fold)


@pytest.mark.parametrize(
    ("name", "buffer", "message"),
    [
        ("work_indptr", torch.zeros(0, dtype=torch.int32), "must have at least one entry"),
        ("work_indptr", torch.zeros(3, 1, dtype=torch.int32), r"must be \[num_workgroups \+ 1\]"),
        ("work_info", torch.zeros(4, 7, dtype=torch.int32), r"must be \[num_works, 8\]"),
        ("reduce_final_map", torch.zeros(4, 2, dtype=torch.int32), r"must be \[3, 2\]"),
        ("reduce_indptr", torch.zeros(4), "must be int32"),
        ("work_info", torch.zeros(4, 9, dtype=torch.int32)[:, :8], "must be contiguous"),
        ("work_info", torch.zeros(4, 8, dtype=torch.int32, device="meta"), "must be on cpu"),
    ],
)
def test_unfit_buffers(work, name, buffer, message):
    work.check_buffers("op", torch.device("cpu"))
    with pytest.raises(LayoutError, match=f"op: {name} {message}"):
        replace(work, **{name: buffer}).check_buffers("op", torch.device("cpu"))


def test_sizes_are_those_of_the_buffers():
    sizes = WorkListSizes(6, 9, 5, 4)
    assert WorkList.empty(sizes).sizes == sizes
