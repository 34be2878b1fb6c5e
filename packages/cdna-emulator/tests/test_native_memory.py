"""Memory instructions of the native core against NumPy: one instruction, one wave, random state."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cdna_emulator.memory import DeviceMemory

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
setup_of_wave = importlib.import_module("memory_cases.setup")
sys.path.remove(str(HERE))
BASE = setup_of_wave.BASE
LANES = setup_of_wave.LANES
M0 = setup_of_wave.M0
MEMORY_BYTES = setup_of_wave.MEMORY_BYTES
SCALAR_OFFSET = setup_of_wave.SCALAR_OFFSET
Setup = setup_of_wave.Setup
as_bytes = setup_of_wave.as_bytes
as_register = setup_of_wave.as_register
check_loaded = setup_of_wave.check_loaded
kinds = setup_of_wave.kinds
programs = setup_of_wave.programs
registers = setup_of_wave.registers

# name without the space's prefix: (bytes, signed, half); half 1 is a low, 2 a high half.
LOADS = {
    "dword": (4, False, 0),
    "dwordx2": (8, False, 0),
    "dwordx3": (12, False, 0),
    "dwordx4": (16, False, 0),
    "ubyte": (1, False, 0),
    "sbyte": (1, True, 0),
    "ushort": (2, False, 0),
    "sshort": (2, True, 0),
    "ubyte_d16": (1, False, 1),
    "ubyte_d16_hi": (1, False, 2),
    "sbyte_d16": (1, True, 1),
    "sbyte_d16_hi": (1, True, 2),
    "short_d16": (2, False, 1),
    "short_d16_hi": (2, False, 2),
}
STORES = {
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "byte": (1, 0),
    "short": (2, 0),
    "byte_d16_hi": (1, 2),
    "short_d16_hi": (2, 2),
}
# How a space addresses: text around the data register, and the offset of the instruction.
LOAD_FORMS = {
    "global": "global_load_{0} {1}, v[2:3], off offset:-24",
    "global_saddr": "global_load_{0} {1}, v4, s[8:9] offset:40",
    "flat": "flat_load_{0} {1}, v[2:3] offset:24",
    "scratch_vaddr": "scratch_load_{0} {1}, v4, off offset:8",
    "scratch_saddr": "scratch_load_{0} {1}, off, s6 offset:8",
    "buffer_offen": "buffer_load_{0} {1}, v4, s[12:15], s7 offen offset:40",
}
STORE_FORMS = {
    "global": "global_store_{0} v[2:3], {1}, off offset:-24",
    "global_saddr": "global_store_{0} v4, {1}, s[8:9] offset:40",
    "flat": "flat_store_{0} v[2:3], {1} offset:24",
    "scratch_vaddr": "scratch_store_{0} v4, {1}, off offset:8",
    "scratch_saddr": "scratch_store_{0} off, {1}, s6 offset:8",
    "buffer_offen": "buffer_store_{0} {1}, v4, s[12:15], s7 offen offset:40",
}
INSTRUCTION_OFFSETS = {"global": -24, "global_saddr": 40, "flat": 24, "buffer_offen": 40}


def load_text(form, name):
    """Return a load into v16 and up."""
    return LOAD_FORMS[form].format(name, registers(16, max(1, LOADS[name][0] // 4)))


def store_text(form, name):
    """Return a store from v20 and up."""
    return STORE_FORMS[form].format(name, registers(20, max(1, STORES[name][0] // 4)))


BUFFER_FORMS = {
    "none": "buffer_load_dwordx2 v[16:17], off, s[12:15], s7 offset:16",
    "offen": "buffer_load_dwordx2 v[16:17], v4, s[12:15], s7 offen offset:16",
    "idxen": "buffer_load_dwordx2 v[16:17], v30, s[12:15], s7 idxen offset:4",
    "both": "buffer_load_dwordx2 v[16:17], v[30:31], s[12:15], s7 idxen offen offset:4",
    "store": "buffer_store_dwordx2 v[20:21], v[30:31], s[12:15], s7 idxen offen offset:4",
}
SCALAR = [
    "s_load_dword s20, s[8:9], 0x10",
    "s_load_dwordx2 s[20:21], s[8:9], s6",
    "s_load_dwordx4 s[20:23], s[10:11], -0x20",
    "s_load_dwordx8 s[20:27], s[8:9], s6 offset:0x40",
    "s_load_dwordx16 s[20:35], s[8:9], 0x100",
    "s_buffer_load_dword s20, s[12:15], 0x10",
    "s_buffer_load_dwordx8 s[20:27], s[12:15], s6",
]
COPIES = {
    942: [
        "global_load_lds_dword v4, s[8:9] offset:16",
        "global_load_lds_sbyte v[2:3], off offset:16",
        "global_load_lds_ushort v4, s[8:9] offset:16",
        "buffer_load_dword v4, s[12:15], s7 offen offset:16 lds",
        "buffer_load_ubyte v4, s[12:15], s7 offen offset:16 lds",
    ],
    950: [
        "global_load_lds_dwordx3 v4, s[8:9] offset:16",
        "global_load_lds_dwordx4 v4, s[8:9] offset:16",
        "buffer_load_dwordx3 v4, s[12:15], s7 offen offset:16 lds",
        "buffer_load_dwordx4 v4, s[12:15], s7 offen offset:16 lds",
    ],
}


def _texts():
    texts = [load_text(form, name) for form in LOAD_FORMS for name in LOADS]
    texts += [store_text(form, name) for form in STORE_FORMS for name in STORES]
    texts += [*BUFFER_FORMS.values(), *SCALAR, *COPIES[942]]
    texts += ["ds_read_b64 v[16:17], v5 offset:12", "ds_write_b32 v5, v20 offset:12"]
    texts += ["global_atomic_add v4, v20, s[8:9] offset:8"]
    texts += ["buffer_atomic_add v20, v4, s[12:15], s7 offen offset:8 sc0"]
    return texts


@cache
def programs_942():
    """Assemble what both architectures have, in one go."""
    return programs(_texts(), "gfx942")


@cache
def programs_950():
    """Return the programs that gfx950 alone has."""
    return programs(COPIES[950], "gfx950")


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("form", ["global", "global_saddr", "flat", "buffer_offen"])
def test_load(seed, form, name):
    """Every width, extension and half, from memory."""
    size, is_signed, half = LOADS[name]
    setup = Setup(seed, alignment=4 if form == "buffer_offen" else 1)
    after, counters = setup.run(programs_942()[load_text(form, name)])
    extra = INSTRUCTION_OFFSETS[form] + (SCALAR_OFFSET if form == "buffer_offen" else 0)
    expected = {}
    for lane in setup.active:
        at = int(setup.offsets[lane]) + extra
        expected[lane] = as_register(setup.bytes[at : at + size].tobytes(), is_signed, half)
    check_loaded(setup, after, expected)
    assert not counters.findings
    assert counters.bytes[0] == size * len(setup.active)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("form", ["global", "global_saddr", "flat", "buffer_offen"])
def test_store(seed, form, name):
    """Every width and half, to memory."""
    size, half = STORES[name]
    setup = Setup(seed, alignment=4 if form == "buffer_offen" else 1)
    wanted = setup.bytes.copy()
    extra = INSTRUCTION_OFFSETS[form] + (SCALAR_OFFSET if form == "buffer_offen" else 0)
    for lane in setup.active:
        at = int(setup.offsets[lane]) + extra
        wanted[at : at + size] = list(as_bytes(setup.vgpr, 20, lane, size, half))
    _, counters = setup.run(programs_942()[store_text(form, name)])
    np.testing.assert_array_equal(setup.bytes, wanted)
    assert not counters.findings


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("form", ["scratch_vaddr", "scratch_saddr"])
def test_scratch(seed, form, name):
    """Private memory gives each lane its own value back, at the same offset for all."""
    size, half = STORES[name]
    load = {"byte": "ubyte", "short": "ushort", "byte_d16_hi": "ubyte", "short_d16_hi": "ushort"}
    text = store_text(form, name) + "\n" + load_text(form, load.get(name, name))
    program = programs([text], "gfx942")[text]
    setup = Setup(seed)
    after, counters = setup.run(program, scratch_bytes=4096)
    expected = {
        lane: as_register(as_bytes(setup.vgpr, 20, lane, size, half), False, 0)
        for lane in setup.active
    }
    check_loaded(setup, after, expected)
    assert not counters.findings


def buffer_address(setup, lane, form, swizzle, add_tid, stride):
    """Return the byte of the memory that a lane's access begins at."""
    index = int(setup.vgpr[30, lane]) if form in ("idxen", "both", "store") else 0
    offset = {"offen": 4, "both": 31, "store": 31}.get(form)
    within = int(setup.vgpr[offset, lane]) if offset else 0
    within += 16 if form in ("none", "offen") else 4
    element = index + (lane if add_tid else 0)
    if not swizzle:
        return SCALAR_OFFSET + element * stride + within
    inside = within // 4 * 4
    block = (element // swizzle * stride + inside) * swizzle
    return SCALAR_OFFSET + block + element % swizzle * 4 + within % 4


@pytest.mark.parametrize("form", BUFFER_FORMS)
@pytest.mark.parametrize("swizzle", [0, 8, 16])
@pytest.mark.parametrize("add_tid", [False, True])
def test_buffer_addressing(seed, form, swizzle, add_tid):
    """Index, offset, stride, swizzle and lane number make the address; each dword by itself."""
    setup = Setup(seed, alignment=4)
    stride = 24
    setup.sgpr[13] |= stride << 16 | (1 << 31 if swizzle else 0)
    setup.sgpr[15] = {0: 0, 8: 0, 16: 1}[swizzle] << 21 | add_tid << 23
    setup.sgpr[14] = 4000
    setup.vgpr[4] = setup.rng.integers(0, 20, 64) * 4
    setup.vgpr[30] = setup.rng.permutation(64)
    setup.vgpr[31] = setup.rng.integers(0, 3, 64) * 4
    wanted, expected = setup.bytes.copy(), {}
    for lane in setup.active:
        raw = b""
        for part in range(2):
            # The offset within a record counts before the swizzle.
            setup.vgpr[31, lane] += 4 * part
            setup.vgpr[4, lane] += 4 * part
            at = buffer_address(setup, lane, form, swizzle, add_tid, stride)
            if form == "none" and part:
                at = buffer_address_of_second(setup, lane, swizzle, add_tid, stride)
            if form == "idxen" and part:
                at = buffer_address_of_second(setup, lane, swizzle, add_tid, stride, indexed=True)
            setup.vgpr[31, lane] -= 4 * part
            setup.vgpr[4, lane] -= 4 * part
            raw += setup.bytes[at : at + 4].tobytes()
            value = int(setup.vgpr[20 + part, lane])
            wanted[at : at + 4] = list(value.to_bytes(4, "little"))
        expected[lane] = as_register(raw, False, 0)
    after, counters = setup.run(programs_942()[BUFFER_FORMS[form]])
    if form == "store":
        np.testing.assert_array_equal(setup.bytes, wanted)
        expected = {}
    check_loaded(setup, after, expected)
    assert not counters.findings


def buffer_address_of_second(setup, lane, swizzle, add_tid, stride, *, indexed=False):
    """Return the address of the second dword where no register holds the offset."""
    within = 8 if indexed else 20
    element = (int(setup.vgpr[30, lane]) if indexed else 0) + (lane if add_tid else 0)
    if not swizzle:
        return SCALAR_OFFSET + element * stride + within
    block = (element // swizzle * stride + within) * swizzle
    return SCALAR_OFFSET + block + element % swizzle * 4


def test_buffer_range(seed):
    """Out of range loads zero, dword by dword, and is no finding; outside memory is one."""
    setup = Setup(seed)
    setup.set_exec(2**64 - 1)
    setup.vgpr[4] = LANES * 4
    setup.sgpr[14] = 120
    after, counters = setup.run(programs_942()[BUFFER_FORMS["offen"]])
    data = setup.bytes.view(np.uint32)[SCALAR_OFFSET // 4 :]
    offsets = LANES * 4 + 16
    for part in range(2):
        wanted = np.where(offsets + 4 * part < 120, data[(offsets + 4 * part) // 4], 0)
        np.testing.assert_array_equal(after.vgpr[16 + part], wanted)
    assert not counters.findings
    setup.sgpr[14] = 1 << 20
    setup.vgpr[4] = MEMORY_BYTES - 40 + LANES * 4
    after, counters = setup.run(programs_942()[BUFFER_FORMS["offen"]])
    assert [finding.kind for finding in counters.findings] == [1]
    assert counters.findings[0].lane == 1
    assert counters.findings[0].detail0 == setup.address + MEMORY_BYTES
    tail = setup.bytes.view(np.uint32)[-2:]
    assert list(after.vgpr[16, :3]) == [tail[0], tail[1], 0]


def test_buffer_structured_range(seed):
    """With a stride the index is compared with the records."""
    setup = Setup(seed)
    setup.set_exec(2**64 - 1)
    setup.sgpr[13] |= 16 << 16
    setup.sgpr[14] = 40
    setup.vgpr[30] = LANES
    after, counters = setup.run(programs_942()[BUFFER_FORMS["idxen"]])
    at = (SCALAR_OFFSET + LANES * 16 + 4) // 4
    wanted = np.where(LANES < 40, setup.bytes.view(np.uint32)[at], 0)
    np.testing.assert_array_equal(after.vgpr[16], wanted)
    assert not counters.findings


def test_buffer_atomic_out_of_range_returns_zero(seed):
    """An atomic that is out of range changes nothing."""
    setup = Setup(seed, alignment=8)
    setup.sgpr[14] = 0
    before = setup.bytes.copy()
    text = "buffer_atomic_add v20, v4, s[12:15], s7 offen offset:8 sc0"
    after, counters = setup.run(programs_942()[text])
    np.testing.assert_array_equal(setup.bytes, before)
    check_loaded(setup, after, {lane: [0] for lane in setup.active}, first=20)
    assert not counters.findings


@pytest.mark.parametrize("text", SCALAR)
def test_scalar_load(seed, text):
    """Constants, negative ones too, registers, and both."""
    setup = Setup(seed)
    setup.set_pair(10, setup.address + 512)
    setup.sgpr[14] = 84  # the last three dwords of the longest buffer load are out of range
    found = re.search(r"dwordx(\d+)", text)
    dwords = int(found[1]) if found else 1
    at = {
        "0x10": 0x10,
        "s6": 64,
        "-0x20": 512 - 0x20,
        "s6 offset:0x40": 128,
        "0x100": 0x100,
    }[text.rsplit(", ", 1)[1]]
    words = setup.bytes.view(np.uint32)[at // 4 :][:dwords].copy()
    if "buffer" in text:
        words[at + 4 * np.arange(dwords) >= 84] = 0
    after, counters = setup.run(programs_942()[text])
    wanted = setup.sgpr.copy()
    wanted[20 : 20 + dwords] = words
    np.testing.assert_array_equal(after.sgpr, wanted)
    assert not counters.findings


@pytest.mark.parametrize(("arch", "text"), [(a, text) for a in COPIES for text in COPIES[a]])
def test_copy_to_lds(seed, arch, text):
    """Copies land at M0 plus the offset plus the lane's place; inactive lanes leave a hole."""
    setup = Setup(seed, alignment=4)
    setup.sgpr[M0] = 128
    sizes = {"ubyte": 1, "sbyte": 1, "ushort": 2, "dword": 4, "dwordx3": 12, "dwordx4": 16}
    name = text.split()[0].rsplit("_", 1)[1]
    size, extra = sizes[name], 16 + (SCALAR_OFFSET if "buffer" in text else 0)
    wanted = setup.lds.copy()
    for lane in setup.active:
        at = int(setup.offsets[lane]) + extra
        raw = setup.bytes[at : at + size].tobytes()
        dwords = as_register(raw, name == "sbyte", 0)
        to = 128 + 16 + lane * (4 if size <= 4 else 16)
        for i, dword in enumerate(dwords):
            wanted[to + 4 * i : to + 4 * i + 4] = list(dword.to_bytes(4, "little"))
    program = programs_942()[text] if arch == 942 else programs_950()[text]
    after, counters = setup.run(program)
    np.testing.assert_array_equal(after.lds, wanted)
    np.testing.assert_array_equal(after.vgpr, setup.vgpr)
    assert not counters.findings


@pytest.mark.parametrize(
    ("text", "register", "kind"),
    [
        ("global_load_dwordx4 v[16:19], v4, s[8:9] offset:40", 4, 1),
        ("global_store_dwordx2 v4, v[20:21], s[8:9] offset:40", 4, 1),
        ("ds_read_b64 v[16:17], v5 offset:12", 5, 2),
        ("ds_write_b32 v5, v20 offset:12", 5, 2),
        ("scratch_load_dword v16, v4, off offset:8", 4, 12),
    ],
)
def test_out_of_bounds(seed, text, register, kind):
    """One lane past the end is found; it loads zero and stores nothing."""
    setup = Setup(seed, alignment=4)
    setup.set_exec(2**64 - 1)
    setup.vgpr[register, 17] = 1 << 20
    before, lds_before = setup.bytes.copy(), setup.lds.copy()
    program = programs_942()[text]
    after, counters = setup.run(program, scratch_bytes=4096)
    assert [item[:2] for item in kinds(counters)] == [(kind, 17)]
    if "load" in text or "read" in text:
        assert after.vgpr[16, 17] == 0
        np.testing.assert_array_equal(after.vgpr[16, 18:] == 0, False)
        np.testing.assert_array_equal(setup.bytes, before)
    else:
        changed = np.flatnonzero(setup.bytes != before).size + (after.lds != lds_before).sum()
        assert 0 < changed <= 63 * 8


def test_read_only_memory_is_not_written(seed):
    """A store into a buffer that is mapped read-only is out of bounds."""
    setup = Setup(seed)
    setup.memory = DeviceMemory()
    setup.address = setup.memory.map(
        "data", setup.bytes.ctypes.data, setup.bytes.size, setup.bytes, writable=False
    )
    setup.set_pair(BASE, setup.address)
    before = setup.bytes.copy()
    _, counters = setup.run(programs_942()["global_store_dword v4, v20, s[8:9] offset:40"])
    np.testing.assert_array_equal(setup.bytes, before)
    assert kinds(counters)[0][0] == 1


def test_misaligned(seed):
    """LDS and atomics want alignment; memory does not."""
    setup = Setup(seed, alignment=8)
    setup.set_exec(1 << 9)
    setup.vgpr[5, 9] = 322
    _, counters = setup.run(programs_942()["ds_read_b64 v[16:17], v5 offset:12"])
    assert kinds(counters) == [(11, 9, 334)]
    setup.vgpr[4, 9] = 322
    _, counters = setup.run(programs_942()["global_atomic_add v4, v20, s[8:9] offset:8"])
    assert kinds(counters) == [(11, 9, setup.address + 330)]


def test_flat_reaches_lds_and_private_memory(seed):
    """Flat addresses choose between device memory, LDS and private memory by aperture."""
    text = "flat_store_dword v[2:3], v20 offset:24\nflat_load_dword v16, v[2:3] offset:24"
    program = programs([text], "gfx942")[text]
    setup = Setup(seed, alignment=4)
    setup.set_exec(2**64 - 1)
    thirds = LANES % 3
    for lane in range(64):
        base = (setup.address, 1 << 48, 2 << 48)[thirds[lane]]
        full = base + int(setup.offsets[lane])
        setup.vgpr[2, lane], setup.vgpr[3, lane] = full & 0xFFFFFFFF, full >> 32
    wanted, wanted_lds = setup.bytes.copy(), setup.lds.copy()
    for lane in range(64):
        at = int(setup.offsets[lane]) + 24
        target = (wanted, wanted_lds, np.zeros(8192, np.uint8))[thirds[lane]]
        target[at : at + 4] = list(int(setup.vgpr[20, lane]).to_bytes(4, "little"))
    after, counters = setup.run(program, scratch_bytes=4096)
    np.testing.assert_array_equal(setup.bytes, wanted)
    np.testing.assert_array_equal(after.lds, wanted_lds)
    check_loaded(setup, after, {lane: [int(setup.vgpr[20, lane])] for lane in range(64)})
    assert not counters.findings
