"""Random memory and LDS instructions, and states whose addresses they can use."""

from __future__ import annotations

import re

import numpy as np

from cdna_emulator.arguments import PRIVATE_APERTURE, SHARED_APERTURE
from cdna_emulator.isa import OpSpec, Unit
from operation_cases.states import EXEC, LANES, M0, State
from operation_cases.texts import (
    ADDRESS_PAIR,
    BASE,
    INDEX_PAIR,
    LDS_ADDRESS,
    OFFSET,
    RESOURCE,
    SCALAR_OFFSET,
    SCRATCH_BASE,
    SCRATCH_OFFSET,
    STRUCTURED,
    SWIZZLED,
    Writer,
)

#: Bytes of the buffer and of the LDS that the instructions work on.
BUFFER_BYTES, LDS_BYTES = 8192, 4096
#: Offsets stay so small that every address below fits with room for the widest access.
_MAX_OFFSET = 256
_STRIDE, _RECORDS = 48, 64


def data_words(name: str) -> int:
    """Return how many registers an instruction's data has."""
    if "cmpswap" in name:
        return 4 if name.endswith("_x2") else 2
    if "_atomic_" in name:
        return 2 if name.endswith(("_x2", "_f64")) else 1
    if match := re.search(r"dwordx(\d+)", name):
        return int(match[1])
    if "read2" in name:
        return 2 * int(name[-2:]) // 32
    if "write2" in name:
        return int(name[-2:]) // 32
    if match := re.search(r"_[buif](64|96|128)(?:_|$)", name):
        return int(match[1]) // 32
    return 1


def forms(op: OpSpec) -> tuple[str, ...]:
    """Return the ways to address an instruction's operand."""
    if op.unit is Unit.BUFFER:
        return ("off", "offen", "idxen", "both", "swizzled", "outside", "lds")
    if op.unit is Unit.GLOBAL:
        return ("vector", "scalar")
    if op.unit is Unit.SMEM:
        return ("constant", "register")
    return ("plain", "shared", "private") if op.unit is Unit.FLAT else ("plain",)


def write(writer: Writer, op: OpSpec, form: str) -> str | None:
    """Return a random text of a memory or LDS instruction."""
    if not op.slots:
        return op.name
    if op.unit is Unit.LDS:
        return _lds(writer, op)
    if op.unit is Unit.BUFFER:
        return _buffer(writer, op, form)
    if op.unit is Unit.SMEM:
        return _scalar(writer, op, form)
    if op.unit is Unit.SCRATCH:
        return _scratch(writer, op)
    return _addressed(writer, op, form)


def _data(writer: Writer, words: int) -> str:
    return writer.vector(words, writer.pick(("v", "a")), 20, 60)


