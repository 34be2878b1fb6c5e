"""What goes into a cache comes out of it, and nothing else changes: property tests."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from mla_core import layouts
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.dtypes import fp8_max, itemsize, torch_dtype
from mla_core.layouts import Layout
from mla_core.layouts.codecs import Cast, Codec, GroupScaled, NvFp4, PerTensor, TokenScaled

POISON = 255  # NaN in bf16, fp16, fp32 and e4m3


def error_bound(codec: Codec, x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the largest rounding error a codec may make on each number of ``x`` [T, width]."""
    tiny = 1e-6 * x.abs()  # the fp32 arithmetic around the rounding
    if isinstance(codec, Cast):
        mantissa, smallest = {"bf16": (8, -133), "fp16": (11, -24), "fp32": (24, -149)}[codec.dtype]
        return x.abs() * 2.0**-mantissa + 2.0 ** (smallest - 1)
    if isinstance(codec, PerTensor):
        return x.abs() / 16 + scale * 2.0**-10 + tiny
    if isinstance(codec, NvFp4):
        amax = group_amax(x, 16)
        # Half a step below 6 is 1. Rounding moves the scale by up to 1/16, or by 2**-10 if it is
        # tiny, which costs 6 times as much where 6 saturates.
        return amax / 6 * (1 + 1 / 16) + 6 * 2.0**-10
    if isinstance(codec, TokenScaled):
        codec = GroupScaled(codec.dtype, x.shape[-1])
    assert isinstance(codec, GroupScaled)
    e8m0 = 2 if codec.e8m0 else 1
    factor = group_amax(x, codec.group) / fp8_max(codec.dtype) * e8m0 + 2e-4
    return x.abs() / 16 + factor * 2.0**-10 + tiny


