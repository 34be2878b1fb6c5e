"""The descriptor: frozen data, functions imported at first use and named in every failure."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from mla_core.backend import API_VERSION, Backend, always_available
from mla_core.errors import BackendUnavailableError
from mla_core.problem import Capability

WRITE = Capability(op="write_kv_cache", kernel="k")


def make(target: str = "math:sqrt", capabilities: tuple[Capability, ...] = (WRITE,)) -> Backend:
    return Backend("nova", 5, capabilities, {"write_kv_cache": target})


def test_defaults():
    backend = make()
    assert backend.api_version == API_VERSION
    assert backend.probe is always_available
    backend.probe("sm90")


def test_descriptor_is_frozen_and_hashable():
    ops = {"write_kv_cache": "math:sqrt"}
    backend = Backend("nova", 5, (WRITE,), ops)
    ops["decode"] = "math:exp"
    assert list(backend.ops) == ["write_kv_cache"]
    with pytest.raises(TypeError):
        backend.ops["decode"] = "math:exp"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.priority = 6  # type: ignore[misc]
    assert len({backend, backend, make()}) == 2, "identity decides"


def test_function_is_imported_at_first_use_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nova_kernels.py").write_text("def write():\n    return 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    backend = make("nova_kernels:write")
    assert "nova_kernels" not in sys.modules
    assert backend.load("write_kv_cache")() == 42
    monkeypatch.delitem(sys.modules, "nova_kernels")
    (tmp_path / "nova_kernels.py").unlink()
    assert backend.load("write_kv_cache")() == 42


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:write", "cannot load write_kv_cache from 'no_such_module:write'"),
        ("math:no_such_function", "no_such_function"),
        ("math", "cannot load write_kv_cache from 'math'"),
    ],
)
def test_function_that_is_not_there_raises_with_cause(target: str, message: str):
    with pytest.raises(BackendUnavailableError, match=message) as info:
        make(target).load("write_kv_cache")
    assert isinstance(info.value.__cause__, (ImportError, AttributeError))


def test_error_inside_a_kernel_module_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "nova_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        make("nova_broken:write").load("write_kv_cache")


def test_unknown_op_is_named_with_the_known_ones():
    with pytest.raises(BackendUnavailableError, match="op must be one of write_kv_cache, got 'de"):
        make().load("decode")


@pytest.mark.parametrize(
    ("op", "missing"), [("decode", "decode, plan_decode"), ("prefill", "prefill")]
)
def test_capability_without_a_function_is_refused(op: str, missing: str):
    with pytest.raises(BackendUnavailableError, match=f"missing {missing}"):
        make(capabilities=(WRITE, Capability(op=op, kernel="k")))


def test_backend_may_offer_nothing():
    assert Backend("empty", 1, (), {}).capabilities == ()


def test_integrations_are_imported_at_first_use_too():
    backend = Backend(
        "nova", 5, (), {}, integrations={"transformers": "math:sqrt", "vllm": "math:no"}
    )
    assert backend.integration("transformers")(9.0) == 3.0
    with pytest.raises(BackendUnavailableError, match="cannot load vllm from 'math:no'"):
        backend.integration("vllm")
    with pytest.raises(BackendUnavailableError, match="one of transformers, vllm, got 'jax'"):
        backend.integration("jax")
    with pytest.raises(BackendUnavailableError, match="integration must be one of none, got 'jax'"):
        make().integration("jax")
