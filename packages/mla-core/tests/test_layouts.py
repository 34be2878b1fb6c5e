"""Exact bytes of every layout: addresses worked out by hand, coverage, and whole rows."""

from __future__ import annotations

import struct

import pytest
import torch

from mla_core import layouts
from mla_core.dims import MLADims
from mla_core.dtypes import itemsize, torch_dtype
from mla_core.errors import LayoutError
from mla_core.layouts import Digit, Layout

DIMS = MLADims(16)
V4 = MLADims(64, kv_lora_rank=448, value_includes_rope=True)
INDEXER = MLADims(64, kv_lora_rank=128, qk_rope_head_dim=0)


def dims_of(layout: Layout) -> MLADims:
    """Return the dims a layout is usually used with."""
    if layout.only is None:
        return DIMS
    return V4 if layout.only == (448, 64) else INDEXER


# layout, page size, field, token in page, stored element, buffer, byte offset in the page
ADDRESSES = [
    ("bf16", 64, "kv_c", 3, 10, 0, 3 * 1152 + 20),
    ("bf16", 64, "k_pe", 3, 5, 0, 3 * 1152 + 1024 + 10),
    ("fp16", 1, "k_pe", 0, 63, 0, 1150),
    ("fp32", 16, "kv_c", 15, 511, 0, 15 * 2304 + 2044),
    ("fp8", 64, "kv_c", 3, 10, 0, 1738),
    ("fp8", 64, "k_pe", 3, 5, 0, 2245),
    ("fp8_fnuz", 64, "k_pe", 3, 5, 0, 2245),
    ("fp8_seg656", 64, "kv_c", 3, 10, 0, 1546),
    ("fp8_seg656", 64, "kv_c_scale", 3, 2, 0, 32824),
    ("fp8_seg656", 64, "k_pe", 3, 5, 0, 34186),
    ("fp8_seg656_fnuz", 64, "kv_c_scale", 3, 2, 0, 32824),
    ("fp8_seg644", 64, "kv_c", 3, 10, 0, 1546),
    ("fp8_seg644", 64, "kv_c_scale", 3, 0, 0, 32780),
    ("fp8_seg644", 64, "k_pe", 3, 5, 0, 33418),
    ("fp8_seg644", 1, "k_pe", 0, 5, 0, 526),
    ("fp8_seg644_fnuz", 64, "kv_c_scale", 3, 0, 0, 32780),
    ("fp8_ds656", 64, "kv_c", 3, 10, 0, 1978),
    ("fp8_ds656", 64, "kv_c_scale", 3, 2, 0, 2488),
    ("fp8_ds656", 64, "k_pe", 3, 5, 0, 2506),
    ("fp8_ds656_fnuz", 64, "k_pe", 3, 5, 0, 2506),
    ("fp8_seg576_fnuz", 64, "k_pe", 3, 5, 0, 32965),
    ("fp8_ds32_fnuz", 64, "kv_c_scale", 3, 7, 2, 55),
    ("fp8_seg576", 64, "kv_c", 3, 10, 0, 1546),
    ("fp8_seg576", 64, "k_pe", 3, 5, 0, 32965),
    ("fp8_ds32", 64, "kv_c", 3, 10, 0, 1546),
    ("fp8_ds32", 64, "k_pe", 3, 5, 1, 394),
    ("fp8_ds32", 64, "kv_c_scale", 3, 7, 2, 55),
    ("v4_nm", 64, "kv_c", 3, 10, 0, 1546),
    ("v4_nm", 64, "kv_c_scale", 3, 6, 0, 1996),
    ("v4_nm", 64, "k_pe", 3, 5, 1, 394),
    ("v4_584", 64, "kv_c", 3, 10, 0, 1738),
    ("v4_584", 64, "k_pe", 3, 5, 0, 2186),
    ("v4_584", 64, "kv_c_scale", 3, 6, 0, 36894),
    ("v4_bf16", 64, "kv_c", 3, 10, 0, 3092),
    ("v4_bf16", 64, "k_pe", 3, 5, 0, 3978),
    ("shuffled_bf16", 64, "kv_c", 21, 29, 0, 17242),
    ("shuffled_bf16", 64, "k_pe", 21, 13, 0, 67930),
    ("shuffled_fp8", 64, "kv_c", 21, 29, 0, 8541),
    ("shuffled_fp8", 64, "k_pe", 21, 21, 0, 34133),
    ("shuffled_fp8_fnuz", 64, "k_pe", 21, 21, 0, 34133),
    ("nvfp4_shuffled", 128, "kv_c", 21, 29, 0, 4445),
    ("nvfp4_shuffled", 128, "kv_c_scale", 101, 21, 0, 35189),
    ("nvfp4_shuffled", 256, "kv_c_scale", 229, 21, 0, 72053),
    ("nvfp4_shuffled", 128, "k_pe", 21, 21, 0, 37717),
    ("nvfp4_shuffled", 128, "k_pe_scale", 101, 3, 0, 41055),
    ("indexer", 64, "kv_c", 3, 10, 0, 394),
    ("indexer", 64, "kv_c_scale", 3, 0, 0, 8204),
    ("indexer_fnuz", 64, "kv_c_scale", 3, 0, 0, 8204),
    ("indexer_shuffled", 64, "kv_c", 21, 29, 0, 2397),
    ("indexer_shuffled", 64, "kv_c_scale", 21, 0, 0, 8276),
    ("indexer_shuffled_fnuz", 64, "kv_c", 21, 29, 0, 2397),
]

