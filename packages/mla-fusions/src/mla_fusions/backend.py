"""Descriptor of the ``fusions`` backend: what its kernels take, without importing Triton."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

from mla_core import layouts
from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError
from mla_core.problem import Capability, Verified

#: Architectures that the kernels are compiled for in the tests.
GPU_ARCHS = frozenset({"sm90", "gfx942", "gfx950"})

_INTERPRETED = Verified(
    "cpu", "interpreted", "2026-11-21", "packages/mla-fusions/tests/test_write_kv_cache.py"
)
_RAN = Verified("sm90", "ran", "2026-11-21", "benchmarks/results/sm90/tests_gpu.log")
_EMULATED = tuple(
    Verified(arch, "emulated", "2026-11-21", "packages/mla-fusions/tests/test_emulated.py")
    for arch in ("gfx942", "gfx950")
)
_WRITE = Capability(
    op="write_kv_cache",
    kernel="write_rows",
    archs=GPU_ARCHS,
    q_dtypes=frozenset({"bf16", "fp16", "fp32"}),
    kv_dtypes=frozenset(layout.kv_dtype for layout in layouts.ALL.values()),
    layouts=frozenset(layout.family for layout in layouts.ALL.values()),
    value_includes_rope=True,
    verified=(_RAN, *_EMULATED),
)


def _in_interpreter(row: Capability) -> Capability:
    """Return the row for a CPU; the interpreter takes seconds, so only those who name it get it."""
    return replace(row, archs=frozenset({"cpu"}), automatic=False, verified=(_INTERPRETED,))


def probe(arch: str) -> None:
    """Raise when Triton is missing, or on a CPU without Triton's interpreter.

    Raises
    ------
    BackendUnavailableError
    """
    if find_spec("triton") is None:
        raise BackendUnavailableError('triton is not installed; pip install "mla-fusions[triton]"')
    if arch == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise BackendUnavailableError(
            "fusions runs on the CPU only in Triton's interpreter; set TRITON_INTERPRET=1 to test "
            "with it"
        )


BACKEND = Backend(
    name="fusions",
    priority=50,
    description="Fused operations around attention in Triton: cache writes.",
    probe=probe,
    ops={"write_kv_cache": "mla_fusions.cache_writes:write_kv_cache"},
    integrations={"transformers": "mla_fusions.integrations.transformers:fuse"},
    capabilities=(_WRITE, _in_interpreter(_WRITE)),
)
