"""The fused CPU path of the reference backend: when it is taken, and that shares do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mla_core.plan import AttentionOptions, plan_decode
from mla_core.reference_backend import fused
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with this many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case",
    [
        DecodeCase("shares", (37, 0, 1, 2, 6, 130)),
        DecodeCase("several_parts", (2500, 4500), page_size=64, q_dtype="fp32", layout="fp32"),
        DecodeCase("tail", (37, 9, 70, 3), (4, 4, 4, 5), page_size=1),
        DecodeCase("sink", (37, 0, 9), has_sink=True),
        DecodeCase("half", (40, 60), (2, 1), q_dtype="fp16", layout="fp16"),
        DecodeCase("strided", (40, 60), strided=True),
        DecodeCase("hidden", (40, 60), hidden_page=True),
    ],
    ids=str,
)
def test_any_number_of_shares_gives_the_truth(case: DecodeCase, threads: int, seed: int):
    check_decode("reference", replace(case, seed=seed))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (DecodeCase("plain", (9,)), 1),
        (DecodeCase("fp32", (9,), q_dtype="fp32", layout="fp32"), 1),
        (DecodeCase("sink", (9,), has_sink=True), 1),
        (DecodeCase("mixed", (9,), q_dtype="fp16", layout="bf16"), 0),
        (DecodeCase("fp8", (9,), q_dtype="fp8_e4m3", layout="fp8"), 0),
        (DecodeCase("quantised", (9,), layout="fp8_ds656"), 0),
        (DecodeCase("shuffled", (9,), layout="shuffled_bf16"), 0),
        (DecodeCase("softcap", (9,), options=AttentionOptions(softcap=2.0)), 0),
    ],
    ids=str,
)
def test_the_plan_says_whether_it_is_fused(case: DecodeCase, expected: int):
    inputs = case.build()
    plan = plan_decode(
        case.dims,
        inputs.qo_indptr,
        inputs.kv,
        q_dtype=inputs.ql_nope.dtype,
        options=case.options,
        has_sink=case.has_sink,
        backend="reference",
    )
    assert plan.schedule.config["FUSED"] == expected


@pytest.mark.parametrize(
    ("options", "distance", "hide", "expected"),
    [
        (AttentionOptions(), 0, False, 20),
        (AttentionOptions(), 3, False, 17),
        (AttentionOptions(), 30, False, 0),
        (AttentionOptions(causal=False), 3, False, 20),
        (AttentionOptions(window=5), 0, False, 0),
        (AttentionOptions(cp_world_size=2), 0, False, 0),
        (AttentionOptions(), 0, True, 0),
    ],
)
def test_common_slots_are_a_prefix_every_query_sees(
    options: AttentionOptions, distance: int, hide: bool, expected: int, threads: int
):
    slots = torch.arange(20) * 3
    if hide:
        slots[7] = -1
    common = fused.common_slots(distance, slots, options)
    assert common.numel() == expected - expected % threads
    assert torch.equal(common, slots[: common.numel()])
