"""Per-head key and value layouts: addresses worked out by hand, and round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from mla_core import layouts
from mla_core.dtypes import itemsize, torch_dtype
from mla_core.errors import LayoutError
from mla_core.layouts import HeadLayout

Buffers = tuple[torch.Tensor, torch.Tensor]

# layout, page size, head width, part (0 key, 1 value), token, element, byte offset in the block
ADDRESSES = [
    ("expanded_bf16", 1, 192, 0, 0, 77, 154),
    ("expanded_fp8", 1, 128, 1, 0, 77, 77),
    ("gqa_bf16", 16, 128, 0, 5, 77, ((77 // 8) * 16 * 8 + 5 * 8 + 5) * 2),
    ("gqa_bf16", 16, 128, 1, 5, 77, (77 * 16 + 5) * 2),
    ("gqa_fp8", 16, 128, 0, 5, 77, 4 * 16 * 16 + 5 * 16 + 13),
    ("gqa_shuffled_bf16", 32, 128, 1, 21, 77, (2 * 128 * 8 + 77 * 8 + 5) * 2),
    ("gqa_shuffled_fp8", 32, 128, 1, 21, 77, 128 * 16 + 77 * 16 + 5),
    ("gqa_shuffled_fp8", 32, 128, 0, 21, 77, 4 * 32 * 16 + 21 * 16 + 13),
]
# fp16 is arranged like bf16, and the fnuz encoding like the other.
ADDRESSES += [(row[0].replace("bf16", "fp16"), *row[1:]) for row in ADDRESSES if "bf16" in row[0]]
ADDRESSES += [(row[0] + "_fnuz", *row[1:]) for row in ADDRESSES if "fp8" in row[0]]


def test_every_layout_has_addresses() -> None:
    assert {row[0] for row in ADDRESSES} == set(layouts.HEADS)


@pytest.mark.parametrize(
    ("name", "page_size", "width", "part", "token", "elem", "expected"), ADDRESSES
)
def test_address(
    name: str, page_size: int, width: int, part: int, token: int, elem: int, expected: int
) -> None:
    field, _ = layouts.get_heads(name).blocks(width, width, page_size)[part]
    assert field.address(token, elem) == expected


def _buffers(layout: HeadLayout, *sizes: int) -> Buffers:
    key, value = (
        torch.full((*spec.shape, itemsize(spec.dtype)), 255, dtype=torch.uint8)
        .view(torch_dtype(spec.dtype))
        .squeeze(-1)
        for spec in layout.buffer_specs(*sizes)
    )
    return key, value


def test_buffer_shapes() -> None:
    shapes = {
        name: tuple(spec.shape for spec in layouts.get_heads(name).buffer_specs(2, 192, 128, 5, ps))
        for name, ps in [("expanded_fp8", 1), ("gqa_bf16", 16), ("gqa_shuffled_fp8", 32)]
    }
    assert shapes == {
        "expanded_fp8": ((5, 2, 192), (5, 2, 128)),
        "gqa_bf16": ((5, 2, 24, 16, 8), (5, 2, 128, 16)),
        "gqa_shuffled_fp8": ((5, 2, 12, 32, 16), (5, 2, 2, 128, 16)),
    }


def test_shaped_indexing_agrees() -> None:
    """The documented shapes index the same numbers that pack wrote."""
    layout = layouts.get_heads("gqa_shuffled_bf16")
    buffers = _buffers(layout, 3, 64, 32, 2, 16)
    torch.manual_seed(0)
    key, value = torch.randn(32, 3, 64).bfloat16(), torch.randn(32, 3, 32).bfloat16()
    layout.pack(buffers, key, value, torch.arange(32), page_size=16)
    page, head, token, dim = 1, 2, 11, 29
    assert buffers[0][page, head, dim // 8, token, dim % 8] == key[16 + token, head, dim]
    assert buffers[1][page, head, token // 8, dim, token % 8] == value[16 + token, head, dim]


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(layouts.HEADS)),
    num_heads=st.integers(1, 3),
    num_pages=st.integers(1, 4),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_round_trip(name: str, num_heads: int, num_pages: int, multiple: int, seed: int) -> None:
    note(f"seed {seed}")
    torch.manual_seed(seed)
    layout = layouts.get_heads(name)
    page_size = layout.page_multiple * multiple if layout.is_paged else 1
    buffers = _buffers(layout, num_heads, 48, 32, num_pages, page_size)
    before = [buffer.clone() for buffer in buffers]
    num_slots = num_pages * page_size
    slots = torch.randperm(num_slots)[: num_slots // 2 + 1]
    slots[torch.rand(len(slots)) < 0.2] = -3
    key, value = torch.randn(len(slots), num_heads, 48), torch.randn(len(slots), num_heads, 32)
    needs_scales = layout.codec.scale_kind == "per_tensor"
    scales = (torch.tensor([0.05]), torch.tensor([0.04])) if needs_scales else None
    layout.pack(buffers, key, value, slots, page_size, scales)
    got = layout.unpack(buffers, slots, 48, 32, page_size, scales)
    live = slots >= 0
    for x, y in zip((key, value), got, strict=True):
        rtol, atol = (2**-4, 1e-4) if needs_scales else (2**-8, 1e-6)
        torch.testing.assert_close(y[live], x[live], rtol=rtol, atol=atol)
        assert not y[~live].any()
    others = torch.tensor(sorted(set(range(num_slots)) - set(slots.tolist())), dtype=torch.int64)
    now = layout.unpack(buffers, others, 48, 32, page_size, scales)
    then = layout.unpack((before[0], before[1]), others, 48, 32, page_size, scales)
    for x, y in zip(now, then, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


def test_refusals() -> None:
    with pytest.raises(LayoutError, match=r"must be one of expanded_bf16, .*, got 'bf16'"):
        layouts.get_heads("bf16")
    with pytest.raises(LayoutError, match="expanded_bf16: page_size must be 1, got 16"):
        layouts.get_heads("expanded_bf16").blocks(192, 128, 16)
    with pytest.raises(LayoutError, match="page_size must be a positive multiple of 16, got 8"):
        layouts.get_heads("gqa_shuffled_fp8").blocks(64, 64, 8)
    with pytest.raises(LayoutError, match="value_dim must be a positive multiple of 8, got 60"):
        layouts.get_heads("gqa_bf16").blocks(64, 60, 8)
    layout = layouts.get_heads("expanded_fp8")
    key, value, slots = torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([0])
    buffers = _buffers(layout, 2, 4, 4, 3)
    with pytest.raises(LayoutError, match="scales must be two fp32"):
        layout.pack(buffers, key, value, slots)
    strided = torch.zeros(3, 2, 8).to(torch.float8_e4m3fn)[..., :4]
    scales = (torch.ones(1), torch.ones(1))
    with pytest.raises(LayoutError, match=r"must be contiguous, got strides \(16, 8, 1\)"):
        layout.pack((strided, buffers[1]), key, value, slots, scales=scales)
