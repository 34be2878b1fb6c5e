"""Cache writes as AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_core.testing.emulation import emulated_triton
from mla_core.testing.writes import WRITE_CASES, check_write

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

KERNEL = "mla_fusions.kernels.write_rows:write_rows_kernel"
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
    with emulated_triton(arch, KERNEL) as results:
        check_write("fusions", replace(case, num_tokens=min(case.num_tokens, 7)))
    assert sum(result.instructions for result in results) > 0
