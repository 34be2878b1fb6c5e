"""This package's Triton kernels as gfx942 and gfx950 machine code, with the checkers on."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mla_core.metadata import DeviceProfile, WorkList, decode_sizes, plan_v1_2, plan_v1_2_device
from mla_core.reduce import LseBase, reduce_partials, reduce_tiles
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_

cdna_emulator = pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

REDUCE = "mla_core.kernels.reduce:reduce_partials_kernel"
PLANNER = tuple(
    f"mla_core.kernels.plan:{name}"
    for name in ("request_prefix_kernel", "deal_kernel", "fill_kernel")
)
#: `plan_v1_2_device` refuses AMD GPUs with an older one; `./dev env` lays this one out.
SECOND_TRITON = Path(__file__).parents[3] / ".nox" / "second-triton"
archs = pytest.mark.parametrize("arch", ["gfx942", "gfx950"])


def partials(rng, lengths, num_heads=3, value_dim=512):
    """Return ragged partials, some of them empty with bytes that must not be read."""
    count = sum(lengths)
    partial_out = torch.randn(count, num_heads, value_dim, generator=rng)
    partial_lse = 4 * torch.randn(count, num_heads, generator=rng)
    empty = torch.rand(count, num_heads, generator=rng) < 0.2
    partial_lse[empty] = float("-inf")
    partial_out[empty] = float("nan")
    indptr = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return partial_out, partial_lse, indptr


@archs
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("base", list(LseBase))
def test_reduce(emulated_triton, rng, arch, out_dtype, with_sink, base):
    partial_out, partial_lse, indptr = partials(rng, (3, 0, 1, 70, 2))
    sink = torch.randn(3, generator=rng) if with_sink else None
    common = {"reduce_indptr": indptr, "sink": sink, "lse_base": base, "out_dtype": out_dtype}
    expected_out, expected_lse = reduce_partials(
        partial_out, partial_lse, backend="torch", **common
    )
    out, lse = poison_(torch.empty_like(expected_out)), poison_(torch.empty_like(expected_lse))
    results = emulated_triton(arch, REDUCE)
    reduce_partials(partial_out, partial_lse, out=out, lse=lse, backend="triton", **common)
    assert [result.instructions > 0 for result in results] == [True]
    assert_close(out, expected_out, what="out")
    assert_close(lse, expected_lse, what="lse")


@archs
def test_reduce_tiles_of_folded_heads(emulated_triton, rng, arch):
    partial_out, partial_lse, _ = partials(rng, (30,), num_heads=2)
    sink = torch.randn(6, generator=rng)
    arguments = {
        "reduce_indptr": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "final_map": torch.tensor([[0, 2], [2, 4], [9, 12]], dtype=torch.int32),
        "partial_map": torch.tensor([3, 20, 0, 8, 12], dtype=torch.int32),
        "max_tile_rows": 3,
        "sink": sink,
        "fold": 3,
        "qo_indptr": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    }
    expected, got = (
        (torch.full((5, 6, 512), 7.0, dtype=torch.bfloat16), torch.full((5, 6), 7.0))
        for _ in range(2)
    )
    tensors = partial_out, partial_lse
    reduce_tiles(*tensors, **arguments, out=expected[0], lse=expected[1], backend="torch")
    results = emulated_triton(arch, REDUCE)
    reduce_tiles(*tensors, **arguments, out=got[0], lse=got[1], backend="triton")
    assert [result.instructions > 0 for result in results] == [True]
    assert_close(got[0], expected[0], what="out")
    assert_close(got[1], expected[1], what="lse")
    assert torch.equal(got[1] == 7, expected[1] == 7)


@pytest.mark.skipif(not SECOND_TRITON.is_dir(), reason=f"no Triton in {SECOND_TRITON}")
@archs
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_device_planner(emulated_triton, rng, arch, num_heads, page_size):
    q_lens = [1, 4, 2, 0, 1]
    kv_lens = torch.randint(0, 4000, (5,), generator=rng).tolist()
    pages = [-(-length // page_size) for length in kv_lens]
    last = [(length - 1) % page_size + 1 if length else 0 for length in kv_lens]
    tensors = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        for lengths in (q_lens, pages)
    ]
    tensors.append(torch.tensor(last, dtype=torch.int32))
    options = {
        "num_heads": num_heads,
        "profile": DeviceProfile(arch, 16),
        "page_size": page_size,
        "max_seqlen_qo": max(q_lens),
    }
    sizes = decode_sizes(len(q_lens), max(q_lens), num_heads, profile=options["profile"])
    expected, found = WorkList.empty(sizes, "cpu"), WorkList.empty(sizes, "cpu")
    for field in fields(WorkList):
        getattr(expected, field.name).fill_(-77)
        getattr(found, field.name).fill_(-77)
    plan_v1_2(*tensors, **options).copy_into(expected)
    # LLVM merges the lane masks of a loop into registers whose other lanes it leaves undefined.
    checks = [name for name in cdna_emulator.CHECKS if name != "uninitialised"]
    results = emulated_triton(arch, *PLANNER, checks=checks, triton=str(SECOND_TRITON))
    plan_v1_2_device(found, *tensors, **options)
    assert len(results) == len(PLANNER)
    for field in fields(WorkList):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
