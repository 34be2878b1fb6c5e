"""Decode again, also with other tensors: launches that skip Triton get what its own would.

Run by `test_aot` in a process of its own; the driver launches nothing.
"""

from __future__ import annotations

import os

import pytest
import torch
from triton.runtime.jit import JITFunction

from mla_core import AttentionOptions, FusedRope, LatentCache, MLADims, PagedKV, decode, plan_decode
from mla_core.arch import cpu_as
from mla_core.errors import LayoutError
from mla_core.launch import forget, recording
from mla_core.rope import RopeInputs
from mla_core.testing.null_driver import null_driver
from mla_triton import aot

CASES = (
    ("sm90", 16, "bf16", 64, {"num_kv_splits": 3}),
    ("sm90", 128, "bf16", 64, {"num_kv_splits": 3}),
    ("sm90", 16, "bf16", 1, {"has_sink": True}),
    ("sm90", 16, "fp8_ds656", 64, {"num_kv_splits": 1}),
    ("sm90", 16, "fp8_ds656", 64, {"fixed_lengths": True, "persistent": True}),
    ("sm90", 16, "fp8", 16, {"num_kv_splits": 2}),
    ("sm90", 8, "bf16", 64, {"options": AttentionOptions(cp_world_size=2)}),
    ("sm90", 16, "bf16", 16, {"options": AttentionOptions(rope=FusedRope(True, 64))}),
    ("sm90", 16, "fp32", 16, {"options": AttentionOptions(rope=FusedRope(True, 64))}),
    ("gfx950", 128, "bf16", 16, {"options": AttentionOptions(window=9), "num_kv_splits": 2}),
)


def main():
    # Compiled, not interpreted, although the tensors are on the CPU.
    list(aot.kernels())
    os.environ["TRITON_INTERPRET"] = "1"
    plain, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: (
        plain.append(kernel) or run(kernel, *args, **kwargs)
    )
    names = set()
    for arch, heads, layout, page_size, options in CASES:
        with cpu_as(arch), null_driver(*aot.TARGETS[arch]) as driver:
            steps = [Step(heads, layout, page_size, **options) for _ in range(3)]
            names |= check_decode(driver, steps, plain)
            check_run(driver, steps, plain)
    check_alignment(plain)
    check_refusals()
    print(" ".join(sorted(names)))


def check_decode(driver, steps, plain):
    """Of the calls with plans alike, all but the first skip Triton; they launch the same."""
    expected = [launches_of(driver, step.decode, step.plan) for step in steps]
    steps[0].decode(steps[0].plan)
    plain.clear()
    for step, launches in [*zip(steps, expected, strict=True)] * 2:
        plan, count = step.plan, len(plain)
        assert launches_of(driver, step.decode, plan, anew=False) == launches
        # The host reads what these were promised, so that they are not repeated on the CPU.
        if plan.request.kv_lens is None and plan.options.rope is None:
            assert len(plain) == count, plan
    return {name for launches in expected for name, *_ in launches}


def check_run(driver, steps, plain):
    """What the backend launches for one step's tensors and plan is repeated for another's."""
    expected = [launches_of(driver, step.run, step.plan) for step in steps]
    with recording() as tape:
        steps[0].run(steps[0].plan)
    repeat = tape.repeat(steps[0].given, steps[0].whole)
    plain.clear()
    for step, launches in zip(steps, expected, strict=True):
        given = addresses((*step.given, *step.whole))
        repeated = launches_of(driver, lambda _, given=given: repeat(given), step.plan, anew=False)
        assert repeated == launches
    assert not plain


def check_alignment(plain):
    """Queries that start at odd bytes take another kernel, though all else is alike."""
    with cpu_as("sm90"), null_driver(*aot.TARGETS["sm90"]) as driver:
        step = Step(16, "bf16", 64)
        odd = (
            torch.zeros(step.q.numel() + 8).bfloat16()[1:].as_strided(step.q.shape, step.q.stride())
        )
        for _ in range(3):
            for q, kernel in ((step.q, "hopper_decode_kernel"), (odd, "decode_kernel")):
                step.ql_nope, step.q_pe = q.split((512, 64), dim=-1)
                plain.clear()
                launches = launches_of(driver, step.decode, step.plan, anew=False)
                assert launches[0][0] == kernel
        assert not plain