def group_amax(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return, for each number of ``x`` [T, width], the largest magnitude of its group."""
    groups = x.abs().view(len(x), x.shape[-1] // group, group)
    return groups.amax(-1, keepdim=True).expand_as(groups).reshape(x.shape)


@st.composite
def caches(draw: st.DrawFn) -> tuple[Layout, MLADims, int, int, int]:
    """Draw layout, dims, page size, pages, and extra bytes between pages."""
    layout = layouts.get(draw(st.sampled_from(layouts.names())))
    if layout.only is None:
        rank = draw(st.sampled_from([256, 512, 1024]))
        rope = draw(st.sampled_from([0, 32, 64]))
        rope -= rope % layout.rope_multiple
    else:
        rank, rope = layout.only
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    page_size = layout.page_multiple * draw(st.sampled_from([1, 2, 3, 5]))
    num_pages = draw(st.integers(1, 4))
    return layout, dims, page_size, num_pages, draw(st.sampled_from([0, 64]))


def poisoned_cache(
    layout: Layout, dims: MLADims, page_size: int, num_pages: int, pad: int, scale: float
) -> tuple[LatentCache, list[torch.Tensor]]:
    """Return a cache in poisoned memory, ``pad`` bytes after each page, and the raw memory."""
    memory, buffers = [], []
    for region in layout.arrangement(dims, page_size).regions:
        room = max(region.nbytes + pad, 8)  # a buffer of no width still needs a stride
        raw = torch.full((num_pages, room), POISON, dtype=torch.uint8)
        memory.append(raw)
        typed = raw.view(torch_dtype(region.dtype))
        buffers.append(typed[:, : region.nbytes // itemsize(region.dtype)])
    factor = torch.tensor([scale]) if layout.needs_scale else None
    return LatentCache.bind(layout, dims, page_size, *buffers, scale=factor), memory


def test_every_codec_has_a_bound() -> None:
    for layout in layouts.ALL.values():
        for codec in (layout.latent, layout.rope):
            assert error_bound(codec, torch.ones(1, 128), 1.0).shape == (1, 128)


@settings(deadline=None, max_examples=40)
@given(cache=caches(), seed=st.integers(0, 2**31))
def test_round_trip(cache: tuple[Layout, MLADims, int, int, int], seed: int) -> None:
    layout, dims, page_size, num_pages, pad = cache
    note(f"seed {seed}, {layout}, {dims}, page_size {page_size}, {num_pages} pages, pad {pad}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_slots = num_pages * page_size
    rows = rng.randint(0, min(num_slots, 40))
    slots = torch.randperm(num_slots)[:rows]
    slots[torch.rand(rows) < 0.2] = -rng.randint(1, 1000)
    magnitude = 10.0 ** rng.uniform(-2, 2)
    kv_c = torch.randn(rows, dims.kv_lora_rank) * magnitude
    k_pe = torch.randn(rows, dims.qk_rope_head_dim) * magnitude
    largest = max((part.abs().max().item() for part in (kv_c, k_pe) if part.numel()), default=1.0)
    scale = largest / 240
    bound, memory = poisoned_cache(layout, dims, page_size, num_pages, pad, scale)

    bound.write(kv_c, k_pe, slots)
    got_c, got_pe = bound.read(slots)

    live = slots >= 0
    for codec, x, got in ((layout.latent, kv_c, got_c), (layout.rope, k_pe, got_pe)):
        if not x.numel():
            continue
        assert (got[~live] == 0).all()
        excess = (got - x).abs() - error_bound(codec, x, scale)
        assert excess[live].numel() == 0 or excess[live].max().item() <= 0

    # Bytes outside the written rows, in other slots, padding and between pages, kept their value.
    written = [torch.zeros_like(raw, dtype=torch.bool) for raw in memory]
    for field in layout.fields(dims, page_size):
        token = (slots[live] % page_size)[:, None]
        page = slots[live] // page_size
        for copy in range(field.copies[0].size if field.copies else 1):
            start = field.address(token, torch.arange(field.width), copy)
            for byte in range(itemsize(field.dtype)):
                written[field.buffer][page[:, None], start + byte] = True
    for raw, mask in zip(memory, written, strict=True):
        assert (raw[~mask] == POISON).all()


@pytest.mark.parametrize("name", layouts.names())
def test_rewriting_a_slot_replaces_it(name: str) -> None:
    layout = layouts.get(name)
    rank, rope = layout.only or (512, 64)
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    cache, _ = poisoned_cache(layout, dims, layout.page_multiple, 2, 0, 0.05)
    slots = torch.tensor([1, 0])
    for value in (7.0, -3.0):
        kv_c, k_pe = torch.full((2, rank), value), torch.full((2, rope), value)
        cache.write(kv_c, k_pe, slots)
        got_c, got_pe = cache.read(slots, torch.float64)
        assert got_c.dtype == torch.float64
        torch.testing.assert_close(got_c, kv_c.double(), rtol=0.07, atol=0.0)
        torch.testing.assert_close(got_pe, k_pe.double(), rtol=0.07, atol=0.0)


@pytest.mark.parametrize("name", layouts.names())
def test_all_rows_skipped_changes_nothing(name: str) -> None:
    layout = layouts.get(name)
    rank, rope = layout.only or (512, 64)
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    cache, memory = poisoned_cache(layout, dims, layout.page_multiple, 1, 0, 0.05)
    cache.write(torch.ones(3, rank), torch.ones(3, rope), torch.tensor([-1, -7, -(2**40)]))
    assert all((raw == POISON).all() for raw in memory)


@pytest.mark.parametrize("name", layouts.names())
def test_pages_agree_with_slots(name: str) -> None:
    layout = layouts.get(name)
    rank, rope = layout.only or (512, 64)
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    page_size = layout.page_multiple * 2
    cache, _ = poisoned_cache(layout, dims, page_size, 3, 0, 0.05)
    slots = torch.arange(3 * page_size)
    torch.manual_seed(1)
    cache.write(torch.randn(len(slots), rank), torch.randn(len(slots), rope), slots)
    kv_c, k_pe = cache.read_pages(torch.tensor([2, -1, 0, -5], dtype=torch.int32))
    assert kv_c.shape == (4, page_size, rank)
    assert k_pe.shape == (4, page_size, rope)
    rows_c, rows_pe = cache.read(slots)
    for place, page in ((0, 2), (2, 0)):
        chosen = slice(page * page_size, (page + 1) * page_size)
        assert torch.equal(kv_c[place], rows_c[chosen])
        assert torch.equal(k_pe[place], rows_pe[chosen])
    assert not kv_c[[1, 3]].any()
    assert not k_pe[[1, 3]].any()
