"""Planning for Hopper: which tile, how the work is dealt, and what the estimate weighs."""

from __future__ import annotations

import pytest
import torch

from mla_core.arch import cpu_as
from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions, PlanRequest, plan_decode
from mla_core.problem import Problem
from mla_triton import hopper
from mla_triton.backend import HOPPER_ROWS

SMS = 132


def request_of(
    heads, batch, length, *, mean=None, q_len=1, splits=None, features=(), rank=512, **changes
):
    changes = {"q_dtype": "bf16", "kv_dtype": "bf16", "page_size": 64} | changes
    problem = Problem(
        op="decode",
        arch="sm90",
        dims=MLADims(heads, rank),
        q_len=q_len,
        features=frozenset(features),
        **changes,
    )
    pages = -(-(mean or length) // 64) * batch
    return PlanRequest(
        problem, AttentionOptions(), batch, batch * q_len, q_len, length, pages, splits
    )


@pytest.mark.parametrize(
    ("num_rows", "tile"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (512, 64)],
)
def test_smallest_tile_that_holds_the_rows(num_rows, tile):
    assert hopper.rows_of_a_program(num_rows, is_packed=False) == tile


@pytest.mark.parametrize(("num_rows", "tile"), [(1, 16), (16, 16), (32, 16), (33, 64), (128, 64)])
def test_tiles_over_fp8_caches(num_rows, tile):
    assert hopper.rows_of_a_program(num_rows, is_packed=True) == tile


@pytest.mark.parametrize(
    ("heads", "batch", "length", "runs"),
    [(16, 128, 8192, 1), (64, 128, 4096, 1), (128, 128, 8192, 1), (128, 64, 4096, 1)],
)
def test_batches_that_fill_the_device_are_not_cut(heads, batch, length, runs):
    schedule = hopper.make_schedule(request_of(heads, batch, length), SMS)
    assert schedule.config["max_runs"] == runs
    assert set(schedule.workspace) == {"note"}


@pytest.mark.parametrize(
    ("heads", "batch", "length", "programs"),
    [(16, 16, 1024, 128), (128, 1, 32768, 128), (16, 64, 4096, 128)],
)
def test_small_batches_are_cut_to_fill_the_device(heads, batch, length, programs):
    config = hopper.make_schedule(request_of(heads, batch, length), SMS).config
    assert config["max_runs"] > 1
    assert config["num_workers"] * config["row_blocks"] == programs


def test_ragged_batches_and_bad_multiples_are_dealt_in_spans():
    ragged = hopper.make_schedule(request_of(16, 64, 40000, mean=4096), SMS)
    assert ragged.config["max_runs"] == 0
    assert ragged.config["num_workers"] == SMS
    assert "ragged" in ragged.because
    assert hopper.make_schedule(request_of(64, 200, 4096), SMS).config["max_runs"] == 0


def test_wishes_are_followed():
    schedule = hopper.make_schedule(request_of(16, 4, 9000, splits=5), SMS)
    assert schedule.num_kv_splits == 5
    assert schedule.config["num_workers"] == 20
    assert schedule.workspace["partial_out"] == ((20, 1, 16, 512), torch.float32)


def test_an_invariant_plan_does_not_look_at_the_batch():
    def dealt(batch, length):
        request = request_of(16, batch, length, features=["batch_invariant"])
        config = hopper.make_schedule(request, SMS).config
        return config["M"], config["max_runs"], config["min_tiles"]

    assert dealt(1, 100) == dealt(300, 9000)


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"features": ["cp_round_robin", "sink", "window", "softcap", "non_causal"]}, True),
        ({"features": ["persistent"]}, False),
        ({"features": ["rope"]}, False),
        ({"rank": 1024}, False),
        ({"rank": 256}, True),
        ({"kv_dtype": "fp8_e4m3"}, True),
        ({"kv_dtype": "fp8_e4m3", "q_dtype": "fp8_e4m3", "layout": "ds656"}, True),
        ({"kv_dtype": "fp8_e4m3", "q_dtype": "fp16", "layout": "seg576"}, True),
        # Rotary keys in bf16 would cost such queries bits.
        ({"kv_dtype": "fp8_e4m3", "q_dtype": "fp16", "layout": "ds656"}, False),
        ({"kv_dtype": "fp8_e4m3", "layout": "ds32"}, False),
        # Rows would not start at multiples of 16 bytes.
        ({"kv_dtype": "fp8_e4m3", "layout": "ds656", "rank": 256}, False),
        ({"kv_dtype": "fp8_e4m3", "layout": "seg644", "page_size": 6}, False),
        ({"kv_dtype": "fp8_e4m3", "layout": "seg644", "page_size": 12}, True),
    ],
    ids=[
        *("plain", "masks", "persistent", "rope", "rank-1024", "rank-256"),
        *("fp8", "fp8-queries", "fp16-queries", "fp16-on-bf16-keys", "ds32"),
        *("ds656-rank-256", "seg644-page-6", "seg644-page-12"),
    ],
)
def test_what_the_kernels_take(changes, takes):
    problem = request_of(16, 1, 64, **changes).problem
    assert any(not row.why_not(problem) for row in HOPPER_ROWS) == takes


