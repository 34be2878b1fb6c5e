"""Conformance cases on AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_core import layouts
from mla_core.dims import MLADims
from mla_core.metadata import DeviceProfile, plan_v1_2
from mla_core.metadata.worklist import KV_END, KV_START
from mla_core.plan import AttentionOptions, plan_decode
from mla_core.rope import FusedRope
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases
from mla_core.testing.emulation import emulated_triton

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

DECODE = "mla_triton.kernels.decode:decode_kernel"
WORKLIST = "mla_triton.kernels.decode_worklist:decode_worklist_kernel"
ROTATE = "mla_triton.kernels.rope:rotate_keys_kernel"
ARCHS = ("gfx942", "gfx950")
#: Each differs from the others in what the persistent kernel adds, or in what it shares.
PERSISTENT_CASES = (
    DecodeCase("pieces", (700, 0, 33, 5), (2, 1, 4, 1), dims=MLADims(5), page_size=1, seed=1),
    DecodeCase("pages", (900, 17, 0), dims=MLADims(16), page_size=64, has_sink=True, seed=2),
    DecodeCase(
        "masks",
        (600, 100, 9),
        (3, 2, 1),
        dims=MLADims(20, 256, 32),
        page_size=3,
        options=AttentionOptions(window=200, softcap=3.0),
        has_sink=True,
        seed=3,
    ),
    DecodeCase("fp32", (400, 31), dims=MLADims(3, 64, 32), layout="fp32", q_dtype="fp32", seed=4),
)


def covering(cases):
    """Return the cases with anything new in them: a situation, a layout, widths or scales."""
    seen, chosen = set(), []
    for case in cases:
        dims, rope = case.dims, case.options.rope
        scales = layouts.get(case.layout).scale_kind
        heads = dims.num_heads if case.name in ("heads", "multi_token") else None
        situation = (case.name, heads, case.num_kv_splits)
        if rope is not None:
            # A rotation ends before the loop over keys, so one case of each kind will do.
            stored_as = layouts.get(case.layout).rope.dtype
            kind = (rope.is_neox, rope.write_back, rope.dim_offset > 0, stored_as)
            situation = ("rope", *kind, "cp_round_robin" in case.options.features)
        new = {
            situation,
            (case.layout,),
            (case.q_dtype, scales),
            (scales == "none", dims.kv_lora_rank, dims.qk_rope_head_dim),
        } - seen
        if new:
            seen |= new
            chosen.append(case)
    return chosen


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch in ARCHS
        for case in covering(decode_cases("triton", arch))
    ],
)
def test_conformance(arch, case):
    with emulated_triton(arch, DECODE, ROTATE) as results:
        check_decode("triton", case)
    instructions = sum(result.instructions for result in results)
    print(f"{len(results)} launches, {instructions} wave-instructions")
    # Machine code ran, unless the case has nothing to do.
    assert bool(instructions) == bool(sum(case.query_lens))


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        *((arch, case) for arch in ARCHS for case in PERSISTENT_CASES),
        (
            "gfx942",
            DecodeCase("fnuz", (600, 33), (2, 1), q_dtype="fp8_e4m3fnuz", layout="fp8_fnuz"),
        ),
        ("gfx950", DecodeCase("bytes", (600, 33), (2, 1), layout="fp8_seg656", page_size=64)),
        (
            "gfx950",
            DecodeCase(
                "ranks", (600, 33), (4, 1), options=AttentionOptions(cp_world_size=3, cp_rank=2)
            ),
        ),
    ],
    ids=str,
)
def test_persistent(arch, case):
    with emulated_triton(arch, WORKLIST) as results:
        check_decode("triton", case, persistent=True, fixed_lengths=True)
    assert [result.instructions > 0 for result in results] == [True, True]  # works, then the merge


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("write_back", [False, True])
def test_persistent_with_fused_rope(arch, write_back):
    options = AttentionOptions(rope=FusedRope(False, 32, write_back=write_back))
    case = DecodeCase("rope", (500, 0, 33, 2), (2, 1, 4, 3), MLADims(5, 64, 32), options=options)
    with emulated_triton(arch, WORKLIST, ROTATE) as results:
        check_decode("triton", case, persistent=True, fixed_lengths=True)
    assert [result.instructions > 0 for result in results] == [True] * 3


@pytest.mark.parametrize("arch", ARCHS)
def test_list_of_the_device(arch):
    """The interpreter makes the list: only a later Triton compiles the planner rightly."""
    with emulated_triton(arch, WORKLIST) as results:
        check_decode("triton", PERSISTENT_CASES[0], persistent=True)
    assert [result.instructions > 0 for result in results] == [True, True]


def test_folded_list_of_the_caller():
    """48 heads in three groups, as lists for gfx942 have them; no work for the empty request."""
    case = DecodeCase(
        "folded", (500, 0, 70), (3, 1, 2), dims=MLADims(48, 64, 32), has_sink=True, seed=5
    )
    inputs = case.build()
    with emulated_triton("gfx942", WORKLIST) as results:
        work = plan_v1_2(
            inputs.qo_indptr,
            inputs.kv.kv_indptr,
            inputs.kv.kv_last_page_len,
            num_heads=48,
            profile=DeviceProfile("gfx942", 7),
            page_size=16,
            kv_granularity=1,
            max_seqlen_qo=3,
        )
        keep = work.work_info[:, KV_END] > work.work_info[:, KV_START]
        before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])
        listed = replace(
            work,
            work_info=work.work_info[keep].contiguous(),
            work_indptr=before[work.work_indptr.long()].int(),
        )

        def follow(plan):
            return plan_decode(
                case.dims,
                inputs.qo_indptr,
                inputs.kv,
                has_sink=True,
                work_list=listed,
                work_list_fold=3,
                backend="triton",
            )

        check_decode("triton", case, inputs=inputs, replan=follow)
    assert [result.instructions > 0 for result in results] == [True, True]
