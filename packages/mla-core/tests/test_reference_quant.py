"""Quantisers against scalar formats written out with Python's exact fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference.quant import (
    ceil_power_of_two,
    dequantize_groups,
    dequantize_mxfp4,
    dequantize_nvfp4,
    e2m1_decode,
    e2m1_encode,
    e8m0_decode,
    e8m0_encode,
    pack_nibbles,
    quantize_groups,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_per_tensor,
    to_fp8,
    unpack_nibbles,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
#: exponent bits, mantissa bits, exponent bias, largest finite value
FORMATS = {
    "fp8_e4m3": (4, 3, 7, 448.0),
    "fp8_e4m3fnuz": (4, 3, 8, 240.0),
    "fp8_e5m2": (5, 2, 15, 57344.0),
}


def fp8_magnitudes(fp8):
    """Every finite magnitude of a format, ascending, so that the index is the byte."""
    exponent_bits, mantissa_bits, bias, largest = FORMATS[fp8]
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = Fraction(mantissa, 2**mantissa_bits)
            if exponent == 0:
                value = fraction * Fraction(2) ** (1 - bias)
            else:
                value = (1 + fraction) * Fraction(2) ** (exponent - bias)
            if value <= largest:
                values.append(value)
    return values


def nearest_even(x, magnitudes):
    """Index of the magnitude nearest to ``x``; a tie takes the even index."""
    x = Fraction(x)
    return min(range(len(magnitudes)), key=lambda i: (abs(magnitudes[i] - x), i % 2))


finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
moderate_floats = st.floats(-600, 600, width=32)


# --- fp8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", FORMATS)
@settings(deadline=None, max_examples=40)
@given(x=st.one_of(finite_floats, moderate_floats, st.floats(-0.125, 0.125, width=32)))
def test_to_fp8_is_nearest_even_and_saturates(fp8, x):
    magnitudes = fp8_magnitudes(fp8)
    expected = math.copysign(float(magnitudes[nearest_even(abs(x), magnitudes)]), x)
    assert to_fp8(torch.tensor(x), fp8).double().item() == expected


@pytest.mark.parametrize("fp8", FORMATS)
def test_to_fp8_at_every_value_and_every_tie(fp8):
    magnitudes = fp8_magnitudes(fp8)
    values = torch.tensor([float(m) for m in magnitudes])
    assert torch.equal(to_fp8(values, fp8).float(), values)
    assert to_fp8(values, fp8).view(torch.uint8).tolist() == list(range(len(magnitudes)))
    ties = (values[1:] + values[:-1]) / 2
    codes = to_fp8(ties, fp8).view(torch.uint8).tolist()
    assert codes == [i if i % 2 == 0 else i + 1 for i in range(len(ties))]


@pytest.mark.parametrize(("fp8", "largest"), [("fp8_e4m3", 448.0), ("fp8_e4m3fnuz", 240.0)])
def test_beyond_the_range_and_nan(fp8, largest):
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, 464.1, math.nan])
    stored = to_fp8(x, fp8).float()
    assert stored[:5].tolist() == [largest, -largest, largest, -largest, largest]
    assert stored[5].isnan()


def test_flavours_disagree_by_a_factor_of_two():
    x = torch.tensor([1.0, -3.5, 100.0])
    ocp, fnuz = (to_fp8(x, fp8).view(torch.uint8) for fp8 in ("fp8_e4m3", "fp8_e4m3fnuz"))
    assert torch.equal(fnuz, ocp + 8)
    assert to_fp8(torch.tensor(-0.0), "fp8_e4m3fnuz").view(torch.uint8).item() == 0


# --- scales ------------------------------------------------------------------------------------


def test_per_tensor_scale_is_a_dequantisation_factor():
    x = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    stored, scale = quantize_per_tensor(x, 0.25)
    assert stored.float().tolist() == [[4.0, -8.0], [2.0, 0.0]]
    assert scale.item() == 0.25
    stored, scale = quantize_per_tensor(x, torch.tensor([0.25]), fp8="fp8_e4m3fnuz")
    assert stored.float().tolist() == [[4.0, -8.0], [2.0, 0.0]]
    assert scale.shape == ()


@pytest.mark.parametrize("fp8", FORMATS)
def test_per_tensor_default_scale_uses_the_whole_range(rng, fp8):
    x = torch.randn(5, 7, generator=rng)
    stored, scale = quantize_per_tensor(x, fp8=fp8)
    assert stored.float().abs().max().item() == FORMATS[fp8][3]
    assert scale.item() == pytest.approx(x.abs().max().item() / FORMATS[fp8][3])


@pytest.mark.parametrize("shape", [(0, 4), (2, 4)])
def test_per_tensor_zeros(shape):
    stored, scale = quantize_per_tensor(torch.zeros(shape))
    assert (stored.float() == 0).all()
    assert scale > 0


@pytest.mark.parametrize("fp8", FORMATS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_groups_by_scalar_loop(rng, fp8, group_size, scale_format):
    x = torch.randn(3, 128, generator=rng) * torch.tensor([[1e-3], [1.0], [1e3]])
    stored, scales = quantize_groups(x, group_size, fp8=fp8, scale_format=scale_format)
    assert stored.shape == x.shape
    assert scales.shape == (3, 128 // group_size)
    assert scales.dtype == torch.float32
    for row in range(3):
        for group in range(128 // group_size):
            part = slice(group * group_size, (group + 1) * group_size)
            exact = x[row, part].abs().max().item() / FORMATS[fp8][3]
            scale = scales[row, group].item()
            if scale_format == "ue8m0":
                assert scale == 2.0 ** math.ceil(math.log2(exact))
            else:
                assert scale == pytest.approx(exact, rel=1e-6)
            expected = to_fp8(x[row, part] / scales[row, group], fp8)
            assert torch.equal(stored[row, part].view(torch.uint8), expected.view(torch.uint8))


def test_group_error_is_half_a_step(rng):
    x = torch.randn(16, 128, generator=rng)
    stored, scales = quantize_groups(x, 32)
    back = dequantize_groups(stored, scales)
    amax = x.double().unflatten(-1, (-1, 32)).abs().amax(dim=-1, keepdim=True)
    error = (back - x.double()).unflatten(-1, (-1, 32)).abs()
    # Three mantissa bits: half a step is 1/16 of the binade's lower end, here 256 of 448.
    assert (error <= amax * (256 / 448) / 16 * (1 + 1e-6)).all()
    assert error.max() > 0


def test_group_floors():
    zeros = torch.zeros(1, 64)
    stored, scales = quantize_groups(zeros, 64)
    assert (stored.float() == 0).all()
    assert scales.item() == torch.finfo(torch.float32).tiny
    _, scales = quantize_groups(zeros, 64, min_amax=1e-4)
    assert scales.item() == pytest.approx(1e-4 / 448)
    _, scales = quantize_groups(zeros, 64, min_scale=1e-4, scale_format="ue8m0")
    assert scales.item() == 2.0**-13


def test_dequantize_groups_by_hand():
    stored = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    back = dequantize_groups(stored, torch.tensor([[10.0, 0.5]]))
    assert back.tolist() == [[10.0, 20.0, 1.5, 2.0]]
    assert back.dtype == torch.float64


@settings(deadline=None, max_examples=40)
@given(exponent=st.integers(-126, 126), ulps=st.integers(-3, 3))
def test_ceil_power_of_two(exponent, ulps):
    bits = struct.unpack("<i", struct.pack("<f", 2.0**exponent))[0] + ulps
    x = struct.unpack("<f", struct.pack("<i", bits))[0]
    expected = 2.0**exponent if ulps <= 0 else 2.0 ** (exponent + 1)
    assert ceil_power_of_two(torch.tensor(x)).item() == expected


def test_e8m0_bytes():
    codes = torch.arange(256).to(torch.uint8)
    values = e8m0_decode(codes)
    assert values[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert values[255].isnan()
    assert torch.equal(e8m0_encode(values[:255]), codes[:255])
    assert e8m0_decode(codes[:1], dtype=torch.float32).item() == 2.0**-127
    beyond = torch.tensor([2.0**-140, 2.0**127, 2.0**130], dtype=torch.float64)
    assert e8m0_encode(beyond).tolist() == [0, 254, 254]


# --- fp4 ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(x=st.floats(-10, 10, width=32))
def test_e2m1_is_nearest_even(x):
    code = e2m1_encode(torch.tensor([x])).item()
    magnitude = nearest_even(abs(x), [Fraction(m) for m in E2M1])
    assert code == magnitude + 8 * (math.copysign(1.0, x) < 0)


@pytest.mark.parametrize(
    ("x", "value"),
    [
        (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),
        (0.2500001, 0.5), (0.7499999, 0.5), (4.9999995, 4.0), (5.0000005, 6.0),
        (6.0, 6.0), (7.0, 6.0), (1e30, 6.0), (math.inf, 6.0), (1e-45, 0.0), (0.0, 0.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_e2m1_directed(x, value, sign):
    decoded = e2m1_decode(e2m1_encode(torch.tensor([sign * x]))).item()
    assert decoded == sign * value
    assert math.copysign(1.0, decoded) == sign


def test_e2m1_decode_is_the_table():
    assert e2m1_decode(torch.arange(16).to(torch.uint8)).tolist() == E2M1 + [-m for m in E2M1]


def test_nibbles_low_half_is_the_even_element():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_nibbles(packed), codes)
    with pytest.raises(LayoutError, match="codes must have an even last dimension"):
        pack_nibbles(codes[:, :3])


def scalar_mxfp4(group):
    """Byte of the scale and the 32 codes, from the float's bits and exact fractions."""
    amax = max(abs(x) for x in group)
    bits = struct.unpack("<I", struct.pack("<f", amax))[0]
    rounded = struct.unpack("<f", struct.pack("<I", (bits + 0x200000) & 0xFF800000))[0]
    exponent = -127 if rounded == 0.0 else max(int(math.log2(rounded)) - 2, -127)
    codes = []
    for x in group:
        magnitude = Fraction(abs(x)) / Fraction(2) ** exponent
        code = nearest_even(magnitude, [Fraction(m) for m in E2M1])
        codes.append(code + 8 * (math.copysign(1.0, x) < 0))
    return exponent + 127, codes


