"""Device memory: host arrays at virtual addresses that make address mistakes visible.

Every buffer gets a slot of 1 TiB to itself: its number is ``address >> 40``, so a kernel that runs
past a buffer by anything less than a terabyte hits nothing. Buffers begin just below a multiple of
4 GiB: an address computed without its carry into the high half misses the buffer as well. The
bytes stay where they are on the host; nothing is copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cdna_emulator.errors import ArgumentError

SLOT_BITS = 40
#: Distance of a buffer's begin from the next multiple of 4 GiB.
_BELOW_BOUNDARY = 8192
#: Buffers keep their host address modulo this, which kernels specialised on alignment rely on.
_KEPT_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Buffer:
    """One mapped range of host bytes.

    Parameters
    ----------
    name : str
        For findings.
    address : int
        Of the first byte on the device.
    size : int
        Bytes.
    host : int
        Address of the first byte in this process.
    is_writable : bool
    owner : object
        Kept alive as long as the mapping.
    """

    name: str
    address: int
    size: int
    host: int
    is_writable: bool
    owner: object


class Span(NamedTuple):
    """The host bytes of one array: from ``begin`` up to ``end``, element 0 at ``first``."""

    name: str
    begin: int
    end: int
    first: int
    is_writable: bool
    owner: object


class DeviceMemory:
    """The buffers one launch can reach."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def map(self, name: str, host: int, size: int, owner: object, *, writable: bool = True) -> int:
        """Map ``size`` bytes at a host address; return the device address."""
        if size >= 1 << SLOT_BITS:
            raise ArgumentError(f"{name}: size must be below 1 TiB, got {size} bytes")
        slot = len(self.buffers) + 1
        address = (slot << SLOT_BITS) + (1 << 32) - _BELOW_BOUNDARY + host % _KEPT_ALIGNMENT
        self.buffers.append(Buffer(name, address, size, host, writable, owner))
        return address

    def map_bytes(self, name: str, data: bytes, *, writable: bool = False) -> int:
        """Map a copy of some bytes; return the device address, a multiple of 256."""
        padded = np.zeros(len(data) + _KEPT_ALIGNMENT, np.uint8)
        start = -padded.ctypes.data % _KEPT_ALIGNMENT
        padded[start : start + len(data)] = np.frombuffer(data, np.uint8)
        return self.map(name, padded.ctypes.data + start, len(data), padded, writable=writable)

    def map_arrays(self, arrays: Iterable[tuple[str, Any]]) -> list[int]:
        """Map named NumPy arrays or torch CPU tensors; return the addresses of their elements 0.

        Arrays that share bytes share a buffer, so that a write through one is seen through the
        other; it can be written when all of them can. An array without elements has a slot and
        no bytes.
        """
        spans = [host_span(name, array) for name, array in arrays]
        addresses = [0] * len(spans)
        in_order = sorted(range(len(spans)), key=lambda number: spans[number][1:3])
        groups: list[list[int]] = []  # numbers of the spans of each buffer
        end = 0
        for number in in_order:
            _, begin, its_end, *_ = spans[number]
            if begin == its_end:
                self._map_shared(spans, [number], addresses)
            elif begin < end:
                groups[-1].append(number)
            else:
                groups.append([number])
            end = max(end, its_end)
        for numbers in groups:
            self._map_shared(spans, numbers, addresses)
        return addresses

    def _map_shared(self, spans: list[Span], numbers: list[int], addresses: list[int]) -> None:
        """Map one buffer for the spans of these numbers, and fill in their addresses."""
        here = [spans[number] for number in numbers]
        begin, end = here[0].begin, max(span.end for span in here)
        base = self.map(
            "+".join(span.name for span in here),
            begin,
            end - begin,
            [span.owner for span in here],
            writable=all(span.is_writable for span in here),
        )
        for number in numbers:
            addresses[number] = base + spans[number].first - begin

    def describe(self, address: int, size: int = 1) -> str:
        """Say where ``size`` bytes at an address are, in words for a finding."""
        slot = address >> SLOT_BITS
        if not 1 <= slot <= len(self.buffers):
            return f"{address:#x}, in no buffer's slot"
        buffer = self.buffers[slot - 1]
        offset = address - buffer.address
        kind = "" if buffer.is_writable else ", read-only"
        name = f"{buffer.name} ({bytes_of(buffer.size)}{kind})"
        if offset < 0:
            return f"{bytes_of(-offset)} before {name}"
        if offset >= buffer.size:
            return f"{bytes_of(offset - buffer.size)} past the end of {name}"
        over = offset + size - buffer.size
        return f"byte {offset} of {name}{f', the last {over} past its end' if over > 0 else ''}"

    def view(self, address: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the bytes at a device address as a writable view; None out of bounds."""
        slot = address >> SLOT_BITS
        if not 1 <= slot <= len(self.buffers):
            return None
        buffer = self.buffers[slot - 1]
        offset = address - buffer.address
        if offset < 0 or offset + size > buffer.size:
            return None
        array = (ctypes.c_uint8 * size).from_address(buffer.host + offset)
        return np.frombuffer(memoryview(array), np.uint8)


def bytes_of(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count} byte{'s' if count != 1 else ''}"


def is_array(value: object) -> bool:
    """Whether a kernel argument is memory: a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def host_span(name: str, array: Any) -> Span:
    """Return where an array lies, whatever its strides.

    Raises
    ------
    ArgumentError
        Its elements are not plain bytes in this machine's order, or not in its memory.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject or not array.dtype.isnative:
            raise ArgumentError(
                f"{name}: dtype must be of plain values in native byte order, got {array.dtype}"
            )
        first, itemsize = int(array.ctypes.data), array.itemsize
        shape, strides, writable = array.shape, array.strides, bool(array.flags.writeable)
    else:
        if array.device.type != "cpu":
            raise ArgumentError(
                f"{name}: device must be cpu, got {array.device}; move it with .cpu()"
            )
        first, itemsize = int(array.data_ptr()), int(array.element_size())
        shape, writable = tuple(array.shape), True
        strides = tuple(stride * itemsize for stride in array.stride())
    if 0 in shape:
        return Span(name, first, first, first, writable, array)
    reaches = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    begin = first + sum(reach for reach in reaches if reach < 0)
    end = first + sum(reach for reach in reaches if reach > 0) + itemsize
    return Span(name, begin, end, first, writable, array)
