"""What hardware and runtime set up before a kernel's first instruction.

Arguments in memory, the loaded code object, initial scalar registers and the MODE register, as the
kernel descriptor asks for them; see *Initial Kernel Execution State* in the LLVM documentation
*User Guide for AMDGPU Backend*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

from cdna_emulator.arguments import pack_arguments
from cdna_emulator.code_object import CodeObject, Kernel
from cdna_emulator.errors import ArgumentError
from cdna_emulator.memory import DeviceMemory

#: Bytes of LDS of a workgroup.
LDS_BYTES = {"gfx942": 64 * 1024, "gfx950": 160 * 1024}
MAX_BLOCK = 1024
_FP16_OVERFLOW_BIT = 23


@dataclass(frozen=True)
class Launch:
    """Everything that a core needs to know of a launch beside the program."""

    kernel: Kernel
    memory: DeviceMemory
    image_base: int
    user_sgprs: tuple[int, ...]
    entry_address: int
    mode: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    lds_bytes: int


def extent(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """Return one to three sizes as three."""
    try:
        sizes = [index(size) for size in (value if isinstance(value, Iterable) else (value,))]
    except TypeError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or any(not 0 <= size < 1 << 32 for size in sizes):
        raise ArgumentError(f"run: {name} must be 1 to 3 sizes of 0 or more, got {value!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def prepare(
    code_object: CodeObject,
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[Any] | Mapping[str, Any],
    dynamic_lds: int,
) -> Launch:
    """Check a launch, map its memory and fill in its initial registers.

    Raises
    ------
    ArgumentError
        The kernel or the architecture does not take these sizes or arguments.
    """
    items = math.prod(block)
    if not 1 <= items <= MAX_BLOCK:
        raise ArgumentError(f"run: block must be 1 to {MAX_BLOCK} work-items, got {block}")
    if items > kernel.max_flat_workgroup_size:
        raise ArgumentError(
            f"run: block must be at most {kernel.max_flat_workgroup_size} work-items for "
            f"{kernel.name}, got {items}"
        )
    if kernel.reqd_workgroup_size not in (None, block):
        raise ArgumentError(
            f"run: block must be {kernel.reqd_workgroup_size} for {kernel.name}, got {block}"
        )
    if dynamic_lds < 0:
        raise ArgumentError(f"run: dynamic_lds must be 0 bytes or more, got {dynamic_lds}")
    lds_bytes = kernel.group_segment_size + dynamic_lds
    if lds_bytes > LDS_BYTES[code_object.arch]:
        raise ArgumentError(
            f"run: LDS must be at most {LDS_BYTES[code_object.arch]} bytes on {code_object.arch}, "
            f"got {lds_bytes}"
        )
    memory = DeviceMemory()
    kernarg = pack_arguments(kernel, args, memory, grid, block)
    kernarg_address = memory.map_bytes("the kernel's arguments", kernarg)
    image_base = _map_image(code_object, memory)
    sgprs, entry = _user_sgprs(kernel, kernarg, kernarg_address, memory, grid, block)
    return Launch(kernel, memory, image_base, sgprs, entry, _mode(kernel), grid, block, lds_bytes)


def _map_image(code_object: CodeObject, memory: DeviceMemory) -> int:
    """Map the loaded code object; return the device address of its address 0."""
    end = max(segment.address + len(segment.data) for segment in code_object.segments)
    base = memory.map_bytes("the code object", bytes(end), writable=True)
    for segment in code_object.load(base):
        view = memory.view(segment.address, len(segment.data))
        assert view is not None
        view[:] = np.frombuffer(segment.data, np.uint8)
    return base


def _user_sgprs(
    kernel: Kernel,
    kernarg: bytes,
    kernarg_address: int,
    memory: DeviceMemory,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
) -> tuple[tuple[int, ...], int]:
    """Return s0 and up at the start, and the address where execution starts.

    Values without a place in memory here (queue, dispatch id, scratch descriptor) are zero.
    """
    descriptor = kernel.descriptor
    placed = descriptor.initial_sgprs()
    words = np.zeros(descriptor.user_sgpr_count, np.uint32)

    def put(name: str, data: bytes) -> None:
        first, count = placed[name]
        values = np.frombuffer(data.ljust(4 * count, b"\0"), np.uint32)
        words[first : first + count] = values[: len(words) - first]

    if "dispatch_ptr" in placed:
        packet = memory.map_bytes("the dispatch packet", _packet(kernel, grid, block))
        put("dispatch_ptr", packet.to_bytes(8, "little"))
    if "kernarg_segment_ptr" in placed:
        put("kernarg_segment_ptr", kernarg_address.to_bytes(8, "little"))
    if "private_segment_size" in placed:
        put("private_segment_size", kernel.private_segment_size.to_bytes(4, "little"))
    if "kernarg_preload" in placed:
        begin = 4 * descriptor.kernarg_preload_offset
        put("kernarg_preload", kernarg[begin : begin + 4 * descriptor.kernarg_preload_length])
    entry = kernel.preload_entry_address or kernel.entry_address
    return tuple(words.tolist()), entry


def _packet(kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int]) -> bytes:
    """Return the AQL packet of the launch, as the HSA runtime specification lays it out."""
    packet = np.zeros(16, np.uint32)
    packet[0] = 2 | 3 << 16  # kernel dispatch of three dimensions
    packet[1] = block[0] | block[1] << 16
    packet[2] = block[2]
    packet[3:6] = [grid[axis] * block[axis] for axis in range(3)]
    packet[6], packet[7] = kernel.private_segment_size, kernel.group_segment_size
    return packet.tobytes()


def _mode(kernel: Kernel) -> int:
    descriptor = kernel.descriptor
    return (
        descriptor.round_mode_32
        | descriptor.round_mode_16_64 << 2
        | descriptor.denorm_mode_32 << 4
        | descriptor.denorm_mode_16_64 << 6
        | descriptor.dx10_clamp << 8
        | descriptor.ieee_mode << 9
        | descriptor.fp16_overflow << _FP16_OVERFLOW_BIT
    )


def system_sgprs(kernel: Kernel) -> int:
    """Return which registers follow the user registers, as bits of ``SystemSgprs``."""
    descriptor = kernel.descriptor
    return (
        descriptor.enable_workgroup_id_x
        | descriptor.enable_workgroup_id_y << 1
        | descriptor.enable_workgroup_id_z << 2
        | descriptor.enable_workgroup_info << 3
    )
