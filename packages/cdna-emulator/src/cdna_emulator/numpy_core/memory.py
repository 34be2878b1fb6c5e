"""Loads, stores and atomics on device memory and private memory; scalar loads.

Each lane's address is turned into a view of the bytes it names, or None; everything after that is
the same for global, flat, scratch and buffer instructions. Lanes act one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cdna_emulator.arguments import PRIVATE_APERTURE, SHARED_APERTURE
from cdna_emulator.instruction import Instruction, Operand
from cdna_emulator.numpy_core.atomics import update
from cdna_emulator.numpy_core.operands import number, scalar, vector_words
from cdna_emulator.numpy_core.registry import handler, words_of
from cdna_emulator.numpy_core.salu import signed
from cdna_emulator.numpy_core.state import LANES, Array, WaveState

#: Returns the bytes of one lane's access in pieces of at most four; None where it has no access.
Locate = Callable[[int, int], "list[Array | None]"]


@dataclass(frozen=True)
class Shape:
    """How a load or store relates bytes in memory to registers."""

    size: int
    is_signed: bool = False
    half: str = ""


SHAPES = {
    "ubyte": Shape(1),
    "sbyte": Shape(1, True),
    "ushort": Shape(2),
    "sshort": Shape(2, True),
    "byte": Shape(1),
    "short": Shape(2),
    "byte_d16_hi": Shape(1, half="high"),
    "ubyte_d16": Shape(1, half="low"),
    "ubyte_d16_hi": Shape(1, half="high"),
    "sbyte_d16": Shape(1, True, "low"),
    "sbyte_d16_hi": Shape(1, True, "high"),
    "short_d16": Shape(2, half="low"),
    "short_d16_hi": Shape(2, half="high"),
    "dword": Shape(4),
    "dwordx2": Shape(8),
    "dwordx3": Shape(12),
    "dwordx4": Shape(16),
}


def placed(data: bytes, shape: Shape) -> list[int]:
    """Return the register words that loaded bytes give.

    With ECC on its registers, as CDNA3 and CDNA4 have it, a load of one half clears the other.
    """
    if shape.size >= 4:
        return [int.from_bytes(data[k : k + 4], "little") for k in range(0, shape.size, 4)]
    value = int.from_bytes(data, "little")
    if shape.is_signed:
        value = signed(value, 8 * shape.size)
    if shape.half == "low":
        return [value & 0xFFFF]
    if shape.half == "high":
        return [(value & 0xFFFF) << 16]
    return [value & 0xFFFFFFFF]


def load(state: WaveState, target: Operand, locate: Locate, shape: Shape) -> None:
    """Load into registers, lane after lane."""
    for lane in np.flatnonzero(state.active):
        pieces = locate(int(lane), shape.size)
        data = b"".join(
            bytes(min(4, shape.size)) if piece is None else piece.tobytes() for piece in pieces
        )
        for k, word in enumerate(placed(data, shape)):
            state.vgpr[target.index + k, lane] = word


def store(state: WaveState, source: Operand, locate: Locate, shape: Shape) -> None:
    """Store from registers, lane after lane."""
    words = vector_words_plain(state, source, max(1, shape.size // 4))
    for lane in np.flatnonzero(state.active):
        data = words[:, lane].tobytes()[2 if shape.half == "high" else 0 :][: shape.size]
        for k, piece in enumerate(locate(int(lane), shape.size)):
            if piece is not None:
                piece[:] = np.frombuffer(data[4 * k : 4 * k + 4], np.uint8)


def vector_words_plain(state: WaveState, operand: Operand, words: int) -> Array:
    """Return registers as they are: memory instructions take no modifiers."""
    return state.vgpr[operand.index : operand.index + words].copy()


def atomic(
    state: WaveState, inst: Instruction, data: Operand, result: Operand | None, locate: Locate
) -> None:
    """Read, modify and write, lane after lane; the old value goes to ``result``."""
    name, size = _atomic_name(inst.mnemonic)
    compares = name == "cmpswap"
    words = vector_words_plain(state, data, size // 4 * (2 if compares else 1))
    for lane in np.flatnonzero(state.active):
        pieces = locate(int(lane), size)
        given = [int(word) for word in words[:, lane]]
        new = _join(given[: size // 4])
        old = 0
        if all(piece is not None for piece in pieces):
            views = [piece for piece in pieces if piece is not None]
            old = int.from_bytes(b"".join(view.tobytes() for view in views), "little")
            if compares:
                after = new if old == _join(given[size // 4 :]) else old
            else:
                after = update(name, old, new, size)
            raw = after.to_bytes(size, "little")
            for k, view in enumerate(views):
                view[:] = np.frombuffer(raw[4 * k : 4 * k + 4], np.uint8)
        if result is not None:
            for k in range(size // 4):
                state.vgpr[result.index + k, lane] = old >> 32 * k & 0xFFFFFFFF


def _join(words: list[int]) -> int:
    return sum(word << 32 * k for k, word in enumerate(words))


def _atomic_name(mnemonic: str) -> tuple[str, int]:
    name = mnemonic.split("_atomic_")[1]
    if name.endswith("_x2"):
        return name[:-3], 8
    if name in ("add_f64", "min_f64", "max_f64"):
        return name[:-2], 8
    return (name[:-2] if name == "add_f32" else name), 4


def pieces_of(view: Array | None, size: int) -> list[Array | None]:
    """Cut a view into dwords."""
    if view is None:
        return [None] * -(-size // 4)
    return [view[k : k + 4] for k in range(0, size, 4)]


# --- where an address points


def device(state: WaveState, lane: int, address: int, size: int) -> Array | None:
    """Return bytes of device memory; a miss is recorded."""
    address &= (1 << 64) - 1
    view = state.memory.view(address, size) if state.memory is not None else None
    if view is None:
        state.fault("memory", lane, address, size)
    return view


def private(state: WaveState, lane: int, address: int, size: int) -> Array | None:
    """Return bytes of a lane's private memory."""
    if not 0 <= address <= state.scratch.shape[1] - size:
        state.fault("scratch", lane, address, size)
        return None
    return state.scratch[lane, address : address + size]


