"""LDS instructions of the native core against NumPy: one instruction, one wave, random state."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
setup_of_wave = importlib.import_module("memory_cases.setup")
sys.path.remove(str(HERE))
LANES = setup_of_wave.LANES
M0 = setup_of_wave.M0
Setup = setup_of_wave.Setup
as_bytes = setup_of_wave.as_bytes
as_register = setup_of_wave.as_register
check_loaded = setup_of_wave.check_loaded
programs = setup_of_wave.programs
registers = setup_of_wave.registers

DS_LOADS = {
    "b32": (4, False, 0),
    "b64": (8, False, 0),
    "b96": (12, False, 0),
    "b128": (16, False, 0),
    "u8": (1, False, 0),
    "i8": (1, True, 0),
    "u16": (2, False, 0),
    "i16": (2, True, 0),
    "u8_d16": (1, False, 1),
    "u8_d16_hi": (1, False, 2),
    "i8_d16": (1, True, 1),
    "i8_d16_hi": (1, True, 2),
    "u16_d16": (2, False, 1),
    "u16_d16_hi": (2, False, 2),
}
DS_STORES = {
    "b32": (4, 0),
    "b64": (8, 0),
    "b96": (12, 0),
    "b128": (16, 0),
    "b8": (1, 0),
    "b16": (2, 0),
    "b8_d16_hi": (1, 2),
    "b16_d16_hi": (2, 2),
}
TWO_OFFSETS = [
    f"ds_{op}2{st}_b{bits} " + text
    for st in ("", "st64")
    for bits in (32, 64)
    for op, text in (
        ("read", f"{registers(16, bits // 16)}, v6 offset0:1 offset1:3"),
        ("write", f"v6, {registers(20, bits // 32)}, {registers(24, bits // 32)} offset0:3"),
    )
]
SWIZZLES = [0x8000 | 0b00_11_10_01, 0x801B, 0x1F, 0x001F | 7 << 10, 0x1E | 1 << 5, 0x041F, 0x7C1F]
CROSSLANE = [
    "ds_permute_b32 v16, v7, v20 offset:8",
    "ds_bpermute_b32 v16, v7, v20 offset:8",
    *(f"ds_swizzle_b32 v16, v20 offset:{pattern}" for pattern in SWIZZLES),
    "ds_read_addtid_b32 v16 offset:64",
    "ds_write_addtid_b32 v20 offset:64",
]
TRANSPOSES = {
    "ds_read_b64_tr_b16 v[16:17], v5": 16,
    "ds_read_b64_tr_b8 v[16:17], v5": 8,
    "ds_read_b64_tr_b4 v[16:17], v5": 4,
    "ds_read_b96_tr_b6 v[16:18], v5": 6,
}


def _texts():
    texts = [*TWO_OFFSETS, *CROSSLANE]
    for name, (size, _, _) in DS_LOADS.items():
        texts.append(f"ds_read_{name} {registers(16, max(1, size // 4))}, v5 offset:12")
    for name, (size, _) in DS_STORES.items():
        texts.append(f"ds_write_{name} v5, {registers(20, max(1, size // 4))} offset:12")
    return texts


@cache
def programs_942():
    """Assemble what both architectures have, in one go."""
    return programs(_texts(), "gfx942")


@cache
def programs_950():
    """Assemble what gfx950 alone has."""
    return programs(list(TRANSPOSES), "gfx950")


@pytest.mark.parametrize("name", DS_LOADS)
def test_lds_read(seed, name):
    """Every width, extension and half, from LDS."""
    size, is_signed, half = DS_LOADS[name]
    setup = Setup(seed, alignment=min(size, 4))
    text = f"ds_read_{name} {registers(16, max(1, size // 4))}, v5 offset:12"
    after, counters = setup.run(programs_942()[text])
    expected = {}
    for lane in setup.active:
        at = int(setup.offsets[lane]) + 12
        expected[lane] = as_register(setup.lds[at : at + size].tobytes(), is_signed, half)
    check_loaded(setup, after, expected)
    assert not counters.findings


@pytest.mark.parametrize("name", DS_STORES)
def test_lds_write(seed, name):
    """Every width and half, to LDS."""
    size, half = DS_STORES[name]
    setup = Setup(seed, alignment=min(size, 4))
    text = f"ds_write_{name} v5, {registers(20, max(1, size // 4))} offset:12"
    after, counters = setup.run(programs_942()[text])
    wanted = setup.lds.copy()
    for lane in setup.active:
        at = int(setup.offsets[lane]) + 12
        wanted[at : at + size] = list(as_bytes(setup.vgpr, 20, lane, size, half))
    np.testing.assert_array_equal(after.lds, wanted)
    np.testing.assert_array_equal(after.vgpr, setup.vgpr)
    assert not counters.findings


@pytest.mark.parametrize("text", TWO_OFFSETS)
def test_lds_two_offsets(seed, text):
    """Offsets count values, or 64 values."""
    setup = Setup(seed)
    size = 8 if "_b64" in text else 4
    scale = size * (64 if "st64" in text else 1)
    setup.vgpr[6] = setup.rng.permutation(64) * 8
    after, counters = setup.run(programs_942()[text])
    wanted, expected = setup.lds.copy(), {}
    for lane in setup.active:
        base = int(setup.vgpr[6, lane])
        if "read" in text:
            raw = b"".join(setup.lds[base + k * scale :][:size].tobytes() for k in (1, 3))
            expected[lane] = as_register(raw, False, 0)
        else:
            wanted[base + 3 * scale :][:size] = list(as_bytes(setup.vgpr, 20, lane, size, 0))
    if "write" in text:
        # The second offset is 0: its values are written after the first ones.
        for lane in setup.active:
            base = int(setup.vgpr[6, lane])
            wanted[base : base + size] = list(as_bytes(setup.vgpr, 24, lane, size, 0))
    check_loaded(setup, after, expected)
    np.testing.assert_array_equal(after.lds, wanted)
    assert not counters.findings


@pytest.mark.parametrize("text", CROSSLANE)
def test_crosslane(seed, text):
    """Permutations, swizzles, and LDS accesses by lane number."""
    setup = Setup(seed)
    setup.vgpr[7] = setup.rng.integers(0, 64, 64) * 4 + setup.rng.integers(0, 4, 64)
    setup.sgpr[M0] = 256
    data, active = setup.vgpr[20], setup.active
    expected = {}
    wanted = setup.lds.copy()
    if "ds_permute" in text:
        received = [0] * 64
        for lane in active:
            received[(int(setup.vgpr[7, lane]) + 8) // 4 % 64] = int(data[lane])
        expected = {lane: [received[lane]] for lane in active}
    elif "addtid" in text:
        for lane in active:
            at = 256 + 64 + 4 * lane
            if "read" in text:
                expected[lane] = as_register(setup.lds[at : at + 4].tobytes(), False, 0)
            else:
                wanted[at : at + 4] = list(int(data[lane]).to_bytes(4, "little"))
    else:
        for lane in active:
            if "bpermute" in text:
                source = (int(setup.vgpr[7, lane]) + 8) // 4 % 64
            else:
                pattern = int(text.split("offset:")[1])
                if pattern & 0x8000:
                    source = lane & ~3 | pattern >> 2 * (lane & 3) & 3
                else:
                    within = (lane & pattern & 31 | pattern >> 5 & 31) ^ pattern >> 10 & 31
                    source = lane & 32 | within
            expected[lane] = [int(data[source]) if source in active else 0]
    after, counters = setup.run(programs_942()[text])
    check_loaded(setup, after, expected)
    np.testing.assert_array_equal(after.lds, wanted)
    assert not counters.findings


@pytest.mark.parametrize("text", TRANSPOSES)
def test_transposing_read(seed, text):
    """Sixteen lanes read rows of a matrix and receive its columns."""
    bits = TRANSPOSES[text]
    size = 12 if bits == 6 else 8
    per_lane = size * 8 // bits
    setup = Setup(seed, alignment=8)
    setup.set_exec(2**64 - 1)
    setup.offsets = setup.rng.permutation(64) * 32 + 64
    setup.vgpr[5] = setup.offsets
    elements = np.zeros((64, per_lane), np.uint32)
    for lane in range(64):
        raw = int.from_bytes(setup.lds[int(setup.offsets[lane]) :][:size].tobytes(), "little")
        elements[lane] = [raw >> bits * i & (1 << bits) - 1 for i in range(per_lane)]
    after, counters = setup.run(programs_950()[text])
    expected = {}
    for group in range(4):
        # Rows of 16 elements lie one after another in the lanes.
        matrix = elements[16 * group : 16 * group + 16].reshape(per_lane, 16)
        for column in range(16):
            packed = sum(int(matrix[row, column]) << bits * row for row in range(per_lane))
            expected[16 * group + column] = as_register(packed.to_bytes(size, "little"), False, 0)
    check_loaded(setup, after, expected)
    assert not counters.findings


def test_bank_conflicts(seed):
    """The busiest bank of each phase counts; one dword read by many lanes is no conflict."""
    text = "ds_read_b32 v16, v5 offset:12"
    for stride, cycles in ((4, 2), (0, 2), (8, 4), (128, 64), (12, 2)):
        setup = Setup(seed)
        setup.set_exec(2**64 - 1)
        setup.lds = np.zeros(16384, np.uint8)
        setup.vgpr[5] = LANES * stride
        _, counters = setup.run(programs_942()[text])
        assert counters.bank_cycles[0] == cycles, stride
    wide_text = "ds_read_b128 v[16:19], v5 offset:12"
    for stride, cycles in ((16, 8), (32, 16)):
        setup = Setup(seed)
        setup.set_exec(2**64 - 1)
        setup.vgpr[5] = LANES * stride
        _, counters = setup.run(programs_942()[wide_text])
        assert counters.bank_cycles[0] == cycles, stride
