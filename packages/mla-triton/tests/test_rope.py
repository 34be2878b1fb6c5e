"""Fused RoPE in Triton, where the conformance cases do not reach."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from mla_core import AttentionOptions, FusedRope
from mla_core.dims import MLADims
from mla_core.rope import RopeInputs
from mla_core.testing.assertions import assert_close
from mla_core.testing.cases import MAX_POSITION, DecodeCase
from mla_core.testing.conformance import plan_case
from mla_core.testing.conformance import run_case as run
from mla_core.testing.poison import poison_

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIMS = MLADims(3, 64, 32)
KEPT = AttentionOptions(rope=FusedRope(False, 32))
STORED = AttentionOptions(rope=FusedRope(False, 32, write_back=True))


plan_of = partial(plan_case, backend="triton")


@pytest.mark.parametrize("options", [KEPT, STORED], ids=["kept", "stored"])
def test_lengths_and_positions_are_read_when_running(seed, options):
    """One plan serves other lengths, pages, query counts and positions, as in a graph."""
    case = DecodeCase("longest", (70, 40), (2, 1), DIMS, options=options, seed=6 * seed)
    inputs = case.build(DEVICE)
    bounds = {"total_q": 3, "max_seqlen_q": 2, "max_seqlen_k": 70}
    plan = plan_of(case, inputs, num_kv_splits=2, **bounds)
    other = DecodeCase("later", (17, 50), (1, 2), DIMS, options=options, seed=6 * seed + 1)
    later = other.build(DEVICE)
    plan.qo_indptr.copy_(later.qo_indptr)
    for workspace in plan.workspace.values():
        poison_(workspace)
    assert_close(run(later, plan), later.expected_out, what="out")


@pytest.mark.parametrize("options", [KEPT, STORED], ids=["kept", "stored"])
@pytest.mark.parametrize("wild", [MAX_POSITION, -1, 1 << 40])
def test_a_wild_position_spoils_its_own_request_alone(monkeypatch, seed, options, wild):
    """Where nobody may look at values, nothing is read past the table and the rows become NaN."""
    monkeypatch.setattr(RopeInputs, "check_values", lambda *_: None)
    case = DecodeCase("wild", (40, 9, 20), (2, 1, 1), DIMS, options=options, seed=6 * seed + 3)
    inputs = case.build(DEVICE)
    assert inputs.positions.dtype == torch.int64
    positions = inputs.positions.clone()
    positions[2] = wild
    k_pe_tokens = torch.zeros(4, 32, device=DEVICE)
    out = run(replace(inputs, positions=positions), plan_of(case, inputs), k_pe_tokens=k_pe_tokens)
    mine = torch.tensor([False, False, True, False], device=DEVICE)
    assert out[mine].isnan().all()
    assert k_pe_tokens[mine].isnan().all()
    assert_close(out[~mine], inputs.expected_out[~mine.cpu()], what="out")


@pytest.mark.parametrize("options", [KEPT, STORED], ids=["kept", "stored"])
def test_fp8_keys_saturate(options):
    """A pair of largest values turned by 45 degrees is larger than fp8 holds."""
    case = DecodeCase("largest", (20, 3), (2, 1), DIMS, layout="fp8", options=options)
    inputs = case.build(DEVICE)
    slots = inputs.kv.token_slots()[[0, 0, 1], [18, 19, 2]]
    largest = 448.0 * float(inputs.kv.cache.scale)
    inputs.kv.cache.write_rope(torch.full((3, 32), largest, device=DEVICE), slots)
    table = torch.full((MAX_POSITION, 32), 0.5**0.5, device=DEVICE)
    inputs = replace(inputs, cos_sin_cache=table)
    before = inputs.kv.cache.buffers[0].clone()
    results = {}
    for backend in ("reference", "triton"):
        inputs.kv.cache.buffers[0].copy_(before)
        k_pe_tokens = torch.empty(3, 32, device=DEVICE)
        plan = plan_of(case, inputs, backend=backend)
        out = run(inputs, plan, k_pe_tokens=k_pe_tokens)
        results[backend] = out, k_pe_tokens, inputs.kv.cache.read(slots)[1]
    # (a, b) becomes (0, sqrt(2) a), of which fp8 holds a.
    assert results["triton"][1][:, 1::2].eq(largest).all()
    assert_close(results["triton"][0], results["reference"][0], what="out")
    for got, want in zip(results["triton"][1:], results["reference"][1:], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotated_keys_may_go_to_strided_memory_of_any_dtype(seed, dtype):
    case = DecodeCase("strided", (40, 3), (2, 1), DIMS, options=KEPT, seed=seed)
    inputs = case.build(DEVICE)
    wide = torch.full((3, 50), 7.0, dtype=dtype, device=DEVICE)
    run(inputs, plan_of(case, inputs), k_pe_tokens=wide[:, 9:41])
    assert_close(wide[:, 9:41], inputs.expected_k_pe_tokens, what="k_pe_tokens", dtype="bf16")
    assert (wide[:, :9] == 7).all()
    assert (wide[:, 41:] == 7).all()


def test_bits_do_not_depend_on_writing_back(seed):
    outs = []
    for options in (KEPT, STORED):
        case = DecodeCase("bits", (300, 20), (1, 3), DIMS, options=options, seed=seed)
        inputs = case.build(DEVICE)
        outs.append(run(inputs, plan_of(case, inputs, num_kv_splits=3)))
    assert torch.equal(*outs)
