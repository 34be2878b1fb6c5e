"""The fixtures that the package offers to other test suites."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

KERNELS = Path(__file__).with_name("bridge_kernels.py")


@pytest.fixture
def module(monkeypatch):
    """Import the kernels by a name that the compiler process finds as well."""
    spec = importlib.util.spec_from_file_location("bridge_kernels", KERNELS)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bridge_kernels", loaded)
    monkeypatch.syspath_prepend(str(KERNELS.parent))
    spec.loader.exec_module(loaded)
    return loaded


def test_emulate_kernel(emulate_kernel):
    x = torch.zeros(64, dtype=torch.int32)
    result = emulate_kernel(f"{KERNELS}:tuned", "gfx942", num_warps=1)[1](x, 50, BLOCK=64)
    assert result.instructions > 0
    assert torch.equal(x[:50], torch.arange(50).int())
    assert not x[50:].any()


@pytest.fixture
def own_kernel(module):
    """Check, after everything else is undone, that the module has its own kernel again."""
    own = module.tuned
    yield own
    assert module.tuned is own


def test_emulated_triton(own_kernel, module, emulated_triton):
    results = emulated_triton("gfx950", "bridge_kernels:tuned")
    assert module.tuned is not own_kernel
    x = torch.zeros(128, dtype=torch.int32)
    module.tuned[(2,)](x, 128, BLOCK=64)
    module.tuned[(2,)](x, 128, BLOCK=64)
    assert torch.equal(x, torch.arange(128).int())
    assert len(results) == 2