def shared(state: WaveState, lane: int, address: int, size: int) -> Array | None:
    """Return bytes of the workgroup's LDS."""
    if not 0 <= address <= len(state.lds) - size:
        state.fault("lds", lane, address, size)
        return None
    return state.lds[address : address + size]


def _offset(inst: Instruction) -> int:
    return number(inst, "offset")


def _lane_addresses(state: WaveState, operand: Operand, words: int) -> list[int]:
    if operand.kind == "off":
        return [0] * LANES
    values = vector_words_plain(state, operand, words)
    return [_join([int(word) for word in values[:, lane]]) for lane in range(LANES)]


def _global(state: WaveState, inst: Instruction, vector: Operand, base: Operand) -> Locate:
    if base.kind == "off":
        start, offsets = 0, _lane_addresses(state, vector, 2)
    else:
        start, offsets = scalar(state, base, 2), _lane_addresses(state, vector, 1)
    return lambda lane, size: pieces_of(
        device(state, lane, start + offsets[lane] + _offset(inst), size), size
    )


def _flat(state: WaveState, inst: Instruction, vector: Operand) -> Locate:
    addresses = _lane_addresses(state, vector, 2)

    def locate(lane: int, size: int) -> list[Array | None]:
        address = addresses[lane] + _offset(inst) & (1 << 64) - 1
        if address >> 32 == SHARED_APERTURE:
            return pieces_of(shared(state, lane, address & 0xFFFFFFFF, size), size)
        if address >> 32 == PRIVATE_APERTURE:
            return pieces_of(private(state, lane, address & 0xFFFFFFFF, size), size)
        return pieces_of(device(state, lane, address, size), size)

    return locate


def _scratch(state: WaveState, inst: Instruction, vector: Operand, base: Operand) -> Locate:
    offsets = _lane_addresses(state, vector, 1)
    start = 0 if base.kind == "off" else scalar(state, base)
    return lambda lane, size: pieces_of(
        private(state, lane, (offsets[lane] + start + _offset(inst)) & 0xFFFFFFFF, size), size
    )


