"""Planning: what is chosen, what is logged, what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

import mla_core
from mla_core import AttentionOptions, LatentCache, LayoutError, MLADims, PagedKV
from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError, UnsupportedProblemError
from mla_core.plan import Schedule, build_plan, output_dtype

DIMS = MLADims(4)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_kv(layout: str = "bf16") -> PagedKV:
    cache = LatentCache.allocate(layout, DIMS, 4, 16)
    return PagedKV.from_csr(cache, i32(0, 2, 2, 3), i32(3, 1, 0), i32(5, 0, 16))


def test_lengths_are_read_from_the_batch():
    plan = mla_core.plan_decode(DIMS, i32(0, 2, 2, 5), make_kv(), backend="reference")
    request = plan.request
    assert (request.batch_size, request.total_q) == (3, 5)
    assert (request.max_seqlen_q, request.max_seqlen_k) == (3, 21)
    assert request.problem.q_len == 3
    assert plan.options == AttentionOptions()
    assert plan.num_kv_splits == 1
    assert str(plan).startswith("reference/torch_online_softmax num_kv_splits=1")


def test_given_lengths_are_taken_as_they_are():
    plan = mla_core.plan_decode(
        DIMS, i32(0, 1, 1, 2), make_kv(), total_q=7, max_seqlen_q=4, max_seqlen_k=999
    )
    assert plan.request.total_q == 7
    assert plan.request.max_seqlen_k == 999


def test_lengths_that_stay_are_part_of_the_request():
    arguments = {"dims": DIMS, "qo_indptr": i32(0, 2, 2, 5), "kv": make_kv()}
    request = mla_core.plan_decode(**arguments, fixed_lengths=True).request
    assert (request.q_lens, request.kv_lens) == ((2, 0, 3), (21, 0, 16))
    request = mla_core.plan_decode(**arguments).request
    assert (request.q_lens, request.kv_lens) == (None, None)


def test_tables_of_a_schedule_come_with_the_plan():
    asked = []

    def schedule(request):
        asked.append(request.kv_lens)
        lens = i32(*(request.kv_lens or ()))
        workspace = {"partials": ((2, 3), torch.float32)}
        return Schedule("kernel", workspace=workspace, tables={"lens": lens})

    backend = Backend("fake", 1, (), {"plan_decode": "", "decode": ""})
    backend._loaded.update(plan_decode=schedule, decode=print)
    changing = mla_core.plan_decode(DIMS, i32(0, 2, 2, 5), make_kv(), backend="reference").request
    fixed = replace(changing, q_lens=(2, 0, 3), kv_lens=(21, 0, 16))
    for request in (changing, changing, fixed, fixed):
        made = build_plan(request, backend, i32(0, 2, 2, 5))
        assert made.tables["lens"].tolist() == list(request.kv_lens or ())
        assert made.workspace["partials"].shape == (2, 3)
    # A schedule for changing lengths is remembered, one for fixed lengths is not.
    assert asked == [None, (21, 0, 16), (21, 0, 16)]


def test_options_become_features():
    options = AttentionOptions(window=4, softcap=2.0, cp_world_size=2, cp_rank=1)
    plan = mla_core.plan_decode(
        DIMS, i32(0, 1, 1, 2), make_kv(), options=options, has_sink=True, batch_invariant=True
    )
    assert plan.request.problem.features == {
        "lse",
        "window",
        "softcap",
        "cp_round_robin",
        "sink",
        "batch_invariant",
    }
    assert AttentionOptions(causal=False).features == {"non_causal"}


def test_plan_choice_is_logged(caplog):
    logger = logging.getLogger("mla_core")
    logger.setLevel(logging.INFO)
    try:
        with caplog.at_level(logging.INFO, "mla_core"):
            mla_core.plan_decode(DIMS, i32(0, 1, 1, 2), make_kv(), backend="reference")
    finally:
        logger.setLevel(logging.WARNING)
    line = caplog.messages[-1]
    assert line.startswith("plan_decode backend=reference kernel=torch_online_softmax")
    assert "backend='reference' was passed" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qo_indptr": i32(0, 1)}, r"qo_indptr must be \[batch_size \+ 1\]=\(4,\)"),
        ({"num_kv_splits": 0}, r"num_kv_splits must be in 1..256, got 0"),
        ({"num_kv_splits": 257}, r"num_kv_splits must be in 1..256, got 257"),
        ({"total_q": -1}, r"total_q must be >= 0, got -1"),
        ({"max_seqlen_q": -1}, r"max_seqlen_q must be >= 0, got -1"),
        ({"dims": MLADims(4, kv_lora_rank=256)}, r"dims.kv_lora_rank must be 512 like the cache"),
        ({"dims": MLADims(4, qk_rope_head_dim=32)}, r"dims.qk_rope_head_dim must be 64"),
        ({"total_q": 1}, r"qo_indptr must end at no more than the 1 rows of q, got 2"),
        ({"max_seqlen_q": 0}, r"max_seqlen_q must be at least the most query tokens .*, 1, got 0"),
        ({"max_seqlen_k": -1}, r"max_seqlen_k must be >= 0, got -1"),
        ({"q_dtype": torch.int16}, r"dtype: must be one of .*, got torch.int16"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    good = {"dims": DIMS, "qo_indptr": i32(0, 1, 1, 2), "kv": make_kv()}
    with pytest.raises(LayoutError, match=message):
        mla_core.plan_decode(**{**good, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be None or >= 1, got 0"),
        ({"window": 4, "causal": False}, "window must be None when causal is False"),
        ({"softcap": -0.5}, "softcap must be >= 0, got -0.5"),
        ({"cp_rank": 2, "cp_world_size": 2}, "cp_rank must be in 0..cp_world_size - 1"),
        ({"cp_rank": 0, "cp_world_size": 0}, "cp_rank must be in 0..cp_world_size - 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(LayoutError, match=message):
        AttentionOptions(**options)


def test_unsupported_query_dtype_says_which_backend_refused_and_why():
    with pytest.raises(UnsupportedProblemError, match=r"reference: q_dtype=fp64 \(needs"):
        mla_core.plan_decode(
            DIMS, i32(0, 1, 1, 2), make_kv(), q_dtype=torch.float64, backend="reference"
        )


def test_missing_backend_is_named():
    with pytest.raises(BackendUnavailableError, match="'nonesuch' is not installed"):
        mla_core.plan_decode(DIMS, i32(0, 1, 1, 2), make_kv(), backend="nonesuch")


def test_output_dtype():
    assert output_dtype(torch.float16) == torch.float16
    assert output_dtype(torch.float8_e4m3fn) == torch.bfloat16
