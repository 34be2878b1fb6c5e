"""What only a GPU can show: graph replay, caches past 4 GiB, real matrix units, long contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_core.batch import PagedKV, indptr_of, pages_of
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.ops import decode, replan
from mla_core.plan import plan_decode
from mla_core.reference import attention
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.poison import poison_
from mla_core.testing.sync import no_sync
from mla_triton import tuning
from mla_triton.decode import with_config

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seed")]

DIMS = MLADims(16)


def random_batch(kv_lens, q_lens, dims=DIMS, page_size=64, dtype=torch.bfloat16):
    """Draw a batch over shuffled pages whose unused rows are NaN."""
    layout = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    capacity = sum(-(-length // page_size) for length in kv_lens)
    cache = LatentCache.allocate(layout, dims, capacity + 3, page_size, device="cuda")
    index = torch.zeros(capacity + len(kv_lens) + 1 + len(kv_lens), dtype=torch.int32).cuda()
    kv = PagedKV(cache, *index.split((len(kv_lens) + 1, capacity, len(kv_lens))))
    refill(kv, kv_lens)
    qo_indptr = indptr_of(torch.tensor(q_lens, dtype=torch.int32)).cuda()
    q = torch.randn(sum(q_lens), dims.num_heads, dims.latent_dim, device="cuda").to(dtype)
    return q[..., : dims.kv_lora_rank], q[..., dims.kv_lora_rank :], kv, qo_indptr


def refill(kv, kv_lens):
    """Give a batch new lengths, pages and data in place; every dead row becomes NaN."""
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    pages = pages_of(lens, kv.page_size)
    kv.kv_indptr.copy_(indptr_of(pages))
    kv.kv_last_page_len.copy_(lens - (pages - 1).clamp(min=0) * kv.page_size)
    total = int(pages.sum())
    kv.kv_page_indices[:total] = torch.randperm(kv.cache.num_pages)[:total].int().cuda()
    kv.check_values()
    rows = kv.cache.rows()
    rows.fill_(float("nan"))
    slots = kv.token_slots()
    slots = slots[slots >= 0]
    rows.flatten(0, 1)[slots] = torch.randn(len(slots), rows.shape[-1], device="cuda").to(
        rows.dtype
    )


def truth(ql_nope, q_pe, kv, qo_indptr, sm_scale):
    """Attend in fp64 on the GPU, request by request."""
    slots, lens = kv.token_slots(), kv.seq_lens.tolist()
    rows = [kv.cache.read(slots[b, :length]) for b, length in enumerate(lens)]
    return attention.decode(
        ql_nope,
        q_pe,
        [kv_c for kv_c, _ in rows],
        [k_pe for _, k_pe in rows],
        qo_indptr,
        sm_scale=sm_scale,
    )


def check(got, expected):
    out, lse = got
    assert_close(out, expected[0], what="out")
    assert_close(lse, expected[1], what="lse", tolerance=TOLERANCES["fp16"])


@pytest.mark.parametrize("num_heads", [1, 8, 16, 20, 32, 64, 96, 128])
@pytest.mark.parametrize("q_len", [1, 2, 4])
def test_long_ragged_batch(num_heads, q_len):
    dims = MLADims(num_heads)
    kv_lens = [5000, 1, 4096, 4097, 63, 64, 65, 17000]
    ql_nope, q_pe, kv, qo_indptr = random_batch(kv_lens, [q_len] * 8, dims)
    plan = plan_decode(dims, qo_indptr, kv, backend="triton")
    got = decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale, return_lse=True)
    check(got, truth(ql_nope, q_pe, kv, qo_indptr, dims.sm_scale))


@pytest.mark.parametrize("page_size", [1, 3, 16, 32, 64, 100, 128, 256])
def test_page_sizes(page_size):
    ql_nope, q_pe, kv, qo_indptr = random_batch([1500, 700, 1], [2, 1, 3], page_size=page_size)
    plan = plan_decode(DIMS, qo_indptr, kv, backend="triton")
    got = decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, return_lse=True)
    check(got, truth(ql_nope, q_pe, kv, qo_indptr, DIMS.sm_scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_heads", [4, 64])
def test_other_dtypes(dtype, num_heads):
    dims = MLADims(num_heads)
    ql_nope, q_pe, kv, qo_indptr = random_batch([1500, 700, 1], [1, 1, 1], dims, dtype=dtype)
    plan = plan_decode(dims, qo_indptr, kv, q_dtype=dtype, backend="triton")
    got = decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale, return_lse=True)
    check(got, truth(ql_nope, q_pe, kv, qo_indptr, dims.sm_scale))


@pytest.mark.parametrize("num_kv_splits", [1, 8])
def test_graph_replays_with_changed_lengths(num_kv_splits):
    """Capture once, then change lengths, pages and queries in place and replay."""
    ql_nope, q_pe, kv, qo_indptr = random_batch([700, 3000, 2000, 1], [2, 1, 2, 2])
    plan = plan_decode(
        DIMS,
        qo_indptr,
        kv,
        total_q=7,
        max_seqlen_q=3,
        max_seqlen_k=4096,
        num_kv_splits=num_kv_splits,
        backend="triton",
    )
    out = poison_(torch.empty(7, 16, 512, dtype=torch.bfloat16, device="cuda"))
    lse = poison_(torch.empty(7, 16, device="cuda"))

    def step():
        decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, out=out, lse=lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    check((out, lse), truth(ql_nope, q_pe, kv, qo_indptr, DIMS.sm_scale))
    for kv_lens, q_lens in (
        ([100, 2900, 0, 1], [1, 3, 1, 2]),
        ([3000, 20, 2000, 641], [3, 0, 3, 1]),
        ([0, 0, 0, 1], [2, 1, 2, 2]),
    ):
        refill(kv, kv_lens)
        qo_indptr.copy_(indptr_of(torch.tensor(q_lens, dtype=torch.int32)))
        ql_nope.copy_(torch.randn_like(ql_nope))
        poison_(out)
        poison_(lse)
        graph.replay()
        check((out, lse), truth(ql_nope, q_pe, kv, qo_indptr, DIMS.sm_scale))


@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_graph_makes_its_work_list_again(num_heads, page_size):
    """Capture planning on the device with two layers, then change lengths in place and replay."""
    dims = MLADims(num_heads)
    batch = random_batch([700, 3000, 2000, 1], [2, 1, 2, 2], dims, page_size)
    ql_nope, q_pe, kv, qo_indptr = batch
    bounds = {"total_q": 7, "max_seqlen_q": 3, "max_seqlen_k": 4096}
    plan = plan_decode(dims, qo_indptr, kv, persistent=True, backend="triton", **bounds)
    out = poison_(torch.empty(2, 7, num_heads, 512, dtype=torch.bfloat16, device="cuda"))
    lse = poison_(torch.empty(2, 7, num_heads, device="cuda"))

    def step():
        replan(plan, kv)
        for layer in range(2):
            decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, out=out[layer], lse=lse[layer])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kv_lens, q_lens in (
        ([700, 3000, 2000, 1], [2, 1, 2, 2]),
        ([100, 2900, 0, 1], [1, 3, 1, 2]),
        ([3000, 20, 2000, 641], [3, 0, 3, 1]),
        ([0, 0, 0, 1], [2, 1, 2, 2]),
        ([1, 5690, 0, 3], [1, 3, 2, 1]),
    ):
        refill(kv, kv_lens)
        qo_indptr.copy_(indptr_of(torch.tensor(q_lens, dtype=torch.int32)))
        ql_nope.copy_(torch.randn_like(ql_nope))
        poison_(out)
        poison_(lse)
        graph.replay()
        expected = truth(ql_nope, q_pe, kv, qo_indptr, DIMS.sm_scale)
        for layer in range(2):
            check((out[layer], lse[layer]), expected)


@pytest.mark.parametrize("fixed_lengths", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("num_heads", [1, 16, 20, 64, 128])
@pytest.mark.parametrize("q_len", [1, 4])
def test_work_lists_of_a_long_ragged_batch(fixed_lengths, num_heads, q_len):
    dims = MLADims(num_heads)
    kv_lens = [5000, 1, 0, 4097, 63, 64, 65, 40000]
    ql_nope, q_pe, kv, qo_indptr = random_batch(kv_lens, [q_len] * 8, dims)
    plan = plan_decode(
        dims, qo_indptr, kv, persistent=True, fixed_lengths=fixed_lengths, backend="triton"
    )
    runs = [
        decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale, return_lse=True) for _ in range(3)
    ]
    check(runs[0], truth(ql_nope, q_pe, kv, qo_indptr, dims.sm_scale))
    for again in runs[1:]:
        assert torch.equal(runs[0][0], again[0])
        assert torch.equal(runs[0][1], again[1])


def test_replanning_reads_nothing():
    ql_nope, q_pe, kv, qo_indptr = random_batch([3000, 100], [1, 1])
    bounds = {"total_q": 2, "max_seqlen_q": 1, "max_seqlen_k": 3000}
    plan = plan_decode(DIMS, qo_indptr, kv, persistent=True, backend="triton", **bounds)
    out = decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale)  # compiles
    with no_sync():
        plan = plan_decode(DIMS, qo_indptr, kv, persistent=True, backend="triton", **bounds)
        replan(plan, kv)
        decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, out=out)


@pytest.mark.parametrize("kernel", ["planned", "portable", "work list"])
@pytest.mark.large
def test_cache_past_4_gib_of_elements(kernel):
    """Pages whose element offset needs more than 32 bits, beside pages at the start."""
    page_size, num_pages = 64, 2**32 // (64 * 576) + 4000  # about 8.9 GB
    buffer = torch.empty(num_pages, page_size, 576, dtype=torch.bfloat16, device="cuda")
    cache = LatentCache.bind("bf16", DIMS, page_size, buffer)
    far = torch.arange(num_pages - 10, num_pages, dtype=torch.int32)
    table = torch.stack([far, torch.arange(10, dtype=torch.int32)]).cuda()
    buffer[table.flatten().long()] = torch.randn(20, 64, 576, device="cuda").bfloat16()
    lens = torch.tensor([630, 640], dtype=torch.int32, device="cuda")
    kv = PagedKV.from_block_table(cache, table, lens)
    qo_indptr = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    for num_heads in (16, 128):
        dims = DIMS.with_heads(num_heads)
        q = torch.randn(2, num_heads, 576, device="cuda").bfloat16()
        persistent = kernel == "work list"
        plan = plan_decode(dims, qo_indptr, kv, persistent=persistent, backend="triton")
        if kernel == "portable":
            plan = with_config(plan, tuning.choose(plan.request))
            assert plan.schedule.kernel == "flash_decode"
        got = decode(q[..., :512], q[..., 512:], kv, plan, sm_scale=DIMS.sm_scale, return_lse=True)
        check(got, truth(q[..., :512], q[..., 512:], kv, qo_indptr, DIMS.sm_scale))


def test_batch_invariant_bits():
    """A request alone gives the bits it gives among others."""
    ql_nope, q_pe, kv, qo_indptr = random_batch([3000, 100, 9000], [1, 2, 1])
    plan = plan_decode(DIMS, qo_indptr, kv, batch_invariant=True, backend="triton")
    out, lse = decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, return_lse=True)
    count = int(kv.kv_indptr[3] - kv.kv_indptr[2])
    first = int(kv.kv_indptr[2])
    alone = replace(
        kv,
        kv_indptr=torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        kv_page_indices=kv.kv_page_indices[first : first + count].clone(),
        kv_last_page_len=kv.kv_last_page_len[2:].clone(),
    )
    one = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    plan = plan_decode(DIMS, one, alone, batch_invariant=True, backend="triton")
    out_alone, lse_alone = decode(
        ql_nope[3:], q_pe[3:], alone, plan, sm_scale=DIMS.sm_scale, return_lse=True
    )
    assert torch.equal(out[3:], out_alone)
    assert torch.equal(lse[3:], lse_alone)


def test_runs_are_bitwise_equal():
    ql_nope, q_pe, kv, qo_indptr = random_batch([3000, 100, 9000], [1, 2, 1])
    plan = plan_decode(DIMS, qo_indptr, kv, backend="triton")
    runs = [decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_plan_reads_nothing_when_given_bounds():
    """With all bounds given, planning and running work under a sync detector."""
    ql_nope, q_pe, kv, qo_indptr = random_batch([3000, 100], [1, 1])
    bounds = {"total_q": 2, "max_seqlen_q": 1, "max_seqlen_k": 3000}
    plan = plan_decode(DIMS, qo_indptr, kv, backend="triton", **bounds)
    out = decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale)  # compiles
    with no_sync():
        plan = plan_decode(DIMS, qo_indptr, kv, backend="triton", **bounds)
        decode(ql_nope, q_pe, kv, plan, sm_scale=DIMS.sm_scale, out=out)


@pytest.mark.parametrize(("kv_lora_rank", "rope"), [(256, 32), (512, 0), (448, 64), (1024, 64)])
def test_other_dims(kv_lora_rank, rope):
    dims = MLADims(40, kv_lora_rank, rope)
    ql_nope, q_pe, kv, qo_indptr = random_batch([700, 130], [1, 2], dims)
    plan = plan_decode(dims, qo_indptr, kv, backend="triton")
    config = tuning.DecodeConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)
    plan = with_config(plan, config, num_kv_splits=3)
    got = decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale, return_lse=True)
    check(got, truth(ql_nope, q_pe, kv, qo_indptr, dims.sm_scale))
