"""Floating-point instructions against exact arithmetic and NumPy, on both cores."""

from __future__ import annotations

import importlib
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
directed = importlib.import_module("operation_cases.machine")
sys.path.remove(str(HERE))
machine = directed.machine
ALL, F32, F64, U32, f32_bits, ordinary_f32, same_floats, states = (
    directed.ALL,
    directed.F32,
    directed.F64,
    directed.U32,
    directed.f32_bits,
    directed.ordinary_f32,
    directed.same_floats,
    directed.states,
)


# --- floats


ROUND_UP, ROUND_DOWN, ROUND_ZERO = 0x3F5, 0x3FA, 0x3FF


def _rounded(exact, dtype, mode):
    """Round a fraction to f32 or f64 by comparing candidates, not by arithmetic."""
    if exact == 0:
        return dtype(0)
    near = dtype(float(exact)) if abs(exact) < Fraction(2) ** 1023 else dtype(np.inf)
    candidates = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    finite = [x for x in candidates if np.isfinite(x)]
    below = max(x for x in finite if Fraction(float(x)) <= exact)
    above = min(x for x in finite if Fraction(float(x)) >= exact)
    if mode == ROUND_UP:
        return above
    if mode == ROUND_DOWN:
        return below
    if mode == ROUND_ZERO:
        return below if exact > 0 else above
    to_below, to_above = exact - Fraction(float(below)), Fraction(float(above)) - exact
    if to_below == to_above and above != below:
        width = {F32: np.uint32, F64: np.uint64}[dtype]
        return below if below.view(width) & width(1) == 0 else above
    return below if to_below < to_above else above


@pytest.mark.parametrize("mode", [0x3F0, ROUND_UP, ROUND_DOWN, ROUND_ZERO])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_products_and_fused_products_round_once(machine, seed, dtype, mode):
    rng = np.random.default_rng(seed)
    a, b, c = (rng.standard_normal(64).astype(dtype) for _ in range(3))
    # Near cancellation: the low half of the product is all that is left.
    c[:16] = -(a[:16] * b[:16])
    c[16:32] *= dtype(2.0 ** -(24 if dtype is F32 else 53))
    m = machine()
    m.state.mode = mode
    kind, width = ("f32", 1) if dtype is F32 else ("f64", 2)
    m.v(10, a).v(12, b).v(14, c)
    x, y, z = (f"v{k}" if width == 1 else f"v[{k}:{k + 1}]" for k in (10, 12, 14))
    r = [f"v{k}" if width == 1 else f"v[{k}:{k + 1}]" for k in (20, 22, 24)]
    m.run(
        f"v_fma_{kind} {r[0]}, {x}, {y}, {z}",
        f"v_add_{kind}_e64 {r[1]}, {x}, {z}",
        f"v_mul_{kind}_e64 {r[2]}, {x}, {y}",
    )
    read = m.f32 if dtype is F32 else m.f64
    exact = [[Fraction(float(value)) for value in values] for values in (a, b, c)]
    for lane, (p, q, s) in enumerate(zip(*exact, strict=True)):
        assert read(20)[lane] == _rounded(p * q + s, dtype, mode)
        assert read(22)[lane] == _rounded(p + s, dtype, mode)
        assert read(24)[lane] == _rounded(p * q, dtype, mode)


def test_denormals_follow_the_mode(machine):
    tiny = f32_bits(0x00000001, 0x80000001, 0x007FFFFF, 0x00800000)
    half = f32_bits(0x3F000000)
    for mode, keeps_inputs, keeps_outputs in (
        (0x3F0, True, True),
        (0x3C0, False, False),
        (0x3D0, True, False),
        (0x3E0, False, True),
    ):
        m = machine().v(10, tiny).v(11, half)
        m.state.mode = mode
        m.run(
            "v_mul_f32_e32 v20, v11, v10",
            "v_add_f32_e32 v21, v10, v10",
            "v_max_f32_e32 v22, v10, v10",
            "v_mov_b32_e32 v23, v10",
        )
        limit = F32(2.0**-126)
        inputs = tiny if keeps_inputs else np.where(np.abs(tiny) < limit, tiny * 0, tiny)
        for register, want in ((20, inputs * half), (21, inputs + inputs), (22, inputs)):
            kept = want if keeps_outputs else np.where(np.abs(want) < limit, want * 0, want)
            same_floats(m.f32(register), kept)
        np.testing.assert_array_equal(m.bits(23), tiny.view(U32))


def test_minimum_and_maximum_of_nan_and_zeros(machine):
    quiet, signalling = 0x7FC00001, 0x7F800001
    a = f32_bits(quiet, 0x3F800000, 0x00000000, 0x80000000, signalling, 0x7F800000, 0xFF800000)
    b = f32_bits(0x3F800000, quiet, 0x80000000, 0x00000000, 0x3F800000, 0x3F800000, quiet)
    for mode, of_signalling in ((0x3F0, 0x7FC00001), (0x1F0, 0x3F800000)):
        m = machine().v(10, a).v(11, b)
        m.state.mode = mode
        m.run("v_min_f32_e32 v20, v10, v11", "v_max_f32_e32 v21, v10, v11")
        one, infinity = 0x3F800000, 0x7F800000
        low = [one, one, 0x80000000, 0x80000000, of_signalling, one, 0xFF800000]
        high = [one, one, 0, 0, of_signalling, infinity, 0xFF800000]
        np.testing.assert_array_equal(m.bits(20)[:7], low)
        np.testing.assert_array_equal(m.bits(21)[:7], high)


