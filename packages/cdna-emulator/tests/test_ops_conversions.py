"""Conversions against NumPy and the formats of torch, on both cores."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
directed = importlib.import_module("operation_cases.machine")
sys.path.remove(str(HERE))
machine = directed.machine
EIGHT, F32, F64, U32, ordinary_f32, same_floats = (
    directed.EIGHT,
    directed.F32,
    directed.F64,
    directed.U32,
    directed.ordinary_f32,
    directed.same_floats,
)


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
