"""Compile every packaged row of an architecture: ``python aot_check.py gfx942``.

Or only the kernels for Hopper, in Gluon: ``python aot_check.py hopper``.

Prints one JSON line for each compiled kernel. A process of its own, since pytest runs kernels in
Triton's interpreter, which replaces what the compiler needs.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import asdict

from mla_core import layouts
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions, PlanRequest
from mla_core.problem import Problem
from mla_core.rope import FusedRope
from mla_triton import aot, tuning
from mla_triton.backend import BACKEND, HOPPER_ROWS

PLAIN = AttentionOptions()
EVERYTHING = AttentionOptions(window=100, softcap=30.0)
ACCESS = re.compile(r"(ld|st|atom|red|cp\.\S+)\.global")
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "v_mfma")


def is_covered(q_dtype, layout, rank, page_size):
    """Leave out what compiles to nearly the same: fp16, and formats at every page size."""
    if layout.kv_dtype == q_dtype == "fp16":
        return rank == 512
    if not layout.kv_dtype.startswith("fp8"):
        return True
    if q_dtype == "fp16" or (page_size == 1 and layout.family != "standard"):
        return False
    return rank <= 512 or (q_dtype == "bf16" and page_size == 64)


def shapes(arch):
    """Return for each row, query dtype and layout the widest problems that it answers."""
    found = {}
    for q_dtype, layout, rank, (heads, q_len), page_size in itertools.product(
        ("bf16", "fp16", "fp32", "fp8_e4m3", "fp8_e4m3fnuz"),
        layouts.ALL.values(),
        (256, 512, 1024),
        ((16, 1), (32, 1), (128, 1), (128, 4)),
        (1, 64),
    ):
        dims = MLADims(heads, rank)
        problem = Problem(
            op="decode",
            arch=arch,
            q_dtype=q_dtype,
            kv_dtype=layout.kv_dtype,
            dims=dims,
            layout=layout.family,
            page_size=page_size,
            q_len=q_len,
            features=frozenset({"lse"}),
        )
        if not is_covered(q_dtype, layout, rank, page_size):
            continue
        if all(row.why_not(problem) for row in BACKEND.capabilities if row.op == "decode"):
            continue
        try:
            layout.check_dims(dims)
            layout.check_page_size(page_size)
        except ValueError:
            continue
        row = tuning.find(PlanRequest(problem, PLAIN, 2, 2 * q_len, q_len, 128, 4))
        # Later shapes are wider: the last one stays.
        key = (row.where, q_dtype, layout.name, page_size, rank > 512)
        found[key] = (dims, q_len, row.config)
    return found


def cases(arch):
    """Yield an adorned case of each shape, with splits and without in turn, and mostly a plain."""
    for index, (key, (dims, q_len, config)) in enumerate(shapes(arch).items()):
        _, q_dtype, layout, page_size, _ = key
        shape = {
            "arch": arch,
            "dims": dims,
            "q_dtype": q_dtype,
            "layout": layout,
            "page_size": page_size,
            "q_len": q_len,
        }
        adorned = {"options": EVERYTHING, "has_sink": True, "return_lse": True}
        # The portable kernel, also where planning would take the one for Hopper.
        tiled = shape | {"config": config}
        yield aot.DecodeCase(**tiled, **adorned, num_kv_splits=(8, 1)[index % 2])
        if arch == "sm90" and layout == q_dtype == "bf16":
            # What planning takes: the kernels for Hopper, up to rank 512.
            yield aot.DecodeCase(**shape, **adorned, num_kv_splits=(3, 1)[index % 2])
        if layout == q_dtype == "bf16" or (layout, q_dtype) == ("fp8_ds656", "bf16"):
            yield aot.DecodeCase(**shape, **adorned, is_persistent=True)
        if layout == q_dtype == "bf16" and dims.kv_lora_rank == 512:
            # A kernel that rotates the keys, and one that looks for them.
            for write_back in (False, True):
                rope = FusedRope(is_neox=False, rotary_dim=64, write_back=write_back)
                options = AttentionOptions(rope=rope)
                persistent = {"is_persistent": write_back}
                yield aot.DecodeCase(**shape, **persistent, options=options)
        if layout == q_dtype:
            is_large = arch.startswith("gfx") and index % 2 == 1
            yield aot.DecodeCase(**tiled, num_kv_splits=(1, 8)[index % 2], is_large=is_large)


def hopper_cases():
    """Yield cases of the kernels for Hopper that no row of a table stands for."""
    formats = [("bf16", "bf16", 16), ("bf16", "bf16", 128), ("fp16", "fp16", 16)]
    formats += [("bf16", "fp8", 16), ("fp8_e4m3", "fp8_seg576", 16)]
    formats += [("bf16", "fp8", 64), ("fp8_e4m3", "fp8_seg576", 128)]
    formats += [("fp8_e4m3", f"fp8_{name}", 16) for name in ("seg644", "seg656", "ds656")]
    formats += [("bf16", f"fp8_{name}", 64) for name in ("seg644", "ds656")]
    shapes = itertools.product(formats, (256, 512), (16, 64))
    for index, ((q_dtype, layout, heads), rank, page_size) in enumerate(shapes):
        splits = (1, 8)[(index + index // 4) % 2]
        case = aot.DecodeCase(
            "sm90", MLADims(heads, rank), q_dtype, layout, page_size, num_kv_splits=splits
        )
        family = layouts.get(layout)
        problem = Problem(
            op="decode",
            arch="sm90",
            q_dtype=q_dtype,
            kv_dtype=family.kv_dtype,
            dims=case.dims,
            layout=family.family,
            page_size=page_size,
            features=frozenset({"lse"}),
        )
        if any(not row.why_not(problem) for row in HOPPER_ROWS):
            yield case
    # Merges of few pieces and of many; eight are among the cases before.
    for rank, splits in itertools.product((256, 512), (3, 32)):
        yield aot.DecodeCase("sm90", MLADims(16, rank), num_kv_splits=splits, has_sink=True)


def too_large_for_two(built):
    """Say why two programs of the kernel for fp8 caches would not share a multiprocessor."""
    if "hopper_decode" not in built.name or built.resources.registers > 128:
        return []
    shared = built.resources.shared_bytes + 1024  # of which CUDA keeps 1 KiB
    return [] if 2 * shared <= 228 * 1024 else [f"{shared} bytes of shared memory"]


def too_early(built, text):
    """Say where a kernel that is launched while others end does not wait for them."""
    if ".hopper." not in built.name:
        return []
    partitions = built.resources.num_threads // 128 if "decode" in built.name else 1
    lines = text.splitlines()
    waits = [place for place, line in enumerate(lines) if "griddepcontrol.wait" in line]
    found = [] if len(waits) == partitions else [f"{len(waits)} waits, {partitions} partitions"]
    begin = 0
    for wait in waits:
        # After the first one, a partition begins where it is handed its arguments.
        handed = [place for place in range(begin, wait) if "barrier.sync" in lines[place]]
        start = handed[-1] if begin and handed else begin
        found += [f"before a wait: {line}" for line in lines[start:wait] if ACCESS.search(line)]
        begin = wait + 1
    return found


def check(what):
    """Compile and print."""
    arch = "sm90" if what == "hopper" else what
    wanted = itertools.chain(
        () if what == "hopper" else cases(arch), hopper_cases() if arch == "sm90" else ()
    )
    if what == arch:
        reached = {key[0] for key in shapes(arch)}
        unreached = [row.where for row in tuning.rows(arch) if row.where not in reached]
        print(json.dumps({"unreached": unreached}))
    for built in aot.build(wanted):
        asm = built.compiled.asm
        text = asm.get("ptx") or asm["amdgcn"]
        result = {
            "name": built.name,
            "configuration": built.configuration,
            "cases": built.cases,
            "excess": [
                *built.resources.excess(arch),
                *too_large_for_two(built),
                *too_early(built, text),
            ],
            "resources": asdict(built.resources),
            "is_binary": (asm.get("cubin") or asm["hsaco"])[:4] == b"\x7fELF",
            "matrix_instructions": sum(text.count(name) for name in INSTRUCTIONS),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    check(sys.argv[1])