@dataclass(frozen=True)
class Descriptor:
    """A buffer resource descriptor."""

    base: int
    stride: int
    records: int
    swizzles: bool
    index_stride: int
    adds_lane: bool

    @staticmethod
    def read(state: WaveState, operand: Operand) -> Descriptor:
        """Take the four registers apart."""
        words = [int(state.sgpr[operand.index + k]) for k in range(4)]
        adds_lane = bool(words[3] >> 23 & 1)
        stride = words[1] >> 16 & 0x3FFF
        if adds_lane:
            # The data format field extends the stride.
            stride |= (words[3] >> 15 & 15) << 14
        return Descriptor(
            base=words[0] | (words[1] & 0xFFFF) << 32,
            stride=stride,
            records=words[2],
            swizzles=bool(words[1] >> 31),
            index_stride=8 << (words[3] >> 21 & 3),
            adds_lane=adds_lane,
        )


def _buffer(
    state: WaveState, inst: Instruction, vector: Operand, resource: Operand, base: Operand
) -> Locate:
    descriptor = Descriptor.read(state, resource)
    start = scalar(state, base)
    has_index, has_offset = "idxen" in inst.modifiers, "offen" in inst.modifiers
    words = vector_words(state, inst, vector, 2) if has_index and has_offset else None
    single = None if vector.kind == "off" else vector_words(state, inst, vector, 1)[0]

    def locate(lane: int, size: int) -> list[Array | None]:
        index = offset = 0
        if words is not None:
            index, offset = int(words[0, lane]), int(words[1, lane])
        elif single is not None and has_index:
            index = int(single[lane])
        elif single is not None and has_offset:
            offset = int(single[lane])
        if descriptor.adds_lane:
            index += lane
        offset += _offset(inst)
        return [
            _buffer_piece(state, descriptor, lane, start, index, offset + k, min(4, size - k))
            for k in range(0, size, 4)
        ]

    return locate


def _buffer_piece(
    state: WaveState,
    descriptor: Descriptor,
    lane: int,
    start: int,
    index: int,
    offset: int,
    size: int,
) -> Array | None:
    """Return one dword of a buffer; out of the descriptor's range there is none, by design."""
    if descriptor.swizzles and descriptor.stride:
        if index >= descriptor.records:
            return None
        group, within = divmod(index, descriptor.index_stride)
        element, byte = divmod(offset, 4)
        linear = (group * descriptor.stride + element * 4) * descriptor.index_stride
        linear += within * 4 + byte
    else:
        linear = offset + index * descriptor.stride
        # LLVM relies on the scalar offset being left out of the check.
        if linear + size > descriptor.records:
            return None
    return device(state, lane, descriptor.base + start + linear, size)


# --- instructions


def _locate(state: WaveState, inst: Instruction, address: int) -> Locate:
    """Return the addressing of an instruction whose address operand is at a position."""
    operands = inst.operands
    space = inst.mnemonic.partition("_")[0]
    if space == "global":
        return _global(state, inst, operands[address], operands[-1])
    if space == "flat":
        return _flat(state, inst, operands[address])
    if space == "scratch":
        return _scratch(state, inst, operands[address], operands[-1])
    return _buffer(state, inst, *operands[-3:])


_LOADS = words_of(
    "dword dwordx2 dwordx3 dwordx4 ubyte sbyte ushort sshort ubyte_d16 ubyte_d16_hi sbyte_d16"
    " sbyte_d16_hi short_d16 short_d16_hi"
)
_STORES = words_of("dword dwordx2 dwordx3 dwordx4 byte short byte_d16_hi short_d16_hi")
_INTEGER_ATOMICS = words_of("swap cmpswap add sub smin umin smax umax and or xor inc dec")
_FLOAT_ATOMICS = words_of("add_f32 pk_add_f16 pk_add_bf16 add_f64 min_f64 max_f64")
_ATOMICS = [*_INTEGER_ATOMICS, *(f"{name}_x2" for name in _INTEGER_ATOMICS), *_FLOAT_ATOMICS]


@handler(" ".join(f"{s}_load_{n}" for s in ("global", "flat", "scratch") for n in _LOADS))
def _vector_load(state: WaveState, inst: Instruction) -> None:
    shape = SHAPES[inst.mnemonic.split("_load_")[1]]
    load(state, inst.operands[0], _locate(state, inst, 1), shape)


@handler(" ".join(f"{s}_store_{n}" for s in ("global", "flat", "scratch") for n in _STORES))
def _vector_store(state: WaveState, inst: Instruction) -> None:
    shape = SHAPES[inst.mnemonic.split("_store_")[1]]
    store(state, inst.operands[1], _locate(state, inst, 0), shape)


