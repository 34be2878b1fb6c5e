"""Dense decode: the conformance suite on the planned kernel, then what it does not reach."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from mla_core.arch import arch_of
from mla_core.batch import indptr_of
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases, plan_case
from mla_core.testing.conformance import run_case as run
from mla_core.testing.poison import poison_
from mla_triton import tuning
from mla_triton.decode import launch_decode, with_config

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


plan_of = partial(plan_case, backend="triton")


def check(got, inputs):
    assert_close(got[0], inputs.expected_out, what="out")
    assert_close(got[1], inputs.expected_lse, what="lse", tolerance=TOLERANCES["fp16"])


@pytest.mark.parametrize("case", decode_cases("triton", arch_of(DEVICE)), ids=str)
def test_conformance(case):
    check_decode("triton", case, DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        DecodeCase("rows_over_blocks", (40, 0, 9), (3, 1, 2), dims=MLADims(20, 256)),
        DecodeCase("odd_rank", (40, 9), dims=MLADims(3, 448, 32), page_size=3),
        DecodeCase("no_rope", (40, 9), dims=MLADims(3, 96, 0), page_size=64),
        DecodeCase("rope_6", (40, 9), dims=MLADims(3, 32, 6), layout="fp32", q_dtype="fp32"),
        DecodeCase("sink", (40, 0), (2, 1), dims=MLADims(3, 64), has_sink=True),
        DecodeCase(
            "everything",
            (90, 33, 5),
            (3, 1, 2),
            dims=MLADims(3, 64),
            options=AttentionOptions(window=20, softcap=3.0),
            has_sink=True,
        ),
        DecodeCase("non_causal", (40,), (3,), options=AttentionOptions(causal=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_kv_splits", [1, 3])
def test_small_tiles(case, num_kv_splits, seed):
    case = replace(case, seed=seed)
    inputs = case.build(DEVICE)
    config = tuning.DecodeConfig(**SMALL)
    plan = with_config(plan_of(case, inputs), config, num_kv_splits)
    for workspace in plan.workspace.values():
        poison_(workspace)
    check(run(inputs, plan, return_lse=True), inputs)


@pytest.mark.parametrize("num_kv_splits", [1, 2])
def test_lse_is_optional(num_kv_splits, seed):
    case = DecodeCase("no_lse", (40, 3), dims=MLADims(2, 64), seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, num_kv_splits=num_kv_splits)
    assert_close(run(inputs, plan), inputs.expected_out, what="out")


@pytest.mark.parametrize("num_kv_splits", [1, 2])
def test_strides_of_outputs_and_queries(num_kv_splits, seed):
    case = DecodeCase("strided", (40, 3), (2, 1), dims=MLADims(3, 64, 32), seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, num_kv_splits=num_kv_splits)
    wide = torch.full((3, 3, 100), 7.0, dtype=torch.bfloat16, device=DEVICE)
    wide_lse = torch.full((3, 5), 7.0, device=DEVICE)
    padded = torch.nn.functional.pad(inputs.ql_nope.transpose(0, 1), (8, 8))
    ql_nope = padded[..., 8:-8].transpose(0, 1)
    out, lse = wide.transpose(0, 1)[..., 3:67], wide_lse[:, 1:4]
    check(run(replace(inputs, ql_nope=ql_nope), plan, out=out, lse=lse), inputs)
    assert (wide[..., :3] == 7).all()
    assert (wide[..., 67:] == 7).all()
    assert (wide_lse[:, [0, 4]] == 7).all()


def test_lengths_are_read_when_running(seed):
    """One plan serves other lengths, pages and query counts written in place, as in a graph."""
    case = DecodeCase("longest", (70, 40), (2, 1), dims=MLADims(2, 64), page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, num_kv_splits=2, total_q=3, max_seqlen_q=2, max_seqlen_k=70)
    other = DecodeCase("later", (17, 50), (1, 2), dims=case.dims, page_size=16, seed=seed + 1)
    later = other.build(DEVICE)
    plan.qo_indptr.copy_(later.qo_indptr)
    check(run(later, plan, return_lse=True), later)


def test_separate_latent_and_rope_buffers(seed):
    case = DecodeCase("separate", (40, 3), dims=MLADims(2, 64, 32), page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, num_kv_splits=1)
    rows = inputs.kv.cache.rows()
    out = torch.empty_like(inputs.ql_nope)
    lse = torch.empty(out.shape[:2], device=DEVICE)
    launch_decode(
        inputs.ql_nope,
        inputs.q_pe,
        rows[..., :64].contiguous(),
        rows[..., 64:].contiguous(),
        inputs.qo_indptr,
        inputs.kv.kv_indptr,
        inputs.kv.kv_page_indices,
        inputs.kv.kv_last_page_len,
        out=out[:, None],
        lse=lse[:, None],
        sink=None,
        sm_scale=inputs.sm_scale,
        max_seqlen_q=1,
        options=case.options,
        schedule=plan.schedule,
    )
    check((out, lse), inputs)


def test_batch_invariant_bits(seed):
    """A request alone gives the bits it gives among others."""
    case = DecodeCase("mates", (300, 20), (1, 3), dims=MLADims(2, 64), page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    together = run(inputs, plan_of(case, inputs, batch_invariant=True), return_lse=True)
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
        qo_indptr=indptr_of(torch.tensor([1])).to(DEVICE),
    )
    got = run(alone, plan_of(case, alone, batch_invariant=True), return_lse=True)
    assert torch.equal(got[0], together[0][:1])
    assert torch.equal(got[1], together[1][:1])


def test_plan_explains_itself(seed):
    case = DecodeCase("plan", (5000,), dims=MLADims(16), page_size=64, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs)
    assert plan.num_kv_splits > 1
    assert "multiprocessors" in str(plan)
    for name, value in plan.schedule.config.items():
        assert f"{name}={value}" in str(plan)
    assert plan_of(case, inputs, num_kv_splits=5).num_kv_splits == 5
    assert plan_of(case, inputs, batch_invariant=True).schedule.because.startswith("fixed by")


@pytest.mark.parametrize("num_kv_splits", [1, 3])
def test_rows_before_every_window_may_hold_nan(num_kv_splits):
    case = DecodeCase("window", (100, 5), (3, 2), options=AttentionOptions(window=24))
    inputs = case.build(DEVICE)
    hidden = inputs.kv.token_slots()[0, : 100 - 2 - 24]
    poison = torch.full((hidden.numel(), case.dims.latent_dim), torch.nan, device=DEVICE)
    rank = case.dims.kv_lora_rank
    inputs.kv.cache.write(poison[:, :rank], poison[:, rank:], hidden)
    check(run(inputs, plan_of(case, inputs, num_kv_splits=num_kv_splits), return_lse=True), inputs)
