"""Conformance cases on AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

import pytest

from mla_core import layouts
from mla_core.testing.conformance import check_decode, decode_cases
from mla_core.testing.emulation import emulated_triton

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

DECODE = "mla_triton.kernels.decode:decode_kernel"
ARCHS = ("gfx942", "gfx950")


def covering(cases):
    """Return the cases with anything new in them: a situation, a format, or widths and scales."""
    seen, chosen = set(), []
    for case in cases:
        dims = case.dims
        new = {
            (case.name, dims.num_heads, case.num_kv_splits, case.options),
            (case.q_dtype, case.layout),
            (layouts.get(case.layout).scale_kind, dims.kv_lora_rank, dims.qk_rope_head_dim),
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
    with emulated_triton(arch, DECODE) as results:
        check_decode("triton", case)
    instructions = sum(result.instructions for result in results)
    print(f"{len(results)} launches, {instructions} wave-instructions")
    # Machine code ran, unless the case has nothing to do.
    assert bool(instructions) == bool(sum(case.query_lens))
