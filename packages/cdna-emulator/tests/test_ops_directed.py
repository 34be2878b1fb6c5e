"""Instructions against facts that owe nothing to either core: mathematics, NumPy, ml formats.

Every test runs on both cores.
"""

from __future__ import annotations

import importlib
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
assembly, compare, states = (
    importlib.import_module(f"operation_cases.{name}") for name in ("assembly", "compare", "states")
)
sys.path.remove(str(HERE))

LANE = np.arange(64)
ALL = (1 << 64) - 1
U32, U64, F32, F64 = np.uint32, np.uint64, np.float32, np.float64


class Machine:
    """One wave on one core: set registers, run lines, read registers."""

    def __init__(self, core, arch="gfx942"):
        self.core, self.arch = core, arch
        self.state = states.State(np.random.default_rng(0), "integer")
        self.state.vgpr[:] = 0
        self.state.mode = 0x3F0
        self.exec(ALL)

    def exec(self, mask):
        self.state.set_pair(states.EXEC, mask)

    def v(self, index, values):
        """Set a vector register, or a pair from 64-bit values."""
        values = np.broadcast_to(np.asarray(values), 64)
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        if values.dtype.itemsize == 8:
            self.state.vgpr[index] = bits.astype(U32)
            self.state.vgpr[index + 1] = (bits >> U64(32)).astype(U32)
        else:
            self.state.vgpr[index] = bits
        return self

    def s(self, index, value):
        self.state.sgpr[index] = value
        return self

    def run(self, *lines):
        instructions = assembly.parsed([*lines, "s_endpgm"], self.arch)
        if self.core == "native":
            self.after, counters = compare.run_native(instructions, self.state, self.arch)
            assert not counters.findings
        else:
            self.after = compare.run_numpy(instructions, self.state, self.arch)
            assert not self.after.faults
        return self

    def bits(self, index):
        return self.after.vgpr[index].copy()

    def f32(self, index):
        return self.bits(index).view(F32)

    def f64(self, index):
        low, high = self.bits(index).astype(U64), self.bits(index + 1).astype(U64)
        return (low | high << U64(32)).view(F64)

    def pair(self, index):
        return int(self.after.sgpr[index]) | int(self.after.sgpr[index + 1]) << 32


@pytest.fixture(params=["native", "numpy"])
def machine(request):
    return lambda arch="gfx942": Machine(request.param, arch)


def f32_bits(*patterns):
    return np.resize(np.array(patterns, U32), 64).view(F32)


def same_floats(got, want):
    """Equal, zeros by their sign, NaN with NaN."""
    got, want = np.asarray(got), np.asarray(want)
    nan = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(np.where(nan, 0, got), np.where(nan, 0, want))
    np.testing.assert_array_equal(nan | np.signbit(got) == nan | np.signbit(want), True)


def ordinary_f32(seed, count=64, spread=40):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)).astype(F32)


# --- arithmetic with carries, fields and counts


def test_carry_chain_adds_and_subtracts_128_bits(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 32, (2, 4, 64), dtype=np.uint64)
    a[1, :8], b[1, :8] = 0xFFFFFFFF, 0
    a[0, :8], b[0, :8] = 0xFFFFFFFF, 1
    m = machine()
    for k in range(4):
        m.v(10 + k, a[k].astype(U32)).v(20 + k, b[k].astype(U32))
    lines = ["v_add_co_u32_e32 v30, vcc, v10, v20"]
    lines += [f"v_addc_co_u32_e32 v{30 + k}, vcc, v{10 + k}, v{20 + k}, vcc" for k in (1, 2, 3)]
    lines += ["v_sub_co_u32_e32 v40, vcc, v10, v20"]
    lines += [f"v_subb_co_u32_e32 v{40 + k}, vcc, v{10 + k}, v{20 + k}, vcc" for k in (1, 2, 3)]
    m.run(*lines)
    for lane in range(64):
        x, y = (sum(int(n[k, lane]) << 32 * k for k in range(4)) for n in (a, b))
        for first, want in ((30, x + y), (40, x - y)):
            got = sum(int(m.bits(first + k)[lane]) << 32 * k for k in range(4))
            assert got == want % (1 << 128)