# bytes per token over all buffers, of which padding or second copies
SIZES = {
    "bf16": (1152, 0),
    "fp16": (1152, 0),
    "fp32": (2304, 0),
    "fp8": (576, 0),
    "fp8_fnuz": (576, 0),
    "fp8_seg656": (656, 0),
    "fp8_seg656_fnuz": (656, 0),
    "fp8_seg644": (644, 0),
    "fp8_seg644_fnuz": (644, 0),
    "fp8_ds656": (656, 0),
    "fp8_seg576": (576, 0),
    "fp8_ds32": (656, 0),
    "fp8_ds656_fnuz": (656, 0),
    "fp8_seg576_fnuz": (576, 0),
    "fp8_ds32_fnuz": (656, 0),
    "v4_nm": (640, 7 + 50),
    "v4_584": (584, 1),
    "v4_bf16": (1024, 0),
    "shuffled_bf16": (1152, 0),
    "shuffled_fp8": (576, 0),
    "shuffled_fp8_fnuz": (576, 0),
    "nvfp4_shuffled": (324, 0),
    "indexer": (132, 0),
    "indexer_fnuz": (132, 0),
    "indexer_shuffled": (132, 0),
    "indexer_shuffled_fnuz": (132, 0),
}


@pytest.mark.parametrize(
    ("name", "page_size", "field_name", "token", "elem", "buffer", "expected"), ADDRESSES
)
def test_address(
    name: str, page_size: int, field_name: str, token: int, elem: int, buffer: int, expected: int
) -> None:
    layout = layouts.get(name)
    field = layout.arrangement(dims_of(layout), page_size).field(field_name)
    assert field.buffer == buffer
    assert field.address(token, elem) == expected
    as_tensors = field.address(torch.tensor([0, token]), torch.tensor([0, elem]))
    assert as_tensors.tolist() == [field.base, expected]


def test_every_layout_has_addresses_and_sizes() -> None:
    assert {row[0] for row in ADDRESSES} == set(SIZES) == set(layouts.names())
    for name in layouts.names():
        assert layouts.get(name).name == name


@pytest.mark.parametrize("name", layouts.names())
def test_sizes(name: str) -> None:
    layout, (total, idle) = layouts.get(name), SIZES[name]
    assert layout.bytes_per_token(dims_of(layout)) == total
    assert layout.live_bytes_per_token(dims_of(layout)) == total - idle
    assert layout.bytes_per_page(dims_of(layout), 256) == 256 * total


@pytest.mark.parametrize("name", layouts.names())
@pytest.mark.parametrize("pages", [1, 3])
def test_fields_fill_the_page_without_overlap(name: str, pages: int) -> None:
    layout = layouts.get(name)
    dims, page_size = dims_of(layout), pages * layout.page_multiple
    arrangement = layout.arrangement(dims, page_size)
    used = [torch.zeros(region.nbytes, dtype=torch.int32) for region in arrangement.regions]
    tokens = torch.arange(page_size)[:, None]
    for field in arrangement.fields:
        size = itemsize(field.dtype)
        copies = field.copies[0].size if field.copies else 1
        for copy in range(copies):
            start = field.address(tokens, torch.arange(field.width), copy).flatten()
            for byte in range(size):
                used[field.buffer].index_add_(0, start + byte, torch.ones_like(start).int())
    idle = SIZES[name][1] - (7 if name == "v4_nm" else 0)  # a second copy is not padding
    assert max(int(count.max()) for count in used) == 1
    assert sum(int((count == 0).sum()) for count in used) == idle * page_size


