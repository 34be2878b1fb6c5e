"""LDS loads, stores and atomics, and the instructions that move data between lanes through it."""

from __future__ import annotations

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import OPS
from cdna_emulator.numpy_core.atomics import compare_floats, update
from cdna_emulator.numpy_core.memory import (
    Locate,
    Shape,
    load,
    pieces_of,
    shared,
    store,
    vector_words_plain,
)
from cdna_emulator.numpy_core.operands import number
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.state import LANE, LANES, Array, Mode, WaveState

_U32 = np.uint32
_READS = {
    "b32": Shape(4),
    "b64": Shape(8),
    "b96": Shape(12),
    "b128": Shape(16),
    "u8": Shape(1),
    "i8": Shape(1, True),
    "u16": Shape(2),
    "i16": Shape(2, True),
    "u8_d16": Shape(1, half="low"),
    "u8_d16_hi": Shape(1, half="high"),
    "i8_d16": Shape(1, True, "low"),
    "i8_d16_hi": Shape(1, True, "high"),
    "u16_d16": Shape(2, half="low"),
    "u16_d16_hi": Shape(2, half="high"),
}
_WRITES = {
    "b32": Shape(4),
    "b64": Shape(8),
    "b96": Shape(12),
    "b128": Shape(16),
    "b8": Shape(1),
    "b16": Shape(2),
    "b8_d16_hi": Shape(1, half="high"),
    "b16_d16_hi": Shape(2, half="high"),
}


def _at(state: WaveState, addresses: Array) -> Locate:
    return lambda lane, size: pieces_of(
        shared(state, lane, int(addresses[lane]) & 0xFFFFFFFF, size), size
    )


def _addresses(state: WaveState, inst: Instruction, position: int) -> Array:
    base = state.vgpr[inst.operands[position].index].astype(np.int64)
    result: Array = base + number(inst, "offset")
    return result


@handler(" ".join(f"ds_read_{name}" for name in _READS))
def _read(state: WaveState, inst: Instruction) -> None:
    shape = _READS[inst.mnemonic.removeprefix("ds_read_")]
    load(state, inst.operands[0], _at(state, _addresses(state, inst, 1)), shape)


@handler(" ".join(f"ds_write_{name}" for name in _WRITES))
def _write(state: WaveState, inst: Instruction) -> None:
    shape = _WRITES[inst.mnemonic.removeprefix("ds_write_")]
    store(state, inst.operands[1], _at(state, _addresses(state, inst, 0)), shape)


@handler("ds_read_addtid_b32")
def _read_by_lane(state: WaveState, inst: Instruction) -> None:
    load(state, inst.operands[0], _at(state, _lane_slots(state, inst)), Shape(4))


@handler("ds_write_addtid_b32")
def _write_by_lane(state: WaveState, inst: Instruction) -> None:
    store(state, inst.operands[0], _at(state, _lane_slots(state, inst)), Shape(4))


def _lane_slots(state: WaveState, inst: Instruction) -> Array:
    return (state.m0 & 0xFFFF) + number(inst, "offset") + 4 * LANE


def _two_addresses(state: WaveState, inst: Instruction, position: int, size: int) -> list[Array]:
    unit = size * (64 if "st64" in inst.mnemonic else 1)
    base = state.vgpr[inst.operands[position].index].astype(np.int64)
    return [base + unit * number(inst, key) for key in ("offset0", "offset1")]


@handler("ds_read2_b32 ds_read2_b64 ds_read2st64_b32 ds_read2st64_b64")
def _read_two(state: WaveState, inst: Instruction) -> None:
    size = int(inst.mnemonic[-2:]) // 8
    words = size // 4
    target = inst.operands[0].index
    # Both addresses are read before a register is written.
    both = _two_addresses(state, inst, 1, size)
    for lane in np.flatnonzero(state.active):
        for which, addresses in enumerate(both):
            view = shared(state, int(lane), int(addresses[lane]) & 0xFFFFFFFF, size)
            data = bytes(size) if view is None else view.tobytes()
            row = np.frombuffer(data, np.uint32)
            for k in range(words):
                state.vgpr[target + which * words + k, lane] = row[k]


@handler("ds_write2_b32 ds_write2_b64 ds_write2st64_b32 ds_write2st64_b64")
def _write_two(state: WaveState, inst: Instruction) -> None:
    size = int(inst.mnemonic[-2:]) // 8
    for which, addresses in enumerate(_two_addresses(state, inst, 0, size)):
        store(state, inst.operands[1 + which], _at(state, addresses), Shape(size))


# --- atomics


