"""The path from op to plan, catalog row, kernel and merge; CPU tensors, emulated kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_asm import emulation, emulator
from mla_asm.decode import plan_decode as schedule_of
from mla_asm.decode import with_kernel
from mla_core import MLADims, PagedKV
from mla_core.arch import arch_of
from mla_core.batch import indptr_of
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.ops import decode
from mla_core.plan import plan_decode
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases

M16, M64 = "mla_decode_bf16_m16", "mla_decode_bf16_m64"
GPU_CASES = decode_cases("asm", arch_of("cuda")) if torch.cuda.is_available() else ()


@pytest.fixture(autouse=True)
def emulated():
    with emulation("gfx942") as seen:
        yield seen


def plan_of(case, inputs, **arguments):
    return plan_decode(
        case.dims, inputs.qo_indptr, inputs.kv, options=case.options, backend="asm", **arguments
    )


def run(inputs, plan, **arguments):
    return decode(
        inputs.ql_nope, inputs.q_pe, inputs.kv, plan, sm_scale=inputs.sm_scale, **arguments
    )


def check(got, inputs):
    # Whatever the dtype of the output, the kernel rounds its probabilities to bf16.
    assert_close(got[0], inputs.expected_out, what="out", dtype="bf16")
    assert_close(got[1], inputs.expected_lse, what="lse", tolerance=TOLERANCES["fp16"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_conformance_on_a_gpu(case):
    check_decode("asm", case, "cuda")


@pytest.mark.parametrize(
    ("case", "fixed_lengths", "kernel"),
    [
        (DecodeCase("one_tile", (40, 0, 9), dims=MLADims(12)), False, M16),
        (DecodeCase("wide_tile", (40, 0, 9), dims=MLADims(20)), False, M64),
        (DecodeCase("ragged", (700, 0, 9)), True, f"{M16}_ps"),
        (DecodeCase("ragged", (700, 0, 9), (1, 2, 3), dims=MLADims(128)), True, f"{M64}_ps"),
    ],
    ids=str,
)
def test_planning_chooses_the_kernel_and_it_is_right(case, fixed_lengths, kernel, seed, emulated):
    case = replace(case, seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs, fixed_lengths=fixed_lengths)
    assert plan.schedule.kernel == kernel
    check(run(inputs, plan, return_lse=True), inputs)
    assert len(emulated.results) == 1
    assert emulated.results[0].instructions > 0


def test_a_long_request_is_split_and_merged(seed):
    case = DecodeCase("long", (1000,), dims=MLADims(16), page_size=64, seed=seed)
    inputs = case.build()
    for fixed_lengths, kernel in ((False, M16), (True, f"{M16}_ps")):
        plan = with_kernel(plan_of(case, inputs, fixed_lengths=fixed_lengths), kernel)
        assert plan.num_kv_splits > 1
        check(run(inputs, plan, return_lse=True), inputs)


@pytest.mark.parametrize(
    ("num_kv_splits", "kernel"), [(1, M16), (2, M16), (1, f"{M16}_ps"), (1, f"{M64}_ps")]
)
def test_lse_is_optional(num_kv_splits, kernel, seed):
    case = DecodeCase("no_lse", (400, 3), dims=MLADims(2), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs, num_kv_splits=num_kv_splits, fixed_lengths=kernel.endswith("_ps"))
    assert_close(run(inputs, with_kernel(plan, kernel)), inputs.expected_out, what="out")


@pytest.mark.parametrize(
    ("num_kv_splits", "kernel"), [(1, M64), (2, M64), (1, f"{M16}_ps"), (3, f"{M64}_ps")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_of_outputs_and_queries(num_kv_splits, kernel, dtype, seed):
    case = DecodeCase("strided", (300, 3), (2, 1), dims=MLADims(3), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs, num_kv_splits=num_kv_splits, fixed_lengths=kernel.endswith("_ps"))
    plan = with_kernel(plan, kernel)
    for left in (3, 8):  # rows that start at no multiple of 16 bytes, and some that do
        wide = torch.full((3, 3, 528), 7.0, dtype=dtype)
        wide_lse = torch.full((3, 5), 7.0)
        padded = torch.nn.functional.pad(inputs.ql_nope.transpose(0, 1), (left, 8))
        ql_nope = padded[..., left:-8].transpose(0, 1)
        out, lse = wide.transpose(0, 1)[..., left : left + 512], wide_lse[:, 1:4]
        check(run(replace(inputs, ql_nope=ql_nope), plan, out=out, lse=lse), inputs)
        assert (wide[..., :left] == 7).all()
        assert (wide[..., left + 512 :] == 7).all()
        assert (wide_lse[:, [0, 4]] == 7).all()


def test_lengths_are_read_when_running(seed):
    """One plan serves other lengths, pages and query counts written in place, as in a graph."""
    case = DecodeCase("longest", (300, 40), (2, 1), dims=MLADims(8), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs, num_kv_splits=2)
    other = DecodeCase("other", (17, 280), (1, 2), dims=MLADims(8), seed=seed + 1).build()
    plan.qo_indptr.copy_(other.qo_indptr)
    check(run(other, plan, return_lse=True), other)


def test_a_work_list_allows_other_pages_only(seed):
    case = DecodeCase("planned", (300, 40), (2, 1), dims=MLADims(8), seed=seed)
    inputs = case.build()
    plan = with_kernel(plan_of(case, inputs, fixed_lengths=True), f"{M16}_ps")
    other = replace(case, seed=seed + 1).build()
    check(run(other, plan, return_lse=True), other)
    other.kv.kv_last_page_len[0] += 1
    with pytest.raises(LayoutError, match="seq_lens must stay"):
        run(other, plan)


@pytest.mark.parametrize("heads", [16, 40])
def test_bits_do_not_depend_on_batch_mates(heads, seed):
    case = DecodeCase("mates", (210, 77, 500), (1, 2, 4), dims=MLADims(heads), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs, batch_invariant=True)
    together = run(inputs, plan, return_lse=True)
    kv = inputs.kv
    for request in range(3):
        tokens = slice(*inputs.qo_indptr[request : request + 2].tolist())
        pages = kv.kv_page_indices[slice(*kv.kv_indptr[request : request + 2].tolist())]
        alone = replace(
            inputs,
            ql_nope=inputs.ql_nope[tokens],
            q_pe=inputs.q_pe[tokens],
            qo_indptr=indptr_of(inputs.qo_indptr.diff()[request : request + 1]),
            kv=PagedKV.from_csr(
                kv.cache,
                torch.tensor([0, pages.numel()], dtype=torch.int32),
                pages.clone(),
                kv.kv_last_page_len[request : request + 1].clone(),
            ),
        )
        got = run(alone, plan_of(case, alone, batch_invariant=True), return_lse=True)
        assert torch.equal(got[0], together[0][tokens])
        assert torch.equal(got[1], together[1][tokens])


def test_a_compiled_step_runs_the_kernel(seed, emulated):
    case = DecodeCase("compiled", (40, 9), dims=MLADims(4), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs)
    step = torch.compile(decode, backend="eager", fullgraph=True)
    got = step(
        inputs.ql_nope, inputs.q_pe, inputs.kv, plan, sm_scale=inputs.sm_scale, return_lse=True
    )
    check(got, inputs)
    assert len(emulated.results) == 1


def test_a_cache_that_16_bytes_do_not_divide_is_refused(seed):
    case = DecodeCase("odd", (40,), dims=MLADims(4), seed=seed)
    inputs = case.build()
    buffer = inputs.kv.cache.buffers[0]
    flat = torch.zeros(buffer.numel() + 1, dtype=buffer.dtype)[1:]
    cache = replace(inputs.kv.cache, buffers=(flat.view(buffer.shape),))
    shifted = replace(inputs, kv=replace(inputs.kv, cache=cache))
    with pytest.raises(LayoutError, match=r"kv must start and step .* at multiples of 16 bytes"):
        run(shifted, plan_of(case, shifted))


def test_a_batch_larger_than_a_grid_is_refused():
    plan = plan_of(DecodeCase("small", (1,)), DecodeCase("small", (1,)).build())
    with pytest.raises(UnsupportedProblemError, match=r"batch_size must be in 0\.\.65535"):
        schedule_of(replace(plan.request, batch_size=65536))


def test_a_request_longer_than_a_kernel_counts_is_refused():
    case = DecodeCase("small", (1,))
    request = plan_of(case, case.build()).request
    longest = replace(request, max_seqlen_k=2**30, num_kv_splits=1)
    assert schedule_of(longest).kernel == M16
    for max_seqlen_k in (2**30 + 1, 2**31 - 1):
        with pytest.raises(
            UnsupportedProblemError,
            match=rf"asm: max_seqlen_k must be at most 1073741824, got {max_seqlen_k}; plan parts",
        ):
            schedule_of(replace(longest, max_seqlen_k=max_seqlen_k))


def test_emulation_is_announced_once(caplog, seed):
    emulator._announce.cache_clear()
    case = DecodeCase("said", (9,), dims=MLADims(4), seed=seed)
    inputs = case.build()
    plan = plan_of(case, inputs)
    with caplog.at_level("INFO", "mla_core"):
        run(inputs, plan)
        run(inputs, plan)
    said = [message for message in caplog.messages if message.startswith("asm_emulate")]
    assert len(said) == 1
    assert "arch=gfx942" in said[0]
