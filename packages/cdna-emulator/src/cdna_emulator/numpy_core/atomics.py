"""What read-modify-write instructions do to a value, shared by memory and LDS.

A function takes the old value, the operand (and the comparand) as raw integers of 4 or 8 bytes and
returns the new value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

from cdna_emulator.numpy_core.formats import bf16_to_float, float_to_bf16
from cdna_emulator.numpy_core.salu import signed

Update = Callable[[int, int, int], int]


def _as_float(value: int, size: int) -> float:
    return float(struct.unpack("<f" if size == 4 else "<d", value.to_bytes(size, "little"))[0])


def _from_float(value: float, size: int) -> int:
    dtype = np.float32 if size == 4 else np.float64
    with np.errstate(all="ignore"):
        return int.from_bytes(dtype(value).tobytes(), "little")


def _add_halves(old: int, new: int, size: int) -> int:
    first, second = (np.array([v], np.uint32).view(np.float16) for v in (old, new))
    with np.errstate(all="ignore"):
        return int((first + second).astype(np.float16).view(np.uint32)[0])


def _add_bf16(old: int, new: int, size: int) -> int:
    first, second = (
        bf16_to_float(np.array([v], np.uint32).view(np.uint16)).astype(np.float64)
        for v in (old, new)
    )
    with np.errstate(all="ignore"):
        return int(float_to_bf16(first + second).astype(np.uint16).view(np.uint32)[0])


def _add_floats(old: int, new: int, size: int) -> int:
    with np.errstate(all="ignore"):
        dtype = np.float32 if size == 4 else np.float64
        return _from_float(dtype(_as_float(old, size)) + dtype(_as_float(new, size)), size)


def _wrap(old: int, limit: int, size: int) -> int:
    return 0 if old >= limit else old + 1


def _unwrap(old: int, limit: int, size: int) -> int:
    return limit if old == 0 or old > limit else old - 1


UPDATES: dict[str, Update] = {
    "swap": lambda old, new, size: new,
    "add": lambda old, new, size: old + new,
    "sub": lambda old, new, size: old - new,
    "rsub": lambda old, new, size: new - old,
    "smin": lambda old, new, size: new if signed(new, 8 * size) < signed(old, 8 * size) else old,
    "smax": lambda old, new, size: new if signed(new, 8 * size) > signed(old, 8 * size) else old,
    "umin": lambda old, new, size: min(old, new),
    "umax": lambda old, new, size: max(old, new),
    "and": lambda old, new, size: old & new,
    "or": lambda old, new, size: old | new,
    "xor": lambda old, new, size: old ^ new,
    "inc": _wrap,
    "dec": _unwrap,
    "add_f": _add_floats,
    "min_f": lambda old, new, size: new if _as_float(new, size) < _as_float(old, size) else old,
    "max_f": lambda old, new, size: new if _as_float(new, size) > _as_float(old, size) else old,
    "pk_add_f16": _add_halves,
    "pk_add_bf16": _add_bf16,
}


def update(name: str, old: int, new: int, size: int) -> int:
    """Return the value that memory holds afterwards."""
    return UPDATES[name](old, new, size) & ((1 << 8 * size) - 1)