def _offset(writer: Writer, *, negative: bool = False) -> str:
    low = -_MAX_OFFSET if negative else 0
    value = int(writer.rng.integers(low // 16, _MAX_OFFSET // 16)) * 16
    return f" offset:{value}" if value and writer.chance(0.7) else ""


def _lds(writer: Writer, op: OpSpec) -> str:
    name, words = op.name, data_words(op.name)
    # Data are in one register file.
    bank = writer.pick(("v", "a"))

    if "addtid" in name:
        return f"{name} {writer.vector()}{_offset(writer)}"
    if "permute" in name:
        return f"{name} {writer.vector()}, {writer.vector()}, {writer.vector()}{_offset(writer)}"
    if name == "ds_swizzle_b32":
        pattern = int(writer.rng.integers(0, 0x8000))
        if writer.chance(0.4):
            pattern = 0x8000 | pattern & 0xFF
        return f"{name} {writer.vector()}, {writer.vector()} offset:{pattern:#x}"
    operands = []
    for position in range(len(op.slots)):
        is_address = position == (1 if op.slots[0].is_written else 0)
        first = 20 + 12 * position
        data = writer.vector(words, bank, first, first + 8)
        operands.append(LDS_ADDRESS if is_address else data)
    text = f"{name} {', '.join(operands)}"
    if "read2" in name or "write2" in name:
        top = 4 if "st64" in name else 16
        first, second = writer.rng.choice(top, 2, replace=False)
        return f"{text} offset0:{first} offset1:{second}"
    return text + _offset(writer)


def _buffer(writer: Writer, op: OpSpec, form: str) -> str | None:
    if form == "lds" and "_load_dword" not in op.name:
        return None
    if form == "swizzled" and "atomic" in op.flags and data_words(op.name) > 1:
        # Swizzling takes the two halves of a value apart.
        return None
    data = "" if form == "lds" else f"{_data(writer, data_words(op.name))}, "
    scalar = writer.pick((SCALAR_OFFSET, "0", "16"))
    address, resource, modifiers = {
        "off": ("off", RESOURCE, ""),
        "lds": (OFFSET, RESOURCE, " offen"),
        "offen": (OFFSET, RESOURCE, " offen"),
        "outside": (OFFSET, STRUCTURED, " offen"),
        "idxen": (OFFSET, STRUCTURED, " idxen"),
        "both": (INDEX_PAIR, STRUCTURED, " idxen offen"),
        "swizzled": (INDEX_PAIR, SWIZZLED, " idxen offen"),
    }[form]
    text = f"{op.name} {data}{address}, {resource}, {scalar}{modifiers}{_offset(writer)}"
    if "atomic" in op.flags and writer.chance(0.5):
        text += " sc0"
    return text + (" lds" if form == "lds" else "")


def _scalar(writer: Writer, op: OpSpec, form: str) -> str | None:
    if op.name in ("s_memtime", "s_memrealtime"):
        return None
    words = data_words(op.name)
    target = writer.scalar(words) if words > 1 else "s40"
    base = RESOURCE if "buffer" in op.name else BASE
    offset = SCALAR_OFFSET if form == "register" else hex(4 * int(writer.rng.integers(0, 64)))
    return f"{op.name} {target}, {base}, {offset}"


def _scratch(writer: Writer, op: OpSpec) -> str:
    data = _data(writer, data_words(op.name))
    address, base = writer.pick(
        (f"{SCRATCH_OFFSET}|off", f"off|{SCRATCH_BASE}", f"{SCRATCH_OFFSET}|{SCRATCH_BASE}")
    ).split("|")
    operands = (data, address, base) if "load" in op.name else (address, data, base)
    offset = 4 * int(writer.rng.integers(0, 8))
    return f"{op.name} {', '.join(operands)}" + (f" offset:{offset}" if offset else "")


def _addressed(writer: Writer, op: OpSpec, form: str) -> str:
    words = data_words(op.name)
    address, base = (OFFSET, BASE) if form == "scalar" else (ADDRESS_PAIR, "off")
    tail = [] if op.unit is Unit.FLAT else [base]
    offset = _offset(writer, negative=op.unit is Unit.GLOBAL)
    if "lds_dma" in op.flags:
        return f"{op.name} {', '.join([address, *tail])}{offset}"
    if "atomic" in op.flags:
        given = _data(writer, words)
        kept = words // 2 if "cmpswap" in op.name else words
        # Result and data are in one register file.
        result = [writer.vector(kept, given[0], 20, 60)] if writer.chance(0.5) else []
        text = f"{op.name} {', '.join([*result, address, given, *tail])}{offset}"
        return text + (" sc0" if result else "")
    if "store" in op.name:
        return f"{op.name} {', '.join([address, _data(writer, words), *tail])}{offset}"
    return f"{op.name} {', '.join([_data(writer, words), address, *tail])}{offset}"


def prepare(state: State, rng: np.random.Generator, op: OpSpec, form: str, base: int) -> None:
    """Put usable addresses into the registers that the texts name."""
    size = 16
    room = (BUFFER_BYTES - 4 * _MAX_OFFSET) // size
    offsets = rng.integers(0, room, LANES) * size + 2 * _MAX_OFFSET
    if "atomic" in op.flags and rng.random() < 0.5:
        # Several lanes on one address.
        offsets = rng.choice(offsets[:4], LANES)
    addresses = np.uint64(base) + offsets.astype(np.uint64)
    if form == "shared":
        addresses = (np.uint64(SHARED_APERTURE) << np.uint64(32)) + (
            rng.integers(0, (LDS_BYTES - 512) // size, LANES) * size
        ).astype(np.uint64)
    elif form == "private":
        addresses = (np.uint64(PRIVATE_APERTURE) << np.uint64(32)) + np.zeros(LANES, np.uint64)
    state.vgpr[2] = (addresses & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    state.vgpr[3] = (addresses >> np.uint64(32)).astype(np.uint32)
    state.vgpr[4] = offsets
    if form == "idxen":
        state.vgpr[4] = rng.integers(0, _RECORDS + 8, LANES)
    elif form == "outside":
        state.vgpr[4] = rng.integers(0, 2 * BUFFER_BYTES // 8, LANES) * 8
    state.vgpr[5] = rng.integers(0, (LDS_BYTES - 1536) // size, LANES) * size
    state.vgpr[6] = rng.integers(0, _RECORDS + 8, LANES)
    state.vgpr[7] = rng.integers(0, _STRIDE // 8, LANES) * 8
    state.vgpr[8] = rng.integers(0, 16, LANES) * 4
    state.set_pair(8, base + 2 * _MAX_OFFSET if op.unit is Unit.GLOBAL else base)
    if op.unit is Unit.GLOBAL:
        state.vgpr[4] -= 2 * _MAX_OFFSET
    state.sgpr[24], state.sgpr[25] = 16 * int(rng.integers(0, 4)), 4 * int(rng.integers(0, 8))
    _descriptors(state, rng, base)
    state.sgpr[M0] = 4 * int(rng.integers(0, 64))
    if op.unit is Unit.LDS and "tr_b" in op.name:
        # Transposing reads have one lane's data for another: all lanes must be on.
        state.set_pair(EXEC, (1 << LANES) - 1)


def _descriptors(state: State, rng: np.random.Generator, base: int) -> None:
    low, high = base & 0xFFFFFFFF, base >> 32 & 0xFFFF
    state.sgpr[12:16] = [low, high, BUFFER_BYTES, 0x00020000]
    limit = int(rng.choice([BUFFER_BYTES, BUFFER_BYTES // 2]))
    state.sgpr[16:20] = [low, high | _STRIDE << 16, limit, 0x00020000]
    index_stride = int(rng.integers(0, 4))
    state.sgpr[20:24] = [
        low,
        high | _STRIDE << 16 | 1 << 31,
        _RECORDS,
        0x00020000 | index_stride << 21,
    ]
