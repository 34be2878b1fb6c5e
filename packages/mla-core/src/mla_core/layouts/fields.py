"""Where a value lives inside a page: strides over the digits of two indices.

A plain array puts element ``d`` of token ``o`` at ``o * row + d``. The shuffled caches of AMD
kernels do not, but they are still regular: write the token and the element index as mixed-radix
numbers, and each *digit* has one stride. With 16-token groups, for instance, ``o`` has the digits
``(o // 16, o % 16)``. So every layout of this library is a table of `Field` rows, and every field
is a strided view of the cache that reads and writes in place.

>>> token = (Digit(4, 16 * 64), Digit(16, 8))  # 64 tokens in groups of 16
>>> address(17, token)  # group 1, member 1
1032
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from mla_core.dtypes import itemsize, torch_dtype
from mla_core.errors import LayoutError

Index = TypeVar("Index", int, torch.Tensor)

#: Integer dtypes that carry stored bits unchanged; copies through floats may quieten a NaN.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of an index: it takes ``size`` values, ``stride`` bytes apart."""

    size: int
    stride: int


Digits = tuple[Digit, ...]


def span(digits: Digits) -> int:
    """Return how many values an index with these digits takes."""
    product = 1
    for digit in digits:
        product *= digit.size
    return product


def split(index: Index, digits: Digits) -> list[Index]:
    """Return the digits of an index, most significant first."""
    values: list[Index] = []
    for digit in reversed(digits[1:]):
        values.append(index % digit.size)
        index = index // digit.size
    values.append(index)
    return values[::-1]


def address(index: Index, digits: Digits) -> Index:
    """Return the byte offset of an index, an int or an int64 tensor."""
    values = split(index, digits)
    offset = values[0] * digits[0].stride
    for value, digit in zip(values[1:], digits[1:], strict=True):
        offset = offset + value * digit.stride
    return offset


@dataclass(frozen=True, slots=True)
class Field:
    """One kind of stored value (latent, rotary key, scales) and its place in a page.

    Parameters
    ----------
    name : "kv_c", "k_pe", "kv_c_scale" or "k_pe_scale"
    dtype : str
        Of one stored element. Packed fp4 pairs and E8M0 scales are ``uint8``.
    buffer : int
        Which of the cache's buffers holds it.
    base : int
        Byte offset of element (0, 0) from the start of the page.
    tokens, elems : tuple of Digit
        Digits of the token index in the page and of the element index in the row.
    copies : tuple of Digit
        For a value that is stored more than once; empty otherwise.
    """

    name: str
    dtype: str
    buffer: int
    base: int
    tokens: Digits
    elems: Digits
    copies: Digits = ()

    @property
    def width(self) -> int:
        """Stored elements of one token, not counting copies."""
        return span(self.elems)

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return span(self.tokens)

    def address(self, token: Index, elem: Index, copy: int = 0) -> Index:
        """Return the byte offset inside the page; ints, or int64 tensors that broadcast."""
        place = address(token, self.tokens) + address(elem, self.elems) + self.base
        return place + copy * self.copies[0].stride if self.copies else place

    def view(self, page_bytes: torch.Tensor) -> torch.Tensor:
        """View a buffer as ``[num_pages, *tokens, *elems, *copies]`` of ``dtype``, in place.

        Parameters
        ----------
        page_bytes : [num_pages, ...], any dtype; dense inside a page, any page stride
        """
        digits = self.tokens + self.elems + self.copies
        shape = (page_bytes.shape[0], *(digit.size for digit in digits))
        if 0 in shape:
            return torch.empty(shape, dtype=torch_dtype(self.dtype), device=page_bytes.device)
        # view, not flatten: a copy would swallow writes, so strides that need one are an error.
        typed = reinterpret(page_bytes.view(shape[0], page_bytes[0].numel()), self.dtype)
        size = itemsize(self.dtype)
        strides = (typed.stride(0), *(digit.stride // size for digit in digits))
        return typed[:, self.base // size :].as_strided(shape, strides)

    def put(self, page_bytes: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``values`` [T, width] at ``slots`` [T], int64; -1 skips a row.

        Without a host sync: skipped rows repeat the first written one, and if all are skipped
        they rewrite what the first slot holds.
        """
        view = bits(self.view(page_bytes))
        if slots.numel() == 0 or view.numel() == 0:
            return
        rows = bits(values.contiguous()).reshape(-1, *(digit.size for digit in self.elems))
        if self.copies:
            rows = rows.unsqueeze(-1).expand(*rows.shape, self.copies[0].size)
        is_live = (slots >= 0).view(-1, *([1] * (rows.ndim - 1)))
        # Kept one-dimensional: indexing with a 0-d tensor would wait for the device.
        first = (slots >= 0).int().argmax(0, keepdim=True)
        index = self._index(torch.where(slots >= 0, slots, slots[first]).clamp(min=0))
        held = view[tuple(i[first] for i in index)]
        spare = torch.where(is_live[first], rows[first], held)
        view[index] = torch.where(is_live, rows, spare)

    def take(self, page_bytes: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Gather [T, width] in the stored dtype; a negative slot gives all bits zero."""
        view = bits(self.view(page_bytes))
        shape = (slots.numel(), self.width)
        if view.numel() == 0:
            rows = view.new_zeros(shape)
        else:
            if self.copies:
                view = view[..., 0]
            rows = view[self._index(slots.clamp(min=0))].reshape(shape)
            rows = torch.where((slots >= 0)[:, None], rows, 0)
        return rows.view(torch_dtype(self.dtype))

    def _index(self, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        token = slots % self.page_size
        return (slots // self.page_size, *split(token, self.tokens))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers of the same item size."""
    return tensor.view(_BITS[tensor.element_size()])


def reinterpret(pages: torch.Tensor, dtype: str) -> torch.Tensor:
    """View 2-D ``[num_pages, n]`` memory as another dtype, keeping the page stride."""
    if pages.shape[0] == 1:  # the stride of a single page is arbitrary, but view() checks it
        pages = pages.as_strided(pages.shape, (pages.shape[1], 1))
    return pages.view(torch_dtype(dtype))


@dataclass(frozen=True, slots=True)
class Region:
    """Per-page shape of one buffer, in elements of ``dtype``."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        count = itemsize(self.dtype)
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """Shape and dtype of one whole buffer of a cache."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Arrangement:
    """All fields of a page, and the buffers they live in."""

    fields: tuple[Field, ...]
    regions: tuple[Region, ...]

    def field(self, name: str) -> Field:
        """Return the named field.

        Raises
        ------
        LayoutError
            There is none of that name; the message lists those there are.
        """
        for candidate in self.fields:
            if candidate.name == name:
                return candidate
        names = ", ".join(candidate.name for candidate in self.fields)
        raise LayoutError(f"layout: field must be one of {names}, got {name!r}")
