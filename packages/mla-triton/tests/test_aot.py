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


#: What Triton calls the fp8 flavours, and how the layouts scale them.
FP8 = {"fp8_e4m3": "fp8e4nv", "fp8_e4m3fnuz": "fp8e4b8"}
SCALES = {
    "standard": "tensor",
    "seg576": "tensor",
    "seg644": "token",
    "seg656": "group128",
    "ds656": "group128",
    "ds32": "group32",
}


def jobs_of(when):
    """Return the dtypes, scales and page sizes to compile a row of the tuning table for."""
    if "kv_dtype" in when:
        kv_dtype = FP8[when["kv_dtype"]]
        q_dtypes = ["fp32"] if when.get("q_dtype") == "fp32" else ["bf16", kv_dtype]
        scales = sorted({SCALES[layout] for layout in when.get("layout", SCALES)})
        # Every scale with the first dtype, and the other dtype once.
        chosen = [(q_dtypes[0], each) for each in scales] + [(q, scales[0]) for q in q_dtypes[1:]]
        return [(q_dtype, kv_dtype, each, 64) for q_dtype, each in chosen]
    dtype = "fp32" if when.get("q_dtype") == "fp32" else "bf16"
    return [(dtype, dtype, "none", page_size) for page_size in (1, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_configuration_compiles(arch):
    rows = tuning._table(Path(tuning.__file__).parent / "configs" / arch / "decode.json")
    jobs = []
    for row in rows:
        widest = row.when.get("kv_lora_rank", {"max": 1024})["max"]
        asked = jobs_of(row.when)
        kernels = ["decode"] * len(asked) + ["decode_worklist"]
        for kernel, wanted in zip(kernels, [*asked, asked[-1]], strict=True):
            q_dtype, kv_dtype, scales, page_size = wanted
            job = {
                "arch": arch,
                "kernel": kernel,
                "q_dtype": q_dtype,
                "kv_dtype": kv_dtype,
                "scales": scales,
                "kv_lora_rank": widest,
                "page_size": page_size,
                **row.config.launch,
            }
            jobs.append(job)
            if scales == "none" and (page_size == 1 or kernel == "decode_worklist"):
                jobs.append(job | {"rope": "gptj"})
    jobs.append({"arch": arch, "kernel": "reduce"})
    fp8 = FP8["fp8_e4m3fnuz" if arch == "gfx942" else "fp8_e4m3"]
    for kv_dtype, scales in (("bf16", "none"), ("fp32", "none"), (fp8, "tensor")):
        for write_back in (False, True):
            jobs.append(
                {
                    "arch": arch,
                    "kernel": "rotate",
                    "kv_dtype": kv_dtype,
                    "scales": scales,
                    "write_back": write_back,
                    "num_warps": 1,
                }
            )
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
        if job.get("q_dtype", "fp32") != "fp32":
            assert result["matrix_instructions"] > 0, job
