"""Binding buffers to a layout: accepted forms, refused ones, and memory that is not dense."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from mla_core import layouts
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.errors import LayoutError

DIMS = MLADims(16)
V4 = MLADims(64, kv_lora_rank=448, value_includes_rope=True)
SCALE = torch.tensor([0.25])


def rows(count: int, dims: MLADims = DIMS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return full-range rows that bf16 holds exactly."""
    kv_c, k_pe = torch.randn(count, dims.kv_lora_rank), torch.randn(count, dims.qk_rope_head_dim)
    return kv_c.bfloat16().float(), k_pe.bfloat16().float()


def test_allocate_is_zero_and_describes_itself() -> None:
    cache = LatentCache.allocate("bf16", DIMS, 3, 16)
    assert (cache.num_pages, cache.num_slots, cache.page_size) == (3, 48, 16)
    assert cache.device == torch.device("cpu")
    assert cache.layout is layouts.get("bf16")
    assert cache.buffers[0].shape == (3, 16, 576)
    assert cache.buffers[0].dtype == torch.bfloat16
    assert not cache.buffers[0].any()


def test_caches_of_a_kind_differ_in_their_memory_alone() -> None:
    def allocate(layout="bf16", dims=DIMS, pages=3, page_size=16, scale=None):
        return LatentCache.allocate(layout, dims, pages, page_size, scale=scale)

    cache = allocate()
    assert cache.kind is cache.kind is allocate().kind
    apart = LatentCache.bind("bf16", DIMS, 16, torch.zeros(3, 32, 576).bfloat16()[:, :16])
    others = [
        allocate("fp16"),
        allocate(dims=MLADims(16, 256)),
        allocate(pages=4),
        allocate(page_size=8),
        apart,
        allocate("fp8", scale=SCALE),
    ]
    assert len({cache.kind, *(other.kind for other in others)}) == 7
    assert others[-1].kind is allocate("fp8", scale=SCALE.clone()).kind


@pytest.mark.parametrize("name", layouts.names())
def test_fill_is_a_byte(name: str) -> None:
    layout = layouts.get(name)
    rank, rope = layout.only or (512, 64)
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    scale = SCALE if layout.needs_scale else None
    cache = LatentCache.allocate(layout, dims, 2, layout.page_multiple, scale=scale, fill=255)
    for buffer in cache.buffers:
        assert (buffer.view(torch.uint8) == 255).all()
    if layout.kv_dtype != "fp8_e4m3fnuz" and layout.kv_dtype != "fp4_e2m1":
        assert cache.read(torch.tensor([0]))[0].isnan().all()