def _atomic(name: str, operation: str, size: int) -> None:
    for returns in (False, True):
        prefix, _, suffix = name.rpartition("_")
        mnemonic = f"{prefix}_rtn_{suffix}" if returns else name
        if mnemonic not in OPS:
            continue

        @handler(mnemonic)
        def execute(state: WaveState, inst: Instruction, returns: bool = returns) -> None:
            first = 1 if returns else 0
            addresses = _addresses(state, inst, first)
            data = [
                vector_words_plain(state, operand, size // 4)
                for operand in inst.operands[first + 1 :]
            ]
            for lane in np.flatnonzero(state.active):
                given = [int.from_bytes(rows[:, lane].tobytes(), "little") for rows in data]
                view = shared(state, int(lane), int(addresses[lane]) & 0xFFFFFFFF, size)
                old = 0
                if view is not None:
                    old = int.from_bytes(view.tobytes(), "little")
                    new = _new_value(operation, old, given, size, state.mode)
                    view[:] = np.frombuffer(new.to_bytes(size, "little"), np.uint8)
                if returns:
                    for k in range(size // 4):
                        index = inst.operands[0].index + k
                        state.vgpr[index, lane] = old >> 32 * k & 0xFFFFFFFF


def _new_value(operation: str, old: int, given: list[int], size: int, mode: Mode) -> int:
    if operation == "mskor":
        return old & ~given[0] | given[1]
    if operation == "cmpst":
        return given[1] if old == given[0] else old
    if operation == "cmpst_f":
        return compare_floats(old, given[0], given[1], size, mode)
    return update(operation, old, given[0], size, mode)


for _bits in (32, 64):
    for _name in ("add", "sub", "rsub", "inc", "dec"):
        _atomic(f"ds_{_name}_u{_bits}", _name, _bits // 8)
    for _name in ("and", "or", "xor"):
        _atomic(f"ds_{_name}_b{_bits}", _name, _bits // 8)
    for _name in ("min", "max"):
        _atomic(f"ds_{_name}_i{_bits}", f"s{_name}", _bits // 8)
        _atomic(f"ds_{_name}_u{_bits}", f"u{_name}", _bits // 8)
        _atomic(f"ds_{_name}_f{_bits}", f"{_name}_f", _bits // 8)
    _atomic(f"ds_add_f{_bits}", "add_f", _bits // 8)
    _atomic(f"ds_cmpst_b{_bits}", "cmpst", _bits // 8)
    _atomic(f"ds_cmpst_f{_bits}", "cmpst_f", _bits // 8)
    _atomic(f"ds_mskor_b{_bits}", "mskor", _bits // 8)
    _atomic(f"ds_wrxchg_b{_bits}", "swap", _bits // 8)
_atomic("ds_pk_add_f16", "pk_add_f16", 4)
_atomic("ds_pk_add_bf16", "pk_add_bf16", 4)


# --- lanes


@handler("ds_bpermute_b32")
def _pull(state: WaveState, inst: Instruction) -> None:
    """Each lane names the lane it reads; lanes that are off read as zero."""
    lanes = (_addresses(state, inst, 1) >> 2) & 63
    data = state.vgpr[inst.operands[2].index]
    active = state.active
    values = np.where(active[lanes], data[lanes], _U32(0))
    target = inst.operands[0].index
    state.vgpr[target] = np.where(active, values, state.vgpr[target])


@handler("ds_permute_b32")
def _push(state: WaveState, inst: Instruction) -> None:
    """Each lane names the lane it writes; the highest of several wins, nobody's is zero."""
    lanes = (_addresses(state, inst, 1) >> 2) & 63
    data = state.vgpr[inst.operands[2].index].copy()
    active = state.active
    values = np.zeros(LANES, np.uint32)
    for lane in np.flatnonzero(active):
        values[lanes[lane]] = data[lane]
    target = inst.operands[0].index
    state.vgpr[target] = np.where(active, values, state.vgpr[target])


@handler("ds_swizzle_b32")
def _swizzle(state: WaveState, inst: Instruction) -> None:
    pattern = number(inst, "offset")
    if pattern & 0x8000:
        choice = np.array([pattern >> 2 * k & 3 for k in range(4)])
        lanes = (LANE & ~3) + choice[LANE & 3]
    else:
        and_mask, or_mask, xor_mask = pattern & 31, pattern >> 5 & 31, pattern >> 10 & 31
        lanes = (LANE & 32) + ((LANE & 31 & and_mask | or_mask) ^ xor_mask)
    active = state.active
    data = state.vgpr[inst.operands[1].index]
    values = np.where(active[lanes], data[lanes], _U32(0))
    target = inst.operands[0].index
    state.vgpr[target] = np.where(active, values, state.vgpr[target])


@handler("ds_read_b64_tr_b4 ds_read_b64_tr_b8 ds_read_b64_tr_b16 ds_read_b96_tr_b6")
def _read_transposed(state: WaveState, inst: Instruction) -> None:
    """Read a tile of 16 columns by rows and hand each lane of a group of 16 one column.

    Within a group the lanes' data, one after the other, are the rows of the tile.
    """
    width = int(inst.mnemonic.rpartition("_b")[2])
    size = 12 if width == 6 else 8
    count = 8 * size // width
    addresses = _addresses(state, inst, 1)
    numbers = []
    for lane in range(LANES):
        view = shared(state, lane, int(addresses[lane]) & 0xFFFFFFFF, size)
        numbers.append(0 if view is None else int.from_bytes(view.tobytes(), "little"))
    for lane in range(LANES):
        group, column = lane & ~15, lane & 15
        result = 0
        for row in range(count):
            position = 16 * row + column
            source, element = divmod(position, count)
            piece = numbers[group + source] >> width * element & ((1 << width) - 1)
            result |= piece << width * row
        for k in range(size // 4):
            state.vgpr[inst.operands[0].index + k, lane] = result >> 32 * k & 0xFFFFFFFF
