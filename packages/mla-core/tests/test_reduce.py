"""Split-K reduce, both implementations, against fp64 softmax algebra."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import BackendUnavailableError, LayoutError
from mla_core.reduce import LseBase, reduce_partials, reduce_tiles

NAN, INF = float("nan"), float("inf")
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton")),
]
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def partials(*shape, value_dim=32, empty_share=0.3):
    """Random partials, some empty; the output of an empty one is NaN."""
    lse = 4 * torch.randn(*shape)
    lse[torch.rand(*shape) < empty_share] = -INF
    out = torch.randn(*shape, value_dim)
    out[lse == -INF] = NAN
    return out.to(DEVICE), lse.to(DEVICE)


def merged(outs, lses, sink=None):
    """Merge over dim 0 in fp64; rows are weighted by softmax over [partials, sink]."""
    lses, outs = lses.double(), torch.nan_to_num(outs.double())
    if sink is not None:
        lses = torch.cat([lses, sink.double().expand(1, *lses.shape[1:])])
        outs = torch.cat([outs, outs.new_zeros(1, *outs.shape[1:])])
    if not len(lses):
        return outs.sum(0), lses.sum(0) - INF
    weights = torch.nan_to_num(torch.softmax(lses, 0))
    return (weights[..., None] * outs).sum(0), torch.logsumexp(lses, 0)


def check(got, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    out, lse = got
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected[1], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense(backend, with_sink, out_dtype, seed):
    x, lses = partials(3, 11, 4, value_dim=48)
    sink = torch.randn(4, device=DEVICE) if with_sink else None
    got = reduce_partials(x, lses, sink=sink, out_dtype=out_dtype, backend=backend)
    check(got, merged(x.transpose(0, 1), lses.transpose(0, 1), sink), out_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("with_map", [False, True], ids=["", "map"])
def test_ragged(backend, with_sink, with_map, seed):
    counts = [0, 1, 9, 0, 3]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)
    x, lses = partials(20, 3)
    sink = torch.randn(3, device=DEVICE) if with_sink else None
    partial_map = None
    if with_map:
        partial_map = torch.randperm(20, device=DEVICE, dtype=torch.int32)[:15]
        partial_map[4], partial_map[10] = -1, 20
    rows = torch.arange(20, device=DEVICE) if partial_map is None else partial_map.long()
    out, lse = reduce_partials(
        x, lses, reduce_indptr=indptr, partial_map=partial_map, sink=sink, backend=backend
    )
    for t in range(len(counts)):
        own = rows[indptr[t] : indptr[t + 1]]
        own = own[(own >= 0) & (own < 20)]
        check((out[t], lse[t]), merged(x[own], lses[own], sink))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_zero_and_minus_infinity(backend):
    x = torch.full((2, 3, 2, 8), NAN, device=DEVICE)
    lses = torch.full((2, 3, 2), -INF, device=DEVICE)
    out, lse = reduce_partials(x, lses, backend=backend)
    assert (out == 0).all()
    assert (lse == -INF).all()
    sink = torch.tensor([0.5, -INF], device=DEVICE)
    out, lse = reduce_partials(x, lses, sink=sink, backend=backend)
    assert (out == 0).all()
    assert lse.tolist() == [[0.5, -INF]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_partials_at_all(backend):
    indptr = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    out, lse = reduce_partials(
        torch.empty(0, 2, 8, device=DEVICE),
        torch.empty(0, 2, device=DEVICE),
        reduce_indptr=indptr,
        backend=backend,
    )
    assert (out == 0).all()
    assert (lse == -INF).all()
    out, lse = reduce_partials(
        torch.empty(0, 2, 3, 8, device=DEVICE), torch.empty(0, 2, 3, device=DEVICE), backend=backend
    )
    assert out.shape == (0, 3, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("base", list(LseBase))
def test_single_partial_is_copied_exactly(backend, base, seed):
    x, lses = partials(5, 1, 4, empty_share=0)
    out, lse = reduce_partials(x, lses, lse_base=base, backend=backend)
    assert torch.equal(out, x[:, 0])
    assert torch.equal(lse, lses[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
def test_base_two_is_natural_over_ln2(backend, with_sink, seed):
    x, lses = partials(4, 5, 3)
    sink = torch.randn(3, device=DEVICE) if with_sink else None
    natural = merged(x.transpose(0, 1), lses.transpose(0, 1), sink)
    out, lse = reduce_partials(
        x, lses / math.log(2), sink=sink, lse_base=LseBase.TWO, backend=backend
    )
    check((out, lse), (natural[0], natural[1] / math.log(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_lse_does_not_overflow(backend):
    x = torch.tensor([1.0, 3.0], device=DEVICE)[None, :, None, None].repeat(1, 1, 1, 8)
    lses = torch.tensor([[1e4, 1e4]], device=DEVICE)[..., None]
    out, lse = reduce_partials(x, lses, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4 + math.log(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, seed):
    x, lses = partials(3, 4, 2)
    wide = torch.full((4, 3, 5, 40), NAN, device=DEVICE)
    wide[:, :, 1:3, 4:36] = x.transpose(0, 1)
    strided = wide[:, :, 1:3, 4:36].transpose(0, 1)
    out = torch.full((2, 3, 64), 7.0, device=DEVICE)
    lse = torch.full((2, 3), 7.0, device=DEVICE)
    got = reduce_partials(
        strided,
        lses.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        out=out[:, :, :32].transpose(0, 1),
        lse=lse.T,
        backend=backend,
    )
    check(got, merged(x.transpose(0, 1), lses.transpose(0, 1)))
    assert (out[:, :, 32:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_batch_mates(backend, seed):
    x, lses = partials(6, 13, 2)
    together = reduce_partials(x, lses, backend=backend)
    alone = reduce_partials(x[2:3], lses[2:3], backend=backend)
    assert torch.equal(together[0][2:3], alone[0])
    assert torch.equal(together[1][2:3], alone[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_partials(backend, dtype, seed):
    x, lses = partials(2, 3, 2)
    got = reduce_partials(x.to(dtype), lses, out_dtype=torch.float32, backend=backend)
    check(got, merged(x.to(dtype).transpose(0, 1), lses.transpose(0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles(backend, seed):
    x, lses = partials(30, 2)
    indptr = torch.tensor([0, 2, 3, 3, 6], dtype=torch.int32, device=DEVICE)
    final_map = torch.tensor([[0, 3], [5, 6], [3, 5], [6, 8]], dtype=torch.int32, device=DEVICE)
    first_rows = torch.tensor([0, 10, 25, 3, 13, 20], dtype=torch.int32, device=DEVICE)
    out = torch.full((9, 2, 32), 7.0, device=DEVICE)
    lse = torch.full((9, 2), 7.0, device=DEVICE)
    reduce_tiles(
        x, lses, indptr, final_map, first_rows, max_tile_rows=4, out=out, lse=lse, backend=backend
    )
    for q, rows in {
        0: [0, 10],
        1: [1, 11],
        2: [2, 12],
        5: [25],
        6: [3, 13, 20],
        7: [4, 14, 21],
    }.items():
        check((out[q], lse[q]), merged(x[rows], lses[rows]))
    # Rows of the tile without partials, and rows of no tile, are not ours to write.
    assert (out[[3, 4, 8]] == 7).all()
    assert (lse[[3, 4, 8]] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_in_one_piece_may_be_listed_with_no_row(backend, seed):
    x, lses = partials(4, 2)
    out = torch.full((2, 2, 32), 7.0, device=DEVICE)
    lse = torch.full((2, 2), 7.0, device=DEVICE)
    reduce_tiles(
        x,
        lses,
        *(i32([0, 1, 3]), i32([[0, 1], [1, 2]]), i32([-1, 3, 0])),
        max_tile_rows=1,
        out=out,
        lse=lse,
        backend=backend,
    )
    assert (out[0] == 7).all()
    assert (lse[0] == 7).all()
    check((out[1], lse[1]), merged(x[[3, 0]], lses[[3, 0]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("base", list(LseBase))
def test_tiles_of_folded_heads(backend, with_sink, base, seed):
    """Rows are groups of two of six heads: those of a request's first group come first."""
    q_lens, fold = (2, 0, 3), 3
    sink = torch.randn(6, device=DEVICE) if with_sink else None
    factor = math.log2(math.e) if base is LseBase.TWO else 1.0
    x, lses = partials(40, 2)
    # (first folded row, rows, partial rows); the third tile is not cut
    tiles = [(0, 2, (0, 11)), (2, 2, (20,)), (4, 2, ()), (6, 3, (2, 30)), (12, 2, (7, 9, 13))]
    out = torch.full((5, 6, 32), 7.0, device=DEVICE)
    lse = torch.full((5, 6), 7.0, device=DEVICE)
    reduce_tiles(
        x,
        lses * factor,
        i32([0, *torch.tensor([len(rows) for *_, rows in tiles]).cumsum(0)]),
        i32([[first, first + count] for first, count, _ in tiles]),
        i32([row for *_, rows in tiles for row in rows]),
        max_tile_rows=3,
        out=out,
        lse=lse,
        sink=sink,
        lse_base=base,
        fold=fold,
        qo_indptr=i32([0, 2, 2, 5]),
        backend=backend,
    )
    tokens = [
        (token, group)
        for start, q_len in zip((0, 2, 2), q_lens, strict=True)
        for group in range(fold)
        for token in range(start, start + q_len)
    ]
    written = torch.zeros(5, 6, dtype=torch.bool)
    for first, count, rows in tiles:
        for i in range(count if rows else 0):
            token, group = tokens[first + i]
            heads = slice(2 * group, 2 * group + 2)
            index = [row + i for row in rows]
            got = out[token, heads], lse[token, heads] / factor
            check(got, merged(x[index], lses[index], None if sink is None else sink[heads]))
            written[token, heads] = True
    assert (out[~written] == 7).all()
    assert (lse[~written] == 7).all()


