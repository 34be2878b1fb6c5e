"""CSR, block-table and prefix-sum forms of a ragged batch, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import LatentCache, LayoutError, MLADims, PagedKV
from mla_core.batch import check_qo_indptr, indptr_of, pages_of

DIMS = MLADims(4, kv_lora_rank=32, qk_rope_head_dim=0)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_cache(num_pages: int = 8, page_size: int = 4) -> LatentCache:
    return LatentCache.allocate("fp32", DIMS, num_pages, page_size)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[int, list[int], list[list[int]]]:
    page_size = draw(st.sampled_from([1, 2, 3, 4, 64]))
    lens = draw(st.lists(st.integers(0, 3 * page_size + 1), max_size=5))
    tables = [
        draw(st.lists(st.integers(0, 15), min_size=-(-n // page_size), max_size=-(-n // page_size)))
        for n in lens
    ]
    return page_size, lens, tables


@given(ragged())
@settings(deadline=None, max_examples=40)
def test_block_table_and_csr_agree_with_a_loop(batch: tuple[int, list[int], list[list[int]]]):
    page_size, lens, tables = batch
    cache = make_cache(16, page_size)
    width = max((len(table) for table in tables), default=0) + 1
    dense = torch.full((len(lens), width), 1 << 29, dtype=torch.int32)
    for row, table in zip(dense, tables, strict=True):
        row[: len(table)] = i32(*table)
    kv = PagedKV.from_block_table(cache, dense, i32(*lens))

    assert kv.batch_size == len(lens)
    assert kv.seq_lens.tolist() == lens
    assert kv.kv_page_indices.numel() == dense.numel()
    for b, table in enumerate(tables):
        begin, end = kv.kv_indptr[b : b + 2].tolist()
        assert kv.kv_page_indices[begin:end].tolist() == table
    used = int(kv.kv_indptr[-1])
    assert (kv.kv_page_indices[used:] == -1).all()

    back = kv.block_table()
    slots = kv.token_slots()
    for b, (n, table) in enumerate(zip(lens, tables, strict=True)):
        assert back[b].tolist() == table + [-1] * (back.shape[1] - len(table))
        expected = [table[j // page_size] * page_size + j % page_size for j in range(n)]
        assert slots[b].tolist() == expected + [-1] * (slots.shape[1] - n)


def test_from_csr_keeps_an_over_allocated_index_buffer():
    kv = PagedKV.from_csr(make_cache(), i32(0, 2, 2), i32(5, 5, 1 << 30), i32(1, 0))
    assert kv.seq_lens.tolist() == [5, 0]
    assert kv.token_slots().tolist() == [[20, 21, 22, 23, 20], [-1] * 5]


def test_hidden_page_has_no_slots():
    kv = PagedKV.from_csr(make_cache(), i32(0, 2), i32(-1, 3), i32(2))
    assert kv.token_slots().tolist() == [[-1, -1, -1, -1, 12, 13]]


def test_block_table_with_given_width_and_fill():
    kv = PagedKV.from_csr(make_cache(), i32(0, 1, 3), i32(7, 2, 1), i32(4, 1))
    assert kv.block_table(3, fill=0).tolist() == [[7, 0, 0], [2, 1, 0]]
    empty = PagedKV.from_csr(make_cache(), i32(0, 0), i32(), i32(0))
    assert empty.block_table(2).tolist() == [[-1, -1]]
    assert empty.token_slots().shape == (1, 0)


@pytest.mark.parametrize(
    ("page_size", "expected"),
    [(1, [[0, 1, 2], [-1, -1, -1], [3, 4, -1]]), (4, [[0, 1, 2], [-1, -1, -1], [4, 5, -1]])],
)
def test_from_cu_seqlens(page_size: int, expected: list[list[int]]):
    kv = PagedKV.from_cu_seqlens(make_cache(8, page_size), i32(0, 3, 3, 5))
    assert kv.seq_lens.tolist() == [3, 0, 2]
    assert kv.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert kv.cu_seqlens.dtype == torch.int32
    assert kv.token_slots().tolist() == expected


def test_no_requests():
    kv = PagedKV.from_block_table(make_cache(), torch.zeros(0, 2, dtype=torch.int32), i32())
    assert kv.batch_size == 0
    assert kv.seq_lens.tolist() == []
    assert kv.token_slots().shape == (0, 0)


def test_helpers():
    assert pages_of(i32(0, 1, 4, 5), 4).tolist() == [0, 1, 1, 2]
    assert indptr_of(i32(2, 0, 3)).tolist() == [0, 2, 2, 5]
    assert indptr_of(i32()).tolist() == [0]


NOT_CONTIGUOUS = torch.stack((i32(0, 1, 3), i32(9, 9, 9)), dim=1)[:, 0]
GOOD = {
    "kv_indptr": i32(0, 1, 3),
    "kv_page_indices": i32(7, 2, 1),
    "kv_last_page_len": i32(4, 1),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_indptr", torch.zeros(1, 3, dtype=torch.int32), r"kv_indptr must be 1-D, got shape"),
        ("kv_indptr", torch.tensor([0, 1, 3]), r"kv_indptr must be int32, got torch.int64"),
        ("kv_indptr", i32(), r"kv_indptr must be \[batch_size \+ 1\]"),
        ("kv_indptr", i32(1, 2, 3), r"kv_indptr must start at 0, got 1"),
        ("kv_indptr", i32(0, 2, 1), r"kv_indptr must not decrease, got a smaller value at 2"),
        ("kv_indptr", i32(0, 1, 4), r"kv_page_indices must have at least kv_indptr\[-1\]=4"),
        ("kv_indptr", NOT_CONTIGUOUS, r"kv_indptr must be contiguous"),
        ("kv_page_indices", i32(7, 8, 1), r"kv_page_indices must be in -1..7, got 8 at 1"),
        ("kv_page_indices", i32(7, -2, 1), r"kv_page_indices must be in -1..7, got -2 at 1"),
        ("kv_page_indices", i32(7, 2), r"kv_page_indices must have at least kv_indptr\[-1\]=3"),
        ("kv_page_indices", torch.ones(3), r"kv_page_indices must be int32, got torch.float32"),
        ("kv_last_page_len", i32(4), r"kv_last_page_len must be \[batch_size\]=\(2,\)"),
        ("kv_last_page_len", i32(4, 5), r"kv_last_page_len must be in 1..4 .* at request 1"),
        ("kv_last_page_len", i32(0, 1), r"kv_last_page_len must be in 1..4 .* at request 0"),
    ],
)
def test_bad_csr_is_refused(name: str, value: torch.Tensor, message: str):
    with pytest.raises(LayoutError, match=message):
        PagedKV.from_csr(make_cache(), **{**GOOD, name: value})


def test_last_page_len_of_an_empty_request_must_be_zero():
    with pytest.raises(LayoutError, match="0 for the others, got a value outside at request 0"):
        PagedKV.from_csr(make_cache(), i32(0, 0), i32(), i32(1))


@pytest.mark.parametrize(
    ("table", "lens", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), i32(1, 1), r"block_table must be \[batch_size, max"),
        (torch.zeros(2, 2), i32(1, 1), r"block_table must be int32"),
        (torch.zeros(2, 2, dtype=torch.int32), i32(1), r"seq_lens must be \[batch_size\]=\(2,\)"),
        (torch.zeros(2, 2, dtype=torch.int32), i32(1, 9), r"seq_lens must be in 0..8, got 9 at 1"),
        (torch.zeros(2, 2, dtype=torch.int32), i32(-1, 8), r"seq_lens must be in 0..8, got -1"),
        (torch.full((1, 2), 8, dtype=torch.int32), i32(5), r"kv_page_indices must be in -1..7"),
    ],
)
def test_bad_block_table_is_refused(table: torch.Tensor, lens: torch.Tensor, message: str):
    with pytest.raises(LayoutError, match=message):
        PagedKV.from_block_table(make_cache(), table, lens)


def test_bad_cu_seqlens_is_refused():
    with pytest.raises(LayoutError, match="cu_seqlens_k must have at least one entry"):
        PagedKV.from_cu_seqlens(make_cache(), i32())
    with pytest.raises(LayoutError, match="cu_seqlens_k must start at 0, got 2"):
        PagedKV.from_cu_seqlens(make_cache(), i32(2, 3))
    with pytest.raises(LayoutError, match="kv_page_indices must have at least"):
        PagedKV.from_cu_seqlens(make_cache(2), i32(0, 9))


@pytest.mark.parametrize(
    ("qo_indptr", "message"),
    [
        (i32(0, 1), r"qo_indptr must be \[batch_size \+ 1\]=\(3,\)"),
        (torch.tensor([0, 1, 2]), r"qo_indptr must be int32"),
        (i32(0, 2, 1), r"qo_indptr must not decrease"),
        (i32(1, 1, 2), r"qo_indptr must start at 0"),
    ],
)
def test_bad_qo_indptr_is_refused(qo_indptr: torch.Tensor, message: str):
    with pytest.raises(LayoutError, match=message):
        check_qo_indptr("plan_decode", qo_indptr, 2, torch.device("cpu"))


def test_other_device_is_refused():
    with pytest.raises(LayoutError, match="kv_indptr must be on cpu like the cache, got meta"):
        PagedKV.from_csr(make_cache(), **{**GOOD, "kv_indptr": GOOD["kv_indptr"].to("meta")})