def test_write_and_read_in_place() -> None:
    storage = torch.full((4, 16, 576), math.nan, dtype=torch.bfloat16)
    cache = LatentCache.bind("bf16", DIMS, 16, storage)
    kv_c, k_pe = rows(2)
    cache.write(kv_c, k_pe, torch.tensor([17, 63], dtype=torch.int32))
    assert torch.equal(storage[1, 1].float(), torch.cat([kv_c[0], k_pe[0]]))
    assert torch.equal(storage[3, 15].float(), torch.cat([kv_c[1], k_pe[1]]))
    assert storage.isnan().sum() == (64 - 2) * 576
    got_c, got_pe = cache.read(torch.tensor([63, -1, 17]), torch.bfloat16)
    assert got_c.dtype == got_pe.dtype == torch.bfloat16
    assert torch.equal(got_c[0].float(), kv_c[1])
    assert torch.equal(got_pe[2].float(), k_pe[0])
    assert not got_c[1].any()


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("bf16", (3, 64, 576), torch.bfloat16),
        ("bf16", (3, 64, 1, 576), torch.bfloat16),
        ("bf16", (3, 64 * 576), torch.bfloat16),
        ("fp8", (3, 64, 1, 576), torch.uint8),
        ("fp8", (3, 64, 576), torch.float8_e4m3fn),
        ("fp8_seg656", (3, 64 * 656), torch.uint8),
        ("fp8_seg656", (3, 64, 656), torch.uint8),
        ("fp8_seg644", (3, 64, 644), torch.uint8),
        ("fp8_ds656", (3, 64, 656), torch.uint8),
        ("fp8_ds656", (3, 64, 1, 656), torch.float8_e4m3fn),
        ("shuffled_bf16", (3, 1, 64, 576), torch.bfloat16),
        ("fp8_seg576", (3, 64 * 576), torch.float8_e4m3fn),
    ],
)
def test_accepted_shapes(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = layouts.get(name)
    buffer = torch.zeros(shape, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
    scale = SCALE if layout.needs_scale else None
    cache = LatentCache.bind(name, DIMS, 64, buffer, scale=scale)
    (spec,) = layout.buffer_specs(DIMS, 3, 64)
    assert tuple(cache.buffers[0].shape) == spec.shape
    assert cache.buffers[0].data_ptr() == buffer.data_ptr()
    kv_c, k_pe = rows(1)
    cache.write(kv_c, k_pe, torch.tensor([70]))
    got_c, _ = cache.read(torch.tensor([70]))
    assert torch.nn.functional.cosine_similarity(got_c, kv_c).item() > 0.99
    assert buffer.view(torch.uint8).any()


def test_two_buffers_of_v4() -> None:
    nope = torch.zeros(5, 1, 1, 512, dtype=torch.float8_e4m3fn)
    rope = torch.zeros(5, 1, 1, 64, dtype=torch.bfloat16)
    cache = LatentCache.bind("v4_nm", V4, 1, nope, rope)
    kv_c, k_pe = rows(1, V4)
    cache.write(kv_c, k_pe, torch.tensor([4]))
    assert torch.equal(rope[4, 0, 0].float(), k_pe[0])
    with pytest.raises(LayoutError, match="takes 2 buffers, got 1"):
        LatentCache.bind("v4_nm", V4, 1, nope)
    with pytest.raises(LayoutError, match=r"buffers\[1\] must be \[5, 1, 64\], or \[5, 64\], got"):
        LatentCache.bind("v4_nm", V4, 1, nope, rope[:4])


@pytest.mark.parametrize("name", ["bf16", "fp8_ds656", "fp8_seg656", "fp8_seg644", "shuffled_bf16"])
def test_page_stride_larger_than_a_page(name: str) -> None:
    """Layers interleaved in one allocation: page p of layer l at ``[p, l]``."""
    layout = layouts.get(name)
    (spec,) = layout.buffer_specs(DIMS, 4, 16)
    dense = LatentCache.allocate(name, DIMS, 4, 16)
    whole = torch.zeros(4, 3, *spec.shape[1:], dtype=dense.buffers[0].dtype)
    strided = LatentCache.bind(name, DIMS, 16, whole[:, 1])
    torch.manual_seed(0)
    kv_c, k_pe = rows(64)
    slots = torch.randperm(64)
    for cache in (dense, strided):
        cache.write(kv_c, k_pe, slots)
    assert torch.equal(whole[:, 1], dense.buffers[0])
    assert not whole[:, [0, 2]].any()
    for got, want in zip(strided.read(slots), dense.read(slots), strict=True):
        assert torch.equal(got, want)
    assert strided.field("kv_c").stride(0) == 3 * dense.field("kv_c").stride(0)


def test_pages_beyond_4_gib() -> None:
    """Untouched memory costs nothing, so two pages 5 GiB apart can be really written and read."""
    apart = 5 * 2**30
    memory = torch.empty(apart + 656 * 64, dtype=torch.uint8)
    cache = LatentCache.bind(
        "fp8_ds656", DIMS, 64, memory.as_strided((2, 64, 656), (apart, 656, 1))
    )
    kv_c, k_pe = rows(2)
    cache.write(kv_c, k_pe, torch.tensor([3, 64 + 5]))
    _, got = cache.read(torch.tensor([64 + 5, 3]))
    assert torch.equal(got, k_pe.flip(0))
    start = apart + 5 * 656 + 528
    assert torch.equal(memory[start : start + 128].view(torch.bfloat16).float(), k_pe[1])


def test_field_views_write_through() -> None:
    cache = LatentCache.allocate("fp8_seg656", DIMS, 2, 4)
    scales = cache.field("kv_c_scale")
    assert scales.shape == (2, 4, 4)
    assert scales.dtype == torch.float32
    scales.fill_(2.0)
    cache.field("kv_c").view(torch.uint8).fill_(0x38)
    kv_c, k_pe = cache.read(torch.arange(8))
    assert (kv_c == 2.0).all()
    assert not k_pe.any()
    assert cache.field("k_pe").data_ptr() - cache.buffers[0].data_ptr() == 528 * 4
    assert cache.field("kv_c_scale") is scales


def test_field_views_belong_to_their_buffers() -> None:
    cache = LatentCache.allocate("fp8_seg644", DIMS, 2, 4)
    before = cache.field("kv_c_scale")
    other = replace(cache, buffers=tuple(buffer.clone() for buffer in cache.buffers))
    other.field("kv_c_scale").fill_(3.0)
    assert not before.any()
    assert not cache.field("kv_c_scale").any()


def test_rows_is_the_standard_cache() -> None:
    cache = LatentCache.allocate("fp16", DIMS, 2, 4)
    assert cache.rows() is cache.buffers[0]
    with pytest.raises(
        LayoutError, match=r"rows: layout must be of the standard family, got fp8_ds"
    ):
        LatentCache.allocate("fp8_ds656", DIMS, 2, 4).rows()


def test_no_rope_and_no_pages() -> None:
    dims = MLADims(64, qk_rope_head_dim=0)
    for name in ("bf16", "fp8_ds656", "fp8_ds32", "fp8_seg656", "fp8_seg644"):
        cache = LatentCache.allocate(name, dims, 2, 4)
        kv_c = torch.full((1, 512), 1.5)
        cache.write(kv_c, kv_c[:, :0], torch.tensor([5]))
        got_c, got_pe = cache.read(torch.tensor([5]))
        assert torch.equal(got_c, kv_c)
        assert got_pe.shape == (1, 0)
        empty = LatentCache.allocate(name, dims, 0, 4)
        empty.write(kv_c[:0], kv_c[:0, :0], torch.zeros(0, dtype=torch.int64))
        assert empty.read(torch.tensor([-1]))[0].tolist() == [[0.0] * 512]


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (
            torch.zeros(3, 64, 575),
            "buffers[0] must be [3, 64, 576], or [3, 36864], got [3, 64, 575]",
        ),
        (torch.zeros(3, 32, 576), "got [3, 32, 576]"),
        (torch.zeros(3, 64, 576), "buffers[0] must be bf16, got torch.float32"),
        (torch.zeros(3, 64, 640).bfloat16()[..., :576], "must be dense inside a page, got strides"),
        (torch.zeros(3, 576, 64).bfloat16().mT, "must be dense inside a page, got strides"),
        (
            torch.zeros(64, 576).bfloat16().expand(3, 64, 576),
            "a page stride of at least 36864, got 0",
        ),
        (torch.tensor(0.0), "got []"),
    ],
)
def test_refused_buffers(buffer: torch.Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        LatentCache.bind("bf16", DIMS, 64, buffer)


def test_refused_alignment() -> None:
    memory = torch.zeros(3 * (656 + 2), dtype=torch.uint8)
    with pytest.raises(
        LayoutError, match="at multiples of 4 bytes, got start 0 and page stride 658"
    ):
        LatentCache.bind("fp8_ds656", DIMS, 1, memory.as_strided((3, 1, 656), (658, 656, 1)))
    with pytest.raises(LayoutError, match="got start 1 and page stride 656"):
        LatentCache.bind("fp8_ds656", DIMS, 1, memory[1:].as_strided((2, 1, 656), (656, 656, 1)))


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("fp8", None, "scale must be a fp32 [1] tensor, got None"),
        ("fp8", torch.ones(2), "scale must be fp32 [1] on cpu, got torch.float32 (2,)"),
        ("fp8", torch.ones(1).double(), "scale must be fp32 [1] on cpu, got torch.float64 (1,)"),
        ("bf16", SCALE, "scale must be None, its scale kind is none"),
        ("fp8_ds656", SCALE, "scale must be None, its scale kind is group128_fp32"),
    ],
)
def test_refused_scales(name: str, scale: torch.Tensor | None, message: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(message)):
        LatentCache.allocate(name, DIMS, 2, 4, scale=scale)