def cache_of(num_pages, page_stride=64 * 576):
    buffer = torch.empty(num_pages, page_stride, dtype=torch.bfloat16)[:, : 64 * 576]
    cache = LatentCache.bind("bf16", MLADims(2), 64, buffer)
    index = torch.zeros(2, dtype=torch.int32)
    return PagedKV(cache, index, index[:1], index[:1])


@pytest.mark.parametrize(
    ("width", "start", "takes"), [(576, 0, True), (592, 0, True), (584, 0, False), (592, 1, False)]
)
def test_rows_of_queries_must_start_evenly(width, start, takes):
    q = torch.zeros(3, 2, width, dtype=torch.bfloat16)
    assert hopper.is_aligned(q[..., start : start + 512], q[..., 512:576], cache_of(2)) == takes


@pytest.mark.parametrize("extra", [0, 8, 16])
def test_pages_must_start_evenly(extra):
    q = torch.zeros(1, 2, 576, dtype=torch.bfloat16)
    kv = cache_of(2, 64 * 576 + extra)
    assert hopper.is_aligned(q[..., :512], q[..., 512:], kv) == (extra % 16 == 0)


@pytest.mark.parametrize("is_invariant", [False, True])
def test_the_stride_of_a_single_row_matters_only_where_it_would_among_others(is_invariant):
    q = torch.zeros(1, 1, 576, dtype=torch.bfloat16).as_strided((1, 1, 576), (7, 3, 1))
    takes = hopper.is_aligned(q[..., :512], q[..., 512:], cache_of(1), is_invariant)
    assert takes == (not is_invariant)


def test_a_cache_without_pages_has_no_descriptors():
    cache = cache_of(0).cache
    assert hopper._descriptors(cache.field("kv_c"), cache.field("k_pe")) == (None, None, 0, 0)


@pytest.mark.parametrize(("batch", "runs"), [(128, 2), (264, 1), (64, 4)])
def test_two_programs_over_fp8_caches_share_a_multiprocessor(batch, runs):
    schedule = hopper.make_schedule(request_of(16, batch, 8192, kv_dtype="fp8_e4m3"), SMS)
    assert schedule.kernel == "hopper_packed"
    assert schedule.config["max_runs"] == runs


@pytest.mark.parametrize(
    ("heads", "kv_dtype", "kernel"),
    [
        (32, "bf16", "hopper_narrow"),
        (33, "bf16", "hopper_wide"),
        (32, "fp8_e4m3", "hopper_packed"),
        (33, "fp8_e4m3", "hopper_converted"),
    ],
)
def test_kernel(heads, kv_dtype, kernel):
    request = request_of(heads, 128, 4096, kv_dtype=kv_dtype)
    schedule = hopper.make_schedule(request, SMS)
    assert schedule.kernel == kernel
    # Two programs share a multiprocessor in this one alone.
    assert ("two on each" in schedule.because) == (kernel == "hopper_packed")


def test_an_invariant_plan_over_fp8_caches_takes_the_tile_of_one_query_token():
    request = request_of(16, 4, 4096, q_len=4, kv_dtype="fp8_e4m3", features=["batch_invariant"])
    schedule = hopper.make_schedule(request, SMS)
    assert (schedule.kernel, schedule.config["row_blocks"]) == ("hopper_packed", 4)


