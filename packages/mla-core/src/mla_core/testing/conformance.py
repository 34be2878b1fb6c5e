"""The conformance suite: what every backend's kernels must get right, capability by capability.

A backend's tests run `decode_cases` for its name and `check_decode` on each. A case is run if and
only if a capability row accepts it, so claiming more means passing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from mla_core import registry
from mla_core.dims import MLADims
from mla_core.ops import decode
from mla_core.plan import AttentionOptions, DecodePlan, output_dtype, plan_decode
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase, DecodeInputs
from mla_core.testing.poison import poison_

_RAGGED = (37, 0, 1, 16, 64, 130)
_MTP_Q = (2, 1, 4, 3, 1, 2)


def _one_per_seed(cases: Iterable[DecodeCase]) -> tuple[DecodeCase, ...]:
    return tuple(replace(case, seed=seed) for seed, case in enumerate(cases, start=1))


#: Lengths, pages, heads, dims, dtypes, layouts and options that have broken kernels somewhere.
DECODE_CASES: tuple[DecodeCase, ...] = _one_per_seed(
    [
        DecodeCase("ragged", _RAGGED),
        DecodeCase("ragged", _RAGGED, q_dtype="fp16", layout="fp16"),
        DecodeCase("ragged", _RAGGED, q_dtype="fp32", layout="fp32"),
        DecodeCase("one_token", (1,), page_size=64),
        DecodeCase("full_last_page", (64, 128), page_size=64),
        DecodeCase("last_page_of_one", (65, 1, 129), page_size=64),
        DecodeCase("all_empty", (0, 0)),
        DecodeCase("no_request", ()),
        DecodeCase("page_1", (37, 0, 5), page_size=1),
        DecodeCase("page_3", (37, 0, 5), page_size=3),
        DecodeCase("page_128", (200, 3), page_size=128),
        *(
            DecodeCase("heads", (70, 9), dims=MLADims(heads))
            for heads in (1, 2, 5, 12, 20, 33, 64, 96, 128)
        ),
        DecodeCase("multi_token", (37, 9, 70), (4, 4, 4)),
        DecodeCase("multi_token", (37, 9, 70), (4, 4, 4), dims=MLADims(5), page_size=1),
        DecodeCase("ragged_queries", _RAGGED, _MTP_Q),
        DecodeCase("queries_longer_than_context", (3, 1), (5, 4)),
        DecodeCase("request_without_queries", (20, 30, 40), (1, 0, 2)),
        DecodeCase("absorbed_prefill", (40, 64), (40, 33), dims=MLADims(4)),
        DecodeCase("non_causal", (37, 9, 70), (4, 1, 3), options=AttentionOptions(causal=False)),
        *(DecodeCase("splits", (300, 17, 0, 1), num_kv_splits=splits) for splits in (1, 2, 7, 64)),
        DecodeCase("splits", (130, 17), (3, 2), num_kv_splits=5, page_size=1),
        DecodeCase("shared_page", (40, 60), shared_pages=True),
        DecodeCase("hidden_page", (40, 60), hidden_page=True),
        DecodeCase("hidden_only_page", (10, 60), hidden_page=True),
        DecodeCase("padded_pages", (40, 60), strided=True),
        DecodeCase("window", (100, 5), (3, 2), options=AttentionOptions(window=24)),
        DecodeCase("window_one", (100, 5), options=AttentionOptions(window=1)),
        DecodeCase("softcap", _RAGGED, options=AttentionOptions(softcap=2.0)),
        DecodeCase("sink", _RAGGED, has_sink=True),
        DecodeCase("sink", (300, 0), has_sink=True, num_kv_splits=6),
        *(
            DecodeCase(
                "context_parallel",
                (37, 0, 9),
                (2, 1, 3),
                options=AttentionOptions(cp_world_size=world_size, cp_rank=rank),
            )
            for world_size, rank in ((2, 0), (2, 1), (7, 3))
        ),
        DecodeCase("dims_256_32", (70, 9), dims=MLADims(40, 256, 32, 64, 64)),
        DecodeCase("dims_256_64", (70, 9), dims=MLADims(8, 256, 64, 64, 128)),
        DecodeCase("dims_512_0", (70, 9), dims=MLADims(8, 512, 0, 256, 256)),
        DecodeCase("dims_1024_64", (70, 9), dims=MLADims(8, 1024, 64, 192, 128)),
        *(
            DecodeCase(
                "v4",
                (70, 9),
                dims=MLADims(8, 448, 64, 448, 512, value_includes_rope=True),
                layout=layout,
            )
            for layout in ("v4_bf16", "v4_584", "v4_nm")
        ),
        *(
            DecodeCase("quantised", (70, 9), layout=layout)
            for layout in (
                "fp8",
                "fp8_fnuz",
                "fp8_seg656",
                "fp8_ds656",
                "fp8_seg576",
                "fp8_ds32",
                "shuffled_bf16",
                "shuffled_fp8",
            )
        ),
        DecodeCase("nvfp4", (150, 9), layout="nvfp4_shuffled", page_size=128),
        DecodeCase("fp8_queries", (70, 9), q_dtype="fp8_e4m3", layout="fp8"),
        DecodeCase("fp8_queries", (70, 9), q_dtype="fp8_e4m3fnuz", layout="fp8_fnuz"),
    ]
)


def decode_cases(backend: str, arch: str) -> tuple[DecodeCase, ...]:
    """Return the cases a backend claims on an architecture."""
    rows = registry.record(backend).require().capabilities
    return tuple(
        case for case in DECODE_CASES if any(not row.why_not(case.problem(arch)) for row in rows)
    )


def check_decode(
    backend: str,
    case: DecodeCase,
    device: torch.device | str = "cpu",
    *,
    inputs: DecodeInputs | None = None,
    fixed_lengths: bool = False,
    replan: Callable[[DecodePlan], DecodePlan] | None = None,
) -> None:
    """Run one case on a backend with poisoned outputs and compare it with the truth.

    Parameters
    ----------
    inputs : DecodeInputs, optional
        What ``case.build(device)`` gave, for running many kernels on one case.
    fixed_lengths : bool
        As ``mla_core.plan_decode`` takes it.
    replan : callable, optional
        Changes the plan, to try kernels and configurations that planning would not choose.

    Raises
    ------
    AssertionError
        ``out`` or ``lse`` is not close, or something was left unwritten.
    """
    inputs = inputs or case.build(device)
    plan = plan_decode(
        case.dims,
        inputs.qo_indptr,
        inputs.kv,
        q_dtype=inputs.ql_nope.dtype,
        options=case.options,
        has_sink=case.has_sink,
        num_kv_splits=case.num_kv_splits,
        fixed_lengths=fixed_lengths,
        backend=backend,
    )
    plan = plan if replan is None else replan(plan)
    for workspace in plan.workspace.values():
        poison_(workspace)
    dtype = output_dtype(inputs.ql_nope.dtype)
    out = poison_(torch.empty(inputs.expected_out.shape, dtype=dtype, device=device))
    lse = poison_(torch.empty(inputs.expected_lse.shape, dtype=torch.float32, device=device))
    decode(
        inputs.ql_nope,
        inputs.q_pe,
        inputs.kv,
        plan,
        sm_scale=inputs.sm_scale,
        out=out,
        lse=lse,
        sink=inputs.sink,
        q_scale=inputs.q_scale,
        global_kv_lens=inputs.global_kv_lens,
    )
    assert_close(out, inputs.expected_out, what=f"out of {case}")
    # Scores are dot products of rounded operands accumulated in fp32: the lse keeps more digits
    # than the output, except where a kernel rounds the probabilities or the scores.
    lse_tolerance = TOLERANCES["fp32" if dtype == torch.float32 else "fp16"]
    assert_close(lse, inputs.expected_lse, what=f"lse of {case}", tolerance=lse_tolerance)
