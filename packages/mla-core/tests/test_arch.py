"""Architecture names of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mla_core import arch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for a GPU that this machine need not have."""
    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    arch._gpu_arch.cache_clear()
    yield properties
    arch._gpu_arch.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")])
def test_other_devices_are_named_by_type(device: str | torch.device):
    assert arch.arch_of(device) == str(device)


def test_cpu_by_another_name():
    with arch.cpu_as("gfx942"):
        assert arch.arch_of("cpu") == "gfx942"
        assert arch.arch_of("meta") == "meta"
        with arch.cpu_as("gfx950"):
            assert arch.arch_of("cpu") == "gfx950"
        assert arch.arch_of("cpu") == "gfx942"
    assert arch.arch_of("cpu") == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, device: str):
    monkeypatch.setattr(torch.version, "hip", None)
    assert arch.arch_of(device) == "sm90"


@pytest.mark.parametrize(
    ("name", "expected"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950")]
)
def test_rocm(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, expected: str):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    gpu.gcnArchName = name
    assert arch.arch_of("cuda") == expected


@pytest.mark.gpu
def test_this_gpu_has_a_short_name():
    name = arch.arch_of("cuda")
    assert name.startswith(("sm", "gfx"))
    assert ":" not in name
