"""The reference backend passes every conformance case."""

from __future__ import annotations

import pytest

from mla_core.testing import conformance
from mla_core.testing.cases import DecodeCase


@pytest.mark.parametrize("case", conformance.decode_cases("reference", "cpu"), ids=str)
def test_conformance(case: DecodeCase):
    conformance.check_decode("reference", case)


def test_it_claims_every_case():
    assert set(conformance.DECODE_CASES) == set(conformance.decode_cases("reference", "cpu"))