def test_scale_is_a_dequantisation_factor() -> None:
    cache = LatentCache.allocate("fp8", DIMS, 1, 1, scale=torch.tensor(0.25))
    cache.write(torch.full((1, 512), 2.0), torch.full((1, 64), 1e6), torch.tensor([0]))
    assert (cache.rows().float()[..., :512] == 8.0).all()
    kv_c, k_pe = cache.read(torch.tensor([0]))
    assert (kv_c == 2.0).all()
    assert (k_pe == 448 * 0.25).all()  # saturated


@pytest.mark.parametrize(
    ("kv_c", "k_pe", "slots", "message"),
    [
        (
            torch.ones(2, 512),
            torch.ones(2, 64),
            torch.tensor([0, 8]),
            "must be below 8 (2 pages of 4)",
        ),
        (
            torch.ones(2, 512),
            torch.ones(2, 64),
            torch.tensor([0.0, 1.0]),
            "slots must be 1-D int32",
        ),
        (torch.ones(2, 512), torch.ones(2, 64), torch.tensor([[0, 1]]), "slots must be 1-D int32"),
        (
            torch.ones(3, 512),
            torch.ones(2, 64),
            torch.tensor([0, 1]),
            "kv_c must be (2, 512) floating",
        ),
        (
            torch.ones(2, 512),
            torch.ones(2, 32),
            torch.tensor([0, 1]),
            "k_pe must be (2, 64) floating",
        ),
        (
            torch.ones(2, 512).int(),
            torch.ones(2, 64),
            torch.tensor([0, 1]),
            "got (2, 512) torch.int32",
        ),
    ],
)
def test_refused_writes(
    kv_c: torch.Tensor, k_pe: torch.Tensor, slots: torch.Tensor, message: str
) -> None:
    cache = LatentCache.allocate("bf16", DIMS, 2, 4)
    with pytest.raises(LayoutError, match=re.escape(message)):
        cache.write(kv_c, k_pe, slots)
    assert not cache.buffers[0].any()


