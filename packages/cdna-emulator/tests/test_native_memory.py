"""Memory instructions of the native core against NumPy: one instruction, one wave, random state."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.native_core import Counters, WaveState, run_wave
from cdna_emulator.program import Program, load_program

Array = np.ndarray[Any, Any]
LANES = np.arange(64)
VCC, M0, EXEC = 106, 124, 126
MEMORY_BYTES, LDS_BYTES = 8192, 4096
BASE = 8  # s[8:9] holds the memory's address
FLUSH_NOTHING = 0x3F0
FLUSH_ALL = 0x300

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
SCALAR_OFFSET = 16  # s7, of buffers


def registers(first: int, count: int) -> str:
    """Return the text of a run of vector registers."""
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def programs(texts: list[str], arch: str) -> dict[str, Program]:
    """Assemble one program for each instruction, all in one go."""
    kernels = {f"k{i}": text.split("\n") for i, text in enumerate(texts)}
    code_object = CodeObject.read(assemble_kernels(kernels, arch))
    return {text: load_program(code_object, f"k{i}") for i, text in enumerate(texts)}


def load_text(form: str, name: str) -> str:
    """Return a load into v16 and up."""
    return LOAD_FORMS[form].format(name, registers(16, max(1, LOADS[name][0] // 4)))


def store_text(form: str, name: str) -> str:
    """Return a store from v20 and up."""
    return STORE_FORMS[form].format(name, registers(20, max(1, STORES[name][0] // 4)))


INTEGER_OPERATIONS: dict[str, Callable[[int, int, int], int]] = {
    "swap": lambda old, value, bits: value,
    "add": lambda old, value, bits: old + value,
    "sub": lambda old, value, bits: old - value,
    "smin": lambda old, value, bits: min(old, value, key=lambda x: signed(x, bits)),
    "umin": lambda old, value, bits: min(old, value),
    "smax": lambda old, value, bits: max(old, value, key=lambda x: signed(x, bits)),
    "umax": lambda old, value, bits: max(old, value),
    "and": lambda old, value, bits: old & value,
    "or": lambda old, value, bits: old | value,
    "xor": lambda old, value, bits: old ^ value,
    "inc": lambda old, value, bits: 0 if old >= value else old + 1,
    "dec": lambda old, value, bits: value if old == 0 or old > value else old - 1,
}
DS_OPERATIONS = {
    "add_u": "add",
    "sub_u": "sub",
    "rsub_u": "rsub",
    "inc_u": "inc",
    "dec_u": "dec",
    "min_i": "smin",
    "min_u": "umin",
    "max_i": "smax",
    "max_u": "umax",
    "and_b": "and",
    "or_b": "or",
    "xor_b": "xor",
}


def signed(value: int, bits: int) -> int:
    """Read the bits as two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


def memory_atomics() -> list[str]:
    """Return every form of the integer atomics in memory."""
    texts = []
    for name in [*INTEGER_OPERATIONS, "cmpswap"]:
        for suffix, words in (("", 1), ("_x2", 2)):
            data = registers(20, words * (2 if name == "cmpswap" else 1))
            to = registers(16, words)
            texts += [
                f"global_atomic_{name}{suffix} v4, {data}, s[8:9] offset:8",
                f"global_atomic_{name}{suffix} {to}, v[2:3], {data}, off offset:8 sc0",
                f"flat_atomic_{name}{suffix} {to}, v[2:3], {data} offset:8 sc0",
                f"buffer_atomic_{name}{suffix} {data}, v4, s[12:15], s7 offen offset:8",
                f"buffer_atomic_{name}{suffix} {data}, v4, s[12:15], s7 offen offset:8 sc0",
            ]
    return texts


