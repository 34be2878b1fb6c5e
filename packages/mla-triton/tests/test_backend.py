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

ROWS = backend.BACKEND.capabilities
GPU_ROWS = [row for row in ROWS if "cpu" not in row.archs]
PORTABLE = next(row for row in GPU_ROWS if row.kernel == "flash_decode")
CPU_ROWS = [row for row in ROWS if "cpu" in row.archs]
PERSISTENT_ROWS = [row for row in GPU_ROWS if "persistent" in row.features]
FP8 = {"kv_dtype": "fp8_e4m3"}
FNUZ = {"kv_dtype": "fp8_e4m3fnuz"}


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


def is_accepted(rows, asked):
    return any(not row.why_not(asked) for row in rows)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_known_models(name):
    reasons = PORTABLE.why_not(problem(dims=MODELS[name]))
    expected = ["value_includes_rope=True (needs False)"] if "v4" in name else []
    assert reasons == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_dtype": "fp8_e5m2"}, "kv_dtype=fp8_e5m2 (needs bf16, fp16, fp32)"),
        ({"q_dtype": "fp16"}, "q_dtype=fp16 (needs kv_dtype=bf16)"),
        ({"layout": "shuffled"}, "layout=shuffled (needs standard)"),
        ({"arch": "sm80"}, "arch=sm80 (needs gfx942, gfx950, sm90)"),
        ({"q_dtype": "fp8_e4m3"}, "q_dtype=fp8_e4m3 (needs bf16, fp16, fp32)"),
        (FP8 | {"layout": "v4_584"}, "(needs ds32, ds656, seg576, seg644, seg656, standard)"),
        (FP8 | {"arch": "gfx942"}, "arch=gfx942 (needs gfx950, sm90)"),
        (FP8 | {"q_dtype": "fp8_e4m3fnuz"}, "(needs bf16, fp16, fp32, fp8_e4m3)"),
        (FNUZ, "arch=sm90 (needs gfx942)"),
    ],
    ids=["e5m2", "mixed", "layout", "arch", "q", "fp8-layout", "fp8-arch", "flavours", "fnuz-arch"],
)
def test_refuses(changes, reason):
    asked = problem(**changes)
    assert not is_accepted(GPU_ROWS, asked)
    assert any(reason in said for row in GPU_ROWS for said in row.why_not(asked))


@pytest.mark.parametrize("q_dtype", ["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("layout", ["standard", "seg576", "seg644", "seg656", "ds656", "ds32"])
@pytest.mark.parametrize(
    ("arch", "kv_dtype"),
    [("sm90", "fp8_e4m3"), ("gfx950", "fp8_e4m3"), ("gfx942", "fp8_e4m3fnuz")],
)
def test_accepts_fp8(arch, kv_dtype, layout, q_dtype):
    q_dtype = kv_dtype if q_dtype == "fp8" else q_dtype
    features = frozenset({"lse", "cp_round_robin", "window", "sink", "softcap", "batch_invariant"})
    asked = problem(arch=arch, q_dtype=q_dtype, kv_dtype=kv_dtype, layout=layout, features=features)
    assert is_accepted(GPU_ROWS, asked)


def test_cpu_rows_are_for_those_who_name_them():
    assert not any(row.automatic for row in CPU_ROWS)
    assert CPU_ROWS[0].why_not(problem(arch="cpu")) == []
    assert {proof.level for row in CPU_ROWS for proof in row.verified} == {"interpreted"}


def test_persistent_rows_are_for_those_who_ask():
    asked = problem(features=frozenset({"persistent", "lse"}))
    first = next(row for row in ROWS if not row.why_not(problem()))
    assert "persistent" not in first.features
    assert {row.kernel for row in ROWS if not row.why_not(asked)} == {"flash_decode_worklist"}
    invariant = problem(features=frozenset({"persistent", "batch_invariant"}))
    assert all(row.why_not(invariant) for row in PERSISTENT_ROWS)


def test_every_architecture_has_evidence_and_a_table():
    for row in GPU_ROWS:
        assert {proof.arch for proof in row.verified} == row.archs
    for arch in (*backend.GPU_ARCHS, "cpu"):
        assert (backend_folder() / "configs" / arch / "decode.json").is_file()


def backend_folder():
    from pathlib import Path

    return Path(backend.__file__).parent


def test_probe_without_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
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