def check_refusals():
    """A call that resembles none before is checked, and under MLA_CHECK=1 each call is."""
    with cpu_as("sm90"), null_driver(*aot.TARGETS["sm90"]) as driver:
        step = Step(16, "bf16", 64)
        for _ in range(3):
            step.decode(step.plan)
        count = len(driver.launches)
        step.kv.cache.buffers[0][5, 3, 7] = float("nan")
        step.decode(step.plan)
        os.environ["MLA_CHECK"] = "1"
        with pytest.raises(LayoutError, match="NaN"):
            step.decode(step.plan)
        del os.environ["MLA_CHECK"]
        step.sink = torch.zeros(16)
        with pytest.raises(LayoutError, match="sink must be None"):
            step.decode(step.plan)
        step.sink, step.out = None, step.out.double()
        with pytest.raises(LayoutError, match="out must be"):
            step.decode(step.plan)
        assert len(driver.launches) == 4 / 3 * count


def launches_of(driver, call, plan, anew=True):
    """Return what a call launches, with nothing known from before if it is to be made anew."""
    if anew:
        forget()
        plan.schedule.memo.clear()
    driver.launches.clear()
    call(plan)
    return [(each.name, each.grid, addresses(each.args)) for each in driver.launches]


def addresses(args):
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]


class Step:
    """The tensors of a decode step, and a plan for them."""

    def __init__(self, heads, layout, page_size, **options):
        dims, batch_size = MLADims(heads), 3
        scale = torch.ones(1) if layout == "fp8" else None
        cache = LatentCache.allocate(layout, dims, 8 * batch_size, page_size, scale=scale)
        table = torch.arange(8 * batch_size, dtype=torch.int32).view(batch_size, 8)
        lens = torch.full((batch_size,), 8 * page_size, dtype=torch.int32)
        self.kv = kv = PagedKV.from_block_table(cache, table, lens)
        qo_indptr = torch.arange(batch_size + 1, dtype=torch.int32)
        dtype = torch.float32 if layout == "fp32" else torch.bfloat16
        self.plan = plan_decode(dims, qo_indptr, kv, q_dtype=dtype, backend="triton", **options)
        self.q = torch.randn(batch_size, heads, 576).to(dtype)
        self.ql_nope, self.q_pe = self.q.split((512, 64), dim=-1)
        self.out = torch.empty(batch_size, heads, 512, dtype=dtype)
        self.lse = torch.empty(batch_size, heads)
        self.sink = torch.zeros(heads) if options.get("has_sink") else None
        mask = self.plan.options
        self.lens = lens if mask.cp_world_size > 1 else None
        self.rotation = (None, None)
        if mask.rope is not None:
            self.rotation = (torch.zeros(99, 64), torch.zeros(batch_size, dtype=torch.int64))
        tensors = (self.ql_nope, self.q_pe, self.out, self.lse, self.sink, self.lens)
        index = (kv.kv_indptr, kv.kv_page_indices, kv.kv_last_page_len)
        self.given = [each for each in (*tensors, *index, *self.rotation) if each is not None]
        self.given.append(qo_indptr)
        owned = (*self.plan.workspace.values(), *self.plan.tables.values())
        self.whole = [*cache.buffers, *owned, *([] if scale is None else [scale])]

    def decode(self, plan):
        table, positions = self.rotation
        decode(
            *(self.ql_nope, self.q_pe, self.kv, plan),
            sm_scale=0.1,
            out=self.out,
            lse=self.lse,
            sink=self.sink,
            global_kv_lens=self.lens,
            cos_sin_cache=table,
            positions=positions,
        )

    def run(self, plan):
        table, positions = self.rotation
        plan.run(
            *(self.ql_nope, self.q_pe, self.kv, plan),
            sm_scale=0.1,
            out=self.out,
            lse=self.lse,
            sink=self.sink,
            q_scale=None,
            global_kv_lens=self.lens,
            **({} if table is None else {"rope": RopeInputs(table, positions)}),
        )


if __name__ == "__main__":
    main()