@pytest.mark.parametrize("name", layouts.names())
def test_view_and_address_agree(name: str) -> None:
    layout = layouts.get(name)
    dims, page_size, num_pages = dims_of(layout), 2 * layout.page_multiple, 3
    specs = layout.buffer_specs(dims, num_pages, page_size)
    arrangement = layout.arrangement(dims, page_size)
    for field in arrangement.fields:
        if field.width == 0:
            continue
        spec = specs[field.buffer]
        page_bytes = arrangement.regions[field.buffer].nbytes
        memory = torch.zeros(num_pages, page_bytes, dtype=torch.uint8)
        view = field.view(memory)
        assert view.dtype == torch_dtype(field.dtype)
        assert view.shape[0] == num_pages == spec.shape[0]
        flat = view.storage_offset() * view.element_size()
        assert flat == field.base
        # Element [page, *digits] by strides, against the address of the composed index.
        for page, token, elem in [(0, 0, 0), (2, page_size - 1, field.width - 1), (1, 1, 0)]:
            token %= page_size
            where = page * page_bytes + field.address(token, elem)
            digits = [page, *_digits(token, field.tokens), *_digits(elem, field.elems)]
            offset = sum(d * s for d, s in zip(digits, view.stride(), strict=False))
            assert offset * view.element_size() + flat == where


def _digits(index: int, digits: tuple[Digit, ...]) -> list[int]:
    values = []
    for digit in reversed(digits):
        values.append(index % digit.size)
        index //= digit.size
    assert index == 0
    return values[::-1]


def test_addresses_are_64_bit() -> None:
    layout, page_size = layouts.get("bf16"), 64
    slot = 2**27 * page_size + 3  # page 2**27 of a cache of 10 TB
    stride = 64 * 1152
    expected = 2**27 * stride + 3 * 1152 + 20
    assert layout.address("kv_c", slot, 10, DIMS, page_size, stride) == expected
    slots, elems = torch.tensor([slot]), torch.tensor([10])
    got = layout.address("kv_c", slots, elems, DIMS, page_size, stride)
    assert got.tolist() == [expected]


def _bytes(*buffers: torch.Tensor) -> bytes:
    return b"".join(bytes(b.contiguous().view(torch.uint8).flatten().tolist()) for b in buffers)


def _buffers(
    layout: Layout, dims: MLADims, num_pages: int, page_size: int
) -> tuple[torch.Tensor, ...]:
    specs = layout.buffer_specs(dims, num_pages, page_size)
    return tuple(torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in specs)


def test_flash_mla_row_byte_for_byte() -> None:
    """One 656-byte token: 512 codes, 4 scales, 64 bf16, written by hand."""
    layout = layouts.get("fp8_ds656")
    buffers = _buffers(layout, DIMS, 2, 2)
    kv_c = torch.zeros(1, 512)
    kv_c[0, 0], kv_c[0, 1] = 896.0, -2.0  # scale 2: codes of 448 and -1
    kv_c[0, 128 + 5] = 448.0  # scale 1
    kv_c[0, 384] = -112.0  # scale 0.25: code of -448
    k_pe = torch.zeros(1, 64)
    k_pe[0, 0], k_pe[0, 63] = 1.0, -2.0
    layout.pack(buffers, kv_c, k_pe, torch.tensor([3]), DIMS, 2)
    codes = bytearray(512)
    codes[0], codes[1], codes[133], codes[384] = 0x7E, 0xB8, 0x7E, 0xFE
    scales = struct.pack("<4f", 2.0, 1.0, 2.0**-126, 0.25)  # the third group is all zero
    rope = struct.pack("<H", 0x3F80) + bytes(124) + struct.pack("<H", 0xC000)
    assert _bytes(*buffers) == bytes(3 * 656) + bytes(codes) + scales + rope


def test_seg644_page_byte_for_byte() -> None:
    """Two tokens, each with a scale of its own; a row of zeros gets the smallest one."""
    layout = layouts.get("fp8_seg644")
    buffers = _buffers(layout, DIMS, 2, 2)
    kv_c, k_pe = torch.zeros(2, 512), torch.zeros(2, 64)
    kv_c[0, 0], kv_c[0, 511] = 896.0, -2.0  # the row's scale is 2
    k_pe[0, 0], k_pe[1, 63] = 1.0, -2.0
    layout.pack(buffers, kv_c, k_pe, torch.tensor([2, 3]), DIMS, 2)
    codes = bytearray(1024)
    codes[0], codes[511] = 0x7E, 0xB8
    scales = struct.pack("<2f", 2.0, 2.0**-126)
    ropes = struct.pack("<H", 0x3F80) + bytes(126) + bytes(126) + struct.pack("<H", 0xC000)
    assert _bytes(*buffers) == bytes(2 * 644) + bytes(codes) + scales + ropes


def test_seg656_with_page_size_1_is_the_flash_mla_row() -> None:
    segmented, interleaved = layouts.get("fp8_seg656"), layouts.get("fp8_ds656")
    torch.manual_seed(0)
    kv_c, k_pe = torch.randn(5, 512) * 3, torch.randn(5, 64)
    slots = torch.tensor([4, 0, 2, 1, 3])
    written = []
    for layout in (segmented, interleaved):
        buffers = _buffers(layout, DIMS, 5, 1)
        layout.pack(buffers, kv_c, k_pe, slots, DIMS, 1)
        written.append(_bytes(*buffers))
    assert written[0] == written[1]
    assert len(written[0]) == 5 * 656


