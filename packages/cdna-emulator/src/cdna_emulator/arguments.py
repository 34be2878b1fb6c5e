"""Kernel arguments: from Python values to the bytes of the kernarg segment.

A code object's metadata says where each argument lies and whether it is memory or a value, not
whether a value is an integer or a float; that follows from the Python value: an ``int`` is stored
as an integer, a ``float`` in the IEEE format of the argument's size, a NumPy scalar as its own
bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdna_emulator.code_object import Kernel, KernelArgument
from cdna_emulator.errors import ArgumentError
from cdna_emulator.memory import DeviceMemory, is_array

_BY_VALUE = "by_value"
_FLOAT_FORMATS = {2: "<e", 4: "<f", 8: "<d"}
#: High halves of the flat addresses that reach LDS and private memory, as in native/core.h.
SHARED_APERTURE = 0x0001_0000
PRIVATE_APERTURE = 0x0002_0000


def pack_arguments(
    kernel: Kernel,
    args: Sequence[Any] | Mapping[str, Any],
    memory: DeviceMemory,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
) -> bytes:
    """Map the arrays and return the kernarg block, hidden arguments included.

    Raises
    ------
    ArgumentError
        A value is missing, unknown, or does not fit its argument.
    """
    visible = [arg for arg in kernel.arguments if not arg.value_kind.startswith("hidden_")]
    values = _match(kernel, visible, args)
    named = [
        (arg.name or f"argument {i}", value)
        for i, (arg, value) in enumerate(zip(visible, values, strict=True))
    ]
    addresses = iter(memory.map_arrays([item for item in named if is_array(item[1])]))
    end = max((arg.offset + arg.size for arg in kernel.arguments), default=0)
    packed = bytearray(max(kernel.kernarg_size, end))
    for argument, (name, value) in zip(visible, named, strict=True):
        data = (
            next(addresses).to_bytes(8, "little")
            if is_array(value)
            else _pack_value(f"{kernel.name}: {name}", argument, value)
        )
        if len(data) != argument.size:
            raise ArgumentError(
                f"{kernel.name}: {name} must be {argument.size} bytes, got {len(data)} "
                f"from {type(value).__name__}"
            )
        packed[argument.offset : argument.offset + argument.size] = data
    for argument in kernel.arguments:
        if argument.value_kind.startswith("hidden_"):
            value = _hidden(argument.value_kind, grid, block)
            data = value.to_bytes(argument.size, "little")
            packed[argument.offset : argument.offset + argument.size] = data
    return bytes(packed)


def _match(
    kernel: Kernel, arguments: list[KernelArgument], args: Sequence[Any] | Mapping[str, Any]
) -> list[Any]:
    names = [argument.name or f"argument {i}" for i, argument in enumerate(arguments)]
    if isinstance(args, Mapping):
        unknown = sorted(set(args) - set(names))
        missing = [name for name in names if name not in args]
        if unknown or missing:
            raise ArgumentError(
                f"{kernel.name}: args must be {', '.join(names)}"
                f"{f'; missing {missing}' if missing else ''}"
                f"{f'; unknown {unknown}' if unknown else ''}"
            )
        return [args[name] for name in names]
    if len(args) != len(names):
        raise ArgumentError(
            f"{kernel.name}: args must be {len(names)} values ({', '.join(names)}), got {len(args)}"
        )
    return list(args)


def _pack_value(where: str, argument: KernelArgument, value: Any) -> bytes:
    is_pointer = argument.value_kind != _BY_VALUE
    if value is None and is_pointer:
        return bytes(argument.size)
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, int):
        bits = 8 * argument.size
        if not -(1 << (bits - 1)) <= value < 1 << bits:
            raise ArgumentError(f"{where} must fit {bits} bits, got {value}")
        return (value & ((1 << bits) - 1)).to_bytes(argument.size, "little")
    if isinstance(value, float) and not is_pointer and argument.size in _FLOAT_FORMATS:
        try:
            return struct.pack(_FLOAT_FORMATS[argument.size], value)
        except OverflowError:
            raise ArgumentError(
                f"{where} must fit a float of {argument.size} bytes, got {value}"
            ) from None
    accepted = (
        "a CPU array, an address as int, or None"
        if is_pointer
        else f"an int, float, NumPy scalar or bytes of {argument.size} bytes"
    )
    raise ArgumentError(f"{where} must be {accepted}, got {type(value).__name__}")


def _hidden(kind: str, grid: tuple[int, int, int], block: tuple[int, int, int]) -> int:
    """Return an argument that the runtime supplies; see LLVM's AMDGPU usage, code object v5."""
    axis = "xyz".find(kind[-1]) if kind[-2:-1] == "_" else -1
    if kind.startswith("hidden_block_count_"):
        return grid[axis]
    if kind.startswith("hidden_group_size_"):
        return block[axis]
    if kind.startswith(("hidden_remainder_", "hidden_global_offset_")):
        return 0
    if kind == "hidden_grid_dims":
        return max([1] + [i + 1 for i in range(3) if grid[i] * block[i] > 1])
    if kind == "hidden_shared_base":
        return SHARED_APERTURE
    if kind == "hidden_private_base":
        return PRIVATE_APERTURE
    # Printing, device-side allocation and enqueueing have no runtime here: a null pointer, which
    # faults with its own finding if a kernel uses it.
    return 0
