"""Kernels as AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mla_fusions
from mla_core.dtypes import torch_dtype
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import assert_close
from mla_core.testing.emulation import emulated_triton
from mla_core.testing.writes import WRITE_CASES, check_write
from mla_fusions import (
    batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant as a8w8,
)

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

KERNELS = (
    "mla_fusions.kernels.write_rows:write_rows_kernel",
    "mla_fusions.kernels.write_blocks:write_blocks_kernel",
    "mla_fusions.kernels.absorbed:absorbed_kernel",
    "mla_fusions.kernels.absorbed:reduce_splits_kernel",
)
CASES = tuple(
    case
    for case in WRITE_CASES
    if case.name in ("rows", "non_finite", "one") or (case.name, case.layout) == ("strided", "fp8")
)


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch in ("gfx942", "gfx950")
        for case in CASES
    ],
)
def test_conformance(arch, case):
    with emulated_triton(arch, *KERNELS) as results:
        check_write("fusions", replace(case, num_tokens=min(case.num_tokens, 7)))
    assert sum(result.instructions for result in results) > 0


@pytest.mark.parametrize("asm_layout", [False, True])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_writers_of_heads(arch, asm_layout, seed):
    """What the interpreter writes: bytes are the flavour of the chip, here and there."""
    dtype = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    shape = (1, 32, 16) if asm_layout else (32, 16)
    batches = [torch.randn(2, len(slots), 2, 32).bfloat16() for slots in (range(10), range(3))]
    batches[1] *= 3
    held = []
    for where in (None, arch):
        caches = [torch.zeros(2, 2, 2, 16, 16).to(dtype), torch.zeros(2, 2, *shape).to(dtype)]
        by_token = [torch.zeros(2, 32) for _ in range(2)]
        by_block = [torch.zeros(2, 2) for _ in range(2)]
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            for rows, slots in zip(batches, ([*range(10)], [11, 10, -1]), strict=True):
                key, value = rows
                mla_fusions.reshape_and_cache_with_block_quant(
                    key, value, *caches, *by_block, torch.tensor(slots), asm_layout
                )
            mla_fusions.reshape_and_cache_with_pertoken_quant(
                key, value, *caches, *by_token, torch.tensor([16, 17, 30]), asm_layout
            )
        assert where is None or sum(result.instructions for result in results) > 0
        held.append([*caches, *by_token, *by_block])
    for interpreted, emulated in zip(*held, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("weights", ["bf16", "fp8_e4m3", "fp8_e4m3fnuz", "nvfp4"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_absorbed_products(arch, weights, seed):
    """Odd tokens and outputs; K in two steps, and split where weights are bf16."""
    heads, tokens, n, k = 2, 5, 40, 192
    x, w = torch.randn(heads, tokens, k).bfloat16(), torch.randn(heads, n, k)
    factor = torch.tensor([0.375])
    with emulated_triton(arch, *KERNELS) as results:
        if weights == "bf16":
            w = w.bfloat16()
            got = mla_fusions.batched_gemm_bf16(x, w, dtype=torch.float32, splitK=2)
            expected = gemm.batched_gemm(x, w)
        elif weights == "nvfp4":
            packed, scales = quant.quantize_nvfp4(w)
            got = mla_fusions.batched_gemm_a16wnvfp4(
                x, packed, scales, torch.float32, w_global_scale=factor
            )
            expected = gemm.batched_gemm(x, quant.dequantize_nvfp4(packed, scales)) * 0.375
        else:
            w = w.to(torch_dtype(weights))
            got = a8w8(x, w, factor, 64, dtype=torch.float32)
            expected = gemm.batched_gemm_a8w8(x, w, 0.375, fp8=weights, group_size=64)
    assert sum(result.instructions for result in results) > 0
    assert_close(got, expected, what="y", dtype="fp32")


@pytest.mark.parametrize("way", ["quantised", "wide", "packed"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_absorbed_products_of_mxfp4(arch, way, seed):
    """With the instruction that multiplies MXFP4 where there is one, and a scale that is NaN."""
    heads, tokens, n, k = 2, 5, 40, 192
    x = torch.randn(heads, tokens, k).bfloat16()
    w, scales = quant.quantize_mxfp4(torch.randn(heads, n, k))
    scales[0, 3, 1] = 255
    with emulated_triton(arch, *KERNELS) as results:
        if way == "packed":
            packed, x_scales = quant.quantize_mxfp4(x)
            got = mla_fusions.batched_gemm_afp4wfp4(packed, w, x_scales, scales, torch.float32)
        else:
            got = mla_fusions.batched_gemm_a16wfp4(
                x, w, scales, torch.float32, prequant=way == "quantised"
            )
    assert sum(result.instructions for result in results) > 0
    if way == "wide":
        expected = gemm.batched_gemm(x, quant.dequantize_mxfp4(w, scales))
    else:
        expected = gemm.batched_gemm_mxfp4(x, w, scales)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_close(got.nan_to_num(), expected.nan_to_num(), what="y", dtype="fp32")
