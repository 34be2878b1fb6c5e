"""The argument block: values in their formats, hidden arguments, refusals with names."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest

from cdna_emulator.arguments import PRIVATE_APERTURE, SHARED_APERTURE, pack_arguments
from cdna_emulator.assembler import assemble_lines
from cdna_emulator.code_object import CodeObject, KernelArgument
from cdna_emulator.errors import ArgumentError
from cdna_emulator.memory import DeviceMemory

GRID, BLOCK = (5, 6, 7), (8, 4, 1)


@pytest.fixture(scope="module")
def bare():
    return CodeObject.read(assemble_lines([], "gfx942")).kernel()


def kernel_of(bare, *arguments, kernarg_size=0):
    made, offset = [], 0
    for name, size, kind in arguments:
        offset = -(-offset // size) * size
        made.append(KernelArgument(name, offset, size, kind))
        offset += size
    return replace(bare, name="k", arguments=tuple(made), kernarg_size=kernarg_size or offset)


def pack(kernel, args, memory=None):
    return pack_arguments(kernel, args, memory or DeviceMemory(), GRID, BLOCK)


def one(bare, size, value, kind="by_value"):
    return pack(kernel_of(bare, ("x", size, kind)), [value])


@pytest.mark.parametrize(
    ("size", "value", "expected"),
    [
        (4, 5, struct.pack("<i", 5)),
        (4, -5, struct.pack("<i", -5)),
        (4, 2**32 - 1, b"\xff" * 4),
        (8, -(2**63), struct.pack("<q", -(2**63))),
        (1, True, b"\x01"),
        (2, 1.5, struct.pack("<e", 1.5)),
        (4, 1.5, struct.pack("<f", 1.5)),
        (8, 1.5, struct.pack("<d", 1.5)),
        (4, float("inf"), struct.pack("<f", float("inf"))),
        (4, np.float32(0.1), np.float32(0.1).tobytes()),
        (2, np.int16(-2), b"\xfe\xff"),
        (12, b"twelve bytes", b"twelve bytes"),
    ],
)
def test_values(bare, size, value, expected):
    assert one(bare, size, value) == expected


def test_pointers(bare):
    memory = DeviceMemory()
    array = np.zeros(4, np.int32)
    kernel = kernel_of(
        bare, ("x", 8, "global_buffer"), ("n", 4, "by_value"), ("y", 8, "global_buffer"),
        ("z", 8, "global_buffer"),
    )  # fmt: skip
    block = pack(kernel, [array, 4, None, 0x1234], memory)
    x, n, y, z = struct.unpack("<Qi4xQQ", block)
    assert x == memory.buffers[0].address
    assert (n, y, z) == (4, 0, 0x1234)
    assert memory.describe(x) == "byte 0 of x (16 bytes)"


def test_names_and_order(bare):
    kernel = kernel_of(bare, ("a", 4, "by_value"), ("b", 4, "by_value"))
    assert pack(kernel, {"b": 2, "a": 1}) == pack(kernel, (1, 2)) == struct.pack("<ii", 1, 2)


def test_arguments_without_names(bare):
    kernel = kernel_of(bare, ("", 8, "global_buffer"), ("", 4, "by_value"))
    memory = DeviceMemory()
    pack(kernel, [np.zeros(1), 3], memory)
    assert memory.buffers[0].name == "argument 0"
    with pytest.raises(ArgumentError, match="k: argument 1 must fit 32 bits, got 4294967296"):
        pack(kernel, [None, 2**32])


def test_hidden_arguments(bare):
    kinds = [
        *((f"hidden_block_count_{axis}", 4) for axis in "xyz"),
        *((f"hidden_group_size_{axis}", 2) for axis in "xyz"),
        *((f"hidden_remainder_{axis}", 2) for axis in "xyz"),
        *((f"hidden_global_offset_{axis}", 8) for axis in "xyz"),
        ("hidden_grid_dims", 2),
        ("hidden_private_base", 4),
        ("hidden_shared_base", 4),
        ("hidden_hostcall_buffer", 8),
        ("hidden_queue_ptr", 8),
    ]
    kernel = kernel_of(bare, ("n", 4, "by_value"), *(("", size, kind) for kind, size in kinds))
    block = pack(kernel, [9])
    found = [
        int.from_bytes(block[a.offset : a.offset + a.size], "little") for a in kernel.arguments
    ]
    assert found == [
        9, *GRID, *BLOCK, 0, 0, 0, 0, 0, 0, 3, PRIVATE_APERTURE, SHARED_APERTURE, 0, 0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "block", "dims"),
    [((1, 1, 1), (1, 1, 1), 1), ((4, 1, 1), (64, 1, 1), 1), ((1, 1, 1), (1, 8, 1), 2)],
)
def test_grid_dimensions(bare, grid, block, dims):
    kernel = kernel_of(bare, ("", 2, "hidden_grid_dims"))
    assert pack_arguments(kernel, [], DeviceMemory(), grid, block) == struct.pack("<H", dims)


def test_size_of_the_block(bare):
    kernel = kernel_of(bare, ("n", 4, "by_value"), kernarg_size=24)
    assert pack(kernel, [-1]) == b"\xff" * 4 + bytes(20)


@pytest.mark.parametrize(
    ("size", "kind", "value", "message"),
    [
        (4, "by_value", 2**32, "must fit 32 bits, got 4294967296"),
        (4, "by_value", -(2**31) - 1, "must fit 32 bits, got -2147483649"),
        (4, "by_value", 1e39, "must fit a float of 4 bytes, got 1e+39"),
        (2, "by_value", 65520.0, "must fit a float of 2 bytes, got 65520.0"),
        (4, "by_value", np.float64(1), "must be 4 bytes, got 8 from float64"),
        (4, "by_value", b"abc", "must be 4 bytes, got 3 from bytes"),
        (1, "by_value", 0.5, "must be an int, float, NumPy scalar or bytes of 1 bytes, got float"),
        (4, "by_value", None, "must be an int, float, NumPy scalar or bytes of 4 bytes, got NoneT"),
        (4, "by_value", np.zeros(2), "must be 4 bytes, got 8 from ndarray"),
        (8, "global_buffer", 0.5, "must be a CPU array, an address as int, or None, got float"),
        (8, "global_buffer", [1], "must be a CPU array, an address as int, or None, got list"),
    ],
)
def test_refused(bare, size, kind, value, message):
    with pytest.raises(ArgumentError) as caught:
        one(bare, size, value, kind)
    assert str(caught.value).startswith(f"k: x {message}")


def test_arguments_must_be_all_there(bare):
    kernel = kernel_of(bare, ("a", 4, "by_value"), ("b", 4, "by_value"))
    with pytest.raises(ArgumentError) as caught:
        pack(kernel, {"a": 1, "c": 2})
    assert str(caught.value) == "k: args must be a, b; missing ['b']; unknown ['c']"
    with pytest.raises(ArgumentError, match=r"k: args must be 2 values \(a, b\), got 3"):
        pack(kernel, [1, 2, 3])
