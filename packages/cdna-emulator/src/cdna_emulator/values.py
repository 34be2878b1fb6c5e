"""Kernel arguments written on a command line.

``zeros:f32:16,64`` and ``random:bf16:1024`` and ``arange:i32:8`` make arrays, ``file:x.npy`` loads
one, ``int:5``, ``float:0.5`` and ``null`` are values. bf16 arrays hold their bits in ``uint16``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cdna_emulator.errors import ArgumentError

DTYPES: dict[str, Any] = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u32": np.uint32,
    "u16": np.uint16,
    "u8": np.uint8,
}
_MAKERS = ("zeros", "random", "arange")
_FORMS = "zeros|random|arange:DTYPE:SHAPE, file:PATH, int:N, float:X or null"


def parse_value(text: str, rng: np.random.Generator) -> Any:
    """Return the value that a command-line word stands for.

    Raises
    ------
    ArgumentError
        The word has none of the forms at the top.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind in _MAKERS:
            dtype, _, shape = rest.partition(":")
            return _array(kind, dtype, _shape(shape), rng)
        if kind == "file":
            return np.load(rest)
        if kind == "int":
            return int(rest, 0)
        if kind == "float":
            return float(rest)
        if text == "null":
            return None
    except (ValueError, OSError) as exc:
        raise ArgumentError(f"argument must be {_FORMS}, got {text!r}: {exc}") from exc
    raise ArgumentError(f"argument must be {_FORMS}, got {text!r}")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.isascii() and size.isdecimal() for size in sizes):
        raise ValueError("SHAPE must be sizes with commas between them, like 16,64")
    return tuple(int(size) for size in sizes)


def _array(kind: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"DTYPE must be one of {', '.join(DTYPES)}")
    if kind == "zeros":
        return np.zeros(shape, DTYPES[dtype])
    if kind == "arange":
        count = np.arange(math.prod(shape)).reshape(shape)
        return _bf16(count) if dtype == "bf16" else count.astype(DTYPES[dtype])
    if dtype == "bf16":
        return _bf16(rng.standard_normal(shape))
    if dtype.startswith("f"):
        return rng.standard_normal(shape).astype(DTYPES[dtype])
    bounds = np.iinfo(DTYPES[dtype])
    return rng.integers(bounds.min, bounds.max, shape, DTYPES[dtype], endpoint=True)


def _bf16(values: Any) -> Any:
    """Return the bits of values cut off to bf16."""
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16)
