"""The Hopper kernel over fp8 caches: every format, mask and way to deal out the work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_core import LatentCache, PagedKV, decode, plan_decode, use_backend, write_kv_cache
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions
from mla_core.reference import attention
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import plan_case, run_case
from mla_core.testing.poison import poison_
from mla_triton.hopper import Shares, with_shares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs an sm90 GPU",
    ),
]

LENS = (700, 0, 64, 1, 65, 330, 63, 128)
Q_LENS = (2, 1, 3, 1, 0, 4, 2, 1)
LAYOUTS = ("fp8", "fp8_seg576", "fp8_seg644", "fp8_seg656", "fp8_ds656")


def check_all(case):
    """Run a case whole, in three runs a request, and in three spans of all requests."""
    inputs = case.build("cuda")
    plan = plan_case(case, inputs, backend="triton")
    assert plan.schedule.kernel in ("hopper_packed", "hopper_converted"), plan
    batch_size = len(case.kv_lens)
    for shares in (Shares(batch_size, 1), Shares(3 * batch_size, 3), Shares(3, 0)):
        changed = with_shares(plan, shares)
        for workspace in changed.workspace.values():
            poison_(workspace)
        out, lse = run_case(inputs, changed, return_lse=True)
        # Products are in fp16, but in bf16 where scales of groups were multiplied in before.
        in_bf16 = plan.schedule.kernel == "hopper_converted" and inputs.kv.cache.scale is None
        tolerance = TOLERANCES["fp16" if out.dtype == torch.float16 else "bf16"]
        assert_close(out, inputs.expected_out, what=f"out, {shares}", tolerance=tolerance)
        tolerance = TOLERANCES["bf16" if in_bf16 else "fp16"]
        assert_close(lse, inputs.expected_lse, what=f"lse, {shares}", tolerance=tolerance)
    return inputs, plan


def queries_of(layout):
    """Return the dtypes of queries that meet a layout: its rotary keys are fp8 or bf16."""
    return ("bf16", "fp16", "fp8_e4m3") if layout in ("fp8", "fp8_seg576") else ("bf16", "fp8_e4m3")


@pytest.mark.parametrize(
    ("layout", "q_dtype"), [(layout, q) for layout in LAYOUTS for q in queries_of(layout)]
)
@pytest.mark.parametrize("num_heads", [1, 16, 20, 128])
def test_formats(layout, q_dtype, num_heads, seed):
    dims = MLADims(num_heads)
    check_all(DecodeCase("formats", LENS, Q_LENS, dims, 64, q_dtype, layout, seed=seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 3, 16, 192])
@pytest.mark.parametrize("num_heads", [16, 64])
def test_pages(layout, page_size, num_heads, seed):
    """Pages whose rows start at odd bytes are the portable kernel's, whose products are in bf16."""
    case = DecodeCase(
        "pages",
        LENS,
        Q_LENS,
        MLADims(num_heads),
        page_size,
        layout=layout,
        hidden_page=True,
        seed=seed,
    )
    if layout != "fp8_seg644" or page_size % 4 == 0:
        check_all(case)
        return
    inputs = case.build("cuda")
    plan = plan_case(case, inputs, backend="triton")
    assert plan.schedule.kernel == "flash_decode"
    out, lse = run_case(inputs, plan, return_lse=True)
    assert_close(out, inputs.expected_out, what="out", tolerance=TOLERANCES["bf16"])
    assert_close(lse, inputs.expected_lse, what="lse", tolerance=TOLERANCES["bf16"])


@pytest.mark.parametrize("num_heads", [2, 16, 24, 64])
@pytest.mark.parametrize("layout", ["fp8", "fp8_seg576"])
@pytest.mark.parametrize("q_dtype", ["bf16", "fp8_e4m3"])
def test_rank_256(num_heads, layout, q_dtype, seed):
    dims = MLADims(num_heads, 256, 64)
    check_all(DecodeCase("rank", LENS, Q_LENS, dims, 64, q_dtype, layout, seed=seed))


OPTIONS = {
    "non_causal": AttentionOptions(causal=False),
    "window": AttentionOptions(window=100),
    "softcap": AttentionOptions(softcap=3.0),
    "rank 2 of 3": AttentionOptions(cp_world_size=3, cp_rank=2),
    "everything": AttentionOptions(window=90, softcap=5.0, cp_world_size=2, cp_rank=1),
}


@pytest.mark.parametrize("layout", ["fp8", "fp8_ds656"])
@pytest.mark.parametrize("num_heads", [3, 16, 48])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks(options, num_heads, layout, seed):
    dims = MLADims(num_heads)
    case = DecodeCase("masks", LENS, Q_LENS, dims, 64, layout=layout, options=options, seed=seed)
    check_all(replace(case, has_sink=bool(options.softcap) or num_heads == 16))