def test_scalar_carries_overflow_and_condition(machine):
    m = machine().s(30, 0xFFFFFFFF).s(31, 1).s(32, 0x7FFFFFFF)
    m.run(
        "s_add_u32 s40, s30, s31",  # carry
        "s_addc_u32 s41, s31, s31",
        "s_cselect_b32 s42, 5, 6",  # no carry from that
        "s_add_i32 s43, s32, s31",  # signed overflow
        "s_cselect_b32 s44, 5, 6",
        "s_sub_u32 s45, s31, s30",  # borrow
        "s_subb_u32 s46, s30, s31",
        "s_min_i32 s47, s30, s31",
        "s_cselect_b32 s48, 5, 6",
        "s_absdiff_i32 s49, s31, s30",
        "s_mul_hi_u32 s50, s30, s30",
        "s_mul_hi_i32 s51, s30, s32",
    )
    names = range(40, 52)
    want = [0, 3, 6, 0x80000000, 5, 2, 0xFFFFFFFD, 0xFFFFFFFF, 5, 2, 0xFFFFFFFE, 0xFFFFFFFF]
    assert [int(m.after.sgpr[k]) for k in names] == want


def test_bit_fields_at_their_edges(machine):
    m = machine().v(10, U32(0x87654321))
    offset = LANE.astype(U32) % 40
    width = (LANE.astype(U32) * 7) % 36
    m.v(11, offset).v(12, width).run("v_bfe_u32 v20, v10, v11, v12", "v_bfe_i32 v21, v10, v11, v12")
    for lane in range(64):
        low, size = int(offset[lane]) & 31, int(width[lane]) & 31
        field = 0x87654321 >> low & ((1 << size) - 1)
        assert m.bits(20)[lane] == field
        # The value is extended by its sign before the field is cut out.
        extended = (0x87654321 - (1 << 32)) >> low & ((1 << size) - 1)
        want = extended - (1 << size) if size and extended >> (size - 1) else extended
        assert m.bits(21)[lane] == want % (1 << 32)


def test_scalar_bit_fields_take_width_beyond_the_register(machine):
    m = machine().s(30, 0x80000001).s(31, 32 << 16).s(32, 40 << 16 | 4).s(33, 0)
    m.run(
        "s_bfe_u32 s40, s30, s31",
        "s_bfe_i32 s41, s30, s31",
        "s_bfe_u32 s42, s30, s32",
        "s_bfe_i32 s43, s30, s32",
        "s_bfe_u32 s44, s30, s33",
        "s_cselect_b32 s45, 1, 2",
    )
    want = [0x80000001, 0x80000001, 0x08000000, 0xF8000000, 0, 2]
    assert [int(m.after.sgpr[k]) for k in range(40, 46)] == want


def test_counts_and_first_bits(machine):
    values = np.resize(np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00010000, 0x7FFFFFFF], U32), 64)
    m = (
        machine()
        .v(10, values)
        .run(
            "v_ffbh_u32_e32 v20, v10",
            "v_ffbl_b32_e32 v21, v10",
            "v_ffbh_i32_e32 v22, v10",
            "v_bcnt_u32_b32 v23, v10, 7",
            "v_bfrev_b32_e32 v24, v10",
        )
    )
    none = 0xFFFFFFFF
    np.testing.assert_array_equal(m.bits(20)[:6], [none, 31, 0, 0, 15, 1])
    np.testing.assert_array_equal(m.bits(21)[:6], [none, 0, 31, 0, 16, 0])
    np.testing.assert_array_equal(m.bits(22)[:6], [none, 31, 1, none, 15, 1])
    np.testing.assert_array_equal(m.bits(23)[:6], [7, 8, 8, 39, 8, 38])
    np.testing.assert_array_equal(m.bits(24)[:6], [0, 1 << 31, 1, none, 1 << 15, none - 1])


