"""The conformance suite: what every backend's kernels must get right, capability by capability.

A backend's tests run `decode_cases` for its name and `check_decode` on each. A case is run if and
only if a capability row accepts it, so claiming more means passing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from mla_core import registry
from mla_core.dims import MLADims
from mla_core.layouts.fields import bits
from mla_core.ops import decode
from mla_core.plan import AttentionOptions, DecodePlan, output_dtype, plan_decode
from mla_core.rope import FusedRope
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase, DecodeInputs
from mla_core.testing.poison import poison_

_RAGGED = (37, 0, 1, 16, 64, 130)
_MTP_Q = (2, 1, 4, 3, 1, 2)
_GPTJ = FusedRope(False, 64)


def _one_per_seed(cases: Iterable[DecodeCase]) -> tuple[DecodeCase, ...]:
    return tuple(replace(case, seed=seed) for seed, case in enumerate(cases, start=1))


def _rope_cases() -> Iterable[DecodeCase]:
    """Both pairings, partial and shifted rotations, with and without writing the keys back."""
    neox, gptj = AttentionOptions(rope=FusedRope(True, 64)), AttentionOptions(rope=_GPTJ)
    shifted = FusedRope(False, 32, dim_offset=16, position_offset=5, write_back=True)
    odd_shift = FusedRope(True, 22, dim_offset=7, position_offset=-3)
    stored = AttentionOptions(rope=replace(_GPTJ, write_back=True))
    neox_stored = AttentionOptions(rope=FusedRope(True, 64, write_back=True))
    yield DecodeCase("rope_neox", _RAGGED, options=neox)
    yield DecodeCase("rope_gptj", _RAGGED, options=gptj)
    yield DecodeCase("rope_gptj", _RAGGED, _MTP_Q, q_dtype="fp16", layout="fp16", options=stored)
    yield DecodeCase("rope_neox", _RAGGED, _MTP_Q, q_dtype="fp32", layout="fp32", options=neox)
    yield DecodeCase("rope_shifted", (37, 9), (3, 1), options=AttentionOptions(rope=shifted))
    yield DecodeCase("rope_odd_shift", (37, 9), (3, 1), options=AttentionOptions(rope=odd_shift))
    yield DecodeCase("rope_write_back", _RAGGED, _MTP_Q, options=neox_stored)
    yield DecodeCase("rope_page_1", (37, 0, 5), (2, 1, 3), page_size=1, options=stored)
    yield DecodeCase("rope_page_3", (37, 0, 5), page_size=3, options=gptj)
    yield DecodeCase("rope_longer_queries", (3, 1, 0), (5, 4, 2), options=stored)
    yield DecodeCase("rope_no_queries", (20, 30, 40), (1, 0, 2), options=stored)
    yield DecodeCase("rope_prefill", (40, 64), (40, 33), dims=MLADims(4), options=neox_stored)
    yield DecodeCase("rope_splits", (300, 17, 0, 1), num_kv_splits=7, options=stored)
    yield DecodeCase("rope_hidden_page", (10, 60), hidden_page=True, options=stored)
    yield DecodeCase("rope_padded_pages", (40, 60), strided=True, options=neox_stored)
    yield DecodeCase("rope_heads", (70, 9), dims=MLADims(5), options=gptj)
    yield DecodeCase("rope_heads", (70, 9), (2, 2), dims=MLADims(128), options=stored)
    narrow = AttentionOptions(rope=FusedRope(False, 32, write_back=True))
    yield DecodeCase("rope_32", (70, 9), dims=MLADims(40, 256, 32, 64, 64), options=narrow)
    for name, option in (
        ("non_causal", AttentionOptions(causal=False, rope=_GPTJ)),
        ("window", AttentionOptions(window=24, rope=_GPTJ)),
        ("softcap", AttentionOptions(softcap=2.0, rope=_GPTJ)),
    ):
        yield DecodeCase(f"rope_{name}", (37, 9, 70), (4, 1, 3), options=option, has_sink=True)
    for rank in (0, 2):
        parallel = AttentionOptions(cp_world_size=3, cp_rank=rank, rope=stored.rope)
        yield DecodeCase("rope_context_parallel", (37, 0, 9), (2, 1, 4), options=parallel)
    for layout in ("fp8_ds656", "fp8_seg656", "fp8_ds32", "shuffled_bf16"):
        yield DecodeCase("rope_stored_16bit", (70, 9), (2, 1), layout=layout, options=stored)
    for layout in ("fp8", "fp8_fnuz", "fp8_seg576"):
        yield DecodeCase("rope_stored_8bit", (70, 9), (2, 1), layout=layout, options=stored)
    yield DecodeCase(
        "rope_stored_4bit",
        (150, 9),
        (2, 1),
        layout="nvfp4_shuffled",
        page_size=128,
        options=stored,
    )
    yield DecodeCase("rope_fp8_q", (70, 9), q_dtype="fp8_e4m3", layout="fp8", options=gptj)
    v4 = MLADims(8, 448, 64, 448, 512, value_includes_rope=True)
    yield DecodeCase("rope_v4", (70, 9), dims=v4, layout="v4_584", options=stored)


def _format_cases() -> Iterable[DecodeCase]:
    """Every fp8 format that a kernel reads in place: queries, widths, pages, heads, options."""
    # The latent and the rotary part with different strides, scales of every kind.
    plain = ("fp8_seg644", "fp8_ds656_fnuz", "fp8_seg656_fnuz", "fp8_seg576_fnuz")
    for layout in (*plain, "fp8_seg644_fnuz", "fp8_ds32_fnuz"):
        yield DecodeCase("quantised", (70, 9), layout=layout)
    for layout in ("fp8_seg656", "fp8_ds656", "fp8_seg644", "fp8_seg576", "fp8_ds32"):
        yield DecodeCase("fp8_queries", (70, 9), (2, 1), q_dtype="fp8_e4m3", layout=layout)
    for layout in ("fp8_seg656_fnuz", "fp8_seg644_fnuz"):
        yield DecodeCase("fp8_queries", (70, 9), (2, 1), q_dtype="fp8_e4m3fnuz", layout=layout)
    for layout in ("fp8", "fp8_seg656", "fp8_ds656", "fp8_seg644", "fp8_ds32", "fp8_fnuz"):
        yield DecodeCase("fp16_queries", (40, 9), dims=MLADims(3), q_dtype="fp16", layout=layout)
    for layout in ("fp8", "fp8_ds656", "fp8_seg644", "fp8_ds32", "fp8_seg656_fnuz"):
        yield DecodeCase("fp32_queries", (40, 9), dims=MLADims(3), q_dtype="fp32", layout=layout)
    few, parts = MLADims(5), ("fp8_ds656", "fp8_seg656", "fp8_seg644", "fp8_ds32")
    for layout in (*parts, "fp8_seg656_fnuz"):
        yield DecodeCase("page_1", (37, 0, 5), dims=few, page_size=1, layout=layout)
        yield DecodeCase("page_3", (37, 0, 5), (2, 1, 3), dims=few, page_size=3, layout=layout)
        yield DecodeCase("page_64", (100, 65), dims=few, page_size=64, layout=layout, strided=True)
        yield DecodeCase("hidden_page", (40, 60), dims=few, layout=layout, hidden_page=True)
    narrow = MLADims(40, 256, 32, 64, 64)
    for layout in ("fp8", *parts, "fp8_ds656_fnuz"):
        yield DecodeCase("dims_256_32", (40, 9), dims=narrow, layout=layout)
        yield DecodeCase("dims_512_0", (40, 9), dims=MLADims(8, 512, 0, 256, 256), layout=layout)
        yield DecodeCase("dims_1024_64", (40, 9), dims=MLADims(8, 1024), layout=layout)
    # Not a power of two: three groups of four.
    for layout in ("fp8_ds656", "fp8_seg644", "fp8_ds32", "fp8_seg656_fnuz"):
        yield DecodeCase("dims_384_64", (40, 9), dims=MLADims(2, 384), layout=layout)
    for layout in ("fp8", "fp8_ds656", "fp8_seg644_fnuz"):
        yield DecodeCase("long_queries", (40, 64), (40, 33), dims=MLADims(4, 256), layout=layout)
        yield DecodeCase(
            "everything",
            (90, 33, 0, 5),
            (3, 1, 2, 2),
            dims=MLADims(3, 256),
            layout=layout,
            options=AttentionOptions(window=20, softcap=3.0),
            has_sink=True,
            num_kv_splits=3,
        )


def _context_parallel_cases() -> Iterable[DecodeCase]:
    """Ranks that hold every W-th token, with every other mask, and ranks that see nothing."""

    def options(world_size: int, rank: int, **others: Any) -> AttentionOptions:
        return AttentionOptions(cp_world_size=world_size, cp_rank=rank, **others)

    few = MLADims(3, 256)
    lens, q_lens = (37, 0, 9, 1), (2, 1, 3, 4)
    for world_size, rank in ((2, 0), (3, 2), (8, 7)):
        named = options(world_size, rank, window=24)
        yield DecodeCase("context_parallel_window", lens, q_lens, dims=few, options=named)
    window_one = options(4, 1, window=1)
    yield DecodeCase("context_parallel_window_one", lens, q_lens, dims=few, options=window_one)
    for rank in (0, 3):
        named = options(4, rank, causal=False)
        yield DecodeCase("context_parallel_non_causal", lens, q_lens, dims=few, options=named)
    yield DecodeCase("context_parallel_empty", (0, 0), (2, 1), dims=few, options=options(4, 3))
    yield DecodeCase(
        "context_parallel_long", (40, 20), (40, 33), dims=MLADims(4, 256), options=options(2, 1)
    )
    yield DecodeCase(
        "context_parallel_splits",
        (300, 0, 17),
        (3, 1, 2),
        dims=few,
        options=options(2, 1, softcap=3.0, window=200),
        has_sink=True,
        num_kv_splits=4,
    )
    yield DecodeCase(
        "context_parallel_page_1", lens, q_lens, dims=few, page_size=1, options=options(5, 4)
    )
    for layout in ("fp8_ds656", "fp8_seg644_fnuz"):
        named = options(2, 1)
        yield DecodeCase("context_parallel", lens, q_lens, dims=few, layout=layout, options=named)


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
        *_rope_cases(),
        *_format_cases(),
        *_context_parallel_cases(),
    ]
)


def decode_cases(
    backend: str, arch: str, features: frozenset[str] = frozenset()
) -> tuple[DecodeCase, ...]:
    """Return the cases a backend claims on an architecture, with these features on top."""
    rows = registry.record(backend).require().capabilities
    problems = ((case, case.problem(arch)) for case in DECODE_CASES)
    asked = (
        (case, replace(problem, features=problem.features | features)) for case, problem in problems
    )
    return tuple(case for case, problem in asked if any(not row.why_not(problem) for row in rows))


def plan_case(case: DecodeCase, inputs: DecodeInputs, **arguments: Any) -> DecodePlan:
    """Plan a case; ``arguments`` are further ones of ``mla_core.plan_decode``."""
    return plan_decode(
        case.dims,
        inputs.qo_indptr,
        inputs.kv,
        q_dtype=inputs.ql_nope.dtype,
        options=case.options,
        has_sink=case.has_sink,
        **arguments,
    )


def run_case(inputs: DecodeInputs, plan: DecodePlan, **arguments: Any) -> Any:
    """Decode a case's inputs; ``arguments`` are further ones of ``mla_core.decode``."""
    return decode(
        inputs.ql_nope,
        inputs.q_pe,
        inputs.kv,
        plan,
        sm_scale=inputs.sm_scale,
        sink=inputs.sink,
        q_scale=inputs.q_scale,
        global_kv_lens=inputs.global_kv_lens,
        cos_sin_cache=inputs.cos_sin_cache,
        positions=inputs.positions,
        **arguments,
    )