@pytest.mark.parametrize("exponent", [-80, -40, 30])
@pytest.mark.parametrize("num_heads", [16, 64])
def test_scales_of_any_size(exponent, num_heads, seed):
    """Probabilities times scales stay inside fp16, whatever the scales."""
    dims = MLADims(num_heads)
    case = DecodeCase("scales", LENS, Q_LENS, dims, 64, layout="fp8_ds656", seed=seed)
    inputs = case.build("cuda")
    plan = plan_case(case, inputs, backend="triton")
    want, want_lse = run_case(inputs, plan, return_lse=True)
    factor = 2.0**exponent
    inputs.kv.cache.field("kv_c_scale").mul_(factor)
    q = (inputs.ql_nope.float() / factor).to(torch.bfloat16)
    got, lse = run_case(replace(inputs, ql_nope=q), plan, return_lse=True)
    assert_close(got.double() / factor, want.double(), what="out", tolerance=TOLERANCES["bf16"])
    assert_close(lse, want_lse, what="lse", tolerance=TOLERANCES["bf16"])


@pytest.mark.parametrize("num_heads", [16, 64])
def test_queries_of_any_size(num_heads, seed):
    """Rows whose elements do not fit fp16 as they are."""
    dims = MLADims(num_heads)
    case = DecodeCase("queries", LENS, Q_LENS, dims, 64, layout="fp8", seed=seed)
    inputs = case.build("cuda")
    plan = plan_case(case, inputs, backend="triton")
    want, want_lse = run_case(inputs, plan, return_lse=True)
    for exponent in (-60, 60):
        factor = 2.0**exponent
        scaled = replace(
            inputs,
            ql_nope=inputs.ql_nope * factor,
            q_pe=inputs.q_pe * factor,
            sm_scale=inputs.sm_scale / factor,
        )
        got, lse = run_case(scaled, plan, return_lse=True)
        assert torch.equal(got, want)
        assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("layout", "num_heads"), [("fp8", 16), ("fp8_seg656", 16), ("fp8", 64)])
@pytest.mark.large
def test_graph_over_a_cache_past_4_gib(layout, num_heads, page_size):
    """Replay with other lengths over pages whose byte offset needs more than 32 bits."""
    dims = MLADims(num_heads)
    num_pages = 2**32 // (page_size * 576) + 200
    scale = {"scale": torch.full((1,), 0.5, device="cuda")} if layout == "fp8" else {}
    cache = LatentCache.allocate(layout, dims, num_pages, page_size, device="cuda", **scale)
    far = num_pages - 100 + torch.arange(100, dtype=torch.int32)
    table = torch.stack([far, torch.arange(100, dtype=torch.int32)]).cuda()
    # Whole pages, so that replays change the length of the last.
    num_tokens = 40 * 16
    table = table[:, : num_tokens // page_size].contiguous()
    lens = torch.tensor([num_tokens, num_tokens], dtype=torch.int32, device="cuda")
    kv = PagedKV.from_block_table(cache, table, lens)
    slots = (table[:, :, None].long() * page_size + torch.arange(page_size).cuda()).flatten()
    kv_c, k_pe = torch.randn(2 * num_tokens, 576, device="cuda").bfloat16().split((512, 64), 1)
    with use_backend("reference"):
        write_kv_cache(kv_c.contiguous(), k_pe.contiguous(), cache, slots)
    qo_indptr = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    q = torch.randn(2, num_heads, 576, device="cuda").bfloat16()
    ql_nope, q_pe = q[..., :512], q[..., 512:]
    bounds = {"total_q": 2, "max_seqlen_q": 1, "max_seqlen_k": num_tokens}
    plan = plan_decode(dims, qo_indptr, kv, backend="triton", **bounds)
    assert plan.schedule.kernel == ("hopper_packed" if num_heads == 16 else "hopper_converted")
    out = torch.empty(2, num_heads, 512, dtype=torch.bfloat16, device="cuda")

    def step():
        decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for kept in (page_size - 2, page_size):
        kv.kv_last_page_len.fill_(kept)
        poison_(out)
        graph.replay()
        read = [cache.read(slots.view(2, -1)[b, :n]) for b, n in enumerate(kv.seq_lens.tolist())]
        expected, _ = attention.decode(
            *(ql_nope, q_pe, [row[0] for row in read], [row[1] for row in read], qo_indptr),
            sm_scale=dims.sm_scale,
        )
        assert_close(out, expected, what="out", tolerance=TOLERANCES["bf16"])


@pytest.mark.parametrize("num_heads", [16, 64])
def test_batch_invariant_bits(num_heads, seed):
    """A request alone gives the bits it gives among others."""
    dims = MLADims(num_heads)
    case = DecodeCase("mates", (3000, 20, 900), dims=dims, page_size=64, layout="fp8_ds656")
    inputs = replace(case, seed=seed).build("cuda")
    together = run_case(inputs, plan_case(case, inputs, backend="triton", batch_invariant=True))
    count = int(inputs.kv.kv_indptr[1])
    alone = replace(
        inputs,
        ql_nope=inputs.ql_nope[:1],
        q_pe=inputs.q_pe[:1],
        kv=replace(
            inputs.kv,
            kv_indptr=inputs.kv.kv_indptr[:2].clone(),
            kv_page_indices=inputs.kv.kv_page_indices[:count].clone(),
            kv_last_page_len=inputs.kv.kv_last_page_len[:1].clone(),
        ),
        qo_indptr=inputs.qo_indptr[:2].clone(),
    )
    got = run_case(alone, plan_case(case, alone, backend="triton", batch_invariant=True))
    assert torch.equal(got, together[:1])
