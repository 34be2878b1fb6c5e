"""The public ops: outputs in place, refused input, custom ops, torch.compile."""

from __future__ import annotations

import sys

import pytest
import torch

import mla_core
from mla_core import AttentionOptions, LatentCache, LayoutError, MLADims, PagedKV, plan
from mla_core.ops import library
from mla_core.testing.assertions import assert_close

DIMS = MLADims(4, kv_lora_rank=64, qk_rope_head_dim=32)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(seed: int = 0, dtype: torch.dtype = torch.float32, kv_lens=(21, 0, 16), **plan_options):
    torch.manual_seed(seed)
    cache = LatentCache.allocate("fp32", DIMS, 4, 16)
    mla_core.write_kv_cache(torch.randn(64, 64), torch.randn(64, 32), cache, torch.arange(64))
    table = i32(3, 1, 0, 2, 2, 0).view(3, 2)
    kv = PagedKV.from_block_table(cache, table, i32(*kv_lens))
    qo_indptr = i32(0, 2, 3, 4)
    q = torch.randn(4, 4, 96).to(dtype)
    plan = mla_core.plan_decode(
        DIMS, qo_indptr, kv, q_dtype=dtype, backend="reference", **plan_options
    )
    return {"ql_nope": q[..., :64], "q_pe": q[..., 64:], "kv": kv, "plan": plan, "sm_scale": 0.2}


def test_outputs_are_written_in_place():
    arguments = make()
    want, want_lse = mla_core.decode(**arguments, return_lse=True)
    out, lse = torch.empty(4, 4, 64), torch.empty(4, 4)
    got, got_lse = mla_core.decode(**arguments, out=out, lse=lse)
    assert got is out
    assert got_lse is lse
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert torch.equal(mla_core.decode(**arguments), want)


def test_output_may_have_another_dtype_and_strides():
    arguments = make()
    want = mla_core.decode(**arguments)
    out = torch.empty(4, 9, 64, dtype=torch.bfloat16)[:, 2:6]
    mla_core.decode(**arguments, out=out)
    assert torch.equal(out, want.bfloat16())