def test_lane_counts_below(machine):
    mask = 0x0F0F_1234_8000_0001
    m = machine().s(30, mask & 0xFFFFFFFF).s(31, mask >> 32)
    m.run("v_mbcnt_lo_u32_b32 v20, s30, 0", "v_mbcnt_hi_u32_b32 v21, s31, v20")
    want = [(mask & ((1 << lane) - 1)).bit_count() for lane in range(64)]
    np.testing.assert_array_equal(m.bits(21), want)


def test_integers_saturate_with_clamp(machine):
    m = machine().v(10, U32(0xFFFFFFF0)).v(11, U32(0x100)).v(12, U32(0x7FFFFFF0))
    m.v(13, U32(0xFFF0)).v(14, U32(0x7FF0)).run(
        "v_add_u32_e64 v20, v10, v11 clamp",
        "v_sub_u32_e64 v21, v11, v10 clamp",
        "v_add_i32 v22, v12, v11 clamp",
        "v_add_u16_e64 v23, v13, v11 clamp",
        "v_pk_add_i16 v24, v14, v11 clamp",
        "v_mad_i32_i24 v25, v11, v11, v12 clamp",
        "v_sub_i32 v26, v12, v10",
    )
    got = [int(m.bits(k)[0]) for k in range(20, 27)]
    assert got == [0xFFFFFFFF, 0, 0x7FFFFFFF, 0xFFFF, 0x7FFF, 0x7FFFFFFF, 0x80000000]


def test_byte_permutation_menu(machine):
    m = machine().v(10, U32(0x8F6E5D4C)).v(11, U32(0x3B2A1908))
    want = {
        **{k: 0x3B2A1908 >> 8 * k & 255 for k in range(4)},
        **{k + 4: 0x8F6E5D4C >> 8 * k & 255 for k in range(4)},
        **{8: 0x00, 9: 0x00, 10: 0x00, 11: 0xFF, 12: 0, 13: 255, 14: 255, 255: 255},
    }
    selectors = np.resize(np.array(list(want), U32), 64)
    m.v(12, selectors).run("v_perm_b32 v20, v10, v11, v12")
    np.testing.assert_array_equal(m.bits(20) & 255, [want[int(k)] for k in selectors])


def test_wide_multiply_add(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 32, (2, 64), dtype=np.uint64).astype(U32)
    c = rng.integers(0, 1 << 64, 64, dtype=np.uint64)
    m = machine().v(10, a).v(11, b).v(12, c)
    m.run("v_mad_u64_u32 v[20:21], s[40:41], v10, v11, v[12:13]")
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    got = m.bits(20).astype(object) + m.bits(21).astype(object) * (1 << 32)
    assert list(got) == [value % (1 << 64) for value in exact]
    assert m.pair(40) == sum((value >> 64) << lane for lane, value in enumerate(exact))


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


# --- conversions


def test_float_to_integer_saturates(machine):
    x = np.resize(
        np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 5e9, -0.9, 2.9, -2.9, 2147483648.0], F32), 64
    )
    m = machine().v(10, x).run("v_cvt_i32_f32_e32 v20, v10", "v_cvt_u32_f32_e32 v21, v10")
    top, least = 2**31 - 1, -(2**31)
    signed = [0, top, least, top, least, top, 0, 2, -2, top]
    unsigned = [0, 2**32 - 1, 0, 3000000000, 0, 2**32 - 1, 0, 2, 0, 2**31]
    np.testing.assert_array_equal(m.bits(20).view(np.int32)[:10], signed)
    np.testing.assert_array_equal(m.bits(21)[:10], unsigned)


