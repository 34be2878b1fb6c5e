"""Compile kernels for other machines: ``python aot_compile.py '[{"arch": "gfx942", ...}]'``."""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mla_core.kernels.reduce import reduce_partials_kernel
from mla_triton.kernels.decode import decode_kernel
from mla_triton.kernels.decode_worklist import decode_worklist_kernel
from mla_triton.kernels.rope import rotate_keys_kernel

TARGETS = {
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
KERNELS = {
    "decode": decode_kernel,
    "decode_worklist": decode_worklist_kernel,
    "rotate": rotate_keys_kernel,
    "reduce": reduce_partials_kernel,
}
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "v_mfma")


def constants(job):
    if job["kernel"] == "reduce":
        return {
            "D": 512,
            "BLOCK_D": 512,
            "BLOCK_S": 8,
            "GROUP_ROWS": 1,
            "IS_DENSE": True,
            "HAS_MAP": False,
            "HAS_FINAL_MAP": False,
            "HAS_SINK": True,
            "IS_BASE_TWO": False,
            "FOLD": 1,
        }
    if job["kernel"] == "rotate":
        return {
            "R": 64,
            "BLOCK_R": 64,
            "BLOCK_P": 32,
            "PAGE_SIZE": 64,
            "OFFSET": 0,
            "ROTARY": 64,
            "IS_NEOX": False,
            "HAS_CP": False,
            "HAS_SCALE": job["scales"] == "tensor",
            "HAS_TOKENS": True,
            "WRITE_BACK": job["write_back"],
        }
    rank = job["kv_lora_rank"]
    groups = {"token": 1, "group128": rank // 128, "group32": rank // 32}.get(job["scales"], 0)
    padded = 1 << (rank - 1).bit_length()
    of_list = {"FOLD": 1, "FILLS_EMPTY": False} if job["kernel"] == "decode_worklist" else {}
    return of_list | {
        "D": rank,
        "R": 64,
        "BLOCK_D": padded,
        "BLOCK_R": 64,
        "BLOCK_M": job["BLOCK_M"],
        "BLOCK_N": job["BLOCK_N"],
        "PAGE_SIZE": job["page_size"],
        "ROPE_ALIGN": 8,
        "SCALE_GROUP": padded if groups == 1 else rank // groups if groups else 0,
        "HAS_KV_SCALE": job["scales"] == "tensor",
        "HAS_Q_SCALE": job["q_dtype"].startswith("fp8"),
        "IS_CAUSAL": True,
        "HAS_CP": False,
        "HAS_LSE": True,
        "HAS_SINK": False,
        "HAS_SOFTCAP": False,
        "HAS_WINDOW": False,
        "ROTARY": 64 if job.get("rope") else 0,
        "ROPE_OFFSET": 0,
        "IS_NEOX": job.get("rope") == "neox",
        "NEW_KEYS": 0 if not job.get("rope") else 2 if job["arch"].startswith("gfx") else 1,
    }


def type_of(name, job):
    if name in ("ql_nope_ptr", "q_pe_ptr"):
        return "*" + job["q_dtype"]
    if name == "kv_c_ptr":
        return "*" + job["kv_dtype"]
    if name in ("k_pe_ptr", "new_keys_ptr"):
        # Scales in the page go with bf16 rotary keys.
        return "*" + (job["kv_dtype"] if job["scales"] in ("none", "tensor") else "bf16")
    if name == "kv_scale_ptr" and job["scales"] == "group32":
        return "*u8"
    if name == "tokens_ptr":
        return "*bf16"
    if name == "positions_ptr":
        return "*i64"
    if name.startswith(
        ("kv_scale", "k_pe_scale", "q_scale", "cos_sin", "out", "lse", "sink", "partial")
    ) and name.endswith("_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name in ("sm_scale_log2", "softcap") else "i32"


def is_aligned(name):
    """Say whether callers' values are multiples of 16, as Triton finds out at a launch."""
    if name.startswith("kv_scale_stride"):
        return False
    return name.endswith("_ptr") or ("stride" in name and "lse" not in name)


def compile_job(job):
    kernel, values = KERNELS[job["kernel"]], constants(job)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in values else type_of(name, job) for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in values and is_aligned(name)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=values, attrs=aligned),
        target=TARGETS[job["arch"]],
        options={key: job[key] for key in ("num_warps", "num_stages") if key in job},
    )
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    binary = compiled.asm.get("cubin") or compiled.asm["hsaco"]
    return {
        "shared": compiled.metadata.shared,
        "is_binary": binary[:4] == b"\x7fELF",
        "matrix_instructions": sum(text.count(name) for name in INSTRUCTIONS),
    }


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        print(json.dumps(compile_job(job)), flush=True)
