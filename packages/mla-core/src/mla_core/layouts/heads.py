"""Layouts of per-head keys and values: what prefill reads, and the paged caches of GQA kernels.

MLA caches one latent row per token, but its keys and values also exist *expanded*, one row per
head, and neighbours of MLA kernels write paged per-head caches whose innermost run is 16 bytes.
The fields are those of `mla_core.layouts.fields`; a "page" here is one (page, head) block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_core.dtypes import itemsize
from mla_core.errors import LayoutError
from mla_core.layouts.codecs import Cast, Codec, PerTensor
from mla_core.layouts.fields import BufferSpec, Digit, Field

#: Takes part name, dtype, head width and page size; returns the field and the shape of a block.
Block = Callable[[str, str, int, int], tuple[Field, tuple[int, ...]]]


def _rows(name: str, dtype: str, width: int, page_size: int) -> tuple[Field, tuple[int, ...]]:
    """``d``: one token, one head."""
    size = itemsize(dtype)
    field = Field(name, dtype, 0, 0, (Digit(page_size, width * size),), (Digit(width, size),))
    return field, (width,)


def _lanes(name: str, dtype: str, width: int, page_size: int) -> tuple[Field, tuple[int, ...]]:
    """``(d // x) * ps * x + o * x + d % x`` elements: 16 bytes of one token together."""
    size, x = itemsize(dtype), 16 // itemsize(dtype)
    elems = (Digit(width // x, page_size * 16), Digit(x, size))
    field = Field(name, dtype, 0, 0, (Digit(page_size, 16),), elems)
    return field, (width // x, page_size, x)


def _columns(name: str, dtype: str, width: int, page_size: int) -> tuple[Field, tuple[int, ...]]:
    """``d * ps + o`` elements: all tokens of one dimension together."""
    size = itemsize(dtype)
    elems = (Digit(width, page_size * size),)
    return Field(name, dtype, 0, 0, (Digit(page_size, size),), elems), (width, page_size)


def _token_lanes(
    name: str, dtype: str, width: int, page_size: int
) -> tuple[Field, tuple[int, ...]]:
    """``(o // x) * D * x + d * x + o % x`` elements: x tokens of one dimension together."""
    size, x = itemsize(dtype), 16 // itemsize(dtype)
    tokens = (Digit(page_size // x, width * 16), Digit(x, size))
    field = Field(name, dtype, 0, 0, tokens, (Digit(width, 16),))
    return field, (page_size // x, width, x)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where the per-head rows ``key`` [T, H, Dk] and ``value`` [T, H, Dv] lie.

    Parameters
    ----------
    name, family, summary : str
    codec : Codec
        How numbers are stored; per-tensor fp8 takes one scale for keys and one for values.
    key, value : callable
        Arrangement of one (page, head) block.
    page_multiple : int
        ``page_size`` must be a multiple of it.
    is_paged : bool
        Otherwise one token is one page.
    """

    name: str
    family: str
    summary: str
    codec: Codec
    key: Block
    value: Block
    page_multiple: int = 1
    is_paged: bool = True

    def __str__(self) -> str:
        """Name only, for messages and test ids."""
        return self.name

    def blocks(
        self, key_dim: int, value_dim: int, page_size: int
    ) -> tuple[tuple[Field, tuple[int, ...]], ...]:
        """Return field and block shape of keys and of values, after checking the sizes.

        Raises
        ------
        LayoutError
            The page size, or a head width that must fill whole 16-byte lanes, does not fit.
        """
        if page_size < 1 or page_size % self.page_multiple or (page_size > 1 and not self.is_paged):
            wanted = f"a positive multiple of {self.page_multiple}" if self.is_paged else "1"
            raise LayoutError(f"layout {self.name}: page_size must be {wanted}, got {page_size}")
        lane = 16 // itemsize(self.codec.dtype)
        for name, width in (("key_dim", key_dim), ("value_dim", value_dim)):
            if width < 1 or (self.is_paged and width % lane):
                raise LayoutError(
                    f"layout {self.name}: {name} must be a positive multiple of "
                    f"{lane if self.is_paged else 1}, got {width}"
                )
        dtype = self.codec.dtype
        return (
            self.key("key", dtype, key_dim, page_size),
            self.value("value", dtype, value_dim, page_size),
        )

    def buffer_specs(
        self, num_heads: int, key_dim: int, value_dim: int, num_pages: int, page_size: int = 1
    ) -> tuple[BufferSpec, BufferSpec]:
        """Return shape and dtype of the key and the value buffer, ``[num_pages, num_heads, ...]``.

        Expanded rows have no page dimension: ``[tokens, num_heads, width]``.
        """
        (_, key), (_, value) = self.blocks(key_dim, value_dim, page_size)
        dtype = self.codec.dtype
        return (
            BufferSpec((num_pages, num_heads, *key), dtype),
            BufferSpec((num_pages, num_heads, *value), dtype),
        )

    def pack(
        self,
        buffers: tuple[torch.Tensor, torch.Tensor],
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        page_size: int = 1,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Store rows in place.

        Parameters
        ----------
        buffers : (key buffer, value buffer), contiguous, as `buffer_specs` says
        key, value : [T, num_heads, key_dim], [T, num_heads, value_dim], floating point
        slots : [T], int64
            ``page * page_size + offset``, distinct; negative skips the row.
        scales : (key scale, value scale), fp32 [1], for per-tensor fp8
        """
        fields = self.blocks(key.shape[-1], value.shape[-1], page_size)
        parts = zip(buffers, (key, value), fields, self._scales(scales), strict=True)
        for buffer, rows, (field, _), scale in parts:
            blocks, where = self._locate(buffer, slots, page_size)
            (stored,) = self.codec.encode(rows.flatten(0, 1), scale)
            field.put(blocks, where, stored)

    def unpack(
        self,
        buffers: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        key_dim: int,
        value_dim: int,
        page_size: int = 1,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather rows [T, num_heads, width] of ``dtype``; a negative slot gives zeros."""
        fields = self.blocks(key_dim, value_dim, page_size)
        parts = []
        for buffer, (field, _), scale in zip(buffers, fields, self._scales(scales), strict=True):
            blocks, where = self._locate(buffer, slots, page_size)
            rows = self.codec.decode((field.take(blocks, where),), scale, dtype)
            parts.append(rows.view(slots.numel(), buffer.shape[1], field.width))
        return parts[0], parts[1]

    def _locate(
        self, buffer: torch.Tensor, slots: torch.Tensor, page_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the buffer as [blocks, ...] and the slot of each (token, head) in it."""
        if not buffer.is_contiguous():
            raise LayoutError(
                f"layout {self.name}: buffers must be contiguous, got strides {buffer.stride()}"
            )
        num_heads = buffer.shape[1]
        heads = torch.arange(num_heads, device=slots.device)
        block = (slots // page_size)[:, None] * num_heads + heads
        where = block * page_size + (slots % page_size)[:, None]
        return buffer.flatten(0, 1), where.flatten()

    def _scales(
        self, scales: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if (scales is not None) != (self.codec.scale_kind == "per_tensor"):
            wanted = "None" if scales is not None else "two fp32 [1] tensors"
            raise LayoutError(f"layout {self.name}: scales must be {wanted}")
        return (None, None) if scales is None else scales


_CODECS: dict[str, Codec] = {
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "fp8": PerTensor("fp8_e4m3"),
    "fp8_fnuz": PerTensor("fp8_e4m3fnuz"),
}


def _layouts(name: str, codec: Codec) -> tuple[HeadLayout, ...]:
    lane = 16 // itemsize(codec.dtype)
    return (
        HeadLayout(
            f"expanded_{name}",
            "expanded",
            f"{codec.dtype} [tokens, heads, width], keys and values apart",
            codec,
            _rows,
            _rows,
            is_paged=False,
        ),
        HeadLayout(
            f"gqa_{name}",
            "gqa",
            f"paged {codec.dtype} [pages, heads, width / {lane}, tokens, {lane}] keys, "
            "[pages, heads, width, tokens] values",
            codec,
            _lanes,
            _columns,
        ),
        HeadLayout(
            f"gqa_shuffled_{name}",
            "gqa_shuffled",
            f"as gqa_{name}, values [pages, heads, tokens / {lane}, width, {lane}]",
            codec,
            _lanes,
            _token_lanes,
            page_multiple=lane,
        ),
    )


#: All per-head layouts by name.
HEADS: dict[str, HeadLayout] = {
    layout.name: layout for name, codec in _CODECS.items() for layout in _layouts(name, codec)
}


def get_heads(name: str) -> HeadLayout:
    """Return a per-head layout by name.

    Raises
    ------
    LayoutError
        There is none; the message lists the names.
    """
    try:
        return HEADS[name]
    except KeyError:
        raise LayoutError(f"layout: name must be one of {', '.join(HEADS)}, got {name!r}") from None