def ds_atomics() -> list[str]:
    """Return every integer atomic of LDS, with and without return."""
    texts = []
    for name in DS_OPERATIONS:
        operation, kind = name.split("_")
        for bits in (32, 64):
            data, to = registers(20, bits // 32), registers(16, bits // 32)
            texts.append(f"ds_{operation}_{kind}{bits} v5, {data} offset:8")
            texts.append(f"ds_{operation}_rtn_{kind}{bits} {to}, v5, {data} offset:8")
    for bits in (32, 64):
        one, two, to = (
            registers(20, bits // 32),
            registers(24, bits // 32),
            registers(16, bits // 32),
        )
        texts.append(f"ds_wrxchg_rtn_b{bits} {to}, v5, {one} offset:8")
        for name in ("cmpst", "mskor"):
            texts.append(f"ds_{name}_b{bits} v5, {one}, {two} offset:8")
            texts.append(f"ds_{name}_rtn_b{bits} {to}, v5, {one}, {two} offset:8")
    return texts


FLOAT_ATOMICS = [
    "global_atomic_add_f32 v4, v20, s[8:9]",
    "global_atomic_pk_add_f16 v16, v4, v20, s[8:9] sc0",
    "global_atomic_pk_add_bf16 v4, v20, s[8:9]",
    "global_atomic_add_f64 v[16:17], v4, v[20:21], s[8:9] sc0",
    "global_atomic_min_f64 v4, v[20:21], s[8:9]",
    "global_atomic_max_f64 v4, v[20:21], s[8:9]",
    "buffer_atomic_add_f32 v20, v4, s[12:15], 0 offen",
    "buffer_atomic_pk_add_f16 v20, v4, s[12:15], 0 offen",
    "buffer_atomic_add_f64 v[20:21], v4, s[12:15], 0 offen",
    "ds_add_f32 v5, v20",
    "ds_add_rtn_f32 v16, v5, v20",
    "ds_add_f64 v5, v[20:21]",
    "ds_min_f32 v5, v20",
    "ds_max_rtn_f32 v16, v5, v20",
    "ds_min_f64 v5, v[20:21]",
    "ds_max_f64 v5, v[20:21]",
    "ds_pk_add_f16 v5, v20",
    "ds_pk_add_rtn_bf16 v16, v5, v20",
    "ds_cmpst_f32 v5, v20, v24",
]
BUFFER_FORMS = {
    "none": "buffer_load_dwordx2 v[16:17], off, s[12:15], s7 offset:16",
    "offen": "buffer_load_dwordx2 v[16:17], v4, s[12:15], s7 offen offset:16",
    "idxen": "buffer_load_dwordx2 v[16:17], v30, s[12:15], s7 idxen offset:4",
    "both": "buffer_load_dwordx2 v[16:17], v[30:31], s[12:15], s7 idxen offen offset:4",
    "store": "buffer_store_dwordx2 v[20:21], v[30:31], s[12:15], s7 idxen offen offset:4",
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
TRANSPOSES = {
    "ds_read_b64_tr_b16 v[16:17], v5": 16,
    "ds_read_b64_tr_b8 v[16:17], v5": 8,
    "ds_read_b64_tr_b4 v[16:17], v5": 4,
    "ds_read_b96_tr_b6 v[16:18], v5": 6,
}


@cache
def programs_942() -> dict[str, Program]:
    """Return the programs of this file that both architectures have."""
    texts = [load_text(form, name) for form in LOAD_FORMS for name in LOADS]
    texts += [store_text(form, name) for form in STORE_FORMS for name in STORES]
    for name, (size, _, _) in DS_LOADS.items():
        texts.append(f"ds_read_{name} {registers(16, max(1, size // 4))}, v5 offset:12")
    for name, (size, _) in DS_STORES.items():
        texts.append(f"ds_write_{name} v5, {registers(20, max(1, size // 4))} offset:12")
    texts += memory_atomics() + ds_atomics() + FLOAT_ATOMICS + list(BUFFER_FORMS.values())
    texts += TWO_OFFSETS + CROSSLANE + SCALAR + COPIES[942]
    return programs(texts, "gfx942")


@cache
def programs_950() -> dict[str, Program]:
    """Return the programs that gfx950 alone has."""
    return programs([*COPIES[950], *TRANSPOSES], "gfx950")


class Setup:
    """Random registers and memory, with addresses where the instructions of this file look."""

    def __init__(self, seed: int, alignment: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.bytes = self.rng.integers(0, 256, MEMORY_BYTES, dtype=np.uint8)
        self.lds = self.rng.integers(0, 256, LDS_BYTES, dtype=np.uint8)
        self.memory = DeviceMemory()
        self.address = self.memory.map("data", self.bytes.ctypes.data, self.bytes.size, self.bytes)
        self.vgpr = self.rng.integers(0, 1 << 32, (512, 64), dtype=np.uint32)
        self.sgpr = self.rng.integers(0, 1 << 32, 128, dtype=np.uint32)
        # Distinct places, 32 bytes apart, in random order.
        places = self.rng.permutation(64) * 32 + 64
        self.offsets = places + self.rng.integers(0, 8 // alignment + 1, 64) * alignment
        self.vgpr[4] = self.offsets
        self.vgpr[5] = self.offsets
        full = self.address + self.offsets.astype(np.uint64)
        self.vgpr[2], self.vgpr[3] = full & 0xFFFFFFFF, full >> 32
        self.set_pair(BASE, self.address)
        self.set_pair(12, self.address)  # descriptor of a raw buffer
        self.sgpr[14], self.sgpr[15] = MEMORY_BYTES, 0x00020000
        self.sgpr[6], self.sgpr[7] = 64, SCALAR_OFFSET
        self.sgpr[13] &= 0xFFFF
        self.set_exec(int(self.rng.integers(0, 1 << 63)) << 1 | 1)

    def set_pair(self, index: int, value: int) -> None:
        """Set two scalar registers."""
        self.sgpr[index], self.sgpr[index + 1] = value & 0xFFFFFFFF, value >> 32

    def set_exec(self, value: int) -> None:
        """Choose the active lanes."""
        self.set_pair(EXEC, value)
        self.active = [lane for lane in range(64) if value >> lane & 1]

    def run(
        self, program: Program, mode: int = FLUSH_NOTHING, scratch_bytes: int = 0
    ) -> tuple[WaveState, Counters]:
        """Execute, leaving the state before untouched apart from memory."""
        state = WaveState(self.sgpr.copy(), self.vgpr.copy(), self.lds.copy(), 0, mode)
        return run_wave(program, state, memory=self.memory, scratch_bytes=scratch_bytes)


def as_register(raw: bytes, is_signed: bool, half: int) -> list[int]:
    """Return the dwords that a load of these bytes gives."""
    if len(raw) >= 4:
        return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    value = int.from_bytes(raw, "little", signed=is_signed)
    return [(value & 0xFFFFFFFF, value & 0xFFFF, (value & 0xFFFF) << 16)[half]]


def as_bytes(vgpr: Array, first: int, lane: int, size: int, half: int) -> bytes:
    """Return the bytes that a store of a lane writes."""
    dwords = vgpr[first : first + max(1, size // 4), lane]
    raw = np.ascontiguousarray(dwords).tobytes()
    return raw[2 : 2 + size] if half == 2 else raw[:size]


def check_loaded(
    setup: Setup, after: WaveState, expected: dict[int, list[int]], first: int = 16
) -> None:
    """Compare the registers a load fills; all others must be as before."""
    wanted = setup.vgpr.copy()
    for lane, values in expected.items():
        for i, value in enumerate(values):
            wanted[first + i, lane] = value
    np.testing.assert_array_equal(after.vgpr, wanted)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("form", ["global", "global_saddr", "flat", "buffer_offen"])
def test_load(seed: int, form: str, name: str) -> None:
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
def test_store(seed: int, form: str, name: str) -> None:
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
def test_scratch(seed: int, form: str, name: str) -> None:
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


@pytest.mark.parametrize("name", DS_LOADS)
def test_lds_read(seed: int, name: str) -> None:
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
def test_lds_write(seed: int, name: str) -> None:
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
def test_lds_two_offsets(seed: int, text: str) -> None:
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


def integer_result(name: str, bits: int, old: int, first: int, second: int) -> int:
    """Return what an atomic leaves behind."""
    if name == "cmpswap":  # value, compare
        result = first if old == second else old
    elif name == "cmpst":  # compare, value
        result = second if old == first else old
    elif name == "mskor":
        result = old & ~first | second
    elif name == "rsub":
        result = first - old
    else:
        result = INTEGER_OPERATIONS[name](old, first, bits)
    return result & ((1 << bits) - 1)


def wide(vgpr: Array, first: int, lane: int, bits: int) -> int:
    """Return a register or a pair of one lane."""
    value = int(vgpr[first, lane])
    return value | int(vgpr[first + 1, lane]) << 32 if bits == 64 else value


def plant(setup: Setup, target: Array, extra: int, bits: int, compare: int) -> None:
    """Make half of the comparisons succeed, and put small and equal values into some lanes."""
    for lane in range(64):
        at = int(setup.offsets[lane]) + extra
        if lane % 2:
            value = wide(setup.vgpr, compare, lane, bits)
            target[at : at + bits // 8] = list(value.to_bytes(bits // 8, "little"))
        elif lane % 4 == 0:
            target[at : at + bits // 8] = 0


@pytest.mark.parametrize("text", memory_atomics())
def test_memory_atomic(seed: int, text: str) -> None:
    """Integer atomics in memory: new value, and the old one where it is returned."""
    found = re.match(r"(\w+?)_atomic_([a-z]+)(_x2)? ", text)
    assert found is not None
    space, name, suffix = found.groups()
    bits = 64 if suffix else 32
    setup = Setup(seed, alignment=8)
    extra = 8 + (SCALAR_OFFSET if space == "buffer" else 0)
    compare = 20 + bits // 32 if name == "cmpswap" else 20
    plant(setup, setup.bytes, extra, bits, compare)
    wanted, expected = setup.bytes.copy(), {}
    for lane in setup.active:
        at = int(setup.offsets[lane]) + extra
        raw = setup.bytes[at : at + bits // 8].tobytes()
        old = int.from_bytes(raw, "little")
        new = integer_result(
            name, bits, old, wide(setup.vgpr, 20, lane, bits), wide(setup.vgpr, compare, lane, bits)
        )
        wanted[at : at + bits // 8] = list(new.to_bytes(bits // 8, "little"))
        expected[lane] = as_register(raw, False, 0)
    after, counters = setup.run(programs_942()[text])
    np.testing.assert_array_equal(setup.bytes, wanted)
    returned = expected if "sc0" in text else {}
    check_loaded(setup, after, returned, first=20 if space == "buffer" else 16)
    assert not counters.findings


@pytest.mark.parametrize("text", ds_atomics())
def test_lds_atomic(seed: int, text: str) -> None:
    """Integer atomics of LDS."""
    found = re.match(r"ds_([a-z]+)(_rtn)?_([a-z])(\d\d) ", text)
    assert found is not None
    operation, returns, kind, width = found.groups()
    name = DS_OPERATIONS.get(f"{operation}_{kind}", {"wrxchg": "swap"}.get(operation, operation))
    bits = int(width)
    setup = Setup(seed, alignment=8)
    plant(setup, setup.lds, 8, bits, 20)
    wanted, expected = setup.lds.copy(), {}
    for lane in setup.active:
        at = int(setup.offsets[lane]) + 8
        raw = setup.lds[at : at + bits // 8].tobytes()
        old = int.from_bytes(raw, "little")
        first, second = wide(setup.vgpr, 20, lane, bits), wide(setup.vgpr, 24, lane, bits)
        new = integer_result(name, bits, old, first, second)
        wanted[at : at + bits // 8] = list(new.to_bytes(bits // 8, "little"))
        expected[lane] = as_register(raw, False, 0)
    after, counters = setup.run(programs_942()[text])
    np.testing.assert_array_equal(after.lds, wanted)
    check_loaded(setup, after, expected if returns else {})
    assert not counters.findings


def test_atomics_add_up(seed: int) -> None:
    """All lanes may hit one address."""
    setup = Setup(seed)
    setup.vgpr[4] = 128
    before = int(setup.bytes[136:140].view(np.uint32)[0])
    setup.run(programs_942()["global_atomic_add v4, v20, s[8:9] offset:8"])
    total = before + sum(int(setup.vgpr[20, lane]) for lane in setup.active)
    assert setup.bytes[136:140].view(np.uint32)[0] == total % 2**32


FLOAT_CORNERS = {
    32: [
        *(0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F800000, 0xFF800000),
        *(0x7FC01234, 0x7F801234, 0x7F7FFFFF, 0x3F800000, 0xBF800000),
    ],
    64: [0, 1 << 63, 1, 0x7FF << 52, 0xFFF << 52, 0x7FF8 << 48 | 5, 0x7FF << 52 | 5, 0x3FF << 52],
    16: [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7E12, 0x7C12, 0x7BFF, 0x3C00, 0xBC00, 0x0400],
}


def flush32(bits: int) -> int:
    """Zero a denormal of f32."""
    return bits & 0x80000000 if bits & 0x7F800000 == 0 else bits


def nan_of(old: int, value: int, infinity: int, quiet: int, sign: int) -> int | None:
    """Return the quieted first NaN of two operands."""
    for bits in (old, value):
        if bits & (sign - 1) > infinity:
            return bits | quiet
    return None


def add32(old: int, value: int, flush: bool) -> int:
    """Add two f32 given as bits."""
    found = nan_of(old, value, 0x7F800000, 0x400000, 1 << 31)
    if found is not None:
        return found
    if flush:
        old, value = flush32(old), flush32(value)
    pair = np.array([old, value], np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        total = pair[:1] + pair[1:]
    bits = 0x7FC00000 if np.isnan(total[0]) else int(total.view(np.uint32)[0])
    return flush32(bits) if flush else bits


def add64(old: int, value: int) -> int:
    """Add two f64 given as bits."""
    found = nan_of(old, value, 0x7FF << 52, 1 << 51, 1 << 63)
    if found is not None:
        return found
    pair = np.array([old, value], np.uint64).view(np.float64)
    with np.errstate(all="ignore"):
        total = pair[:1] + pair[1:]
    return 0x7FF8 << 48 if np.isnan(total[0]) else int(total.view(np.uint64)[0])


def add16(old: int, value: int, is_brain: bool, flush: bool) -> int:
    """Add two f16 or bf16 given as bits."""
    infinity, quiet = (0x7F80, 0x40) if is_brain else (0x7C00, 0x200)
    found = nan_of(old, value, infinity, quiet, 1 << 15)
    if found is not None:
        return found
    if flush:
        old, value = (bits & 0x8000 if bits & infinity == 0 else bits for bits in (old, value))
    bits = _add16(old, value, is_brain)
    return bits & 0x8000 if flush and bits & infinity == 0 else bits


def _add16(old: int, value: int, is_brain: bool) -> int:
    with np.errstate(all="ignore"):
        if is_brain:
            pair = np.array([old << 16, value << 16], np.uint32).view(np.float32)
            total = pair[:1].astype(np.float64) + pair[1:]
            if np.isnan(total[0]):
                return 0x7FC0
            # A sum of two bf16 has few enough bits that both roundings are one, away from ties
            # that a float cannot hold.
            bits = int(total.astype(np.float32).view(np.uint32)[0])
            return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        half = np.array([old, value], np.uint16).view(np.float16)
        total16 = (half[:1].astype(np.float64) + half[1:]).astype(np.float16)
    return 0x7E00 if np.isnan(total16[0]) else int(total16.view(np.uint16)[0])


def choose(old: int, value: int, bits: int, is_max: bool, flush: bool) -> int:
    """Return minimum or maximum: numbers beat quiet NaN, -0 is below +0."""
    infinity, quiet = (0x7F800000, 0x400000) if bits == 32 else (0x7FF << 52, 1 << 51)
    sign = 1 << (bits - 1)
    for item in (old, value):
        if item & (sign - 1) > infinity and not item & quiet:
            return item | quiet
    if old & (sign - 1) > infinity:
        return value
    if value & (sign - 1) > infinity:
        return old

    def order(item: int) -> int:
        if flush and item & infinity == 0:
            item &= sign
        return -(item & (sign - 1)) * 2 - 1 if item & sign else item * 2

    first, second = order(old), order(value)
    return old if (first >= second if is_max else first <= second) else value


def float_result(text: str, old: int, first: int, second: int, flush: bool) -> int:
    """Return what a float atomic leaves behind."""
    if "cmpst" in text:
        compare = nan_of(old, first, 0x7F800000, 0x400000, 1 << 31) is None
        a, b = (flush32(old), flush32(first)) if flush else (old, first)
        is_equal = compare and (a == b or (a | b) & 0x7FFFFFFF == 0)
        return (flush32(second) if flush else second) if is_equal else old
    if "pk_add" in text:
        is_brain = "bf16" in text
        flush = flush and text.startswith("ds_")
        low = add16(old & 0xFFFF, first & 0xFFFF, is_brain, flush)
        return low | add16(old >> 16, first >> 16, is_brain, flush) << 16
    if "add" in text and "f64" in text:
        return add64(old, first)
    if "add" in text:
        return add32(old, first, flush or not text.startswith("ds_"))
    is_flushed = flush and text.startswith("ds_")
    return choose(old, first, 64 if "f64" in text else 32, "max" in text, is_flushed)


@pytest.mark.parametrize("mode", [FLUSH_NOTHING, FLUSH_ALL])
@pytest.mark.parametrize("text", FLOAT_ATOMICS)
def test_float_atomic(seed: int, text: str, mode: int) -> None:
    """Rounding, NaN, infinity and denormals."""
    bits = 64 if "f64" in text else 32
    setup = Setup(seed, alignment=8)
    is_lds = text.startswith("ds_")
    target = setup.lds if is_lds else setup.bytes
    corners = FLOAT_CORNERS[bits]
    if "pk_add" in text:
        halves = FLOAT_CORNERS[16]
        corners = [low | high << 16 for low, high in zip(halves, halves[::-1], strict=True)]
    picks = setup.rng.integers(0, len(corners), (3, 64))
    wanted, expected = target.copy(), {}
    for lane in range(64):
        old, first, second = (corners[pick] for pick in picks[:, lane])
        if lane % 3 == 0:
            first = corners[picks[0, lane]]
        if lane % 5 == 0 and bits == 32:
            old, first = (int(x) for x in setup.rng.integers(0, 1 << 32, 2))
        for register, value in ((20, first), (24, second)):
            setup.vgpr[register, lane] = value & 0xFFFFFFFF
            if bits == 64:
                setup.vgpr[register + 1, lane] = value >> 32
        at = int(setup.offsets[lane])
        raw = old.to_bytes(bits // 8, "little")
        target[at : at + bits // 8] = list(raw)
        wanted[at : at + bits // 8] = list(raw)
        if lane in setup.active:
            new = float_result(text, old, first, second, mode == FLUSH_ALL)
            wanted[at : at + bits // 8] = list(new.to_bytes(bits // 8, "little"))
            expected[lane] = as_register(raw, False, 0)
    after, counters = setup.run(programs_942()[text], mode)
    np.testing.assert_array_equal(after.lds if is_lds else setup.bytes, wanted)
    check_loaded(setup, after, expected if "rtn" in text or "sc0" in text else {})
    assert not counters.findings


def buffer_address(
    setup: Setup, lane: int, form: str, swizzle: int, add_tid: bool, stride: int
) -> int:
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
def test_buffer_addressing(seed: int, form: str, swizzle: int, add_tid: bool) -> None:
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


def buffer_address_of_second(
    setup: Setup, lane: int, swizzle: int, add_tid: bool, stride: int, *, indexed: bool = False
) -> int:
    """Return the address of the second dword where no register holds the offset."""
    within = 8 if indexed else 20
    element = (int(setup.vgpr[30, lane]) if indexed else 0) + (lane if add_tid else 0)
    if not swizzle:
        return SCALAR_OFFSET + element * stride + within
    block = (element // swizzle * stride + within) * swizzle
    return SCALAR_OFFSET + block + element % swizzle * 4


def test_buffer_range(seed: int) -> None:
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


def test_buffer_structured_range(seed: int) -> None:
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


def test_buffer_atomic_out_of_range_returns_zero(seed: int) -> None:
    """An atomic that is out of range changes nothing."""
    setup = Setup(seed, alignment=8)
    setup.sgpr[14] = 0
    before = setup.bytes.copy()
    text = "buffer_atomic_add v20, v4, s[12:15], s7 offen offset:8 sc0"
    after, counters = setup.run(programs_942()[text])
    np.testing.assert_array_equal(setup.bytes, before)
    check_loaded(setup, after, {lane: [0] for lane in setup.active}, first=20)
    assert not counters.findings


@pytest.mark.parametrize("text", CROSSLANE)
def test_crosslane(seed: int, text: str) -> None:
    """Permutations, swizzles, and LDS accesses by lane number."""
    setup = Setup(seed)
    setup.vgpr[7] = setup.rng.integers(0, 64, 64) * 4 + setup.rng.integers(0, 4, 64)
    setup.sgpr[M0] = 256
    data, active = setup.vgpr[20], setup.active
    expected: dict[int, list[int]] = {}
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


@pytest.mark.parametrize("text", SCALAR)
def test_scalar_load(seed: int, text: str) -> None:
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
def test_copy_to_lds(seed: int, arch: int, text: str) -> None:
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


@pytest.mark.parametrize("text", TRANSPOSES)
def test_transposing_read(seed: int, text: str) -> None:
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


def kinds(counters: Counters) -> list[tuple[int, int, int]]:
    """Return kind, lane and first detail of each finding."""
    return [(f.kind, f.lane, f.detail0) for f in counters.findings]


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
def test_out_of_bounds(seed: int, text: str, register: int, kind: int) -> None:
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


def test_read_only_memory_is_not_written(seed: int) -> None:
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


def test_misaligned(seed: int) -> None:
    """LDS and atomics want alignment; memory does not."""
    setup = Setup(seed, alignment=8)
    setup.set_exec(1 << 9)
    setup.vgpr[5, 9] = 322
    _, counters = setup.run(programs_942()["ds_read_b64 v[16:17], v5 offset:12"])
    assert kinds(counters) == [(11, 9, 334)]
    setup.vgpr[4, 9] = 322
    _, counters = setup.run(programs_942()["global_atomic_add v4, v20, s[8:9] offset:8"])
    assert kinds(counters) == [(11, 9, setup.address + 330)]


def test_bank_conflicts(seed: int) -> None:
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


def test_flat_reaches_lds_and_private_memory(seed: int) -> None:
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