def test_integers_to_floats_round_to_even(machine, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 32, 64, dtype=np.uint64).astype(U32)
    x[:4] = [0x01000001, 0x01000003, 0xFFFFFFFF, 0x80000080]
    m = machine().v(10, x).run("v_cvt_f32_u32_e32 v20, v10", "v_cvt_f32_i32_e32 v21, v10")
    np.testing.assert_array_equal(m.f32(20), x.astype(F64).astype(F32))
    np.testing.assert_array_equal(m.f32(21), x.view(np.int32).astype(F64).astype(F32))


def _halfway_f32(bits_kept, seed):
    """Return f32 numbers on and beside the middle between two numbers of a shorter mantissa."""
    rng = np.random.default_rng(seed)
    dropped = 23 - bits_kept
    mantissa = rng.integers(0, 1 << bits_kept, 64) << dropped
    tail = rng.choice([1 << (dropped - 1), (1 << (dropped - 1)) - 1, (1 << (dropped - 1)) + 1], 64)
    exponent = rng.integers(127 - 4, 127 + 4, 64)
    return (exponent << 23 | mantissa | tail).astype(U32).view(F32)


def test_half_conversions_round_ties_to_even_and_pack(machine, seed):
    x, y = _halfway_f32(10, seed), ordinary_f32(seed, spread=24)
    m = (
        machine()
        .v(10, x)
        .v(11, y)
        .run(
            "v_cvt_f16_f32_e32 v20, v10",
            "v_cvt_f16_f32_e32 v21, v11",
            "v_cvt_pkrtz_f16_f32 v22, v10, v11",
        )
    )
    with np.errstate(all="ignore"):
        for register, value in ((20, x), (21, y)):
            want = value.astype(np.float16).view(np.uint16)
            np.testing.assert_array_equal(m.bits(register), want)
    low = (m.bits(22) & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F64)
    assert np.all(np.abs(low) <= np.abs(x))
    assert np.all(np.abs(x) - np.abs(low) < np.spacing(np.abs(low).astype(np.float16)))


def test_bf16_conversion_is_torch_s(machine, seed):
    x, y = _halfway_f32(7, seed), ordinary_f32(seed)
    y[:4] = [np.inf, -np.inf, np.nan, np.float32(3.4e38)]
    m = machine("gfx950").v(10, x).v(11, y).run("v_cvt_pk_bf16_f32 v20, v10, v11")
    words = m.bits(20)
    for half, value in ((words << U32(16), x), (words & U32(0xFFFF0000), y)):
        want = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
        same_floats(half.view(F32), want)


EIGHT = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz,
    ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn,
    ("gfx950", "bf8"): torch.float8_e5m2,
}


@pytest.mark.parametrize(("arch", "kind"), list(EIGHT))
def test_eight_bit_floats_are_torch_s(machine, seed, arch, kind):
    dtype = EIGHT[arch, kind]
    codes = np.arange(256, dtype=np.uint8)
    want = torch.from_numpy(codes).view(dtype).float().numpy()
    for start in range(0, 256, 64):
        part = codes[start : start + 64]
        m = machine(arch).v(10, part.astype(U32)).run(f"v_cvt_f32_{kind}_e32 v20, v10")
        same_floats(m.f32(20), want[start : start + 64])
    largest = float(torch.finfo(dtype).max)
    x = _halfway_f32(3 if kind == "fp8" else 2, seed)
    y = np.clip(ordinary_f32(seed, spread=18), -largest, largest).astype(F32)
    m = machine(arch).v(10, x).v(11, y).v(20, U32(0xABCD1234))
    m.run(
        f"v_cvt_pk_{kind}_f32 v20, v10, v11",
        f"v_cvt_pk_{kind}_f32 v21, v11, v10 op_sel:[0,0,1]",
    )
    for register, shift, value in ((20, 0, x), (20, 8, y), (21, 16, y), (21, 24, x)):
        want = torch.from_numpy(value).to(dtype).view(torch.uint8).numpy()
        np.testing.assert_array_equal(m.bits(register) >> U32(shift) & U32(255), want)
    np.testing.assert_array_equal(m.bits(20) >> U32(16), 0xABCD)


