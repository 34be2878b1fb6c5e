"""The descriptor: what it claims, what it refuses, and that reading it loads no Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mla_core.dims import MODELS, MLADims
from mla_core.errors import BackendUnavailableError
from mla_core.problem import Problem
from mla_core.registry import record
from mla_triton import backend

GPU_ROW, CPU_ROW = backend.BACKEND.capabilities


def problem(**changes):
    asked = {"op": "decode", "arch": "sm90", "q_dtype": "bf16", "kv_dtype": "bf16"}
    return Problem(**(asked | {"dims": MLADims(16)} | changes))


def test_found_through_its_entry_point():
    assert record("triton").require() is backend.BACKEND


def test_descriptor_loads_no_triton():
    code = (
        "import sys; from mla_core.registry import record; record('triton').require();"
        "sys.exit('triton' in sys.modules or 'numpy.testing' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_known_models(name):
    reasons = GPU_ROW.why_not(problem(dims=MODELS[name]))
    expected = ["value_includes_rope=True (needs False)"] if "v4" in name else []
    assert reasons == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_dtype": "fp8_e4m3"}, "kv_dtype=fp8_e4m3 (needs bf16, fp16, fp32)"),
        ({"q_dtype": "fp16"}, "q_dtype=fp16 (needs kv_dtype=bf16)"),
        ({"layout": "shuffled"}, "layout=shuffled (needs standard)"),
        ({"arch": "sm80"}, "arch=sm80 (needs gfx942, gfx950, sm90)"),
        ({"features": frozenset({"cp_round_robin"})}, "feature cp_round_robin"),
    ],
    ids=["fp8", "mixed", "layout", "arch", "context-parallel"],
)
def test_refuses(changes, reason):
    assert any(reason in said for said in GPU_ROW.why_not(problem(**changes)))


def test_cpu_row_is_for_those_who_name_it():
    assert not CPU_ROW.automatic
    assert CPU_ROW.why_not(problem(arch="cpu")) == []
    assert {proof.level for proof in CPU_ROW.verified} == {"interpreted"}


def test_every_architecture_has_evidence_and_a_table():
    assert {proof.arch for proof in GPU_ROW.verified} == backend.GPU_ARCHS
    for arch in (*backend.GPU_ARCHS, "cpu"):
        assert (backend_folder() / "configs" / arch / "decode.json").is_file()


def backend_folder():
    from pathlib import Path

    return Path(backend.__file__).parent


def test_probe_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="triton is not installed; pip install"):
        backend.probe("sm90")


def test_probe_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match="set TRITON_INTERPRET=1"):
        backend.probe("cpu")
    backend.probe("sm90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_probe_in_the_interpreter():
    backend.probe("cpu")
