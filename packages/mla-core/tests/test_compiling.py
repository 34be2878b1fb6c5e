"""Compiling for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_core.compiling import TARGETS, recorded
from mla_core.errors import BackendUnavailableError

SCRIPT = Path(__file__).with_name("compile_check.py")


def test_what_is_recorded_compiles():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["arch"] for result in results] == list(TARGETS)
    for result in results:
        assert result["kernel"] == "reduce_partials_kernel"
        assert result["kinds"] == ["cubin" if result["arch"].startswith("sm") else "hsaco"]
        assert result["registers"] > 0
        assert result["excess"] == []
        assert result["is_restored"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here")
def test_the_interpreter_must_be_off():
    with (
        pytest.raises(BackendUnavailableError, match="Triton's interpreter must be off"),
        recorded("sm90", "mla_core.kernels"),
    ):
        pass


def test_triton_must_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime.interpreter", None)
    with (
        pytest.raises(BackendUnavailableError, match="triton must be importable"),
        recorded("sm90", "mla_core.kernels"),
    ):
        pass
