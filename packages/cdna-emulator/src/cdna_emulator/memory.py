"""Device memory: host arrays at virtual addresses that make address mistakes visible.

Every buffer gets a slot of 1 TiB to itself: its number is ``address >> 40``, so a kernel that runs
past a buffer by anything less than a terabyte hits nothing. Buffers begin just below a multiple of
4 GiB: an address computed without its carry into the high half misses the buffer as well. The
bytes stay where they are on the host; nothing is copied.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
        """Map named NumPy arrays or torch CPU tensors; return their device addresses.

        Arrays that share bytes share a buffer, so that a write through one is seen through the
        other.
        """
        spans = [(name, *host_span(name, array), array) for name, array in arrays]
        merged: list[list[Any]] = []
        for name, begin, end, array, writable in sorted(
            ((n, b, e, a, w) for n, b, e, w, a in spans), key=lambda span: span[1:3]
        ):
            if merged and begin < merged[-1][2]:
                last = merged[-1]
                last[0] += f"+{name}"
                last[2] = max(last[2], end)
                last[3].append(array)
                last[4] = last[4] and writable
            else:
                merged.append([name, begin, end, [array], writable])
        bases = []
        for name, begin, end, owners, writable in merged:
            bases.append((begin, self.map(name, begin, end - begin, owners, writable=writable)))
        starts = [begin for begin, _ in bases]
        addresses = []
        for _, begin, _, _, _ in spans:
            base_begin, base = bases[bisect.bisect_right(starts, begin) - 1]
            addresses.append(base + begin - base_begin)
        return addresses

    def describe(self, address: int) -> str:
        """Say where an address is, in words for a finding."""
        slot = address >> SLOT_BITS
        if not 1 <= slot <= len(self.buffers):
            return f"{address:#x}, in no buffer's slot"
        buffer = self.buffers[slot - 1]
        offset = address - buffer.address
        if offset < 0:
            return f"{-offset} bytes before {buffer.name} ({buffer.size} bytes)"
        if offset >= buffer.size:
            return (
                f"{offset - buffer.size} bytes past the end of {buffer.name} ({buffer.size} bytes)"
            )
        return f"byte {offset} of {buffer.name} ({buffer.size} bytes)"

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
        return np.frombuffer(array, np.uint8)


def is_array(value: object) -> bool:
    """Whether a kernel argument is memory: a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def host_span(name: str, array: Any) -> tuple[int, int, bool]:
    """Return the first byte's address, the address past the last byte, and writability."""
    if isinstance(array, np.ndarray):
        begin = end = int(array.ctypes.data)
        for length, stride in zip(array.shape, array.strides, strict=True):
            reach = (length - 1) * stride
            begin, end = (begin + reach, end) if reach < 0 else (begin, end + reach)
        size = array.itemsize if array.size else 0
        return begin, end + size, bool(array.flags.writeable)
    if array.device.type != "cpu":
        raise ArgumentError(f"{name}: device must be cpu, got {array.device}; move it with .cpu()")
    begin = array.data_ptr()
    if array.numel() == 0:
        return begin, begin, True
    last = sum(
        (size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True)
    )
    return begin, begin + (last + 1) * array.element_size(), True