def test_median_of_three_is_the_middle(machine, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, (3, 64)).astype(F32)
    m = machine().v(10, values[0]).v(11, values[1]).v(12, values[2])
    m.run("v_med3_f32 v20, v10, v11, v12")
    np.testing.assert_array_equal(m.f32(20), np.median(values, axis=0))


def test_clamp_and_output_modifier(machine):
    a = f32_bits(0x7FC00000, 0xBF800000, 0x3F000000, 0x40000000, 0x80000000)
    m = machine().v(10, a).v(11, f32_bits(0x3F800000))
    m.run("v_mul_f32_e64 v20, v10, v11 clamp")
    same_floats(m.f32(20)[:5], np.array([0, 0, 0.5, 1, 0], F32))
    # Output modifiers are ignored while denormals are kept or IEEE mode is on.
    for mode, factor in ((0x3F0, 1), (0x3C0, 1), (0x1C0, 4)):
        m = machine().v(10, f32_bits(0x3F800000)).v(11, f32_bits(0x40400000))
        m.state.mode = mode
        m.run("v_mul_f32_e64 v20, v10, v11 mul:4")
        assert m.f32(20)[0] == 3 * factor


def test_scaling_by_powers_of_two(machine, seed):
    a = ordinary_f32(seed)
    powers = np.random.default_rng(seed).integers(-160, 160, 64).astype(np.int32)
    a[:4] = [np.inf, -np.inf, -0.0, 1.5]
    powers[3] = -149
    m = machine().v(10, a).v(11, powers).run("v_ldexp_f32 v20, v10, v11")
    with np.errstate(all="ignore"):
        want = np.ldexp(a.astype(F64), powers).astype(F32)
    same_floats(m.f32(20), want)


def test_parts_of_numbers(machine, seed):
    a = ordinary_f32(seed)
    a[:6] = [0.0, -0.0, np.float32(1e-44), -3.75, 2.5, 3.5]
    m = (
        machine()
        .v(10, a)
        .run(
            "v_frexp_mant_f32_e32 v20, v10",
            "v_frexp_exp_i32_f32_e32 v21, v10",
            "v_fract_f32_e32 v22, v10",
            "v_rndne_f32_e32 v23, v10",
            "v_ceil_f32_e32 v24, v10",
        )
    )
    mantissa, exponent = np.frexp(a.astype(F64))
    same_floats(m.f32(20), mantissa.astype(F32))
    np.testing.assert_array_equal(m.bits(21).view(np.int32), exponent)
    assert np.all((m.f32(22) >= 0) & (m.f32(22) < 1))
    same_floats(m.f32(23), np.rint(a))
    same_floats(m.f32(24), np.ceil(a))


def test_value_classes(machine):
    patterns = (
        *(0x7F800001, 0x7FC00000, 0xFF800000, 0xBF800000, 0x80000001, 0x80000000),
        *(0x00000000, 0x00000001, 0x3F800000, 0x7F800000),
    )
    for number, pattern in enumerate(patterns):
        m = (
            machine()
            .v(10, f32_bits(pattern))
            .v(11, U32(1 << number))
            .v(12, U32(0x3FF & ~(1 << number)))
        )
        m.run("v_cmp_class_f32_e64 s[40:41], v10, v11", "v_cmp_class_f32_e64 s[42:43], v10, v12")
        assert m.pair(40) == ALL, f"class {number}"
        assert m.pair(42) == 0


def test_comparisons_with_nan_and_lanes_that_are_off(machine):
    a = np.resize(np.array([1, 2, np.nan, 2, -0.0], F32), 64)
    b = np.resize(np.array([2, 2, 1, np.nan, 0.0], F32), 64)
    m = machine().v(10, a).v(11, b)
    m.exec(0x1F)
    m.run(
        "v_cmp_lt_f32_e64 s[40:41], v10, v11",
        "v_cmp_nge_f32_e64 s[42:43], v10, v11",
        "v_cmp_eq_f32_e64 s[44:45], v10, v11",
        "v_cmp_u_f32_e64 s[46:47], v10, v11",
        "v_cmp_lg_f32_e64 s[48:49], v10, v11",
        "v_cmp_tru_f32_e64 s[50:51], v10, v11",
        "v_cmpx_le_f32_e32 vcc, v10, v11",
    )
    got = [m.pair(k) for k in range(40, 52, 2)]
    assert got == [0b00001, 0b01101, 0b10010, 0b01100, 0b00001, 0b11111]
    assert m.pair(states.VCC) == m.pair(states.EXEC) == 0b10011


# --- division


