"""Device memory: every buffer far from the others, element 0 where the kernel expects it."""

from __future__ import annotations

import numpy as np
import pytest

from cdna_emulator.errors import ArgumentError
from cdna_emulator.memory import SLOT_BITS, DeviceMemory, host_span, is_array

GIB4 = 1 << 32


def mapped(*arrays):
    memory = DeviceMemory()
    names = "abcdefgh"[: len(arrays)]
    return memory, memory.map_arrays(zip(names, arrays, strict=True))


def test_each_buffer_has_a_slot():
    memory, addresses = mapped(*(np.zeros(16, np.uint8) for _ in range(3)))
    # By where they lie on the host, not by the order in which they are passed.
    assert sorted(address >> SLOT_BITS for address in addresses) == [1, 2, 3]
    assert all(address & ((1 << SLOT_BITS) - 1) < GIB4 for address in addresses)
    assert len(memory.buffers) == 3


def test_a_lost_carry_misses_the_buffer():
    memory, (address,) = mapped(np.zeros(64 * 1024, np.uint8))
    last = address + 64 * 1024 - 1
    assert address >> 32 != last >> 32
    assert memory.view(last, 1) is not None
    assert memory.view((address & ~(GIB4 - 1)) | (last & (GIB4 - 1)), 1) is None


@pytest.mark.parametrize("offset", [0, 1, 4, 16, 100, 256])
def test_alignment_is_kept(offset):
    room = np.zeros(4096, np.uint8)
    start = -room.ctypes.data % 256
    _, (address,) = mapped(room[start + offset :])
    assert address % 256 == offset % 256


def test_views_share_a_buffer():
    whole = np.zeros(100, np.uint32)
    memory, addresses = mapped(whole[50:60], whole[40:52], whole, np.zeros(4))
    assert addresses[0] - addresses[2] == 200
    assert addresses[1] - addresses[2] == 160
    assert addresses[3] >> SLOT_BITS != addresses[2] >> SLOT_BITS
    buffer = memory.buffers[(addresses[2] >> SLOT_BITS) - 1]
    assert (buffer.size, buffer.name) == (400, "c+b+a")


def test_neighbours_do_not_share():
    whole = np.zeros(100, np.uint32)
    memory, (low, high) = mapped(whole[:50], whole[50:])
    assert low >> SLOT_BITS != high >> SLOT_BITS
    assert memory.view(low, 200) is not None
    assert memory.view(low, 201) is None
    assert memory.view(high - 1, 1) is None


def test_element_0_of_a_reversed_array_is_at_its_end():
    values = np.arange(8, dtype=np.uint32)
    memory, (address,) = mapped(values[::-1])
    assert memory.view(address, 4).view(np.uint32)[0] == 7
    assert memory.view(address - 28, 4).view(np.uint32)[0] == 0
    assert memory.view(address - 29, 1) is None
    assert memory.view(address, 5) is None


def test_strides_reach_only_the_elements():
    values = np.arange(60, dtype=np.uint16).reshape(6, 10)
    span = host_span("x", values[::-2, 2:8:3])
    start = values.ctypes.data
    # Rows 5, 3 and 1; columns 2 and 5.
    assert (span.begin - start, span.end - start) == (2 * 12, 2 * 56)
    assert span.first - start == 2 * 52


def test_arrays_without_elements_have_no_bytes():
    whole = np.zeros(8, np.uint32)
    memory, addresses = mapped(whole, whole[4:4], whole[3:6], np.zeros((0, 5)))
    assert addresses[2] - addresses[0] == 12
    for empty in (addresses[1], addresses[3]):
        assert empty >> SLOT_BITS != addresses[0] >> SLOT_BITS
        assert memory.view(empty, 1) is None
        assert "past the end of" in memory.describe(empty)
        assert "(0 bytes)" in memory.describe(empty)


def test_views_are_the_hosts_own_bytes():
    values = np.zeros(4, np.float32)
    memory, (address,) = mapped(values)
    memory.view(address + 4, 4).view(np.float32)[0] = 2.5
    assert values.tolist() == [0, 2.5, 0, 0]


def test_describe():
    memory = DeviceMemory()
    low, high = np.zeros(24, np.uint8), np.zeros(24, np.uint8)
    high.flags.writeable = False
    (x,) = memory.map_arrays([("x", low)])
    (y,) = memory.map_arrays([("y", high)])
    assert memory.describe(x) == "byte 0 of x (24 bytes)"
    assert memory.describe(x + 23) == "byte 23 of x (24 bytes)"
    assert memory.describe(x + 20, 4) == "byte 20 of x (24 bytes)"
    assert memory.describe(x + 22, 4) == "byte 22 of x (24 bytes), the last 2 past its end"
    assert memory.describe(x + 24) == "0 bytes past the end of x (24 bytes)"
    assert memory.describe(x - 3) == "3 bytes before x (24 bytes)"
    assert memory.describe(x - 1) == "1 byte before x (24 bytes)"
    assert memory.describe(y + 5) == "byte 5 of y (24 bytes, read-only)"
    assert memory.describe(0x10) == "0x10, in no buffer's slot"
    assert memory.describe(3 << SLOT_BITS) == f"{3 << SLOT_BITS:#x}, in no buffer's slot"


def test_shared_bytes_are_written_when_all_arrays_can_be():
    whole = np.zeros(8, np.uint32)
    fixed = whole[:4]
    fixed.flags.writeable = False
    memory, (address, _) = mapped(fixed, whole[2:])
    assert not memory.buffers[0].is_writable
    assert "read-only" in memory.describe(address)


def test_copies_of_bytes():
    memory = DeviceMemory()
    address = memory.map_bytes("block", b"abc")
    assert address % 256 == 0
    assert bytes(memory.view(address, 3)) == b"abc"
    assert memory.view(address, 4) is None
    assert not memory.buffers[0].is_writable


def test_what_is_an_array():
    assert is_array(np.zeros(1))
    assert not is_array(np.float32(1))
    assert not is_array(3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(2, ">f4"), "x: dtype must be of plain values in native byte order, got >f4"),
        (np.zeros(2, object), "x: dtype must be of plain values in native byte order, got object"),
    ],
)
def test_refused_dtypes(array, message):
    with pytest.raises(ArgumentError) as caught:
        host_span("x", array)
    assert str(caught.value) == message


def test_size_limit():
    with pytest.raises(ArgumentError, match="x: size must be below 1 TiB, got 1099511627776"):
        DeviceMemory().map("x", 0, 1 << SLOT_BITS, None)


def test_tensors():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(60, dtype=torch.int16).reshape(6, 10)
    span = host_span("x", tensor[1:5:3, 2:8])
    start = tensor.data_ptr()
    assert (span.begin - start, span.end - start) == (2 * 12, 2 * 48)
    assert span.first == span.begin
    assert span.is_writable
    memory, (empty, whole, part) = mapped(torch.zeros(0), tensor, tensor[2])
    assert part - whole == 40
    assert memory.view(empty, 1) is None
    with pytest.raises(ArgumentError, match=r"x: device must be cpu, got meta; move it with \.cpu"):
        host_span("x", torch.zeros(2, device="meta"))
