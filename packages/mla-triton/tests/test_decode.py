"""Dense decode: the conformance suite, launch details and determinism."""

from __future__ import annotations

import pytest
import torch
from mla_core.arch import arch_of
from mla_core.testing.conformance import check_decode, decode_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = decode_cases("triton", arch_of(DEVICE))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case):
    check_decode("triton", case, DEVICE)
