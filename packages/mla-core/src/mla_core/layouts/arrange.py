"""The known page arrangements: given what a token stores, where each piece goes.

An arrangement function takes the stored items of one token and the page size, and returns the
fields and buffers. Byte formulas are in each docstring; ``ps`` is the page size, ``o`` the token
in the page, ``d`` the stored element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mla_core.dtypes import itemsize
from mla_core.layouts.codecs import Item
from mla_core.layouts.fields import Arrangement, Digit, Field, Region

Arrange = Callable[[Sequence[Item], int], Arrangement]

#: Tokens that one 16 x 16 matrix instruction tile covers.
TILE = 16
#: Tokens in one tile of NVFP4 scales.
SCALE_TILE = 128
#: DeepSeek-V4: one token of the latent buffer, 448 fp8 + 14 scale bytes + 50 of padding.
V4_NM_ROW = 512


def _nbytes(item: Item) -> int:
    return item.width * itemsize(item.dtype)


def _rows(item: Item, page_size: int, stride: int, base: int, buffer: int = 0) -> Field:
    """Place an item as plain rows, ``stride`` bytes apart."""
    tokens = (Digit(page_size, stride),)
    elems = (Digit(item.width, itemsize(item.dtype)),)
    return Field(item.name, item.dtype, buffer, base, tokens, elems)


def standard(items: Sequence[Item], page_size: int) -> Arrangement:
    """One typed array [ps, D]: items of one dtype back to back, token after token."""
    dtype = items[0].dtype
    width = sum(item.width for item in items)
    fields, base = [], 0
    for item in items:
        fields.append(_rows(item, page_size, width * itemsize(dtype), base))
        base += _nbytes(item)
    return Arrangement(tuple(fields), (Region((page_size, width), dtype),))


def interleaved(items: Sequence[Item], page_size: int) -> Arrangement:
    """Bytes [ps, B]: latent, scales, rope of a token together, then the next token."""
    row = sum(_nbytes(item) for item in items)
    fields, base = [], 0
    for item in items:
        fields.append(_rows(item, page_size, row, base))
        base += _nbytes(item)
    return Arrangement(tuple(fields), (Region((page_size, row), "uint8"),))


def segmented(items: Sequence[Item], page_size: int) -> Arrangement:
    """Bytes [ps * B]: every token's latent, then every token's scales, then every token's rope."""
    fields, base = [], 0
    for item in items:
        fields.append(_rows(item, page_size, _nbytes(item), base))
        base += page_size * _nbytes(item)
    return Arrangement(tuple(fields), (Region((base,), "uint8"),))


def separate(items: Sequence[Item], page_size: int) -> Arrangement:
    """One typed array [ps, width] for each of latent, rope and scales, in this order."""
    latent, scales, rope = items
    fields, regions = [], []
    for buffer, item in enumerate((latent, rope, scales)):
        fields.append(_rows(item, page_size, _nbytes(item), 0, buffer))
        regions.append(Region((page_size, item.width), item.dtype))
    return Arrangement(tuple(fields), tuple(regions))


def v4_nm(items: Sequence[Item], page_size: int) -> Arrangement:
    """fp8 [ps, 512] (448 numbers, each scale byte twice, 50 of padding) and bf16 rope [ps, 64]."""
    latent, scales, rope = items
    stride = (Digit(page_size, V4_NM_ROW),)
    doubled = Field(
        scales.name,
        scales.dtype,
        0,
        latent.width,
        stride,
        (Digit(scales.width, 2),),
        (Digit(2, 1),),
    )
    fields = (
        _rows(latent, page_size, V4_NM_ROW, 0),
        doubled,
        _rows(rope, page_size, _nbytes(rope), 0, buffer=1),
    )
    regions = (
        Region((page_size, V4_NM_ROW), latent.dtype),
        Region((page_size, rope.width), rope.dtype),
    )
    return Arrangement(fields, regions)


def v4_584(items: Sequence[Item], page_size: int) -> Arrangement:
    """Bytes: latent and rope at ``o * 576``, then scales at ``ps * 576 + o * 8`` (7 and a pad)."""
    latent, scales, rope = items
    row = _nbytes(latent) + _nbytes(rope)
    scale_row = scales.width + 1
    fields = (
        _rows(latent, page_size, row, 0),
        _rows(scales, page_size, scale_row, page_size * row),
        _rows(rope, page_size, row, _nbytes(latent)),
    )
    return Arrangement(fields, (Region((page_size, row + scale_row), "uint8"),))


def _tiled(item: Item, page_size: int, base: int) -> Field:
    """Place rows in 16-token tiles, 16 contiguous bytes of a token at a time.

    With KW elements in 16 bytes: ``(o//16)*16*N + (d//KW)*16*KW + (o%16)*KW + d%KW`` elements.
    """
    size = itemsize(item.dtype)
    lane = 16 // size
    tokens = (Digit(page_size // TILE, TILE * _nbytes(item)), Digit(TILE, 16))
    elems = (Digit(item.width // lane, TILE * 16), Digit(lane, size))
    return Field(item.name, item.dtype, 0, base, tokens, elems)


def shuffled(items: Sequence[Item], page_size: int) -> Arrangement:
    """Latent region, then rope region, each in 16-token tiles of 16-byte lanes."""
    dtype = items[0].dtype
    fields, base = [], 0
    for item in items:
        fields.append(_tiled(item, page_size, base))
        base += page_size * _nbytes(item)
    width = sum(item.width for item in items)
    return Arrangement(tuple(fields), (Region((page_size, width), dtype),))


def indexer_shuffled(items: Sequence[Item], page_size: int) -> Arrangement:
    """Keys in 16-token tiles of 16-byte lanes, then the scales in token order."""
    key, scales, rope = items
    row = _nbytes(key) + _nbytes(scales)
    fields = (
        _tiled(key, page_size, 0),
        _rows(scales, page_size, _nbytes(scales), page_size * _nbytes(key)),
        _rows(rope, page_size, _nbytes(rope), page_size * row),
    )
    return Arrangement(fields, (Region((page_size, row), "uint8"),))


def nvfp4_shuffled(items: Sequence[Item], page_size: int) -> Arrangement:
    """Packed latent tiles, its scales, packed rope tiles, its scales.

    With ``S`` scales per token, ``q = o % 128`` and ``W`` = 16 for the latent and 4 for the rope,
    scale ``g`` lies at ``(o//128)*128*S + (g//W)*128*W + (q%32)*4*W + (q//32)*W + g%W`` of its
    region.
    """
    latent, latent_scales, rope, rope_scales = items
    fields, base = [], 0
    for item, scales, lanes in ((latent, latent_scales, 16), (rope, rope_scales, 4)):
        fields.append(_tiled(item, page_size, base))
        base += page_size * _nbytes(item)
        tokens = (
            Digit(page_size // SCALE_TILE, SCALE_TILE * scales.width),
            Digit(4, lanes),
            Digit(32, 4 * lanes),
        )
        elems = (Digit(scales.width // lanes, SCALE_TILE * lanes), Digit(lanes, 1))
        fields.append(Field(scales.name, scales.dtype, 0, base, tokens, elems))
        base += page_size * _nbytes(scales)
    return Arrangement(tuple(fields), (Region((page_size, base // page_size), "uint8"),))


def indexer(items: Sequence[Item], page_size: int) -> Arrangement:
    """Every token's fp8 key, then every token's fp32 scale."""
    fields = segmented(items, page_size).fields
    row = sum(_nbytes(item) for item in items)
    return Arrangement(fields, (Region((page_size, row), "uint8"),))