def check_decode(
    backend: str,
    case: DecodeCase,
    device: torch.device | str = "cpu",
    *,
    inputs: DecodeInputs | None = None,
    fixed_lengths: bool = False,
    persistent: bool = False,
    replan: Callable[[DecodePlan], DecodePlan] | None = None,
) -> None:
    """Run one case on a backend with poisoned outputs and compare it with the truth.

    Parameters
    ----------
    inputs : DecodeInputs, optional
        What ``case.build(device)`` gave, for running many kernels on one case.
    fixed_lengths, persistent : bool
        As ``mla_core.plan_decode`` takes them.
    replan : callable, optional
        Changes the plan, to try kernels and configurations that planning would not choose.

    Raises
    ------
    AssertionError
        ``out`` or ``lse`` is not close, or something was left unwritten.
    """
    inputs = inputs or case.build(device)
    plan = plan_case(
        case,
        inputs,
        num_kv_splits=case.num_kv_splits,
        fixed_lengths=fixed_lengths,
        persistent=persistent,
        backend=backend,
    )
    plan = plan if replan is None else replan(plan)
    for workspace in plan.workspace.values():
        poison_(workspace)
    dtype = output_dtype(inputs.ql_nope.dtype)
    k_pe_tokens = None
    if inputs.expected_k_pe_tokens is not None:
        k_pe_tokens = poison_(
            torch.empty(inputs.expected_k_pe_tokens.shape, dtype=dtype, device=device)
        )
    before = [buffer.clone() for buffer in inputs.kv.cache.buffers]
    out = poison_(torch.empty(inputs.expected_out.shape, dtype=dtype, device=device))
    lse = poison_(torch.empty(inputs.expected_lse.shape, dtype=torch.float32, device=device))
    run_case(inputs, plan, out=out, lse=lse, k_pe_tokens=k_pe_tokens)
    if k_pe_tokens is not None and inputs.expected_k_pe_tokens is not None:
        assert_close(k_pe_tokens, inputs.expected_k_pe_tokens, what=f"k_pe_tokens of {case}")
    _check_cache(case, inputs, before)
    assert_close(out, inputs.expected_out, what=f"out of {case}")
    # Scores are dot products of rounded operands accumulated in fp32: the lse keeps more digits
    # than the output, except where a kernel rounds the probabilities or the scores.
    lse_tolerance = TOLERANCES["fp32" if dtype == torch.float32 else "fp16"]
    assert_close(lse, inputs.expected_lse, what=f"lse of {case}", tolerance=lse_tolerance)