def test_refused_allocations() -> None:
    with pytest.raises(LayoutError, match=r"fill must be a byte in 0\.\.255, got 256"):
        LatentCache.allocate("bf16", DIMS, 1, 1, fill=256)
    with pytest.raises(LayoutError, match="num_pages must be >= 0, got -1"):
        LatentCache.allocate("bf16", DIMS, -1, 1)
    with pytest.raises(LayoutError, match="layout: name must be one of"):
        LatentCache.allocate("fp9", DIMS, 1, 1)
    with pytest.raises(LayoutError, match="takes 1 buffers, got 0"):
        LatentCache.bind("bf16", DIMS, 1)


def test_check_slots_reads_them_everywhere_under_mla_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_CHECK", "1")
    cache = LatentCache.allocate("bf16", DIMS, 2, 4)
    with pytest.raises(LayoutError, match="slots must be below 8"):
        cache.read(torch.tensor([9]))


def _cache_of(name: str, device: str = "cpu") -> tuple[LatentCache, torch.Tensor, torch.Tensor]:
    """Return a cache of three pages and four rows that fit it."""
    layout = layouts.get(name)
    rank, rope = layout.only or (512, 64)
    dims = MLADims(8, kv_lora_rank=rank, qk_rope_head_dim=rope)
    scale = SCALE.to(device) if layout.needs_scale else None
    page_size = 2 * layout.page_multiple
    cache = LatentCache.allocate(layout, dims, 3, page_size, scale=scale, device=device)
    kv_c, k_pe = rows(4, dims)
    return cache, kv_c.to(device), k_pe.to(device)


@pytest.mark.parametrize("name", ["bf16", "fp8_ds656", "v4_nm", "shuffled_fp8", "nvfp4_shuffled"])
def test_write_and_read_compile_whole(name: str) -> None:
    cache, kv_c, k_pe = _cache_of(name)
    slots = torch.tensor([5, -1, 0, 2])

    def step(kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache.write(kv_c, k_pe, slots)
        return cache.read(slots)

    torch.compiler.reset()
    got = torch.compile(step, backend="eager", fullgraph=True)(kv_c, k_pe)
    held = [buffer.view(torch.uint8).clone() for buffer in cache.buffers]
    for part, expected in zip(got, step(kv_c, k_pe), strict=True):
        assert torch.equal(part, expected)
    for buffer, bytes_then in zip(cache.buffers, held, strict=True):
        assert torch.equal(buffer.view(torch.uint8), bytes_then)


@pytest.mark.gpu
@pytest.mark.parametrize("name", layouts.names())
def test_captured_write_never_waits_for_the_device(name: str) -> None:
    """A graph captured with one set of slots replays with another, skipped rows included."""
    cache, kv_c, k_pe = _cache_of(name, "cuda")
    reference, *_ = _cache_of(name)
    slots = torch.tensor([0, 1, 2, 3], device="cuda")
    cache.write(kv_c, k_pe, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.write(kv_c, k_pe, slots)
    for values in ([4, -1, 5, 0], [-1, -1, -1, -1]):
        for buffer in cache.buffers:
            buffer.view(torch.uint8).fill_(0)
        for buffer in reference.buffers:
            buffer.view(torch.uint8).fill_(0)
        slots.copy_(torch.tensor(values))
        graph.replay()
        reference.write(kv_c.cpu(), k_pe.cpu(), torch.tensor(values))
        every = torch.arange(cache.num_slots)
        for got, want in zip(cache.read(every.cuda()), reference.read(every), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=2e-7, atol=0)


def test_rotary_parts_can_be_written_alone():
    dims = MLADims(1, 128, 64)
    for layout in ("bf16", "fp8_ds656", "fp8_seg656", "fp8_ds32"):
        cache = LatentCache.allocate(layout, dims, 2, 16)
        slots = torch.arange(32)
        cache.write(torch.randn(32, 128), torch.randn(32, 64), slots)
        kv_c, k_pe = cache.read(slots)
        new = torch.randn(3, 64)
        cache.write_rope(new, torch.tensor([5, -1, 30]))
        got_c, got_pe = cache.read(slots)
        assert torch.equal(got_c, kv_c)
        assert torch.equal(got_pe[[5, 30]], cache.round_rope(new)[[0, 2]])
        rest = [slot for slot in range(32) if slot not in (5, 30)]
        assert torch.equal(got_pe[rest], k_pe[rest])
    with pytest.raises(LayoutError, match=r"write_rope: k_pe must be \(3, 64\) floating point"):
        cache.write_rope(torch.randn(3, 63), torch.arange(3))