@handler(" ".join(f"{s}_atomic_{n}" for s in ("global", "flat") for n in _ATOMICS))
def _vector_atomic(state: WaveState, inst: Instruction) -> None:
    returns = "sc0" in inst.modifiers
    first = 1 if returns else 0
    result = inst.operands[0] if returns else None
    atomic(state, inst, inst.operands[first + 1], result, _locate(state, inst, first))


@handler(" ".join(f"buffer_load_{n}" for n in _LOADS))
def _buffer_load(state: WaveState, inst: Instruction) -> None:
    shape = SHAPES[inst.mnemonic.split("_load_")[1]]
    locate = _locate(state, inst, 0)
    if "lds" in inst.modifiers:
        _to_lds(state, inst, locate, shape)
    else:
        load(state, inst.operands[0], locate, shape)


@handler(" ".join(f"buffer_store_{n}" for n in _STORES))
def _buffer_store(state: WaveState, inst: Instruction) -> None:
    shape = SHAPES[inst.mnemonic.split("_store_")[1]]
    store(state, inst.operands[0], _locate(state, inst, 1), shape)


@handler(" ".join(f"buffer_atomic_{n}" for n in _ATOMICS))
def _buffer_atomic(state: WaveState, inst: Instruction) -> None:
    data = inst.operands[0]
    result = data if "sc0" in inst.modifiers else None
    atomic(state, inst, data, result, _locate(state, inst, 1))


@handler(
    "global_load_lds_dword global_load_lds_ubyte global_load_lds_sbyte global_load_lds_ushort"
    " global_load_lds_sshort global_load_lds_dwordx3 global_load_lds_dwordx4"
)
def _global_to_lds(state: WaveState, inst: Instruction) -> None:
    shape = SHAPES[inst.mnemonic.removeprefix("global_load_lds_")]
    _to_lds(state, inst, _locate(state, inst, 0), shape)


def _to_lds(state: WaveState, inst: Instruction, locate: Locate, shape: Shape) -> None:
    """Copy from memory to LDS: lanes are 4 bytes apart, or 16 if they hold more than 4."""
    stride, width = (4, 4) if shape.size <= 4 else (16, shape.size)
    for lane in np.flatnonzero(state.active):
        pieces = locate(int(lane), shape.size)
        data = b"".join(
            bytes(min(4, shape.size)) if piece is None else piece.tobytes() for piece in pieces
        )
        words = placed(data, shape)
        target = shared(state, int(lane), state.m0 + _offset(inst) + int(lane) * stride, width)
        if target is not None:
            target[:] = np.frombuffer(np.array(words, np.uint32).tobytes(), np.uint8)


# --- scalar loads


@handler(" ".join(f"s_load_dword{n}" for n in ("", "x2", "x4", "x8", "x16")))
def _scalar_load(state: WaveState, inst: Instruction) -> None:
    address = (scalar(state, inst.operands[1], 2) + _scalar_offset(state, inst)) & ~3
    _scalar_words(state, inst, address, None)


@handler(" ".join(f"s_buffer_load_dword{n}" for n in ("", "x2", "x4", "x8", "x16")))
def _scalar_buffer_load(state: WaveState, inst: Instruction) -> None:
    descriptor = Descriptor.read(state, inst.operands[1])
    size = descriptor.records * max(1, descriptor.stride)
    offset = _scalar_offset(state, inst) & ~3
    _scalar_words(state, inst, (descriptor.base & ~3) + offset, size - offset)


def _scalar_offset(state: WaveState, inst: Instruction) -> int:
    operand = inst.operands[2]
    if operand.kind == "constant":
        return signed(operand.bits) + _offset(inst)
    return scalar(state, operand) + _offset(inst)


def _scalar_words(state: WaveState, inst: Instruction, address: int, room: int | None) -> None:
    count = int(inst.mnemonic.split("dword")[1].lstrip("x") or 1)
    for k in range(count):
        inside = room is None or 4 * k + 4 <= room
        view = device(state, -1, address + 4 * k, 4) if inside else None
        word = 0 if view is None else int.from_bytes(view.tobytes(), "little")
        state.sgpr[inst.operands[0].index + k] = word