def _check_cache(case: DecodeCase, inputs: DecodeInputs, before: list[torch.Tensor]) -> None:
    """Check that only a write-back changed the cache, and only as it should; then undo it."""
    cache, fused = inputs.kv.cache, case.options.rope
    if fused is not None and fused.write_back:
        slots, tokens = _newest(case, inputs)
        wanted = inputs.expected_k_pe_tokens
        assert wanted is not None
        _, got = cache.read(slots, torch.float32)
        stored = cache.layout.rope.dtype
        tolerance = TOLERANCES[stored if stored in TOLERANCES else "fp8_e4m3"]
        what = f"rotated keys in the cache of {case}"
        assert_close(got, wanted[tokens.cpu()], what=what, tolerance=tolerance)
        for field in cache.layout.fields(cache.dims, cache.page_size):
            if field.name.startswith("k_pe"):
                field.put(
                    cache.buffers[field.buffer], slots, field.take(before[field.buffer], slots)
                )
    for buffer, held in zip(cache.buffers, before, strict=True):
        assert torch.equal(bits(buffer), bits(held)), f"cache of {case} changed elsewhere"


def _newest(case: DecodeCase, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots [N] of the query tokens' keys that are in the cache, and their tokens."""
    table = inputs.kv.token_slots()
    found: list[tuple[int, int]] = []
    q_begin = 0
    for b, (length, q_len) in enumerate(zip(case.kv_lens, case.query_lens, strict=True)):
        whole = length if inputs.global_kv_lens is None else int(inputs.global_kv_lens[b])
        for j in range(length):
            i = j * case.options.cp_world_size + case.options.cp_rank - (whole - q_len)
            if i >= 0 and int(table[b, j]) >= 0:
                found.append((int(table[b, j]), q_begin + i))
        q_begin += q_len
    pairs = torch.tensor(found, dtype=torch.int64, device=table.device).view(-1, 2)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
