"""Division as compilers expand it, through v_div_scale, v_div_fmas and v_div_fixup.

The quotients must be the correctly rounded ones for every pair of operands, which holds only if the
three instructions and the reciprocal fit together.
"""

from __future__ import annotations

import numpy as np
import pytest

DENORMALS_ON = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 3"
DENORMALS_OFF = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0"
# v7 = v0 / v1
SINGLE = """v_div_scale_f32 v2, s[4:5], v1, v1, v0
v_div_scale_f32 v3, vcc, v0, v1, v0
v_rcp_f32_e32 v4, v2
{on}
v_fma_f32 v5, -v2, v4, 1.0
v_fma_f32 v4, v5, v4, v4
v_mul_f32_e32 v5, v3, v4
v_fma_f32 v6, -v2, v5, v3
v_fma_f32 v5, v6, v4, v5
v_fma_f32 v3, -v2, v5, v3
{off}
v_div_fmas_f32 v3, v3, v4, v5
v_div_fixup_f32 v7, v3, v1, v0"""
KEEPING = SINGLE.format(on="s_nop 0", off="s_nop 0")
FLUSHING = SINGLE.format(on=DENORMALS_ON, off=DENORMALS_OFF)
# v[6:7] = v[0:1] / v[2:3]
DOUBLE = """v_div_scale_f64 v[4:5], s[4:5], v[2:3], v[2:3], v[0:1]
v_rcp_f64_e32 v[6:7], v[4:5]
v_fma_f64 v[8:9], -v[4:5], v[6:7], 1.0
v_fma_f64 v[6:7], v[6:7], v[8:9], v[6:7]
v_fma_f64 v[8:9], -v[4:5], v[6:7], 1.0
v_div_scale_f64 v[10:11], vcc, v[0:1], v[2:3], v[0:1]
v_fma_f64 v[6:7], v[6:7], v[8:9], v[6:7]
v_mul_f64 v[8:9], v[10:11], v[6:7]
v_fma_f64 v[10:11], -v[4:5], v[8:9], v[10:11]
v_div_fmas_f64 v[6:7], v[10:11], v[6:7], v[8:9]
v_div_fixup_f64 v[6:7], v[6:7], v[2:3], v[0:1]"""
KEEP_ALL, FLUSH_SINGLE = 0x3F0, 0x3C0
ROUNDS = 60


@pytest.fixture
def numbers(seed):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def machine(instructions):
    return instructions((KEEPING, FLUSHING, DOUBLE), "gfx942")


def _operands(rng, bits, fraction, case):
    """Return numerators and denominators of 64 lanes, as bits."""
    kind = np.uint32 if bits == 32 else np.uint64
    top = (1 << (bits - 1 - fraction)) - 1
    bias = top >> 1

    def number(low, high):
        exponent = rng.integers(low, high, 64).astype(kind)
        sign = rng.integers(0, 2, 64).astype(kind) << kind(bits - 1)
        return sign | exponent << kind(fraction) | rng.integers(0, 1 << fraction, 64, dtype=kind)

    if case == "any":
        return number(0, top + 1), number(0, top + 1)
    if case == "special":
        infinity, one = top << fraction, bias << fraction
        chosen = [0, 1, (1 << fraction) - 1, 1 << fraction, one, one + 1, infinity - 1, infinity]
        chosen += [infinity + (1 << (fraction - 1)), infinity + 1, (top - 2) << fraction]
        table = np.array([*chosen, *(value | 1 << (bits - 1) for value in chosen)], kind)
        return table[rng.integers(0, len(table), 64)], table[rng.integers(0, len(table), 64)]
    if case == "denormal quotient":
        denominator = number(fraction + 4, top)
        exponent = (denominator >> kind(fraction)).astype(np.int64) & top
        offset = rng.integers(-fraction - 3, 3, 64)
        exponent = np.clip(exponent - bias + offset, 0, top - 1).astype(kind)
        fractions = rng.integers(0, 1 << fraction, 64, dtype=kind)
        return exponent << kind(fraction) | fractions, denominator
    if case == "denormal reciprocal":
        return number(0, top), number(top - 3, top)
    if case == "tiny denominator":
        return number(0, bias + 3), number(0, 3)
    return number(0, fraction + 8), number(bias - 27, bias + 27)  # tiny numerator


CASES = (
    "any",
    "special",
    "denormal quotient",
    "denormal reciprocal",
    "tiny denominator",
    "tiny numerator",
)


def _flush(words):
    return np.where(words & 0x7F800000, words, words & 0x80000000).astype(np.uint32)


def _assert_same(got, expected, floats):
    both_nan = np.isnan(got.view(floats)) & np.isnan(expected.view(floats))
    wrong = np.flatnonzero((got != expected) & ~both_nan)
    assert not wrong.size, [(f"{got[lane]:#x}", f"{expected[lane]:#x}") for lane in wrong[:4]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [KEEP_ALL, FLUSH_SINGLE], ids=["keep", "flush"])
def test_single_quotients_round_correctly(machine, numbers, case, mode):
    for _ in range(ROUNDS):
        a, b = _operands(numbers, 32, 23, case)
        after = machine.run(KEEPING if mode == KEEP_ALL else FLUSHING, {0: a, 1: b}, mode=mode)
        if mode == FLUSH_SINGLE:
            a, b = _flush(a), _flush(b)
        with np.errstate(all="ignore"):
            expected = (a.view(np.float32) / b.view(np.float32)).view(np.uint32)
        if mode == FLUSH_SINGLE:
            expected = _flush(expected)
        _assert_same(after[7], expected, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_double_quotients_round_correctly(machine, numbers, case):
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(ROUNDS):
        a, b = _operands(numbers, 64, 52, case)
        after = machine.run(DOUBLE, {0: a & low, 1: a >> half, 2: b & low, 3: b >> half})
        with np.errstate(all="ignore"):
            expected = (a.view(np.float64) / b.view(np.float64)).view(np.uint64)
        _assert_same(after[6] | after[7].astype(np.uint64) << half, expected, np.float64)
