"""aiter's prefill functions: signatures, numbers against the truth, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch

from mla_core import LayoutError, MLADims
from mla_core.batch import indptr_of
from mla_core.dropin.aiter import mla_prefill_fwd, mla_prefill_ps_fwd
from mla_core.plan import AttentionOptions
from mla_core.reference import prefill
from mla_core.testing.assertions import assert_close
from mla_core.testing.cases import DecodeCase

REQUIRED = inspect.Parameter.empty
SMALL = MLADims(3, kv_lora_rank=64, qk_rope_head_dim=32)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def parameters_of(function) -> list[tuple[str, object]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def test_signatures():
    assert parameters_of(mla_prefill_fwd) == [
        ("q", REQUIRED),
        ("kv_buffer", REQUIRED),
        ("o", REQUIRED),
        ("qo_indptr", REQUIRED),
        ("kv_indptr", REQUIRED),
        ("kv_indices", REQUIRED),
        ("kv_last_page_lens", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("sm_scale", None),
        ("logit_cap", 0.0),
        ("num_kv_splits", None),
    ]
    assert parameters_of(mla_prefill_ps_fwd) == [
        ("Q", REQUIRED),
        ("K", REQUIRED),
        ("V", REQUIRED),
        ("output", REQUIRED),
        ("qo_indptr", REQUIRED),
        ("kv_indptr", REQUIRED),
        ("kv_page_indices", REQUIRED),
        ("work_indptr", REQUIRED),
        ("work_info_set", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("is_causal", REQUIRED),
        ("reduce_indptr", None),
        ("reduce_final_map", None),
        ("reduce_partial_map", None),
        ("softmax_scale", None),
        ("q_scale", None),
        ("k_scale", None),
        ("v_scale", None),
    ]


def absorbed(case: DecodeCase, **changes):
    """Return the arguments of `mla_prefill_fwd` for a case, and the case."""
    inputs = case.build()
    arguments = {
        "q": torch.cat((inputs.ql_nope, inputs.q_pe), dim=-1),
        "kv_buffer": inputs.kv.cache.buffers[0].unsqueeze(2),
        "o": torch.full(inputs.ql_nope.shape, torch.nan, dtype=inputs.ql_nope.dtype),
        "qo_indptr": inputs.qo_indptr,
        "kv_indptr": inputs.kv.kv_indptr,
        "kv_indices": inputs.kv.kv_page_indices,
        "kv_last_page_lens": inputs.kv.kv_last_page_len,
        "max_seqlen_q": max(case.query_lens),
        "sm_scale": inputs.sm_scale,
    }
    return arguments | changes, inputs


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("page_size", [1, 5])
@pytest.mark.parametrize("softcap", [0.0, 0.9])
def test_absorbed_matches_the_truth(dtype, page_size, softcap, seed):
    case = DecodeCase(
        "prefill", (21, 9, 0, 3), q_lens=(13, 9, 0, 5), dims=SMALL, page_size=page_size,
        q_dtype=dtype, layout=dtype, options=AttentionOptions(softcap=softcap), seed=seed,
    )  # fmt: skip
    arguments, inputs = absorbed(case, logit_cap=softcap, num_kv_splits=8)
    logits, lse = mla_prefill_fwd(**arguments)
    assert logits is arguments["o"]
    assert lse.shape == (27, 1, 3, 1)
    assert_close(arguments["o"], inputs.expected_out, what="o")
    assert_close(lse[:, 0, :, 0], inputs.expected_lse, what="lse")


def test_absorbed_default_scale(seed):
    case = DecodeCase(
        "scale", (9,), q_lens=(4,), dims=SMALL, q_dtype="fp32", layout="fp32", seed=seed
    )
    arguments, _ = absorbed(case, sm_scale=None)
    mla_prefill_fwd(**arguments)
    default = arguments["o"].clone()
    mla_prefill_fwd(**arguments | {"sm_scale": 96**-0.5})
    assert torch.equal(default, arguments["o"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_buffer": torch.zeros(9, 16, 1, 96)}, "kv_buffer must be .* of q's dtype"),
        ({"kv_buffer": torch.zeros(9, 96, dtype=torch.bfloat16)}, "kv_buffer must be"),
        ({"kv_buffer": torch.zeros(9, 16, 1, 64, dtype=torch.bfloat16)}, "kv_buffer must be"),
        ({"max_seqlen_q": 3}, "max_seqlen_q must be at least .* 4, got 3"),
        ({"o": torch.zeros(4, 2, 64)}, r"o must be \[4, 3, kv_lora_rank\]"),
    ],
)
def test_absorbed_bad_input(changes, message):
    arguments, _ = absorbed(DecodeCase("bad", (9,), q_lens=(4,), dims=SMALL), **changes)
    with pytest.raises(LayoutError, match=message):
        mla_prefill_fwd(**arguments)


FNUZ, OCP = torch.float8_e4m3fnuz, torch.float8_e4m3fn


def expanded(q_lens, k_lens, rng, *, heads=4, kv_heads=4, dtype=torch.bfloat16, widths=(192, 128)):
    """Return ragged arguments over a pool of K and V rows that is NaN where nothing lives."""
    total_q, total_k = sum(q_lens), sum(k_lens)
    pool = total_k + 5
    rows = torch.randperm(pool, generator=rng)[:total_k].to(torch.int32)
    q = torch.randn(total_q, heads, widths[0], generator=rng).to(dtype)
    k, v = (torch.full((pool, kv_heads, width), torch.nan).to(dtype) for width in widths)
    for stored in (k, v):
        data = torch.randn(total_k, *stored.shape[1:], generator=rng).to(dtype)
        stored[rows.long()] = data
    tail = torch.full((3,), 1 << 30, dtype=torch.int32)
    return {
        "Q": q,
        "K": k,
        "V": v,
        "output": torch.full((total_q, heads, widths[1]), torch.nan, dtype=torch.bfloat16),
        "qo_indptr": indptr_of(torch.tensor(q_lens)),
        "kv_indptr": indptr_of(torch.tensor(k_lens)),
        "kv_page_indices": torch.cat((rows, tail)),
        "work_indptr": i32(9, 9, 9),
        "work_info_set": torch.full((4, 8), -3, dtype=torch.int32),
        "max_seqlen_q": max(q_lens),
        "is_causal": True,
        "reduce_indptr": i32(0, 9),
        "reduce_final_map": torch.full((1, 2), 1 << 30, dtype=torch.int32),
        "reduce_partial_map": i32(1 << 30),
        "softmax_scale": 192**-0.5,
    }


def truth(arguments, **options):
    rows = arguments["kv_page_indices"][: int(arguments["kv_indptr"][-1])].long()
    return prefill.prefill(
        arguments["Q"].double(),
        arguments["K"].double()[rows],
        arguments["V"].double()[rows],
        arguments["qo_indptr"],
        arguments["kv_indptr"],
        causal=arguments["is_causal"],
        **{"sm_scale": arguments["softmax_scale"]} | options,
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, FNUZ, OCP])
def test_expanded_matches_the_truth(dtype, is_causal, rng):
    arguments = expanded([7, 0, 4, 1, 3], [12, 3, 2, 1, 0], rng, dtype=dtype)
    arguments["is_causal"] = is_causal
    scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.3}
    tensors = {name: torch.tensor([value]) for name, value in scales.items()}
    output, lse = mla_prefill_ps_fwd(**arguments, **tensors)
    expected_out, expected_lse = truth(arguments, **scales)
    assert output is arguments["output"]
    assert_close(output, expected_out, what="output", dtype="bf16")
    assert_close(lse, expected_lse, what="lse", dtype="fp32")


def test_expanded_defaults(rng):
    """No work list and no scales; the softmax scale comes from the width of V, as in aiter."""
    arguments = expanded([5, 2], [9, 2], rng, heads=4, kv_heads=2, dtype=torch.float32)
    arguments["output"] = arguments["output"].float()
    names = ("reduce_indptr", "reduce_final_map", "reduce_partial_map", "softmax_scale")
    for name in names:
        del arguments[name]
    output, lse = mla_prefill_ps_fwd(**arguments | {"work_indptr": None, "work_info_set": None})
    expected_out, expected_lse = truth(arguments | {"softmax_scale": 128**-0.5})
    assert_close(output, expected_out, what="output")
    assert_close(lse, expected_lse, what="lse")


def test_expanded_output_is_written_through_its_strides(rng):
    arguments = expanded([5, 2], [9, 2], rng)
    wide = torch.full((7, 4, 200), torch.nan, dtype=torch.bfloat16)
    mla_prefill_ps_fwd(**arguments | {"output": wide[..., :128]})
    assert_close(wide[..., :128], truth(arguments)[0], what="output", dtype="bf16")
    assert wide[..., 128:].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Q": torch.zeros(7, 4, 192)}, "K must be float32, got torch"),
        ({"Q": torch.zeros(7, 4, 192, dtype=torch.int8)}, "Q must be float8_e4m3fn"),
        ({"K": torch.zeros(16, 4, 128, dtype=torch.bfloat16)}, r"K must be \[num_tokens, Hkv, 192"),
        ({"V": torch.zeros(15, 4, 128, dtype=torch.bfloat16)}, r"V must be \[16, 4, DV\]"),
        ({"output": torch.zeros(7, 4, 64)}, r"output must be \[7, 4, 128\]"),
        ({"kv_indptr": i32(0, 11)}, r"kv_indptr must be \[3\]"),
        ({"kv_indptr": i32(0, 9, 20)}, r"kv_page_indices must have at least kv_indptr\[-1\]=20"),
        ({"kv_page_indices": i32(*range(10), 16)}, "kv_page_indices must be rows of K in 0..15"),
        ({"kv_page_indices": i32(*range(10), -1)}, "kv_page_indices must be rows of K in 0..15"),
        ({"max_seqlen_q": 4}, "max_seqlen_q must be at least .* 5, got 4"),
        ({"work_info_set": torch.zeros(4, 7, dtype=torch.int32)}, "work_info_set must be"),
        ({"reduce_final_map": i32(0, 1)}, r"reduce_final_map must be \[num_tiles, 2\]"),
        ({"k_scale": torch.ones(4)}, "k_scale must be fp32 with one element"),
    ],
)
def test_expanded_bad_input(changes, message, rng):
    arguments = expanded([5, 2], [9, 2], rng) | changes
    with pytest.raises(LayoutError, match=message):
        mla_prefill_ps_fwd(**arguments)