def test_lengths_promised_to_stay_must_stay():
    arguments = make(fixed_lengths=True)
    want = mla_core.decode(**make())
    assert torch.equal(mla_core.decode(**arguments), want)
    arguments["kv"].kv_last_page_len[0] += 1
    with pytest.raises(LayoutError, match="seq_lens must stay as the plan's fixed_lengths"):
        mla_core.decode(**arguments)
    arguments = make(fixed_lengths=True)
    arguments["plan"].qo_indptr[1] -= 1
    with pytest.raises(LayoutError, match=r"query lengths in .* must stay"):
        mla_core.decode(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ql_nope": torch.randn(4, 4, 63)}, r"ql_nope must be \[total_q, 4, 64\]"),
        ({"ql_nope": torch.randn(4, 5, 64)}, r"ql_nope must be \[total_q, 4, 64\]"),
        ({"ql_nope": torch.randn(4, 4, 64).half()}, r"ql_nope must be float32, got torch.float16"),
        ({"ql_nope": torch.randn(4, 64, 4).mT}, r"ql_nope must have a contiguous last dimension"),
        ({"ql_nope": torch.randn(3, 4, 64), "q_pe": torch.randn(3, 4, 32)}, r"total_q=4 rows"),
        ({"q_pe": torch.randn(4, 4, 31)}, r"q_pe must be \[4, 4, 32\]"),
        ({"sink": torch.zeros(4)}, r"sink must be None to match the plan's has_sink=False"),
        ({"q_scale": torch.ones(1)}, r"q_scale must be None for torch.float32 queries"),
        ({"global_kv_lens": i32(1, 2, 3)}, r"global_kv_lens must be given if and only if"),
        ({"out": torch.zeros(4, 4, 65)}, r"out must be \[4, 4, 64\], got shape \(4, 4, 65\)"),
        ({"out": torch.zeros(4, 4, 64, dtype=torch.int32)}, r"out must be bfloat16 or float16"),
        ({"lse": torch.zeros(4, 4).half()}, r"lse must be float32"),
        ({"out": torch.zeros(4, 4, 64, device="meta")}, r"out must be on cpu, got meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        mla_core.decode(**{**make(), **change})


def test_a_batch_that_is_not_the_planned_one_is_refused():
    arguments = make()
    other = LatentCache.allocate("bf16", DIMS, 4, 16)
    kv = arguments["kv"]
    wrong_dtype = PagedKV(other, kv.kv_indptr, kv.kv_page_indices, kv.kv_last_page_len)
    with pytest.raises(LayoutError, match="kv must have kv_dtype=fp32 like the plan, got bf16"):
        mla_core.decode(**{**arguments, "kv": wrong_dtype})
    narrow = LatentCache.allocate("fp32", MLADims(4, kv_lora_rank=32, qk_rope_head_dim=32), 4, 16)
    wrong_width = PagedKV(narrow, kv.kv_indptr, kv.kv_page_indices, kv.kv_last_page_len)
    with pytest.raises(LayoutError, match="kv must have kv_lora_rank=64 like the plan, got 32"):
        mla_core.decode(**{**arguments, "kv": wrong_width})
    fewer = PagedKV(kv.cache, kv.kv_indptr[:3], kv.kv_page_indices, kv.kv_last_page_len[:2])
    with pytest.raises(LayoutError, match="kv must have batch_size=3 like the plan, got 2"):
        mla_core.decode(**{**arguments, "kv": fewer})


def test_missing_tensors_are_refused():
    with pytest.raises(LayoutError, match="sink must be given to match the plan's has_sink=True"):
        mla_core.decode(**make(has_sink=True))
    options = AttentionOptions(cp_world_size=2)
    with pytest.raises(LayoutError, match="global_kv_lens must be given if and only if"):
        mla_core.decode(**make(options=options))
    with pytest.raises(LayoutError, match=r"q_scale must be given for torch.float8_e4m3fn queries"):
        mla_core.decode(**make(dtype=torch.float8_e4m3fn))


def test_check_finds_a_nan_in_a_live_row(monkeypatch):
    arguments = make()
    monkeypatch.setenv("MLA_CHECK", "1")
    mla_core.decode(**arguments)
    cache = arguments["kv"].cache
    cache.write(torch.full((1, 64), torch.nan), torch.zeros(1, 32), torch.tensor([50]))
    with pytest.raises(LayoutError, match="must not hold NaN, got one in slot 50"):
        mla_core.decode(**arguments)
    cache.write(torch.zeros(1, 64), torch.zeros(1, 32), torch.tensor([50]))
    arguments["kv"].kv_page_indices[0] = 99
    with pytest.raises(LayoutError, match=r"kv_page_indices must be in -1..3, got 99"):
        mla_core.decode(**arguments)


def test_a_plan_serves_a_batch_whose_lengths_change_in_place():
    arguments = make()
    kv = arguments["kv"]
    mla_core.decode(**arguments)
    longer = PagedKV.from_block_table(kv.cache, i32(2, 0, 1, 3, 1, 3).view(3, 2), i32(32, 7, 1))
    for name in ("kv_indptr", "kv_page_indices", "kv_last_page_len"):
        getattr(kv, name).copy_(getattr(longer, name))
    got = mla_core.decode(**arguments)
    fresh = mla_core.plan_decode(
        DIMS, arguments["plan"].qo_indptr, longer, q_dtype=torch.float32, backend="reference"
    )
    assert torch.equal(got, mla_core.decode(**{**arguments, "kv": longer, "plan": fresh}))


# --- torch.library and torch.compile ----------------------------------------------------------


def test_dims_survive_the_flat_form():
    for dims in mla_core.MODELS.values():
        assert library.restore_dims(library.flatten_dims(dims)) == dims


def step(kv_c, k_pe, slots, ql_nope, q_pe, kv, plan, sm_scale):
    mla_core.write_kv_cache(kv_c, k_pe, kv.cache, slots)
    out, lse = mla_core.decode(ql_nope, q_pe, kv, plan, sm_scale=sm_scale, return_lse=True)
    return out * 2, lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_decode_step_compiles_in_one_graph(backend):
    arguments = make()
    new = {
        "kv_c": torch.randn(2, 64),
        "k_pe": torch.randn(2, 32),
        "slots": torch.tensor([52, -1]),
    }
    want = step(**new, **arguments)
    before = arguments["kv"].cache.buffers[0].clone()
    arguments["kv"].cache.write(torch.zeros(1, 64), torch.zeros(1, 32), torch.tensor([52]))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got = compiled(**new, **arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(arguments["kv"].cache.buffers[0], before)


@pytest.mark.parametrize("num_kv_splits", [None, 3])
def test_a_compiled_step_asks_for_the_schedule_of_its_plan(monkeypatch, num_kv_splits):
    arguments = make(num_kv_splits=num_kv_splits, max_seqlen_k=999)
    asked = []

    def build_plan(request, *others):
        asked.append(request)
        return plan.build_plan(request, *others)

    monkeypatch.setattr(sys.modules["mla_core.ops.decode"], "build_plan", build_plan)
    torch.compile(mla_core.decode, backend="eager", fullgraph=True)(**arguments)
    assert asked == [arguments["plan"].request]


def test_check_finds_a_nan_in_a_compiled_step(monkeypatch):
    arguments = make()
    arguments["kv"].cache.write(
        torch.full((1, 64), torch.nan), torch.zeros(1, 32), torch.tensor([50])
    )
    run = torch.compile(mla_core.decode, backend="eager", fullgraph=True)
    run(**arguments)
    monkeypatch.setenv("MLA_CHECK", "1")
    with pytest.raises(LayoutError, match="must not hold NaN, got one in slot 50"):
        run(**arguments)


def test_new_plans_do_not_recompile_for_ever():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mla_core.decode, fullgraph=True, backend=counter)
    for seed, lens in enumerate([(21, 0, 16), (5, 9, 1), (32, 31, 30), (1, 1, 1), (0, 0, 4)]):
        arguments = make(seed, kv_lens=lens)
        assert_close(compiled(**arguments), mla_core.decode(**arguments), what="out")
    assert counter.frame_count <= 2


def test_sparse_decode_and_prefill_compile():
    arguments = make()
    cache = arguments["kv"].cache
    indices = torch.randint(64, (4, 10), dtype=torch.int32)
    cu = i32(0, 3, 4)
    k, v = torch.randn(4, 4, 96), torch.randn(4, 4, 16)

    def both(ql_nope, q_pe, k):
        sparse = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=0.2)
        dense = mla_core.prefill(torch.cat((ql_nope, q_pe), -1), k, v, cu, cu, sm_scale=0.2)
        return sparse, dense

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    k.requires_grad_()
    inputs = arguments["ql_nope"], arguments["q_pe"], k
    for got, want in zip(compiled(*inputs), both(*inputs), strict=True):
        assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(compiled(*inputs)[1].square().sum(), k)
    (want_grad,) = torch.autograd.grad(both(*inputs)[1].square().sum(), k)
    assert_close(grad, want_grad, what="grad of k")


@pytest.mark.parametrize("ragged", [False, True])
def test_reduce_partials_compiles(ragged):
    torch.manual_seed(0)
    partial_out, partial_lse = torch.randn(6, 4, 8), torch.randn(6, 4)
    index = {"reduce_indptr": i32(0, 4, 4, 6), "partial_map": i32(5, 1, 2, 0, 3, 4)}
    if not ragged:
        partial_out, partial_lse, index = (
            partial_out.view(2, 3, 4, 8),
            partial_lse.view(2, 3, 4),
            {},
        )
    sink = torch.randn(4)
    torch._dynamo.reset()
    compiled = torch.compile(mla_core.reduce_partials, fullgraph=True, backend="aot_eager")
    got = compiled(partial_out, partial_lse, sink=sink, **index)
    want = mla_core.reduce_partials(partial_out, partial_lse, sink=sink, **index)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def captured_calls(monkeypatch, run):
    """Return the flat arguments of every custom op that a compiled function calls."""
    calls = []

    def record(graph, inputs):
        def replay(*args):
            interpreter = torch.fx.Interpreter(graph)
            original = interpreter.call_function

            def call(target, arguments, keywords):
                if getattr(target, "namespace", "") == "mla" or "mla." in str(target):
                    calls.append((target, arguments, keywords))
                return original(target, arguments, keywords)

            interpreter.call_function = call
            return interpreter.run(*args)

        return replay

    torch._dynamo.reset()
    torch.compile(run, fullgraph=True, backend=record)()
    return calls


def test_opcheck(monkeypatch):
    arguments = make()
    cache = arguments["kv"].cache
    indices = torch.randint(64, (4, 10), dtype=torch.int32)
    cu = i32(0, 3, 4)
    q, k = torch.randn(4, 4, 96), torch.randn(4, 4, 96, requires_grad=True)
    v = torch.randn(4, 4, 16)

    def run():
        mla_core.write_kv_cache(torch.ones(1, 64), torch.ones(1, 32), cache, torch.tensor([3]))
        dense = mla_core.decode(**arguments, return_lse=True)
        sparse = mla_core.sparse_decode(
            arguments["ql_nope"], arguments["q_pe"], cache, indices, sm_scale=0.2
        )
        out, lse = dense
        merged = mla_core.reduce_partials(
            out[:, None], lse[:, None], lse_base=mla_core.LseBase.TWO, out_dtype=torch.bfloat16
        )
        return merged, sparse, mla_core.prefill(q, k, v, cu, cu, sm_scale=0.2)

    calls = captured_calls(monkeypatch, run)
    names = {str(target).split(".")[1] for target, _, _ in calls}
    assert names == {"write_kv_cache", "decode", "sparse_decode", "prefill", "reduce_partials"}
    prefill = next(c for c in calls if "prefill" in str(c[0]))
    out, lse = prefill[0](*prefill[1])
    arguments = [t.detach() for t in (torch.randn_like(out), *prefill[1][:3], out, lse)]
    calls.append((torch.ops.mla.prefill_backward.default, (*arguments, *prefill[1][3:]), {}))
    for target, positional, keywords in calls:
        overload = target if hasattr(target, "_schema") else target.default
        results = torch.library.opcheck(overload, positional, keywords)
        assert set(results.values()) == {"SUCCESS"}, (target, results)
