"""Calls after the first, which are repeated, for tensors that have moved; and on other GPUs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from mla_core import AttentionOptions, FusedRope, PagedKV, replan
from mla_core.arch import arch_of
from mla_core.dims import MLADims
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import DECODE_CASES, plan_case, run_case
from mla_core.testing.poison import poison_
from mla_triton.backend import BACKEND

pytestmark = pytest.mark.gpu

KINDS = {
    "one launch": {"num_kv_splits": 1},
    "two launches": {"num_kv_splits": 3},
    "host's list": {"fixed_lengths": True, "persistent": True},
    "device's list": {"persistent": True},
}


def moved(value):
    """Return a copy of a tensor, or of what holds tensors, elsewhere and with the same strides."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        ).copy_(value)
    if isinstance(value, PagedKV):
        cache = replace(
            value.cache,
            buffers=tuple(map(moved, value.cache.buffers)),
            scale=moved(value.cache.scale),
        )
        index = (value.kv_indptr, value.kv_page_indices, value.kv_last_page_len)
        return PagedKV(cache, *map(moved, index))
    return value


def moved_inputs(inputs):
    """Return the same inputs elsewhere; what is expected of them stays where it is."""
    names = [item.name for item in fields(inputs) if not item.name.startswith("expected")]
    return replace(inputs, **{name: moved(getattr(inputs, name)) for name in names})


def check(case, inputs, plan):
    for workspace in plan.workspace.values():
        poison_(workspace)
    if plan.schedule.recipe is not None:
        replan(plan, inputs.kv)
    device = inputs.ql_nope.device
    out = poison_(torch.empty_like(inputs.expected_out, dtype=torch.float32, device=device))
    lse = poison_(torch.empty_like(inputs.expected_lse, dtype=torch.float32, device=device))
    run_case(inputs, plan, out=out, lse=lse)
    is_exact = case.q_dtype == "fp32"
    tolerance = TOLERANCES["fp32" if is_exact else "bf16"]
    assert_close(out, inputs.expected_out, what=f"out of {case}", tolerance=tolerance)
    tolerance = TOLERANCES["fp32" if is_exact else "fp16"]
    assert_close(lse, inputs.expected_lse, what=f"lse of {case}", tolerance=tolerance)


def has_repeats(plan):
    return any(plan.schedule.memo.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_tensors_that_have_moved(case, kind):
    arguments = KINDS[kind]
    features = {"persistent"} if "persistent" in arguments else set()
    problem = case.problem(arch_of(torch.device("cuda")))
    problem = replace(problem, features=problem.features | features)
    if all(row.why_not(problem) for row in BACKEND.capabilities):
        pytest.skip("the backend does not claim this case")
    inputs = case.build("cuda")
    plan = plan_case(case, inputs, backend="triton", **arguments)
    # Strides may change with the first move, so a call like another comes third.
    steps = [inputs, *(moved_inputs(inputs) for _ in range(4))]
    for step in steps:
        check(case, step, plan)
    # Tensors without elements may share the address 0, and such calls are not repeated.
    if inputs.q_pe.numel() and inputs.kv.kv_page_indices.numel():
        assert has_repeats(plan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "layout", "rope"),
    [(16, "bf16", False), (128, "bf16", False), (16, "fp32", False), (16, "bf16", True)],
)
def test_launches_happen_where_the_tensors_are(heads, layout, rope, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = AttentionOptions(rope=FusedRope(True, 64) if rope else None)
    q_dtype = "fp32" if layout == "fp32" else "bf16"
    case = DecodeCase(
        "elsewhere",
        (300, 0, 64),
        dims=MLADims(heads),
        q_dtype=q_dtype,
        layout=layout,
        page_size=64,
        options=options,
    )
    inputs = case.build("cuda:1")
    assert torch.cuda.current_device() == 0
    plan = plan_case(case, inputs, backend="triton", **KINDS[kind])
    for _ in range(4):
        check(case, moved_inputs(inputs), plan)
    assert has_repeats(plan)
    assert torch.cuda.current_device() == 0
    # And on that device's current stream.
    side = torch.cuda.Stream("cuda:1")
    first = moved_inputs(inputs)
    with torch.cuda.stream(side):
        assert torch.cuda.current_device() == 1
    for _ in range(3):
        late = moved_inputs(inputs)
        correct = late.ql_nope.clone()
        torch.cuda.synchronize("cuda:1")
        with torch.cuda.stream(side):
            late.ql_nope.fill_(float("nan"))
            torch.cuda._sleep(20_000_000)
            late.ql_nope.copy_(correct)
            with torch.cuda.device(0):
                # torch knows the side stream as the second GPU's current one here, too.
                check(case, late, plan)
    check(case, first, plan)
