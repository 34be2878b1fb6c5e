"""Compilation for GPUs that are not here: resources within limits, and files that launches find.

Needs neither a GPU nor a vendor's toolkit. Compiles in processes of its own, because Triton's
interpreter, in which the other tests run kernels, replaces the functions the compiler needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_triton.backend import GPU_ARCHS

SCRIPT = Path(__file__).with_name("aot_check.py")
#: Bytes that a thread may keep in local memory. The rows of sm90 were chosen by measurement, and
#: the quickest ones spill a little; those for fp8 caches, not measured yet, spill more.
LOCAL_BYTES = {"sm90": 768}
#: AMD's scalar registers in lanes of vector registers: without memory traffic, and counted in the
#: emulator, larger tiles with them take fewer instructions than smaller ones without. Persistent
#: kernels have more of them, and so has gfx942, which turns fp8 into bf16 by many instructions.
SCALAR_SPILLS = {"gfx950": 80, "gfx942": 144}
#: Right, and slow: a tile of these needs more registers than there are, whatever its size.
TOO_WIDE = (
    ("gfx", "/fp32/", "/d1024+"),
    ("gfx", "/fp8", "/d1024+"),
    ("sm90", "/fp32/fp8_ds32/", ""),
)


@pytest.fixture(scope="module")
def checks():
    """Compile for all architectures at once; Triton's cache makes the next run quick."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    started = {
        arch: subprocess.Popen(
            [sys.executable, str(SCRIPT), arch],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in sorted(GPU_ARCHS)
    }
    results = {}
    for arch, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        results[arch] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_row_compiles_within_limits(checks, arch):
    head, *results = checks[arch]
    # A row that no shape reaches is one that was never compiled.
    assert not head["unreached"]
    assert {result["name"] for result in results} >= {
        "mla_triton.kernels.decode:decode_kernel",
        "mla_triton.kernels.decode_worklist:decode_worklist_kernel",
        "mla_triton.kernels.rope:rotate_keys_kernel",
        "mla_core.kernels.reduce:reduce_partials_kernel",
    }
    passed = []
    for result in results:
        print(result["configuration"], result["cases"], result["resources"])
        assert result["is_binary"], result
        case, resources = result["cases"][0], result["resources"]
        if ".decode" in result["name"] and "/fp32/" not in case:
            assert result["matrix_instructions"] > 0, result
        excess = result["excess"]
        is_too_wide = any(all(part in case for part in parts) for parts in TOO_WIDE)
        if is_too_wide or resources["local_bytes"] <= LOCAL_BYTES.get(arch, 0):
            excess = [line for line in excess if "local" not in line]
        if is_too_wide:
            excess = [line for line in excess if "spilled" not in line]
        elif resources["scalar_spills"] > SCALAR_SPILLS.get(arch, 0):
            excess.append(f"scalar spills: {resources['scalar_spills']}")
        passed += [f"{case}: {line}: {result['configuration']}" for line in excess]
    assert not passed, "\n".join(passed)
