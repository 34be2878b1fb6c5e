"""Cache writes as AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mla_fusions
from mla_core.testing.emulation import emulated_triton
from mla_core.testing.writes import WRITE_CASES, check_write

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

KERNELS = (
    "mla_fusions.kernels.write_rows:write_rows_kernel",
    "mla_fusions.kernels.write_blocks:write_blocks_kernel",
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
