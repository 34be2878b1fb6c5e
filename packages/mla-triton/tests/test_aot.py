"""Ahead-of-time compilation for each architecture: it compiles, and fits the chip's memory.

Needs neither a GPU nor a vendor's toolkit. Runs in a process of its own, because the interpreter
replaces the functions the compiler needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_triton import tuning
from mla_triton.backend import GPU_ARCHS

#: Shared memory of one workgroup in KiB.
SHARED_KIB = {"sm90": 227, "gfx942": 64, "gfx950": 160}

SCRIPT = Path(__file__).with_name("aot_compile.py")


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_configuration_compiles(arch):
    rows = tuning._table(Path(tuning.__file__).parent / "configs" / arch / "decode.json")
    jobs = []
    for row in rows:
        dtype = "fp32" if row.when.get("q_dtype") == "fp32" else "bf16"
        widest = row.when.get("kv_lora_rank", {"max": 1024})["max"]
        for page_size in (1, 64):
            jobs.append(
                {
                    "arch": arch,
                    "kernel": "decode",
                    "dtype": dtype,
                    "kv_lora_rank": widest,
                    "page_size": page_size,
                    **row.config.launch,
                }
            )
    jobs.append({"arch": arch, "kernel": "reduce"})
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(jobs)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(jobs)
    for job, result in zip(jobs, results, strict=True):
        print(job, result)
        assert result["shared"] <= SHARED_KIB[arch] * 1024, job
        assert result["is_binary"], job
        if job.get("dtype") == "bf16":
            assert result["matrix_instructions"] > 0, job
