"""Decode again with the same tensors: launches that skip Triton get what the first ones got.

Run by `test_aot` in a process of its own; the driver launches nothing.
"""

from __future__ import annotations

import os

import torch
from triton.runtime.jit import JITFunction

from mla_core import AttentionOptions, LatentCache, MLADims, PagedKV, decode, plan_decode
from mla_core.arch import cpu_as
from mla_core.testing.null_driver import null_driver
from mla_triton import aot


def main():
    # Compiled, not interpreted, although the tensors are on the CPU.
    list(aot.kernels())
    os.environ["TRITON_INTERPRET"] = "1"
    plain, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: (
        plain.append(kernel) or run(kernel, *args, **kwargs)
    )
    names = set()
    for arch, heads, layout, page_size, options in (
        ("sm90", 16, "bf16", 64, {"num_kv_splits": 3}),
        ("sm90", 128, "bf16", 64, {"num_kv_splits": 3}),
        ("sm90", 16, "bf16", 1, {"has_sink": True}),
        ("sm90", 16, "fp8_ds656", 64, {"num_kv_splits": 1}),
        ("sm90", 16, "fp8_ds656", 64, {"fixed_lengths": True, "persistent": True}),
        ("gfx950", 128, "bf16", 16, {"options": AttentionOptions(window=9), "num_kv_splits": 2}),
    ):
        with cpu_as(arch), null_driver(*aot.TARGETS[arch]) as driver:
            step = make_step(heads, layout, page_size, **options)
            step()
            plain.clear()
            count = len(driver.launches)
            for _ in range(2):
                step()
            assert not plain, (arch, layout, plain)
            for place, launch in enumerate(driver.launches):
                first = driver.launches[place % count]
                assert (launch.name, launch.grid) == (first.name, first.grid)
                assert addresses(launch.args) == addresses(first.args)
                names.add(launch.name)
    print(" ".join(sorted(names)))


def addresses(args):
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]


def make_step(heads, layout, page_size, **options):
    dims, batch_size = MLADims(heads), 3
    cache = LatentCache.allocate(layout, dims, 8 * batch_size, page_size)
    table = torch.arange(8 * batch_size, dtype=torch.int32).view(batch_size, 8)
    lens = torch.full((batch_size,), 8 * page_size, dtype=torch.int32)
    kv = PagedKV.from_block_table(cache, table, lens)
    qo_indptr = torch.arange(batch_size + 1, dtype=torch.int32)
    plan = plan_decode(dims, qo_indptr, kv, backend="triton", **options)
    ql_nope, q_pe = torch.randn(batch_size, heads, 576).bfloat16().split((512, 64), dim=-1)
    out, lse = torch.empty(batch_size, heads, 512).bfloat16(), torch.empty(batch_size, heads)
    sink = torch.zeros(heads) if options.get("has_sink") else None

    def step():
        decode(ql_nope, q_pe, kv, plan, sm_scale=0.1, out=out, lse=lse, sink=sink)

    return step


if __name__ == "__main__":
    main()
