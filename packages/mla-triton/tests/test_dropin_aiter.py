"""Work lists given to aiter's `mla_decode_fwd`, which this backend follows."""

from __future__ import annotations

import pytest
import torch

from mla_core import layouts
from mla_core.arch import arch_of
from mla_core.batch import indptr_of
from mla_core.dims import MLADims
from mla_core.dropin.aiter import (
    decode_update_mla_metadata_v1,
    get_mla_metadata_info_v1,
    get_mla_metadata_v1,
    mla_decode_fwd,
    planning_for,
)
from mla_core.dtypes import torch_dtype
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata import DeviceProfile
from mla_core.plan import AttentionOptions, output_dtype
from mla_core.select import use_backend
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_triton import worklist

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUFFERS = (
    "work_meta_data",
    "work_indptr",
    "work_info_set",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)
MODES = {
    "v1.0": {"fast_mode": False, "intra_batch_mode": True},
    "v1.1": {"fast_mode": False},
    "v1.2": {"fast_mode": True},
}
DIMS = MLADims(3, 64, 32)


@pytest.fixture
def launches(monkeypatch):
    """Count the runs of the persistent kernel."""
    runs = []
    run = worklist.decode
    monkeypatch.setattr(worklist, "decode", lambda *a, **k: (runs.append(a[3]), run(*a, **k)))
    with use_backend("triton"):
        yield runs


def dtypes_of(case):
    return torch_dtype(case.q_dtype), torch_dtype(layouts.get(case.layout).kv_dtype)


def allocate(case, mode):
    q_len = max(case.query_lens)
    info = get_mla_metadata_info_v1(
        len(case.kv_lens), q_len, case.dims.num_heads, *dtypes_of(case), False, **mode
    )
    return {
        name: torch.zeros(shape, dtype=dtype, device=DEVICE)
        for name, (shape, dtype) in zip(BUFFERS, info, strict=True)
    }


def fill(case, inputs, buffers, mode):
    q_dtype, kv_dtype = dtypes_of(case)
    get_mla_metadata_v1(
        inputs.qo_indptr,
        inputs.kv.kv_indptr,
        inputs.kv.kv_last_page_len,
        case.dims.num_heads,
        1,
        case.options.causal,
        *(buffers[BUFFERS[i]] for i in (0, 2, 1, 3, 4, 5)),
        page_size=case.page_size,
        kv_granularity=4,
        max_seqlen_qo=max(case.query_lens),
        is_cp_round_robin=case.options.cp_world_size > 1,
        dtype_q=q_dtype,
        dtype_kv=kv_dtype,
        **mode,
    )


