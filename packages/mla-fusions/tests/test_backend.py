"""The ``fusions`` backend is discovered and promises nothing yet."""

from __future__ import annotations

import pytest

from mla_core import MLADims, Problem, UnsupportedProblemError, registry, select


def test_it_is_discovered_without_capabilities():
    record = registry.record("fusions")
    assert record.distributions == ("mla-fusions",)
    assert record.require().capabilities == ()


def test_naming_it_is_refused_with_a_reason():
    problem = Problem("write_kv_cache", "cpu", "bf16", "bf16", MLADims(16), page_size=64)
    with pytest.raises(UnsupportedProblemError, match="fusions: offers no write_kv_cache"):
        select.select(problem, backend="fusions")