def test_v4_entries_byte_for_byte() -> None:
    """Both V4 packings of one token: group j holds 448 * 2**j, so scale byte 127 + j."""
    kv_c = torch.zeros(1, 448)
    for group in range(7):
        kv_c[0, 64 * group + group] = 448.0 * 2**group
    k_pe = torch.full((1, 64), 1.0)
    codes = bytearray(448)
    for group in range(7):
        codes[65 * group] = 0x7E
    scales = [127 + group for group in range(7)]
    rope = struct.pack("<H", 0x3F80) * 64

    nm = layouts.get("v4_nm")
    buffers = _buffers(nm, V4, 1, 1)
    nm.pack(buffers, kv_c, k_pe, torch.tensor([0]), V4, 1)
    doubled = bytes(scale for scale in scales for _ in range(2))
    assert _bytes(buffers[0]) == bytes(codes) + doubled + bytes(50)
    assert _bytes(buffers[1]) == rope

    packed = layouts.get("v4_584")
    buffers = _buffers(packed, V4, 1, 1)
    packed.pack(buffers, kv_c, k_pe, torch.tensor([0]), V4, 1)
    assert _bytes(*buffers) == bytes(codes) + rope + bytes(scales) + bytes(1)


def test_nvfp4_row_byte_for_byte() -> None:
    """Token 0: its first 32 numbers are the first 16 bytes, low nibble first."""
    layout = layouts.get("nvfp4_shuffled")
    buffers = _buffers(layout, DIMS, 1, 128)
    kv_c, k_pe = torch.zeros(1, 512), torch.zeros(1, 64)
    kv_c[0, :8] = torch.tensor([0.0, 0.5, 1.0, 1.5, -2.0, -3.0, 4.0, 6.0])  # scale 1
    kv_c[0, 16] = 12.0  # scale 2
    k_pe[0, 48] = -6.0  # scale 1 of the fourth group
    layout.pack(buffers, kv_c, k_pe, torch.tensor([0]), DIMS, 128)
    page = _bytes(*buffers)
    assert page[:4] == bytes([0x10, 0x32, 0xDC, 0x76])
    assert page[8] == 0x07
    assert page[128 * 256] == 0x38  # e4m3 of 1
    assert page[128 * 256 + 1] == 0x40  # e4m3 of 2
    assert page[128 * 288 + 256 + 8] == 0x0F  # 25th byte of the rope: second 16-byte lane
    assert page[128 * 320 + 3] == 0x38


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(LayoutError, match=r"must be one of bf16, fp16, .*indexer.*, got 'bf17'"):
        layouts.get("bf17")
    with pytest.raises(LayoutError, match="must be one of kv_c, kv_c_scale, k_pe, got 'scales'"):
        layouts.get("fp8_ds656").arrangement(DIMS, 64).field("scales")


@pytest.mark.parametrize(
    ("name", "dims", "page_size", "message"),
    [
        (
            "v4_nm",
            DIMS,
            1,
            r"\(kv_lora_rank, qk_rope_head_dim\) must be \(448, 64\), got \(512, 64",
        ),
        ("indexer", DIMS, 1, r"must be \(128, 0\), got \(512, 64\)"),
        ("fp8_seg656", V4, 1, "kv_lora_rank must be a multiple of 128, got 448"),
        (
            "nvfp4_shuffled",
            MLADims(8, qk_rope_head_dim=32),
            128,
            "qk_rope_head_dim must be a multiple of 64, got 32",
        ),
        ("shuffled_bf16", DIMS, 24, "page_size must be a positive multiple of 16, got 24"),
        ("nvfp4_shuffled", DIMS, 64, "page_size must be a positive multiple of 128, got 64"),
        ("bf16", DIMS, 0, "page_size must be a positive multiple of 1, got 0"),
    ],
)
def test_refused_dims_and_page_sizes(
    name: str, dims: MLADims, page_size: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        layouts.get(name).fields(dims, page_size)


def test_kinds() -> None:
    kinds = {name: (layout.kv_dtype, layout.scale_kind) for name, layout in layouts.ALL.items()}
    assert kinds["bf16"] == ("bf16", "none")
    assert kinds["fp8_fnuz"] == ("fp8_e4m3fnuz", "per_tensor")
    assert kinds["fp8_ds656"] == ("fp8_e4m3", "group128_fp32")
    assert kinds["fp8_seg644"] == ("fp8_e4m3", "per_token_fp32")
    assert kinds["fp8_ds32"] == ("fp8_e4m3", "group32_e8m0")
    assert kinds["v4_584"] == ("fp8_e4m3", "group64_e8m0")
    assert kinds["nvfp4_shuffled"] == ("fp4_e2m1", "group16_e4m3")
