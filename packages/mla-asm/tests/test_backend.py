"""The ``asm`` backend is discovered and promises exactly what its catalogs hold: nothing yet."""

from __future__ import annotations

import pytest

from mla_asm import read_catalogs
from mla_core import MLADims, Problem, UnsupportedProblemError, registry, select


def test_it_is_discovered_and_usable():
    record = registry.record("asm")
    assert record.distributions == ("mla-asm",)
    assert record.require().priority == 100


def test_no_row_no_capability():
    catalogs = read_catalogs()
    assert set(catalogs) == {"gfx942", "gfx950", "sm90a"}
    assert sum(map(len, catalogs.values())) == 0
    assert registry.record("asm").require().capabilities == ()


def test_naming_it_is_refused_with_a_reason():
    problem = Problem("decode", "gfx942", "bf16", "bf16", MLADims(16), page_size=64)
    with pytest.raises(UnsupportedProblemError, match="asm: offers no decode"):
        select.select(problem, backend="asm")
