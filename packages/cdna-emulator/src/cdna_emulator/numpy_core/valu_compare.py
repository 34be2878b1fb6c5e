"""Vector comparisons, which give one bit for each lane, and value classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core.operands import raw, read, write, write_lanes
from cdna_emulator.numpy_core.registry import handler, words_of
from cdna_emulator.numpy_core.state import Array, WaveState, mask_of
from cdna_emulator.numpy_core.valu_float import exponent_field, is_signalling

#: Relations of ordered numbers; NaN makes each false. A leading ``n`` of float names negates.
_RELATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "f": lambda a, b: np.zeros(len(a), bool),
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a != b,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "t": lambda a, b: np.ones(len(a), bool),
    "tru": lambda a, b: np.ones(len(a), bool),
}
_INTEGER = words_of("f lt eq le gt ne ge t")
_FLOAT = words_of("f lt eq le gt lg ge o u nge nlg ngt nle neq nlt tru")


def relation(name: str) -> Callable[[Array, Array], Array]:
    """Return the function of a relation's name."""
    if name in _RELATIONS:
        return _RELATIONS[name]
    positive = _RELATIONS[name[1:]]
    return lambda a, b: ~positive(a, b)


def _finish(state: WaveState, inst: Instruction, result: Array) -> None:
    lanes = write_lanes(state, inst)
    write(state, inst, 0, result)
    if "writes_exec" in inst.op.flags:
        state.exec = mask_of(result & lanes)


def _register(prefix: str, name: str, kind: str) -> None:
    compare = relation(name)

    @handler(f"{prefix}_{name}_{kind}")
    def execute(state: WaveState, inst: Instruction) -> None:
        a, b = read(state, inst, 1), read(state, inst, 2)
        if kind.startswith("i"):
            a, b = a.view(f"i{a.dtype.itemsize}"), b.view(f"i{b.dtype.itemsize}")
        _finish(state, inst, compare(a, b))


for _prefix in ("v_cmp", "v_cmpx"):
    for _kind in ("i16", "u16", "i32", "u32", "i64", "u64"):
        for _name in _INTEGER:
            _register(_prefix, _name, _kind)
    for _kind in ("f16", "f32", "f64"):
        for _name in _FLOAT:
            _register(_prefix, _name, _kind)


def value_class(values: Array) -> Array:
    """Return the number of each value's class, a bit of the mask that class tests take."""
    negative = np.signbit(values)
    exponent = exponent_field(values)
    top = exponent_field(np.array([np.inf], values.dtype))[0]
    result = np.where(negative, 5, 6)
    result = np.where(values != 0, np.where(negative, 4, 7), result)
    result = np.where(exponent > 0, np.where(negative, 3, 8), result)
    result = np.where(exponent == top, np.where(negative, 2, 9), result)
    return np.where(np.isnan(values), np.where(is_signalling(values), 0, 1), result)


@handler(
    "v_cmp_class_f32 v_cmp_class_f16 v_cmp_class_f64 v_cmpx_class_f32 v_cmpx_class_f16"
    " v_cmpx_class_f64"
)
def _class(state: WaveState, inst: Instruction) -> None:
    # Denormals are classified as they are, so the source is not flushed.
    flushes, state.mode.bits = state.mode.bits, state.mode.bits | 0xF0
    values = read(state, inst, 1)
    state.mode.bits = flushes
    mask = raw(state, inst, 2, 1)[0]
    _finish(state, inst, mask >> value_class(values).astype(np.uint32) & np.uint32(1) == 1)
