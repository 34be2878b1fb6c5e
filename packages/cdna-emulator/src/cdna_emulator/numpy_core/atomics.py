"""What read-modify-write instructions do to a value, shared by memory and LDS.

Values are raw integers of 4 or 8 bytes. Floats follow "Float Memory Atomics" of the CDNA3 and CDNA4
documents: in LDS denormals are flushed as the mode says, in memory only by additions of f32;
minimum and maximum treat NaNs as the vector instructions do in IEEE mode.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdna_emulator.numpy_core.formats import bf16_to_float, float_to_bf16
from cdna_emulator.numpy_core.rounding import flush
from cdna_emulator.numpy_core.salu import signed
from cdna_emulator.numpy_core.state import Array, Mode
from cdna_emulator.numpy_core.valu_float import maximum, minimum

_IEEE = Mode(0x3F0)
#: How memory treats denormals: only additions of f32 flush them.
_IN_MEMORY, _ADD_F32_IN_MEMORY = Mode(0x3F0), Mode(0x3C0)


def _float(value: int, dtype: type, size: int) -> Array:
    return np.frombuffer(value.to_bytes(size, "little"), dtype)


def _bits(values: Array) -> int:
    return int.from_bytes(values.tobytes(), "little")


def _wrap(old: int, limit: int, size: int) -> int:
    return 0 if old >= limit else old + 1


def _unwrap(old: int, limit: int, size: int) -> int:
    return limit if old == 0 or old > limit else old - 1


_INTEGERS: dict[str, Callable[[int, int, int], int]] = {
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
}
_FLOATS: dict[str, Callable[[Array, Array], Array]] = {
    "add_f": lambda a, b: a + b,
    "min_f": lambda a, b: minimum(_IEEE, a, b),
    "max_f": lambda a, b: maximum(_IEEE, a, b),
    "pk_add_f16": lambda a, b: a + b,
}


def _update_float(name: str, old: int, new: int, size: int, mode: Mode) -> int:
    dtype = np.float16 if name == "pk_add_f16" else np.float32 if size == 4 else np.float64
    single = dtype is np.float32
    inputs = mode.flush_inputs32 if single else mode.flush_inputs64
    outputs = mode.flush_outputs32 if single else mode.flush_outputs64
    a, b = (flush(_float(value, dtype, size), inputs) for value in (old, new))
    result = _FLOATS[name](a, b)
    return _bits(flush(result, outputs) if "add" in name else result)


def _add_bf16(old: int, new: int, mode: Mode) -> int:
    halves = (np.frombuffer(value.to_bytes(4, "little"), np.uint16) for value in (old, new))
    # These are f32 cut short, so they go by the bits of f32.
    a, b = (flush(bf16_to_float(half), mode.flush_inputs32) for half in halves)
    total = bf16_to_float(float_to_bf16(a.astype(np.float64) + b))
    return _bits((flush(total, mode.flush_outputs32).view(np.uint32) >> 16).astype(np.uint16))


def update(name: str, old: int, new: int, size: int, mode: Mode | None = None) -> int:
    """Return the value that memory holds afterwards; ``mode`` is the wave's when it is LDS."""
    if name in _INTEGERS:
        return _INTEGERS[name](old, new, size) & ((1 << 8 * size) - 1)
    if mode is None:
        mode = _ADD_F32_IN_MEMORY if (name, size) == ("add_f", 4) else _IN_MEMORY
    if name == "pk_add_bf16":
        return _add_bf16(old, new, mode)
    return _update_float(name, old, new, size, mode)


def compare_floats(old: int, wanted: int, new: int, size: int, mode: Mode) -> int:
    """Return what a compare-and-store of floats leaves: zeros are equal, NaN equals nothing."""
    dtype = np.float32 if size == 4 else np.float64
    on = mode.flush_inputs32 if size == 4 else mode.flush_inputs64
    a, b, c = (flush(_float(value, dtype, size), on) for value in (old, wanted, new))
    return _bits(c) if a[0] == b[0] else old
