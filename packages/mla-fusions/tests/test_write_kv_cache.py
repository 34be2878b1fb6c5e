"""Cache writes in Triton against the layouts' own `pack`, byte for byte."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core import LatentCache, MLADims
from mla_core.testing.poison import poison_
from mla_core.testing.writes import WRITE_CASES, check_write, write_cases

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter, numpy speaks of numbers that become infinite in fp16, as they should.
pytestmark = [
    pytest.mark.kernel,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def test_every_case_is_claimed():
    assert write_cases("fusions", mla_core.arch.arch_of(DEVICE)) == WRITE_CASES


@pytest.mark.parametrize("case", WRITE_CASES, ids=str)
def test_conformance(case):
    check_write("fusions", case, DEVICE)


@pytest.mark.parametrize("layout", ["bf16", "fp8_ds656"])
@pytest.mark.large
def test_offsets_of_more_than_four_gib(layout):
    """Pages far apart in memory of which the system hands out what is touched alone."""
    dims, page_size = MLADims(16), 4
    (spec,) = mla_core.layouts.get(layout).buffer_specs(dims, 1, page_size)
    size = mla_core.dtypes.itemsize(spec.dtype)
    width = torch.Size(spec.shape[1:]).numel()
    step = (5 << 30) // size
    memory = torch.empty(step + width, dtype=mla_core.dtypes.torch_dtype(spec.dtype), device=DEVICE)
    pages = memory.as_strided((2, width), (step, 1))
    poison_(pages)
    cache = LatentCache.bind(layout, dims, page_size, pages)
    kv_c, k_pe = (torch.randn(2, n, device=DEVICE).bfloat16() for n in (512, 64))
    # The last slot is past the end: the kernel skips it as it does a negative one.
    slots = torch.tensor([6, 8], device=DEVICE)
    write = mla_core.registry.record("fusions").require().load("write_kv_cache")
    write(kv_c, k_pe, cache, slots)
    small = torch.empty_like(pages, memory_format=torch.contiguous_format)
    wanted = LatentCache.bind(layout, dims, page_size, poison_(small))
    wanted.write(kv_c[:1], k_pe[:1], slots[:1])
    as_bytes = [each.contiguous().view(torch.uint8).cpu() for each in (pages, small)]
    assert torch.equal(*as_bytes)


@pytest.mark.gpu
def test_replays_in_a_graph_follow_the_slots():
    dims = MLADims(16)
    caches = [LatentCache.allocate("fp8_seg656", dims, 4, 16, device=DEVICE) for _ in range(2)]
    kv_c, k_pe = (torch.randn(5, n, device=DEVICE).bfloat16() for n in (512, 64))
    slots = torch.tensor([3, -1, 40, 17, 0], device=DEVICE)
    mla_core.write_kv_cache(kv_c, k_pe, caches[0], torch.full_like(slots, -1), backend="fusions")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_core.write_kv_cache(kv_c, k_pe, caches[0], slots, backend="fusions")
    for _ in range(3):
        slots.copy_(torch.randperm(64, device=DEVICE)[:5] - 8)
        kv_c.normal_()
        graph.replay()
        caches[1].write(kv_c, k_pe, slots.clamp(min=-1))
    for got, want in zip(caches[0].buffers, caches[1].buffers, strict=True):
        assert torch.equal(got, want)
