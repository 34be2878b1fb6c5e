"""`Layout`: the bytes of a paged latent cache as data, with pack and unpack."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.dims import MLADims
from mla_core.dtypes import itemsize
from mla_core.errors import LayoutError
from mla_core.layouts.arrange import Arrange
from mla_core.layouts.codecs import Codec, Item
from mla_core.layouts.fields import Arrangement, BufferSpec, Field, Index

Buffers = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows ``kv_c ‖ k_pe`` of a page are stored.

    Parameters
    ----------
    name : str
        Unique: what `get` takes and messages print.
    family : str
        Byte arrangement without the dtype; kernels declare the families they read.
    summary : str
        One line for listings.
    latent, rope : Codec
        How each of the two parts is stored as numbers.
    arrange : callable
        Where the stored items go; see `mla_core.layouts.arrange`.
    page_multiple : int
        ``page_size`` must be a multiple of it.
    rank_multiple, rope_multiple : int
        ``kv_lora_rank`` and ``qk_rope_head_dim`` must be multiples of these.
    only : (kv_lora_rank, qk_rope_head_dim), or None
        The one pair a layout is defined for.
    """

    name: str
    family: str
    summary: str
    latent: Codec
    rope: Codec
    arrange: Arrange
    page_multiple: int = 1
    rank_multiple: int = 1
    rope_multiple: int = 1
    only: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Name only, for messages and test ids."""
        return self.name

    @property
    def kv_dtype(self) -> str:
        """Dtype of the cached latent, "bf16", "fp8_e4m3", "fp4_e2m1" ..."""
        return self.latent.dtype

    @property
    def scale_kind(self) -> str:
        """Return how the latent is scaled.

        "none", "per_tensor" (a factor in the cache), or in the page "per_token_fp32" or
        "group<n>_<dtype>".
        """
        return self.latent.scale_kind

    @property
    def needs_scale(self) -> bool:
        """Whether a cache must carry a per-tensor dequantisation factor."""
        return self.scale_kind == "per_tensor"

    def check_dims(self, dims: MLADims) -> None:
        """Refuse dims whose rows this layout cannot hold.

        Raises
        ------
        LayoutError
            The message names the width and what is accepted.
        """
        rank, rope = dims.kv_lora_rank, dims.qk_rope_head_dim
        if self.only is not None and (rank, rope) != self.only:
            raise LayoutError(
                f"layout {self.name}: (kv_lora_rank, qk_rope_head_dim) must be {self.only}, "
                f"got {(rank, rope)}"
            )
        if rank % self.rank_multiple:
            raise LayoutError(
                f"layout {self.name}: kv_lora_rank must be a multiple of {self.rank_multiple}, "
                f"got {rank}"
            )
        if rope % self.rope_multiple:
            raise LayoutError(
                f"layout {self.name}: qk_rope_head_dim must be a multiple of "
                f"{self.rope_multiple}, got {rope}"
            )

    def check_page_size(self, page_size: int) -> None:
        """Refuse page sizes this layout is not defined for.

        Raises
        ------
        LayoutError
        """
        if page_size < 1 or page_size % self.page_multiple:
            raise LayoutError(
                f"layout {self.name}: page_size must be a positive multiple of "
                f"{self.page_multiple}, got {page_size}"
            )

    def items(self, dims: MLADims) -> tuple[Item, ...]:
        """Return what one token stores: latent, its scales if any, rope, its scales if any."""
        latent = self.latent.items("kv_c", dims.kv_lora_rank)
        return (*latent, *self.rope.items("k_pe", dims.qk_rope_head_dim))

    def arrangement(self, dims: MLADims, page_size: int) -> Arrangement:
        """Return fields and per-page buffer shapes, after checking dims and page size."""
        self.check_dims(dims)
        self.check_page_size(page_size)
        return self.arrange(self.items(dims), page_size)

    def fields(self, dims: MLADims, page_size: int) -> tuple[Field, ...]:
        """Return every field of a page."""
        return self.arrangement(dims, page_size).fields

    def buffer_specs(self, dims: MLADims, num_pages: int, page_size: int) -> tuple[BufferSpec, ...]:
        """Return shape and dtype of each buffer, ``[num_pages, ...]``."""
        regions = self.arrangement(dims, page_size).regions
        return tuple(BufferSpec((num_pages, *r.shape), r.dtype) for r in regions)

    def bytes_per_page(self, dims: MLADims, page_size: int) -> int:
        """Return the bytes of one page over all buffers, padding included."""
        return sum(region.nbytes for region in self.arrangement(dims, page_size).regions)

    def bytes_per_token(self, dims: MLADims) -> int:
        """Return the bytes of one token over all buffers, padding included."""
        return self.bytes_per_page(dims, self.page_multiple) // self.page_multiple

    def live_bytes_per_token(self, dims: MLADims) -> int:
        """Return the bytes of one token that carry information: no padding, no second copies."""
        return sum(item.width * itemsize(item.dtype) for item in self.items(dims))

    def address(
        self, name: str, slot: Index, elem: Index, dims: MLADims, page_size: int, page_stride: int
    ) -> Index:
        """Return the byte offset of one element from the start of its buffer.

        ``slot`` is ``page * page_size + offset``; ``page_stride`` is in bytes. Ints, or int64
        tensors that broadcast.
        """
        field = self.arrangement(dims, page_size).field(name)
        page = slot // page_size
        return page * page_stride + field.address(slot % page_size, elem)

    def view(self, name: str, buffers: Buffers, dims: MLADims, page_size: int) -> torch.Tensor:
        """View one field in place, ``[num_pages, *token digits, *element digits, *copies]``."""
        field = self.arrangement(dims, page_size).field(name)
        return field.view(buffers[field.buffer])

    def quantise(
        self, kv_c: torch.Tensor, k_pe: torch.Tensor, scale: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the stored arrays of rows [T, C] and [T, R], by field name."""
        stored = {}
        for name, codec, rows in (("kv_c", self.latent, kv_c), ("k_pe", self.rope, k_pe)):
            items = codec.items(name, rows.shape[-1])
            arrays = codec.encode(rows, scale)
            stored.update({item.name: array for item, array in zip(items, arrays, strict=True)})
        return stored

    def dequantise(
        self,
        stored: dict[str, torch.Tensor],
        dims: MLADims,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows [T, C] and [T, R] of ``dtype`` from stored arrays."""
        parts = []
        for name, codec, width in (
            ("kv_c", self.latent, dims.kv_lora_rank),
            ("k_pe", self.rope, dims.qk_rope_head_dim),
        ):
            arrays = tuple(stored[item.name] for item in codec.items(name, width))
            parts.append(codec.decode(arrays, scale, dtype))
        return parts[0], parts[1]

    def pack(
        self,
        buffers: Buffers,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        slots: torch.Tensor,
        dims: MLADims,
        page_size: int,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Quantise rows and store them in place.

        Parameters
        ----------
        buffers : tuple of tensors as `buffer_specs` says, any page stride
        kv_c, k_pe : [T, kv_lora_rank], [T, qk_rope_head_dim], floating point
        slots : [T], int64
            ``page * page_size + offset``; negative skips the row. Distinct, otherwise which of the
            rows wins is undefined.
        scale : [1], fp32, for per-tensor layouts
        """
        stored = self.quantise(kv_c, k_pe, scale)
        for field in self.fields(dims, page_size):
            field.put(buffers[field.buffer], slots, stored[field.name])

    def pack_rope(
        self,
        buffers: Buffers,
        k_pe: torch.Tensor,
        slots: torch.Tensor,
        dims: MLADims,
        page_size: int,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Quantise and store rotary parts alone; parameters as in `pack`."""
        items = self.rope.items("k_pe", dims.qk_rope_head_dim)
        arrays = self.rope.encode(k_pe, scale)
        arrangement = self.arrangement(dims, page_size)
        for item, array in zip(items, arrays, strict=True):
            field = arrangement.field(item.name)
            field.put(buffers[field.buffer], slots, array)

    def round_rope(
        self,
        k_pe: torch.Tensor,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Return rotary parts [T, R] as they would be read back after storing them."""
        return self.rope.decode(self.rope.encode(k_pe, scale), scale, dtype)

    def unpack(
        self,
        buffers: Buffers,
        slots: torch.Tensor,
        dims: MLADims,
        page_size: int,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather and dequantise rows; a negative slot gives zeros.

        Returns
        -------
        kv_c, k_pe : [T, kv_lora_rank], [T, qk_rope_head_dim] of ``dtype``
        """
        stored = {
            field.name: field.take(buffers[field.buffer], slots)
            for field in self.fields(dims, page_size)
        }
        kv_c, k_pe = self.dequantise(stored, dims, scale, dtype)
        return kv_c, k_pe

    def unpack_pages(
        self,
        buffers: Buffers,
        pages: torch.Tensor,
        dims: MLADims,
        page_size: int,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather whole pages [N]; a negative page gives zeros.

        Returns
        -------
        kv_c, k_pe : [N, page_size, kv_lora_rank], [N, page_size, qk_rope_head_dim] of ``dtype``
        """
        offsets = torch.arange(page_size, device=pages.device)
        slots = pages.long()[:, None] * page_size + offsets
        kv_c, k_pe = self.unpack(buffers, slots.flatten(), dims, page_size, scale, dtype)
        rank, rope = dims.kv_lora_rank, dims.qk_rope_head_dim
        return kv_c.reshape(*slots.shape, rank), k_pe.reshape(*slots.shape, rope)
