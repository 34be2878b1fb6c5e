"""Atomic operations of the native core, in memory and in LDS, against arithmetic in Python."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
setup_of_wave = importlib.import_module("memory_cases.setup")
sys.path.remove(str(HERE))
FLUSH_ALL = setup_of_wave.FLUSH_ALL
FLUSH_NOTHING = setup_of_wave.FLUSH_NOTHING
SCALAR_OFFSET = setup_of_wave.SCALAR_OFFSET
Setup = setup_of_wave.Setup
as_register = setup_of_wave.as_register
check_loaded = setup_of_wave.check_loaded
programs = setup_of_wave.programs
registers = setup_of_wave.registers

INTEGER_OPERATIONS = {
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


def signed(value, bits):
    """Read the bits as two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


def memory_atomics():
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


def ds_atomics():
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


def integer_result(name, bits, old, first, second):
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


def wide(vgpr, first, lane, bits):
    """Return a register or a pair of one lane."""
    value = int(vgpr[first, lane])
    return value | int(vgpr[first + 1, lane]) << 32 if bits == 64 else value


def plant(setup, target, extra, bits, compare):
    """Make half of the comparisons succeed, and put small and equal values into some lanes."""
    for lane in range(64):
        at = int(setup.offsets[lane]) + extra
        if lane % 2:
            value = wide(setup.vgpr, compare, lane, bits)
            target[at : at + bits // 8] = list(value.to_bytes(bits // 8, "little"))
        elif lane % 4 == 0:
            target[at : at + bits // 8] = 0


@cache
def programs_942():
    """Assemble what both architectures have, in one go."""
    return programs([*memory_atomics(), *ds_atomics(), *FLOAT_ATOMICS], "gfx942")


@pytest.mark.parametrize("text", memory_atomics())
def test_memory_atomic(seed, text):
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
def test_lds_atomic(seed, text):
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


def test_atomics_add_up(seed):
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


def flush32(bits):
    """Zero a denormal of f32."""
    return bits & 0x80000000 if bits & 0x7F800000 == 0 else bits


def nan_of(old, value, infinity, quiet, sign):
    """Return the quieted first NaN of two operands."""
    for bits in (old, value):
        if bits & (sign - 1) > infinity:
            return bits | quiet
    return None


def add32(old, value, flush):
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


def add64(old, value):
    """Add two f64 given as bits."""
    found = nan_of(old, value, 0x7FF << 52, 1 << 51, 1 << 63)
    if found is not None:
        return found
    pair = np.array([old, value], np.uint64).view(np.float64)
    with np.errstate(all="ignore"):
        total = pair[:1] + pair[1:]
    return 0x7FF8 << 48 if np.isnan(total[0]) else int(total.view(np.uint64)[0])


def add16(old, value, is_brain, flush):
    """Add two f16 or bf16 given as bits."""
    infinity, quiet = (0x7F80, 0x40) if is_brain else (0x7C00, 0x200)
    found = nan_of(old, value, infinity, quiet, 1 << 15)
    if found is not None:
        return found
    if flush:
        old, value = (bits & 0x8000 if bits & infinity == 0 else bits for bits in (old, value))
    bits = _add16(old, value, is_brain)
    return bits & 0x8000 if flush and bits & infinity == 0 else bits


def _add16(old, value, is_brain):
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


def choose(old, value, bits, is_max, flush):
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

    def order(item):
        if flush and item & infinity == 0:
            item &= sign
        return -(item & (sign - 1)) * 2 - 1 if item & sign else item * 2

    first, second = order(old), order(value)
    return old if (first >= second if is_max else first <= second) else value


def float_result(text, old, first, second, flush):
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
def test_float_atomic(seed, text, mode):
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
