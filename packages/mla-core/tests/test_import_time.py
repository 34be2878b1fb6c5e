"""``import mla_core`` is cheap: torch's own import and little more, no compiler, no driver."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

# Timed inside one process and in CPU time, so that a busy machine does not matter much.
_MEASURE = """
import sys, time, torch
start = time.process_time()
import mla_core
elapsed = time.process_time() - start
assert not torch.cuda.is_initialized()
heavy = {"triton", "transformers", "rich", "matplotlib"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
print(elapsed)
"""
_LIMIT_SECONDS = 0.1


def _run(code: str) -> str:
    # Tracing for coverage, which processes inherit, would double the time.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_little_to_torch():
    times = [float(_run(_MEASURE)) for _ in range(3)]
    print("seconds", times)
    assert statistics.median(times) < _LIMIT_SECONDS


@pytest.mark.parametrize("statement", ["mla_core.backends()", "mla_core.explain(PROBLEM)"])
def test_listing_and_choosing_load_no_compiler(statement: str):
    code = (
        "import sys, torch, mla_core\n"
        "PROBLEM = mla_core.Problem('decode', 'cpu', 'bf16', 'bf16', mla_core.MLADims(16))\n"
        f"{statement}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('triton' in sys.modules)\n"
    )
    assert _run(code) == "False"
