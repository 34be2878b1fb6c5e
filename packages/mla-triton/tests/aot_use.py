"""Decode with kernels that were compiled before: ``python aot_use.py gfx942``; run by `test_aot`.

Prints how many kernels Triton looked for, and how many of them it had to compile. The driver
launches nothing.
"""

from __future__ import annotations

import os
import sys

import torch
from triton import knobs

from mla_core import LatentCache, MLADims, PagedKV, decode, plan_decode
from mla_core.arch import cpu_as
from mla_core.testing.null_driver import null_driver
from mla_triton import aot


def main(arch):
    # Compiled, not interpreted, although the tensors are on the CPU.
    list(aot.kernels())
    os.environ["TRITON_INTERPRET"] = "1"
    hits = []
    knobs.compilation.listener = lambda **seen: hits.append(seen["cache_hit"])
    with cpu_as(arch), null_driver(*aot.TARGETS[arch]) as driver:
        for batch_size, num_kv_splits in ((3, 1), (5, 2), (7, 9), (80, 2)):
            step(batch_size, num_kv_splits)
    print(len(driver.launches), len(hits), hits.count(False))


def step(batch_size, num_kv_splits):
    dims = MLADims(16)
    cache = LatentCache.allocate("bf16", dims, 10 * batch_size, 64)
    table = torch.arange(10 * batch_size, dtype=torch.int32).view(batch_size, 10)
    lens = torch.randint(0, 640, (batch_size,), dtype=torch.int32)
    kv = PagedKV.from_block_table(cache, table, lens)
    qo_indptr = torch.arange(batch_size + 1, dtype=torch.int32)
    plan = plan_decode(dims, qo_indptr, kv, num_kv_splits=num_kv_splits, backend="triton")
    ql_nope, q_pe = torch.randn(batch_size, 16, 576).bfloat16().split((512, 64), dim=-1)
    decode(ql_nope, q_pe, kv, plan, sm_scale=dims.sm_scale)


if __name__ == "__main__":
    main(sys.argv[1])
