"""Cache writes in Triton against the layouts' own `pack`, byte for byte."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core.testing.writes import WRITE_CASES, check_write, write_cases

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter, numpy speaks of numbers that become infinite in fp16, as they should.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def test_every_case_is_claimed():
    assert write_cases("fusions", mla_core.arch.arch_of(DEVICE)) == WRITE_CASES


@pytest.mark.parametrize("case", WRITE_CASES, ids=str)
def test_conformance(case):
    check_write("fusions", case, DEVICE)
