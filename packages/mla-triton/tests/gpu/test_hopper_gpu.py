"""The Hopper kernels on hostile batches: every mask, tile width and way to deal out the work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_core.batch import indptr_of
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions
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


def plan_of(case, inputs, **arguments):
    plan = plan_case(case, inputs, backend="triton", **arguments)
    assert plan.schedule.kernel.startswith("hopper"), plan
    return plan


def check(case, inputs, plan, **arguments):
    for workspace in plan.workspace.values():
        poison_(workspace)
    got = run_case(inputs, plan, return_lse=True, **arguments)
    # The products are those of the cache's dtype, whatever the output is rounded to.
    tolerance = TOLERANCES[case.q_dtype]
    assert_close(got[0], inputs.expected_out, what="out", tolerance=tolerance)
    assert_close(got[1], inputs.expected_lse, what="lse", tolerance=TOLERANCES["fp16"])
    return got


def shares_of(plan, name):
    batch_size = plan.request.batch_size
    row_blocks = plan.schedule.config["row_blocks"]
    return {
        "whole": Shares(batch_size, 1),
        "3 runs": Shares(3 * batch_size, 3),
        "16 runs": Shares(16 * batch_size, 16, 2),
        "line": Shares(max(1, 132 // row_blocks), 0),
        "line of 3": Shares(3, 0),
    }[name]


SCHEDULES = ("whole", "3 runs", "16 runs", "line", "line of 3")


@pytest.mark.parametrize("num_heads", [1, 5, 8, 12, 16, 20, 40, 64, 96, 128])
def test_heads(num_heads, seed):
    case = DecodeCase("heads", LENS, Q_LENS, dims=MLADims(num_heads), page_size=64, seed=seed)
    inputs = case.build("cuda")
    plan = plan_of(case, inputs)
    for schedule in SCHEDULES:
        check(case, inputs, with_shares(plan, shares_of(plan, schedule)))


@pytest.mark.parametrize("num_heads", [2, 16, 24, 64])
@pytest.mark.parametrize(
    ("rank", "rope", "dtype", "page_size"),
    [
        (512, 64, "fp16", 64),
        (512, 64, "bf16", 1),
        (512, 32, "bf16", 192),
        (512, 32, "fp16", 3),
        (256, 64, "bf16", 16),
        (256, 32, "fp16", 64),
    ],
)
def test_widths_and_pages(rank, rope, dtype, num_heads, page_size, seed):
    dims = MLADims(num_heads, rank, rope)
    case = DecodeCase(
        "widths", LENS, Q_LENS, dims, page_size, dtype, dtype, hidden_page=True, seed=seed
    )
    inputs = case.build("cuda")
    plan = plan_of(case, inputs)
    for schedule in ("whole", "line of 3"):
        check(case, inputs, with_shares(plan, shares_of(plan, schedule)))


OPTIONS = {
    "non_causal": AttentionOptions(causal=False),
    "window": AttentionOptions(window=100),
    "window of 1": AttentionOptions(window=1),
    "softcap": AttentionOptions(softcap=3.0),
    "rank 0 of 2": AttentionOptions(cp_world_size=2),
    "rank 2 of 3": AttentionOptions(cp_world_size=3, cp_rank=2),
    "everything": AttentionOptions(window=90, softcap=5.0, cp_world_size=2, cp_rank=1),
}


@pytest.mark.parametrize("num_heads", [3, 16, 24, 64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masks(options, num_heads, seed):
    has_sink = bool(options.softcap) or num_heads == 16
    case = DecodeCase(
        "masks",
        LENS,
        Q_LENS,
        MLADims(num_heads),
        page_size=64,
        options=options,
        has_sink=has_sink,
        seed=seed,
    )
    inputs = case.build("cuda")
    plan = plan_of(case, inputs)
    for schedule in SCHEDULES:
        check(case, inputs, with_shares(plan, shares_of(plan, schedule)))


@pytest.mark.parametrize("num_kv_splits", [None, 1, 7])
@pytest.mark.parametrize("q_len", [1, 16, 40])
def test_long_queries(q_len, num_kv_splits, seed):
    case = DecodeCase("long", (300, 50), (q_len, 3), MLADims(20), 64, seed=seed)
    inputs = case.build("cuda")
    check(case, inputs, plan_of(case, inputs, num_kv_splits=num_kv_splits))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_heads", [16, 64])
def test_output_dtypes_and_strides(num_heads, out_dtype, seed):
    case = DecodeCase("out", (300, 70), (1, 2), MLADims(num_heads), 64, seed=seed)
    inputs = case.build("cuda")
    wide = torch.full((num_heads, 3, 520), 7.0, dtype=out_dtype, device="cuda")
    plan = plan_of(case, inputs)
    for schedule in ("whole", "line of 3"):
        changed = with_shares(plan, shares_of(plan, schedule))
        check(case, inputs, changed, out=wide.transpose(0, 1)[..., 3:515])
        assert (wide[..., :3] == 7).all()
        assert (wide[..., 515:] == 7).all()


@pytest.mark.parametrize("num_heads", [16, 64])
def test_rows_at_odd_bytes_take_the_portable_kernel(num_heads, seed):
    case = DecodeCase("odd", (300, 70), (1, 2), MLADims(num_heads), 64, seed=seed)
    inputs = case.build("cuda")
    padded = torch.nn.functional.pad(inputs.ql_nope, (1, 2))[..., 1:-2]
    odd = replace(inputs, ql_nope=padded)
    check(case, odd, plan_of(case, odd))


@pytest.mark.parametrize("num_heads", [16, 128])
def test_batch_invariant_bits(num_heads, seed):
    """A request alone gives the bits it gives among others."""
    case = DecodeCase("mates", (3000, 20, 900), (1, 3, 2), MLADims(num_heads), 64, seed=seed)
    inputs = case.build("cuda")
    together = check(case, inputs, plan_of(case, inputs, batch_invariant=True))
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
        qo_indptr=indptr_of(torch.tensor([1])).cuda(),
        expected_out=inputs.expected_out[:1],
        expected_lse=inputs.expected_lse[:1],
    )
    got = check(case, alone, plan_of(case, alone, batch_invariant=True))
    assert torch.equal(got[0], together[0][:1])
    assert torch.equal(got[1], together[1][:1])


@pytest.mark.parametrize("num_requests", [257, 600])
def test_more_requests_than_the_line_takes_at_once(num_requests, seed):
    lens = torch.randint(0, 200, (num_requests,), generator=torch.Generator().manual_seed(seed))
    case = DecodeCase("many", tuple(lens.tolist()), dims=MLADims(4), page_size=64, seed=seed)
    inputs = case.build("cuda")
    plan = plan_of(case, inputs)
    check(case, inputs, with_shares(plan, Shares(132, 0)))