def i32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    num_heads=st.integers(1, 3),
    data_seed=st.integers(0, 2**31),
)
def test_merging_in_two_stages_equals_one(counts, num_heads, data_seed):
    torch.manual_seed(data_seed)
    total = sum(counts)
    x, lses = partials(total, num_heads, value_dim=8)
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=DEVICE)
    inner = reduce_partials(x, lses, reduce_indptr=indptr, backend="torch")
    outer = reduce_partials(inner[0][None], inner[1][None], backend="torch")
    check((outer[0][0], outer[1][0]), merged(x, lses))


GOOD = {"partial_out": torch.zeros(2, 3, 4, 8), "partial_lse": torch.zeros(2, 3, 4)}
FLAT = {"partial_out": torch.zeros(6, 4, 8), "partial_lse": torch.zeros(6, 4)}
INDPTR = torch.tensor([0, 3, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FLAT, r"partial_out must be \[total_q, num_splits, num_heads, value_dim\], got shape"),
        (
            GOOD | {"partial_out": torch.zeros(2, 3, 4, 8).double()},
            "partial_out must be float32 or",
        ),
        (GOOD | {"partial_out": torch.zeros(2, 3, 8, 4).mT}, "contiguous last dimension"),
        (GOOD | {"partial_lse": torch.zeros(2, 4, 3)}, r"partial_lse must be \[2, 3, 4\] float32"),
        (GOOD | {"partial_lse": torch.zeros(2, 3, 4).half()}, "float32 like partial_out"),
        (GOOD | {"out": torch.zeros(2, 4, 9)}, r"out must be \[2, 4, 8\]"),
        (GOOD | {"lse": torch.zeros(2, 4).half()}, r"lse must be \[2, 4\] float32"),
        (GOOD | {"sink": torch.zeros(3)}, r"sink must be \[4\]"),
        (GOOD | {"partial_map": INDPTR}, "partial_map must be None without reduce_indptr"),
        (FLAT | {"reduce_indptr": INDPTR.long()}, "reduce_indptr must be int32"),
        (FLAT | {"reduce_indptr": INDPTR[:0]}, r"reduce_indptr must be \[total_q \+ 1\]"),
        (
            GOOD | {"out": torch.zeros(2, 4, 8), "out_dtype": torch.float16},
            "out_dtype must be torch.float32 like out",
        ),
        (GOOD | {"backend": "cuda"}, 'backend must be "torch", "triton" or None'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(arguments, message):
    with pytest.raises(LayoutError, match=message):
        reduce_partials(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"final_map": INDPTR}, r"final_map must be \[2, 2\]"),
        ({"final_map": torch.zeros(2, 4, dtype=torch.int32)[:, ::2]}, "final_map must"),
        ({"max_tile_rows": 0}, "max_tile_rows must be >= 1, got 0"),
        ({"partial_map": INDPTR.long()}, "partial_map must be int32"),
        ({"fold": 0}, "fold must be >= 1, and above 1 come with qo_indptr, got 0"),
        ({"fold": 2}, "qo_indptr, got 2 with qo_indptr=None"),
        ({"fold": 2, "qo_indptr": INDPTR}, r"out must be \[2, 8, 8\]"),
        ({"fold": 2, "qo_indptr": INDPTR.long()}, "qo_indptr must be int32"),
    ],
    ids=["shape", "stride", "rows", "dtype", "fold", "no_indptr", "heads", "indptr_dtype"],
)
def test_bad_tiles(changed, message):
    arguments = {
        **FLAT,
        "reduce_indptr": INDPTR,
        "final_map": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32),
        "partial_map": torch.zeros(6, dtype=torch.int32),
        "max_tile_rows": 1,
        "out": torch.zeros(2, 4, 8),
        "lse": torch.zeros(2, 4),
    }
    with pytest.raises(LayoutError, match=message):
        reduce_tiles(**(arguments | changed))


def test_triton_wants_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match='backend "triton"'):
        reduce_partials(**GOOD, backend="triton")


def test_triton_missing(monkeypatch):
    monkeypatch.setattr("mla_core.reduce._has_triton", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs triton; pip install"):
        reduce_partials(**GOOD, backend="triton")


def test_ranges_past_the_partials_are_refused():
    partial_out, partial_lse = torch.randn(3, 2, 4), torch.randn(3, 2)
    beyond = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(LayoutError, match=r"reduce_indptr must lie in 0\.\.3, .* got 0 to 4"):
        reduce_partials(partial_out, partial_lse, reduce_indptr=beyond)
    rows = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(LayoutError, match=r"reduce_indptr must lie in 0\.\.2"):
        reduce_partials(partial_out, partial_lse, reduce_indptr=beyond, partial_map=rows)