def call(case, inputs, buffers, **changes):
    """Run the call over NaN and compare with the truth."""
    cache = inputs.kv.cache
    buffer = cache.buffers[0]
    out_dtype = output_dtype(inputs.ql_nope.dtype)
    arguments = {
        "q": torch.cat((inputs.ql_nope, inputs.q_pe), dim=-1),
        "kv_buffer": buffer.unsqueeze(2) if cache.layout.family == "standard" else buffer,
        "o": torch.full(inputs.ql_nope.shape, torch.nan, dtype=out_dtype, device=cache.device),
        "qo_indptr": inputs.qo_indptr,
        "kv_indptr": inputs.kv.kv_indptr,
        "kv_indices": inputs.kv.kv_page_indices,
        "kv_last_page_lens": inputs.kv.kv_last_page_len,
        "max_seqlen_q": max(case.query_lens),
        "page_size": case.page_size,
        "sm_scale": inputs.sm_scale,
        "causal": case.options.causal,
        "logit_cap": case.options.softcap,
        "q_scale": inputs.q_scale,
        "kv_scale": cache.scale,
        "cp_world_size": case.options.cp_world_size,
        "cp_rank": case.options.cp_rank,
        **buffers,
    }
    if inputs.global_kv_lens is not None:
        arguments["g_kv_indptr"] = indptr_of(inputs.global_kv_lens)
    arguments |= changes
    logits, lse = mla_decode_fwd(**arguments, return_lse=True)
    assert logits.shape == (len(arguments["q"]), 1, *arguments["o"].shape[1:])
    assert_close(arguments["o"], inputs.expected_out, what="o")
    assert_close(lse, inputs.expected_lse, what="lse", tolerance=TOLERANCES["fp16"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        ("cpu", DecodeCase("ragged", (5, 0, 500, 1, 40), dims=DIMS)),
        ("cpu", DecodeCase("pages_of_one", (400, 0, 9), (3, 1, 2), dims=DIMS, page_size=1)),
        (
            "cpu",
            DecodeCase(
                "no_mask", (400, 9), (3, 2), dims=DIMS, page_size=3,
                options=AttentionOptions(causal=False, softcap=2.0),
            ),
        ),
        ("gfx942", DecodeCase("folded", (300, 0, 9), (1, 1, 1), dims=MLADims(48, 64))),
        ("gfx942", DecodeCase("folded", (300, 9), (2, 2), dims=MLADims(32, 64), page_size=1)),
        (
            "gfx950",
            DecodeCase(
                "ranks", (300, 9, 0), (4, 2, 1), dims=DIMS, page_size=1,
                options=AttentionOptions(cp_world_size=3, cp_rank=1),
            ),
        ),
        (
            "gfx950",
            DecodeCase(
                "fp8", (300, 9), (2, 1), dims=MLADims(64, 64), page_size=1, q_dtype="fp8_e4m3",
                layout="fp8",
            ),
        ),
        ("gfx950", DecodeCase("bytes", (300, 9), dims=MLADims(48), layout="fp8_seg656")),
    ],
    ids=str,
)  # fmt: skip
def test_lists_are_followed(mode, arch, case, launches, seed):
    inputs = case.build(DEVICE)
    with planning_for(DeviceProfile(arch, 12)):
        buffers = allocate(case, MODES[mode])
        fill(case, inputs, buffers, MODES[mode])
        call(case, inputs, buffers)
    (plan,) = launches
    is_folded = case.name in ("folded", "bytes")
    assert plan.request.work_list_fold == (case.dims.num_heads // 16 if is_folded else 1)
    assert plan.tables["work_info"].data_ptr() == buffers["work_info_set"].data_ptr()


def test_a_list_carried_over_to_the_next_step(launches, seed):
    case = DecodeCase("step", (300, 40), dims=DIMS, page_size=1, seed=seed)
    later = DecodeCase("next", (301, 41), dims=DIMS, page_size=1, seed=seed)
    with planning_for(DeviceProfile("cpu", 12)):
        inputs = case.build(DEVICE)
        buffers = allocate(case, MODES["v1.2"])
        fill(case, inputs, buffers, MODES["v1.2"])
        call(case, inputs, buffers)
        inputs = later.build(DEVICE)
        decode_update_mla_metadata_v1(
            inputs.qo_indptr,
            inputs.kv.kv_indptr,
            inputs.kv.kv_last_page_len,
            3,
            1,
            True,
            *(buffers[BUFFERS[i]] for i in (0, 2, 1, 3, 4, 5)),
        )
        call(later, inputs, buffers)
    assert len(launches) == 2


def test_lists_that_number_whole_tiles_among_the_partials(launches, seed):
    """aiter's v1.0 counts one partial, row -1, for a tile that was not cut."""
    case = DecodeCase("minus_one", (200, 40, 0), dims=DIMS, seed=seed)
    inputs = case.build(DEVICE)
    with planning_for(DeviceProfile("cpu", 3)):
        buffers = allocate(case, MODES["v1.0"])
        fill(case, inputs, buffers, MODES["v1.0"])
        buffers["reduce_indptr"].copy_(torch.arange(4, dtype=torch.int32))
        rows = torch.arange(3, dtype=torch.int32)
        buffers["reduce_final_map"].copy_(torch.stack([rows, rows + 1], dim=1))
        buffers["reduce_partial_map"].fill_(-1)
        call(case, inputs, buffers)
    assert len(launches) == 1


def test_another_backend_schedules_itself(seed):
    """The reference has no kernel for lists: garbage in them changes nothing."""
    case = DecodeCase("reference", (200, 40, 0), dims=DIMS, seed=seed)
    inputs = case.build()
    buffers = {name: tensor.fill_(77) for name, tensor in allocate(case, MODES["v1.2"]).items()}
    buffers = {name: tensor.to("cpu") for name, tensor in buffers.items()}
    with use_backend("reference"):
        call(case, inputs, buffers)


@pytest.mark.skipif(arch_of(DEVICE) != "cpu", reason="only the CPU checks lists unasked")
def test_stale_lists_are_refused(launches, seed):
    case = DecodeCase("stale", (200, 40), dims=DIMS, page_size=1, seed=seed)
    later = DecodeCase("later", (210, 49), dims=DIMS, page_size=1, seed=seed).build()
    with planning_for(DeviceProfile("cpu", 8)):
        buffers = allocate(case, MODES["v1.2"])
        fill(case, case.build(), buffers, MODES["v1.2"])
        with pytest.raises(LayoutError, match="list must be made for the lengths it is used with"):
            call(case, later, buffers)


def test_heads_that_no_list_is_for(launches, seed):
    case = DecodeCase("heads", (20, 4), dims=DIMS, seed=seed)
    buffers = allocate(case, MODES["v1.2"])
    with (
        planning_for(DeviceProfile("gfx942", 8)),
        pytest.raises(UnsupportedProblemError, match="num_heads must be a multiple of 16"),
    ):
        call(case, case.build(DEVICE), buffers)
