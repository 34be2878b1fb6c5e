"""The reference backend passes every conformance case."""

from __future__ import annotations

import pytest
import torch

from mla_core.ops import decode
from mla_core.plan import AttentionOptions, plan_decode
from mla_core.testing import conformance
from mla_core.testing.cases import DecodeCase


@pytest.mark.parametrize("case", conformance.decode_cases("reference", "cpu"), ids=str)
def test_conformance(case: DecodeCase):
    conformance.check_decode("reference", case)


def test_it_claims_every_case():
    assert set(conformance.DECODE_CASES) == set(conformance.decode_cases("reference", "cpu"))


def test_rows_before_every_window_may_hold_nan():
    case = DecodeCase("window", (100, 5), (3, 2), options=AttentionOptions(window=24))
    inputs = case.build()
    plan = plan_decode(
        case.dims, inputs.qo_indptr, inputs.kv, options=case.options, backend="reference"
    )
    arguments = (inputs.ql_nope, inputs.q_pe, inputs.kv, plan)
    want = decode(*arguments, sm_scale=inputs.sm_scale)
    hidden = inputs.kv.token_slots()[0, : 100 - 2 - 24]
    inputs.kv.cache.write(
        torch.full((len(hidden), 512), torch.nan), torch.full((len(hidden), 64), torch.nan), hidden
    )
    assert torch.equal(decode(*arguments, sm_scale=inputs.sm_scale), want)


@pytest.mark.parametrize("has_sink", [False, True])
def test_a_nan_in_a_seen_row_reaches_the_result(has_sink: bool):
    # With a soft cap the rows take our own path; what torch's fused kernel does differs by release.
    options = AttentionOptions(softcap=3.0)
    case = DecodeCase("nan", (21, 5), (2, 1), options=options, has_sink=has_sink)
    inputs = case.build()
    inputs.kv.cache.write(
        torch.full((1, 512), torch.nan), torch.zeros(1, 64), inputs.kv.token_slots()[0, 2:3]
    )
    plan = plan_decode(
        case.dims,
        inputs.qo_indptr,
        inputs.kv,
        options=options,
        has_sink=has_sink,
        backend="reference",
    )
    out, lse = decode(
        inputs.ql_nope,
        inputs.q_pe,
        inputs.kv,
        plan,
        sm_scale=inputs.sm_scale,
        sink=inputs.sink,
        return_lse=True,
    )
    assert out[:2].isnan().all()
    assert lse[:2].isnan().all()
    assert not out[2].isnan().any()