def call_of(heads, layout="bf16", splits=1, *, rank=512, batch=2):
    """Return what a call on a GPU would pass, from tensors on the CPU."""
    pytest.importorskip("mla_triton.kernels.hopper.decode")
    dims = MLADims(heads, rank)
    scale = {"scale": torch.ones(1)} if layout == "fp8" else {}
    cache = LatentCache.allocate(layout, dims, batch, 64, **scale)
    index = torch.arange(batch + 1, dtype=torch.int32)
    kv = PagedKV(cache, index, index[:batch], torch.full((batch,), 64, dtype=torch.int32))
    q = torch.zeros(batch, heads, rank + 64, dtype=torch.bfloat16)
    out = torch.zeros(batch, heads, rank, dtype=torch.bfloat16)
    with cpu_as("sm90"):
        plan = plan_decode(dims, index, kv, backend="triton", num_kv_splits=splits)
    assert plan.schedule.kernel.startswith("hopper")
    return hopper._prepare(q[..., :rank], q[..., rank:], kv, plan, out, None)


@pytest.mark.parametrize(
    ("heads", "layout", "is_early"),
    [
        *((16, "bf16", True), (64, "bf16", True)),
        *((16, "fp8", False), (64, "fp8", True)),
        *((16, "fp8_ds656", False), (64, "fp8_ds656", True)),
    ],
)
def test_what_is_launched_while_the_kernel_before_ends(heads, layout, is_early):
    """All but where two programs fit a multiprocessor; merges always."""
    call = call_of(heads, layout, splits=3)
    assert call.constants["launch_pdl"] == is_early
    assert call.merge_constants["launch_pdl"]


@pytest.mark.parametrize("rank", [256, 512])
@pytest.mark.parametrize("heads", [3, 16, 64])
@pytest.mark.parametrize("splits", [2, 4, 5, 16, 17, 100])
def test_launches_of_the_merge(splits, heads, rank):
    call = call_of(heads, splits=splits, rank=rank)
    constants = call.merge_constants
    rows, warps = constants["ROWS"], constants["num_warps"]
    assert call.merge_grid == (-(-heads // constants["M"]) * constants["M"] // rows, 2)
    assert constants["M"] % rows == 0
    # Warps side by side cover a row, the others take other pieces of as many rows.
    assert warps % (rank // 128) == 0
    assert rows * constants["UNROLL"] % (warps // (rank // 128)) == 0


def test_what_is_not_cut_is_not_merged():
    call = call_of(16)
    assert (call.num_programs, call.merge_grid) == (2, ())


def test_an_empty_batch_launches_nothing():
    assert call_of(16, batch=0).num_programs == 0


@pytest.mark.parametrize(("kv_dtype", "least", "most"), [("bf16", 100, 132), ("fp8_e4m3", 90, 140)])
def test_a_request_alone_is_cut_into_as_many_pieces_as_merge_quickly(kv_dtype, least, most):
    schedule = hopper.make_schedule(request_of(16, 1, 32768, kv_dtype=kv_dtype), SMS)
    assert least <= schedule.num_kv_splits <= most


def test_a_long_request_among_short_ones_is_merged_with_many_loads_at_once():
    schedule = hopper.make_schedule(request_of(16, 8, 100000, mean=20000), SMS)
    assert schedule.config["max_runs"] == 0
    assert schedule.num_kv_splits == 84
    assert hopper._merge_launch(0, 84) == (1, 64, 8)
    assert hopper._merge_launch(0, 4) == (2, 8, 4)


def test_what_cannot_be_cut_has_no_partials():
    schedule = hopper.make_schedule(request_of(128, 1, 4096, q_len=4096), SMS)
    assert set(schedule.workspace) == {"note"}


def test_many_blocks_of_rows_fill_the_device_with_requests():
    config = hopper.make_schedule(request_of(128, 64, 4096, q_len=67), SMS).config
    assert config["max_runs"] == 1
    assert config["row_blocks"] == 134


def test_numbers_of_the_kernels():
    schedule = pytest.importorskip("mla_triton.kernels.hopper.schedule")
    from mla_triton.kernels.hopper import load, packed, wide

    assert load.TILE.value == hopper.TILE
    assert wide.M.value == hopper.WIDE
    assert packed.M.value == hopper.PACKED
    assert packed.CHUNK.value == hopper.PACKED_CHUNK
    assert schedule.START_COST.value == hopper._LINE_START
