"""Kernels compiled for GPUs that are not here: within limits, without spilling.

Needs neither a GPU nor a vendor's toolkit. Compiles in processes of its own, because Triton's
interpreter, in which the other tests run kernels, replaces the functions the compiler needs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mla_fusions.backend import GPU_ARCHS

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_check.py")
#: Bytes of local memory: the return address of NVIDIA's routine for rare cases of a division.
CALL_BYTES = 8
#: Every layout and eight other writes, as they are written without turning; the named ops.
NUM_ROTATIONS = 26 + 8 + 12 + 11
#: Six ways to store weights at three numbers of tokens and two shapes; four more launches.
NUM_PRODUCTS = 6 * 6 + 4
#: Products with RoPE and the cache write: five at three numbers of tokens.
NUM_ABSORBED = 5 * 3
#: Norms with each quantiser and without.
NUM_NORMS = 4
#: Norms with RoPE and a write: nine layouts at two numbers of tokens.
NUM_NORM_WRITES = 9 * 2
#: The indexer's inputs and its keys alone: two numbers of tokens, flavours and kinds of pages.
NUM_INDEXERS = 2 * 2 * 2 * 2
#: Norms, W_UK with rotation, and W_UV at two numbers of tokens; one launch more for many tokens;
#: norms, and W_UK with rotation, of three layouts.
NUM_LAYERS = 3 * 2 + 4 + 2 * 3
#: Scalar registers that may be parked in lanes where tiles of comparisons are alive: products that
#: quantise to MXFP4, or widen a flavour of fp8 that the chip does not know.
PARKED = 20


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_kernel_compiles_within_limits(arch):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), arch],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *results, repeated = map(json.loads, done.stdout.splitlines())
    num_products = NUM_PRODUCTS + NUM_ABSORBED
    num_norms = NUM_NORMS + NUM_NORM_WRITES + NUM_INDEXERS
    assert len(results) == 26 + 8 + 9 + NUM_ROTATIONS + num_products + num_norms + NUM_LAYERS
    for result in results:
        print(result["case"], result["resources"])
        assert result["is_binary"], result
        excess = result["excess"]
        if arch == "sm90" and result["resources"]["local_bytes"] <= CALL_BYTES:
            excess = [line for line in excess if "local" not in line]
        assert not excess, result
        allowed = PARKED if result["case"].startswith("product") else 0
        assert result["resources"]["scalar_spills"] <= allowed, result
        assert not result["tangled"], result
        # MXFP4 on both sides goes to the instruction for it, where there is one.
        takes_fp4 = re.match(r"product (rope )?mxfp4|product (packed|to fp8)", result["case"])
        assert result["is_scaled"] == (arch == "gfx950" and takes_fp4 is not None), result
    assert repeated == {"is_direct": True, "is_same": True, "name": "write_rows_kernel"}