@settings(deadline=None, max_examples=40)
@given(
    group=st.lists(st.floats(-1, 1, width=32), min_size=32, max_size=32),
    exponent=st.integers(-100, 100),
)
def test_mxfp4_matches_the_scalar_rule(group, exponent):
    x = torch.tensor(group) * 2.0**exponent
    packed, scales = quantize_mxfp4(x)
    byte, codes = scalar_mxfp4(x.tolist())
    assert scales.tolist() == [byte]
    assert unpack_nibbles(packed).tolist() == codes


@pytest.mark.parametrize(
    ("amax", "byte"),
    [
        (1.0, 125),
        (1.7499999, 125),  # the mantissa does not carry: 2 ** -2, and amax saturates at 6
        (1.75, 126),
        (2.0, 126),
        (6.0, 127),
        (6.9999995, 127),
        (7.0, 128),
        (0.0, 0),
        (1e-45, 0),
        (2.0**-126, 0),
        (2.0**-125, 0),
        (2.0**-124, 1),
    ],
)
def test_mxfp4_scale_directed(amax, byte):
    x = torch.zeros(32)
    x[5] = -amax
    packed, scales = quantize_mxfp4(x)
    assert scales.tolist() == [byte]
    assert (byte, unpack_nibbles(packed).tolist()) == scalar_mxfp4(x.tolist())