@pytest.mark.parametrize(("arch", "kind"), list(EIGHT))
def test_eight_bit_floats_saturate_when_the_mode_says_so(machine, arch, kind):
    dtype = EIGHT[arch, kind]
    largest = float(torch.finfo(dtype).max)
    m = machine(arch).v(10, F32(largest * 3)).v(11, F32(-largest * 1000))
    m.state.mode |= 1 << 23
    m.run(f"v_cvt_pk_{kind}_f32 v20, v10, v11")
    codes = np.array([m.bits(20)[0] & 255, m.bits(20)[0] >> 8 & 255], np.uint8)
    got = torch.from_numpy(codes).view(dtype).float().tolist()
    assert got == [largest, -largest]
    m.state.mode &= ~(1 << 23)
    m.run(f"v_cvt_pk_{kind}_f32 v20, v10, v11")
    codes = np.array([m.bits(20)[0] & 255, m.bits(20)[0] >> 8 & 255], np.uint8)
    assert not np.isfinite(torch.from_numpy(codes).view(dtype).float().numpy()).any()


def test_stochastic_rounding_is_unbiased(machine, seed):
    rng = np.random.default_rng(seed)
    total, count = 0.0, 0
    for _ in range(40):
        m = machine().v(10, F32(1.03)).v(11, rng.integers(0, 1 << 32, 64, np.uint32))
        m.run("v_cvt_sr_fp8_f32 v20, v10, v11", "v_cvt_f32_fp8_e32 v21, v20")
        assert set(m.f32(21).tolist()) <= {1.0, 1.125}
        total, count = total + float(m.f32(21).sum()), count + 64
    # The mean of 2560 draws of a step of 1/8 lies within six deviations.
    assert abs(total / count - 1.03) < 6 * 0.0625 / math.sqrt(count)


