"""`LatentCache`: a layout bound to the buffers of one paged latent cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

import torch

from mla_core import env, layouts
from mla_core.dims import MLADims
from mla_core.dtypes import itemsize, torch_dtype
from mla_core.errors import LayoutError
from mla_core.layouts import BufferSpec, Layout


@dataclass(frozen=True, slots=True)
class LatentCache:
    """A paged cache of latent rows: its layout, dims, page size and memory.

    Make one with `allocate` (new memory) or `bind` (memory of an engine), which check everything;
    the constructor itself trusts its arguments.

    Parameters
    ----------
    layout : Layout
    dims : MLADims
    page_size : int
        Tokens per page.
    buffers : tuple of tensors
        As ``layout.buffer_specs`` says: ``[num_pages, ...]``, dense inside a page, any page stride.
    scale : [1], fp32, or None
        Dequantisation factor (real = stored * scale) of per-tensor fp8 layouts.
    """

    layout: Layout
    dims: MLADims
    page_size: int
    buffers: tuple[torch.Tensor, ...]
    scale: torch.Tensor | None = None
    # Views handed out before: a decode step asks for the same ones layer after layer.
    _views: dict[str, torch.Tensor] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _kind: list[object] = field(init=False, repr=False, compare=False, default_factory=list)

    @classmethod
    def allocate(
        cls,
        layout: str | Layout,
        dims: MLADims,
        num_pages: int,
        page_size: int,
        *,
        device: torch.device | str = "cpu",
        scale: torch.Tensor | None = None,
        fill: int | None = None,
    ) -> LatentCache:
        """Allocate a cache.

        Parameters
        ----------
        layout : name or Layout
        fill : int in 0..255, or None
            Byte to fill the memory with; None means zeros, which padding bytes should be. 255 makes
            every bf16, fp32 and e4m3 value NaN, which is what tests want of unused memory.
        """
        layout = _layout(layout)
        byte = 0 if fill is None else fill
        if not 0 <= byte <= 255:
            raise LayoutError(f"LatentCache: fill must be a byte in 0..255, got {fill}")
        if num_pages < 0:
            raise LayoutError(f"LatentCache: num_pages must be >= 0, got {num_pages}")
        buffers = []
        for spec in layout.buffer_specs(dims, num_pages, page_size):
            buffer = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
            buffer.view(torch.uint8).fill_(byte)
            buffers.append(buffer)
        return cls.bind(layout, dims, page_size, *buffers, scale=scale)

    @classmethod
    def bind(
        cls,
        layout: str | Layout,
        dims: MLADims,
        page_size: int,
        *buffers: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> LatentCache:
        """Bind existing memory, without copying it.

        Parameters
        ----------
        buffers : tensors, in the order of ``layout.buffer_specs``
            A buffer may have extra dimensions of size 1 (``[num_pages, page_size, 1, 576]``) or be
            flat inside the page (``[num_pages, page_size * 656]``, or ``[num_pages, page_size,
            656]`` for a page of segments); fp8 may come as ``uint8`` and the other way round. The
            page stride may be larger than a page.

        Raises
        ------
        LayoutError
            A buffer's number, shape, dtype, device, strides or alignment, or ``scale``, is not what
            the layout needs; the message names it.
        """
        layout = _layout(layout)
        num_pages = buffers[0].shape[0] if buffers and buffers[0].ndim else 0
        specs = layout.buffer_specs(dims, num_pages, page_size)
        fields = layout.fields(dims, page_size)
        op = f"LatentCache({layout.name})"
        if len(buffers) != len(specs):
            raise LayoutError(f"{op}: takes {len(specs)} buffers, got {len(buffers)}")
        device = buffers[0].device
        bound = []
        for index, (buffer, spec) in enumerate(zip(buffers, specs, strict=True)):
            where = f"{op}: buffers[{index}]"
            if buffer.device != device:
                raise LayoutError(
                    f"{where} must be on {device} like the first, got {buffer.device}"
                )
            alignment = max(itemsize(field.dtype) for field in fields if field.buffer == index)
            bound.append(_canonical(where, buffer, spec, page_size, alignment))
        return cls(layout, dims, page_size, tuple(bound), _checked_scale(op, layout, scale, device))

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.buffers[0].shape[0]

    @property
    def num_slots(self) -> int:
        """Tokens the cache can hold."""
        return self.num_pages * self.page_size

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.buffers[0].device

    @property
    def kind(self) -> object:
        """An object for all that caches have in common which differ in their memory alone.

        Layout, dims, page size, device, and shapes, strides and dtypes of the buffers and the
        scale. Cheap to compare and to hash.
        """
        if not self._kind:
            tensors = self.buffers if self.scale is None else (*self.buffers, self.scale)
            looks = tuple((it.shape, it.stride(), it.dtype, it.device) for it in tensors)
            self._kind.append(_kind_of(self.layout, self.dims, self.page_size, looks))
        return self._kind[0]

    def field(self, name: str) -> torch.Tensor:
        """View one field in place, ``[num_pages, *token digits, *element digits, *copies]``.

        For plain (not shuffled) layouts that is ``[num_pages, page_size, width]``, whose strides a
        kernel can take as they are.
        """
        view = self._views.get(name)
        if view is None:
            view = self.layout.view(name, self.buffers, self.dims, self.page_size)
            self._views[name] = view
        return view

    def field_bytes(self, name: str) -> torch.Tensor:
        """View one field as `field` does, but fp8 as ``uint8``, for kernels that make codes."""
        key = f"{name} as bytes"
        view = self._views.get(key)
        if view is None:
            view = self.field(name)
            view = view.view(torch.uint8) if view.element_size() == 1 else view
            self._views[key] = view
        return view

    def rows(self) -> torch.Tensor:
        """Return the cache of a standard layout as ``[num_pages, page_size, latent_dim]``.

        Raises
        ------
        LayoutError
            The layout does not store plain rows.
        """
        if self.layout.family != "standard":
            raise LayoutError(
                f"LatentCache.rows: layout must be of the standard family, got {self.layout.name}; "
                f"use field() or read()"
            )
        return self.buffers[0]

    def write(self, kv_c: torch.Tensor, k_pe: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantise rows and store them at ``slots``.

        Parameters
        ----------
        kv_c, k_pe : [T, kv_lora_rank], [T, qk_rope_head_dim], floating point
        slots : [T], int32 or int64
            ``page * page_size + offset``, distinct; negative skips the row.

        Notes
        -----
        No host sync on an accelerator; there, slots past the end are only refused under
        ``MLA_CHECK=1``.
        """
        op = f"LatentCache({self.layout.name}).write"
        self._check_slots(op, slots)
        self._check_rows(op, "kv_c", kv_c, slots, self.dims.kv_lora_rank)
        self._check_rows(op, "k_pe", k_pe, slots, self.dims.qk_rope_head_dim)
        self.layout.pack(
            self.buffers, kv_c, k_pe, slots.long(), self.dims, self.page_size, self.scale
        )

    def write_rope(self, k_pe: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantise rotary parts and store them at ``slots``, leaving the latents as they are.

        Parameters
        ----------
        k_pe : [T, qk_rope_head_dim], floating point
        slots : [T], int32 or int64
            As in `write`.
        """
        op = f"LatentCache({self.layout.name}).write_rope"
        self._check_slots(op, slots)
        self._check_rows(op, "k_pe", k_pe, slots, self.dims.qk_rope_head_dim)
        self.layout.pack_rope(
            self.buffers, k_pe, slots.long(), self.dims, self.page_size, self.scale
        )

    def round_rope(self, k_pe: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return rotary parts [T, qk_rope_head_dim] as reading them back would, after a write."""
        return self.layout.round_rope(k_pe, self.scale, dtype)

    def read(
        self, slots: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather and dequantise rows; a negative slot gives zeros.

        Parameters
        ----------
        slots : [T], int32 or int64

        Returns
        -------
        kv_c, k_pe : [T, kv_lora_rank], [T, qk_rope_head_dim] of ``dtype``
        """
        self._check_slots(f"LatentCache({self.layout.name}).read", slots)
        return self.layout.unpack(
            self.buffers, slots.long(), self.dims, self.page_size, self.scale, dtype
        )

    def read_pages(
        self, pages: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather and dequantise whole pages [N]; a negative page gives zeros.

        Returns
        -------
        kv_c, k_pe : [N, page_size, kv_lora_rank], [N, page_size, qk_rope_head_dim] of ``dtype``
        """
        return self.layout.unpack_pages(
            self.buffers, pages, self.dims, self.page_size, self.scale, dtype
        )

    def _check_rows(
        self, op: str, name: str, rows: torch.Tensor, slots: torch.Tensor, width: int
    ) -> None:
        expected = (slots.numel(), width)
        if tuple(rows.shape) != expected or not rows.is_floating_point():
            raise LayoutError(
                f"{op}: {name} must be {expected} floating point, got {tuple(rows.shape)} "
                f"{rows.dtype}"
            )
        if rows.device != self.device:
            raise LayoutError(f"{op}: {name} must be on {self.device}, got {rows.device}")

    def _check_slots(self, op: str, slots: torch.Tensor) -> None:
        if slots.ndim != 1 or slots.dtype not in (torch.int32, torch.int64):
            raise LayoutError(
                f"{op}: slots must be 1-D int32 or int64, got {tuple(slots.shape)} {slots.dtype}"
            )
        if slots.device != self.device:
            raise LayoutError(f"{op}: slots must be on {self.device}, got {slots.device}")
        on_host = self.device.type == "cpu" and not torch.compiler.is_compiling()
        if (on_host or env.flag("MLA_CHECK")) and slots.numel():
            largest = int(slots.max())
            if largest >= self.num_slots:
                raise LayoutError(
                    f"{op}: slots must be below {self.num_slots} ({self.num_pages} pages of "
                    f"{self.page_size}), got {largest}"
                )


@functools.lru_cache(maxsize=4096)
def _kind_of(*description: object) -> object:
    """Return one object for equal descriptions."""
    del description
    return object()


def _layout(layout: str | Layout) -> Layout:
    return layouts.get(layout) if isinstance(layout, str) else layout


def _canonical(
    where: str, buffer: torch.Tensor, spec: BufferSpec, page_size: int, alignment: int
) -> torch.Tensor:
    """Check a buffer and view it in the shape and dtype of its spec."""
    num_pages, *inner = spec.shape
    count = math.prod(inner)
    accepted = [_no_ones(shape) for shape in (inner, (page_size, count // page_size), (count,))]
    if (
        buffer.ndim < 2
        or buffer.shape[0] != num_pages
        or _no_ones(buffer.shape[1:]) not in accepted
    ):
        raise LayoutError(
            f"{where} must be {list(spec.shape)}, or [{num_pages}, {count}], "
            f"got {list(buffer.shape)}"
        )
    dtype = torch_dtype(spec.dtype)
    is_bytes = buffer.element_size() == 1 == dtype.itemsize and torch.uint8 in (dtype, buffer.dtype)
    if buffer.dtype != dtype and not is_bytes:
        raise LayoutError(f"{where} must be {spec.dtype}, got {buffer.dtype}")
    if count == 0 or num_pages == 0:
        return buffer.view(dtype).reshape(spec.shape)
    strides = (1, *accumulate(reversed(buffer.shape[2:]), mul))
    for size, stride, dense in zip(
        buffer.shape[:0:-1], buffer.stride()[:0:-1], strides, strict=True
    ):
        if size > 1 and stride != dense:
            raise LayoutError(
                f"{where} must be dense inside a page, got strides {tuple(buffer.stride())} for "
                f"shape {list(buffer.shape)}; call contiguous()"
            )
    # The stride of a dimension of size 1 is arbitrary, so a single page is taken as dense.
    page_stride = buffer.stride(0) if num_pages > 1 else count
    if page_stride < count:
        raise LayoutError(
            f"{where} must have a page stride of at least {count}, got {page_stride}; pages overlap"
        )
    start, size = buffer.storage_offset(), dtype.itemsize
    if page_stride * size % alignment or start * size % alignment:
        raise LayoutError(
            f"{where} must start and step from page to page at multiples of {alignment} bytes, got "
            f"start {start * size} and page stride {page_stride * size}"
        )
    pages = buffer.as_strided((num_pages, count), (page_stride, 1))
    return pages.view(dtype).view(spec.shape)


def _no_ones(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _checked_scale(
    op: str, layout: Layout, scale: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    if not layout.needs_scale:
        if scale is not None:
            raise LayoutError(f"{op}: scale must be None, its scale kind is {layout.scale_kind}")
        return None
    if scale is None:
        raise LayoutError(
            f"{op}: scale must be a fp32 [1] tensor, got None; pass the dequantisation factor"
        )
    if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device:
        raise LayoutError(
            f"{op}: scale must be fp32 [1] on {device}, got {scale.dtype} {tuple(scale.shape)} on "
            f"{scale.device}"
        )
    return scale.reshape(1)