def test_mxfp4_round_trip_and_shapes(rng):
    x = torch.randn(2, 3, 64, generator=rng)
    packed, scales = quantize_mxfp4(x)
    assert packed.shape == (2, 3, 32)
    assert scales.shape == (2, 3, 2)
    back = dequantize_mxfp4(packed, scales)
    again = dequantize_mxfp4(*quantize_mxfp4(back))
    assert torch.equal(again, back)
    by_hand = e2m1_decode(unpack_nibbles(packed)) * e8m0_decode(scales).repeat_interleave(32, -1)
    assert torch.equal(back, by_hand)
    assert (back - x).norm() < 0.2 * x.norm()


def test_nvfp4_matches_the_scalar_rule(rng):
    x = torch.randn(4, 32, generator=rng) * torch.tensor([[1e-2], [1.0], [30.0], [1e5]])
    packed, scales = quantize_nvfp4(x)
    magnitudes = fp8_magnitudes("fp8_e4m3")
    codes = unpack_nibbles(packed)
    for row in range(4):
        for group in range(2):
            part = x[row, 16 * group : 16 * (group + 1)]
            amax = (part.abs().max() / 6.0).item()
            scale = magnitudes[nearest_even(amax, magnitudes)]
            assert scales[row, group].double().item() == float(scale)
            for i, value in enumerate(part.tolist()):
                quotient = (torch.tensor(value) / torch.tensor(float(scale))).item()
                code = nearest_even(abs(quotient), [Fraction(m) for m in E2M1])
                assert codes[row, 16 * group + i].item() == code + 8 * (value < 0)
    back = dequantize_nvfp4(packed, scales)
    assert torch.equal(back, e2m1_decode(codes) * scales.double().repeat_interleave(16, -1))
    assert (back[:3] - x[:3]).norm() < 0.2 * x[:3].norm()


def test_nvfp4_group_below_the_smallest_scale_is_zero():
    x = torch.full((16,), 6 * 2.0**-11)
    packed, scales = quantize_nvfp4(x)
    assert scales.float().item() == 0.0
    assert (packed == 0).all()
    assert (dequantize_nvfp4(packed, scales) == 0).all()


@pytest.mark.parametrize(
    ("quantize", "width"),
    [(quantize_mxfp4, 48), (quantize_nvfp4, 24), (lambda x: quantize_groups(x, 128), 64)],
)
def test_ragged_groups_are_refused(quantize, width):
    with pytest.raises(LayoutError, match="x must have a last dimension that is a multiple of"):
        quantize(torch.zeros(2, width))


def test_scales_must_divide_the_row():
    with pytest.raises(LayoutError, match="scales must have a last dimension that divides 6"):
        dequantize_groups(torch.zeros(2, 6), torch.ones(2, 4))
    with pytest.raises(LayoutError, match="scales must have a last dimension that divides 6"):
        dequantize_groups(torch.zeros(2, 6), torch.ones(2, 0))
