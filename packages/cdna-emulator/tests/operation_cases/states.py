"""Random register states that are full of corner cases.

A flavour says which format the values suit: an f32 multiply is hardly tested by random bits, most
of which are far too large or too small, nor a byte operation by ordinary floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LANES, VGPRS, SGPRS = 64, 512, 128
VCC, M0, EXEC = 106, 124, 126
_F32_BITS = (
    *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC01234, 0x7F800001),
    *(0xFFA00000, 0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000),
    *(0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000, 0x3F000000, 0xBF000000, 0x40000000),
    *(0x3F800001, 0x3F7FFFFF, 0x4B000000, 0x4B000001, 0x4B7FFFFF, 0x477FE000, 0x477FF000),
    *(0x477FEFFF, 0x33000000, 0x33000001, 0x32FFFFFF, 0x38800000, 0x387FC000, 0x43700000),
    *(0x43E00000, 0x43E80000, 0x47600000, 0x4F000000, 0xCF000000, 0x4F800000, 0x3FC00000),
    *(0x40200000, 0xBFC00000, 0x3F808000, 0x3F818000, 0x3F808001, 0x5F800000, 0x1F800000),
)
_F16_BITS = (
    *(0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0x0001, 0x8001, 0x03FF, 0x83FF),
    *(0x0400, 0x8400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00, 0x3800, 0xB800, 0x4000, 0x3C01, 0x3BFF),
    *(0x6400, 0x6401, 0x3E00, 0x4100, 0xBE00, 0x0200, 0x5BFF, 0x57FF, 0x77FF),
)
_F64_BITS = (
    *(0x0000000000000000, 0x8000000000000000, 0x7FF0000000000000, 0xFFF0000000000000),
    *(0x7FF8000000000000, 0xFFF8000000001234, 0x7FF0000000000001, 0x0000000000000001),
    *(0x8000000000000001, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF),
    *(0xFFEFFFFFFFFFFFFF, 0x3FF0000000000000, 0xBFF0000000000000, 0x3FE0000000000000),
    *(0x4330000000000000, 0x4330000000000001, 0x41DFFFFFFFC00000, 0xC1E0000000000000),
    *(0x41EFFFFFFFE00000, 0x47EFFFFFE0000000, 0x47EFFFFFF0000000, 0x36A0000000000000),
    *(0x3690000000000000, 0x3FF0000010000000, 0x3FF0000030000000, 0x3FF8000000000000),
)
_INTEGERS = (
    *(0, 1, 2, 3, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x80000000, 0x80000001, 0x7FFF, 0x8000),
    *(0xFFFF, 0x10000, 0xFF, 0x80, 0x7F, 31, 32, 33, 63, 64, 0x00FFFFFF, 0x00800000, 0x007FFFFF),
    *(0xFF800000, 0x00010001, 0x7FFF8000, 0x80007FFF, 0x80808080, 0x0C0D0B08),
)
#: Values of the MODE register: the default, then each thing that changes results.
MODES = (0x3F0, 0x3F0, 0x3F0, 0x300, 0x330, 0x3C0, 0x1F0, 0x2F0, 0x3F5, 0x3FA, 0x3FF, 0x0F0)


def _mix(
    rng: np.random.Generator, shape: tuple[int, ...], parts: list[tuple[float, Array]]
) -> Array:
    """Choose each element from one of several arrays, by weight."""
    weights = np.array([weight for weight, _ in parts])
    which = rng.choice(len(parts), shape, p=weights / weights.sum())
    return np.choose(which, [values for _, values in parts])


def _single(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    corners = rng.choice(np.array(_F32_BITS, np.uint32), shape)
    ordinary = (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 13, shape)).astype(np.float32)
    small = (rng.integers(-64, 65, shape) / 4).astype(np.float32)
    random = rng.integers(0, 1 << 32, shape, np.uint32)
    parts = [(3.0, corners), (4.0, ordinary.view(np.uint32)), (2.0, small.view(np.uint32))]
    return _mix(rng, shape, [*parts, (1.0, random)])


def _half(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    corners = rng.choice(np.array(_F16_BITS, np.uint16), shape)
    ordinary = (rng.standard_normal(shape) * 2.0 ** rng.integers(-6, 7, shape)).astype(np.float16)
    random = rng.integers(0, 1 << 16, shape, np.uint16)
    return _mix(rng, shape, [(3.0, corners), (5.0, ordinary.view(np.uint16)), (2.0, random)])


def _double(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    corners = rng.choice(np.array(_F64_BITS, np.uint64), shape)
    ordinary = rng.standard_normal(shape) * 2.0 ** rng.integers(-40, 41, shape)
    random = rng.integers(0, 1 << 64, shape, np.uint64)
    return _mix(rng, shape, [(3.0, corners), (5.0, ordinary.view(np.uint64)), (2.0, random)])


def _integer(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    corners = rng.choice(np.array(_INTEGERS, np.uint32), shape)
    small = rng.integers(-40, 41, shape).astype(np.int32).view(np.uint32)
    random = rng.integers(0, 1 << 32, shape, np.uint32)
    return _mix(rng, shape, [(3.0, corners), (3.0, small), (4.0, random)])


def _small_values(rng: np.random.Generator, shape: tuple[int, ...], flavour: str) -> Array:
    """Return small whole numbers in a format, whose products sum up exactly in f32."""
    numbers = rng.integers(-4, 5, shape)
    if flavour == "matrix f32":
        return numbers.astype(np.float32).view(np.uint32)
    if flavour == "matrix f64":
        doubled = rng.integers(-4, 5, (shape[0] // 2, shape[1])).astype(np.float64)
        return _interleave(doubled.view(np.uint64))
    pair = rng.integers(-4, 5, (2, *shape))
    if flavour == "matrix f16":
        low, high = pair.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        low, high = pair.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return low | high << np.uint32(16)


def _interleave(values: Array) -> Array:
    rows = np.empty((2 * values.shape[0], *values.shape[1:]), np.uint32)
    rows[0::2] = values.astype(np.uint32)
    rows[1::2] = (values >> np.uint64(32)).astype(np.uint32)
    return rows


def values(rng: np.random.Generator, flavour: str, rows: int, lanes: int = LANES) -> Array:
    """Return ``rows`` x ``lanes`` register values."""
    shape = (rows, lanes)
    if flavour == "f32":
        return _single(rng, shape)
    if flavour == "f16":
        return _half(rng, shape).astype(np.uint32) | _half(rng, shape).astype(
            np.uint32
        ) << np.uint32(16)
    if flavour == "bf16":
        return _single(rng, shape) & np.uint32(0xFFFF0000) | _single(rng, shape) >> np.uint32(16)
    if flavour == "f64":
        return _interleave(_double(rng, (rows // 2, lanes)))
    if flavour.startswith("matrix"):
        return _small_values(rng, shape, flavour)
    return _integer(rng, shape)


class State:
    """Registers and LDS before an instruction, for either core."""

    def __init__(self, rng: np.random.Generator, flavour: str) -> None:
        self.vgpr = values(rng, flavour, VGPRS)
        self.sgpr = values(rng, flavour, SGPRS, 1)[:, 0].copy()
        self.scc = int(rng.integers(2))
        self.mode = int(rng.choice(MODES))
        self.lds = rng.integers(0, 256, 4096, np.uint8)
        exec_mask = int(rng.integers(0, 1 << 64, dtype=np.uint64))
        kind = rng.random()
        if kind < 0.5:
            exec_mask = (1 << 64) - 1
        elif kind < 0.6:
            exec_mask &= int(rng.integers(0, 1 << 64, dtype=np.uint64)) & 0xF00F00F0F0F00F01
        elif kind < 0.63:
            exec_mask = 0
        self.set_pair(EXEC, exec_mask)
        self.set_pair(VCC, int(rng.integers(0, 1 << 64, dtype=np.uint64)))
        self.sgpr[M0] = int(rng.integers(0, 256))

    def set_pair(self, index: int, value: int) -> None:
        """Write two scalar registers."""
        self.sgpr[index], self.sgpr[index + 1] = value & 0xFFFFFFFF, value >> 32