# --- lanes


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[1,0,3,2]", lambda lane: lane ^ 1),
        ("row_shl:1", lambda lane: lane + 1 if lane % 16 < 15 else None),
        ("row_shr:4", lambda lane: lane - 4 if lane % 16 >= 4 else None),
        ("row_ror:3", lambda lane: lane // 16 * 16 + (lane - 3) % 16),
        ("row_mirror", lambda lane: lane ^ 15),
        ("row_half_mirror", lambda lane: lane ^ 7),
        ("row_bcast:15", lambda lane: lane // 16 * 16 - 1 if lane >= 16 else None),
        ("row_bcast:31", lambda lane: 31 if lane >= 32 else None),
        ("row_newbcast:5", lambda lane: lane // 16 * 16 + 5),
        ("wave_shr:1", lambda lane: lane - 1 if lane else None),
        ("wave_rol:1", lambda lane: (lane + 1) % 64),
    ],
)
def test_dpp_patterns(machine, control, source):
    data = (LANE * 11 + 100).astype(U32)
    m = machine().v(10, data).v(20, U32(7)).v(21, U32(7)).v(22, U32(7))
    m.run(
        f"v_mov_b32_dpp v20, v10 {control} row_mask:0xf bank_mask:0xf",
        f"v_mov_b32_dpp v21, v10 {control} row_mask:0xf bank_mask:0xf bound_ctrl:0",
        f"v_mov_b32_dpp v22, v10 {control} row_mask:0x2 bank_mask:0x8",
    )
    found = [source(int(lane)) for lane in LANE]
    want = [7 if lane is None else data[lane] for lane in found]
    np.testing.assert_array_equal(m.bits(20), want)
    np.testing.assert_array_equal(m.bits(21), [0 if k is None else data[k] for k in found])
    masked = (LANE // 16 == 1) & (LANE // 4 % 4 == 3)
    np.testing.assert_array_equal(m.bits(22), np.where(masked, want, 7))


def test_swizzle_and_permutes(machine, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 1 << 32, 64, np.uint32)
    target = rng.permutation(64).astype(U32)
    m = (
        machine()
        .v(10, data)
        .v(11, target * 4)
        .run(
            "ds_swizzle_b32 v20, v10 offset:swizzle(SWAP,16)",
            "ds_swizzle_b32 v21, v10 offset:swizzle(QUAD_PERM,3,2,1,0)",
            "ds_swizzle_b32 v22, v10 offset:swizzle(BROADCAST,8,3)",
            "ds_bpermute_b32 v23, v11, v10",
            "ds_permute_b32 v24, v11, v10",
            "ds_bpermute_b32 v25, v11, v10 offset:8",
            "s_waitcnt lgkmcnt(0)",
        )
    )
    np.testing.assert_array_equal(m.bits(20), data[LANE ^ 16])
    np.testing.assert_array_equal(m.bits(21), data[LANE ^ 3])
    np.testing.assert_array_equal(m.bits(22), data[LANE // 8 * 8 + 3])
    np.testing.assert_array_equal(m.bits(23), data[target])
    pushed = np.zeros(64, U32)
    pushed[target] = data
    np.testing.assert_array_equal(m.bits(24), pushed)
    np.testing.assert_array_equal(m.bits(25), data[(target + 2) % 64])


def test_lanes_to_scalars_and_swaps(machine):
    data = (LANE + 5).astype(U32)
    m = machine("gfx950").v(10, data).v(11, data + U32(1000)).v(12, data).v(13, data + U32(1000))
    m.exec(0xFF00)
    m.s(42, 77)
    m.run(
        "v_readfirstlane_b32 s40, v10",
        "v_readlane_b32 s41, v10, 63",
        "v_writelane_b32 v10, s42, 2",
        "v_permlane32_swap_b32 v11, v12",
        "v_permlane16_swap_b32 v13, v10",
    )
    assert [int(m.after.sgpr[k]) for k in (40, 41)] == [13, 68]
    # The upper half of the first register changes places with the lower half of the second.
    np.testing.assert_array_equal(m.bits(11), np.where(LANE < 32, data + 1000, data - 32))
    np.testing.assert_array_equal(m.bits(12), np.where(LANE < 32, data + 1032, data))
    written = np.where(LANE == 2, 77, data)
    odd = LANE // 16 % 2 == 1
    np.testing.assert_array_equal(m.bits(13), np.where(odd, written[LANE - 16], data + 1000))
    below = np.where(odd, written, (data + 1000)[(LANE + 16) % 64])
    np.testing.assert_array_equal(m.bits(10), below)


# --- matrices


def _pack(codes, bits):
    """Put ``[element, lane]`` codes into registers from the lowest bit up."""
    per_word = 32 // bits
    words = np.zeros((max(1, len(codes) * bits // 32), 64), U32)
    for k, row in enumerate(codes):
        if bits == 64:
            words[2 * k] = row.astype(U32)
            words[2 * k + 1] = (row >> U64(32)).astype(U32)
        else:
            words[k // per_word] |= row.astype(U32) << U32(bits * (k % per_word))
    return words


def _codes(values, kind, arch):
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if kind in ("fp8", "bf8"):
        return tensor.float().to(EIGHT[arch, kind]).view(torch.uint8).numpy(), 8
    if kind == "i8":
        return values.astype(np.int8).view(np.uint8), 8
    if kind == "bf16":
        return tensor.float().to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), 16
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16), 16
    if kind == "f64":
        return values.astype(F64).view(U64), 64
    return values.astype(F32).view(U32), 32


def _span(first, count):
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


# Rows, columns, depth, blocks, type.
SHAPES = [
    *((16, 16, 4, 1, "f32"), (32, 32, 2, 1, "f32"), (32, 32, 1, 2, "f32"), (4, 4, 1, 16, "f32")),
    *((16, 16, 1, 4, "f32"), (16, 16, 16, 1, "f16"), (32, 32, 8, 1, "f16"), (4, 4, 4, 16, "f16")),
    *((16, 16, 16, 1, "bf16"), (32, 32, 8, 1, "bf16"), (32, 32, 4, 2, "bf16")),
    *((16, 16, 4, 4, "bf16"), (16, 16, 32, 1, "i8"), (32, 32, 16, 1, "i8"), (4, 4, 4, 16, "i8")),
    *((16, 16, 32, 1, "fp8"), (32, 32, 16, 1, "fp8"), (16, 16, 32, 1, "bf8")),
    *((16, 16, 8, 1, "xf32"), (32, 32, 4, 1, "xf32"), (16, 16, 4, 1, "f64"), (4, 4, 4, 4, "f64")),
    *((16, 16, 32, 1, "f16"), (32, 32, 16, 1, "f16"), (16, 16, 32, 1, "bf16")),
    *((32, 32, 16, 1, "bf16"), (16, 16, 64, 1, "i8"), (32, 32, 32, 1, "i8")),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}-{s[3]}-{s[4]}")
def test_matrix_products_are_plain_products(machine, seed, shape):
    """Lay whole numbers out as AMD's tables of matrix layouts say and read the product back."""
    rows, columns, depth, blocks, kind = shape
    wide = {"f16": 256, "bf16": 256, "i8": 512}.get(kind, 10**9)
    is_new = rows * depth > wide and blocks == 1
    arch = "gfx950" if is_new else "gfx942"
    rng = np.random.default_rng(seed)
    a = rng.integers(-4, 5, (blocks, rows, depth))
    b = rng.integers(-4, 5, (blocks, depth, columns))
    c = rng.integers(-4, 5, (blocks, rows, columns))
    held = rows * depth * blocks // 64
    m = machine(arch)
    # Lane: row fastest, then block, then group of consecutive k.
    index, block, group = LANE % rows, LANE // rows % blocks, LANE // (rows * blocks)
    for register, gathered in (
        (10, np.stack([a[block, index, group * held + k] for k in range(held)])),
        (20, np.stack([b[block, group * held + k, index] for k in range(held)])),
    ):
        codes, bits = _codes(gathered, kind, arch)
        for k, words in enumerate(_pack(codes, bits)):
            m.v(register + k, words)
    result = {"f64": "f64", "i8": "i32"}.get(kind, "f32")
    lanes = {}
    for k, i, j in np.ndindex(blocks, rows, columns):
        if rows == 4 and kind == "f64":
            place = 0, j + 4 * k + 16 * i
        elif rows == 4:
            place = i, j + 4 * k
        elif kind == "f64":
            place = i // 4, j + 16 * (i % 4)
        else:
            groups = 64 // columns
            per_block = rows * columns // 64
            place = k * per_block + i // (4 * groups) * 4 + i % 4, j + columns * (i // 4 % groups)
        lanes[k, i, j] = place
    width = 2 if kind == "f64" else 1
    count = rows * columns * blocks // 64
    dtype = {"f32": F32, "i32": np.int32, "f64": F64}[result]
    start = np.zeros((count, 64), dtype)
    for where, (register, lane) in lanes.items():
        start[register, lane] = c[where]
    for register in range(count):
        m.v(100 + width * register, start[register])
    pair = f"_{kind}_{kind}" if kind in ("fp8", "bf8") else f"_{kind}"
    size = f"{rows}x{columns}x{depth}" + (f"_{blocks}b" if blocks > 1 else "")
    bits = {"f64": 64, "i8": 8, "fp8": 8, "bf8": 8, "f16": 16, "bf16": 16}.get(kind, 32)
    regs = max(1, held * bits // 32)
    target = _span(100, count * width)
    # Lanes that are off take part all the same.
    m.exec(0x5555)
    m.run(f"v_mfma_{result}_{size}{pair} {target}, {_span(10, regs)}, {_span(20, regs)}, {target}")
    want = a @ b + c
    for where, (register, lane) in lanes.items():
        if kind == "f64":
            got = m.f64(100 + 2 * register)[lane]
        else:
            got = m.bits(100 + register).view(dtype)[lane]
        assert got == want[where], (where, register, lane)


def test_broadcast_of_blocks_and_lane_groups(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-4, 5, (2, 64)).astype(F32)
    base = machine().v(10, a).v(11, b)
    base.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0")
    # Block 2 of each four serves all four; the last quarter of B serves all.
    m = machine().v(10, a).v(11, b)
    m.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0 cbsz:2 abid:2 blgp:7")
    a_lanes = LANE // 16 * 16 + 8 + LANE % 4
    expected = machine().v(10, a[a_lanes]).v(11, b[48 + LANE % 16])
    expected.run("v_mfma_f32_4x4x1_16b_f32 v[20:23], v10, v11, 0")
    for register in range(20, 24):
        np.testing.assert_array_equal(m.bits(register), expected.bits(register))
        assert np.any(m.bits(register) != base.bits(register))


# --- LDS


def test_lds_atomics_return_what_was_there(machine):
    m = machine()
    m.state.lds = np.zeros(4096, np.uint8)
    m.v(10, (LANE % 4 * 4).astype(U32)).v(11, np.ones(64, U32)).v(12, (LANE + 1).astype(U32))
    m.run(
        "ds_add_rtn_u32 v20, v10, v11",
        "ds_max_rtn_u32 v21, v10, v12 offset:64",
        "ds_inc_rtn_u32 v22, v10, v11 offset:128",
        "s_waitcnt lgkmcnt(0)",
        "ds_read_b32 v23, v10",
        "ds_read_b32 v24, v10 offset:64",
        "s_waitcnt lgkmcnt(0)",
    )
    # Lanes go one after another.
    np.testing.assert_array_equal(m.bits(20), LANE // 4)
    np.testing.assert_array_equal(m.bits(21), np.where(LANE < 4, 0, LANE - 3))
    np.testing.assert_array_equal(m.bits(22), LANE // 4 % 2)
    np.testing.assert_array_equal(m.bits(23), 16)
    np.testing.assert_array_equal(m.bits(24), 61 + LANE % 4)


@pytest.mark.parametrize(("bits", "rows"), [(16, 4), (8, 8), (4, 16)])
def test_transposing_reads_give_columns(machine, seed, bits, rows):
    """Each group of 16 lanes reads a tile by rows; lane i gets column i of it."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 1 << bits, (4, rows, 16))
    m = machine("gfx950")
    m.state.lds = np.zeros(4096, np.uint8)
    per_lane = 64 // bits
    for group in range(4):
        flat = tiles[group].reshape(16, per_lane)
        for lane in range(16):
            word = sum(int(value) << bits * k for k, value in enumerate(flat[lane]))
            start = 8 * (16 * group + lane)
            m.state.lds[start : start + 8] = np.frombuffer(word.to_bytes(8, "little"), np.uint8)
    m.v(10, (LANE * 8).astype(U32))
    m.run(f"ds_read_b64_tr_b{bits} v[20:21], v10", "s_waitcnt lgkmcnt(0)")
    both = m.bits(20).astype(object) + m.bits(21).astype(object) * (1 << 32)
    for lane in range(64):
        column = tiles[lane // 16, :, lane % 16]
        assert both[lane] == sum(int(value) << bits * k for k, value in enumerate(column))


# --- registers indexed by M0


def test_register_index_mode(machine):
    m = machine().s(40, 5)
    for k in range(30):
        m.v(10 + k, U32(100 + k))
    m.run(
        "s_set_gpr_idx_on s40, gpr_idx(SRC0)",
        "v_mov_b32_e32 v60, v10",
        "s_set_gpr_idx_off",
        "s_set_gpr_idx_on s40, gpr_idx(DST)",
        "v_mov_b32_e32 v70, v10",
        "s_set_gpr_idx_off",
        "v_mov_b32_e32 v80, v10",
    )
    assert [int(m.bits(k)[0]) for k in (60, 70, 75, 80)] == [105, 0, 100, 100]
