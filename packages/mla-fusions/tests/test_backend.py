"""What the ``fusions`` backend promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mla_core import BackendUnavailableError, MLADims, Problem, registry, select
from mla_fusions import backend


def test_it_is_discovered():
    record = registry.record("fusions")
    assert record.distributions == ("mla-fusions",)
    assert {row.op for row in record.require().capabilities} == {"write_kv_cache"}


def test_importing_it_loads_no_compiler():
    program = (
        "import sys, mla_fusions, mla_fusions.backend; "
        "sys.exit(bool({'triton', 'mla_triton'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_unknown_layout_is_refused_with_a_reason():
    problem = Problem("write_kv_cache", "sm90", "bf16", "bf16", MLADims(16), "spiral", 64)
    (row, _) = backend.BACKEND.capabilities
    assert "layout=spiral (needs ds32, ds656," in row.why_not(problem)[0]


def test_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match="set TRITON_INTERPRET=1"):
        backend.probe("cpu")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "mla-fusions\[triton\]"'):
        backend.probe("sm90")


def test_the_interpreter_is_not_chosen_unasked():
    problem = Problem("write_kv_cache", "cpu", "bf16", "bf16", MLADims(16), page_size=64)
    assert select.select(problem).backend.name == "reference"