def _division(kind, n, d, quotient):
    """Return LLVM's sequence for a correctly rounded quotient of vector registers."""
    if kind == "f32":
        n, d, q = (f"v{k}" for k in (n, d, quotient))
        s, t, r, e, f = (f"v{k}" for k in range(30, 35))
    else:
        n, d, q = (f"v[{k}:{k + 1}]" for k in (n, d, quotient))
        s, t, r, e, f = (f"v[{k}:{k + 1}]" for k in range(30, 40, 2))
    steps = [
        f"v_div_scale_{kind} {s}, s[60:61], {d}, {d}, {n}",
        f"v_div_scale_{kind} {t}, vcc, {n}, {d}, {n}",
        f"v_rcp_{kind}_e32 {r}, {s}",
    ]
    for _ in range(1 if kind == "f32" else 2):
        steps += [f"v_fma_{kind} {e}, -{s}, {r}, 1.0", f"v_fma_{kind} {r}, {e}, {r}, {r}"]
    steps += [f"v_mul_{kind}{'_e32' if kind == 'f32' else ''} {f}, {t}, {r}"]
    if kind == "f32":
        steps += [f"v_fma_{kind} {e}, -{s}, {f}, {t}", f"v_fma_{kind} {f}, {e}, {r}, {f}"]
    return [
        *steps,
        f"v_fma_{kind} {e}, -{s}, {f}, {t}",
        f"v_div_fmas_{kind} {e}, {e}, {r}, {f}",
        f"v_div_fixup_{kind} {q}, {e}, {d}, {n}",
    ]


@pytest.mark.parametrize("dtype", [F32, F64])
def test_division_is_correctly_rounded(machine, seed, dtype):
    rng = np.random.default_rng(seed)
    info = np.finfo(dtype)
    corners = np.array(
        [
            0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            1,
            -1,
            3,
            info.max,
            info.smallest_normal,
            info.smallest_subnormal,
            -info.smallest_subnormal,
            info.smallest_normal * 3,
            1 / 3,
        ],
        dtype,
    )
    for _ in range(8):
        spread = 120 if dtype is F32 else 1000
        n, d = (
            np.ldexp(rng.standard_normal(64), rng.integers(-spread, spread, 64)).astype(dtype)
            for _ in range(2)
        )
        n[:40], d[20:60] = rng.choice(corners, 40), rng.choice(corners, 40)
        m = machine().v(10, n).v(12, d)
        m.run(*_division("f32" if dtype is F32 else "f64", 10, 12, 20))
        with np.errstate(all="ignore"):
            same_floats((m.f32 if dtype is F32 else m.f64)(20), n / d)


# --- transcendental functions


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("exp", np.exp2),
        ("log", np.log2),
        ("rcp", lambda x: 1 / x),
        ("rsq", lambda x: 1 / np.sqrt(x)),
        ("sqrt", np.sqrt),
        ("sin", lambda x: np.sin(2 * np.pi * x)),
        ("cos", lambda x: np.cos(2 * np.pi * x)),
    ],
)
def test_transcendentals_within_a_unit_in_the_last_place(machine, seed, name, function):
    x = np.abs(ordinary_f32(seed, spread=6))
    if name in ("sin", "cos"):
        x = x % 1
    m = machine().v(10, x).run(f"v_{name}_f32_e32 v20, v10")
    want = function(x.astype(F64))
    # Where sine and cosine cross zero only the absolute error is bounded.
    floor = 2.0**-20 if name in ("sin", "cos") else 0.0
    error = np.abs(m.f32(20) - want)
    assert np.all(error <= np.maximum(np.spacing(np.abs(want).astype(F32)), floor * 2.0**-3))


def test_transcendentals_at_the_ends(machine):
    infinity, nan = np.inf, np.nan
    cases = {
        "exp": ([-infinity, infinity, -200, 200, 0, nan], [0, infinity, 0, infinity, 1, nan]),
        "log": ([0, -0.0, infinity, -1, 1, nan], [-infinity, -infinity, infinity, nan, 0, nan]),
        "rcp": ([0, -0.0, infinity, -infinity, 4, nan], [infinity, -infinity, 0, -0.0, 0.25, nan]),
        "rsq": ([0, -0.0, infinity, -1, 4, nan], [infinity, -infinity, 0, nan, 0.5, nan]),
        "sqrt": ([0, -0.0, infinity, -1, 4, nan], [0, -0.0, infinity, nan, 2, nan]),
        "sin": ([0, 0.25, 0.5, 0.75, infinity, nan], [0, 1, 0, -1, nan, nan]),
        "cos": ([0, 0.25, 0.5, 0.75, infinity, nan], [1, 0, -1, 0, nan, nan]),
    }
    for name, (arguments, want) in cases.items():
        x = np.resize(np.array(arguments, F32), 64)
        m = machine().v(10, x).run(f"v_{name}_f32_e32 v20, v10")
        got, expected = m.f32(20)[:6], np.array(want, F32)
        if name in ("sin", "cos"):
            np.testing.assert_allclose(got, expected, atol=1e-6)
        else:
            same_floats(got, expected)
