"""Quantisation of rows: literal codes, and agreement with the reference formulas."""

from __future__ import annotations

import math

import pytest
import torch

from mla_core import layouts
from mla_core.dims import MLADims
from mla_core.layouts.codecs import (
    GroupScaled,
    NvFp4,
    PerTensor,
    TokenScaled,
    e8m0_ceil,
    e8m0_value,
    fp4_decode,
    fp4_encode,
)
from mla_core.reference import quant

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize(("dtype", "limit"), [("fp8_e4m3", 448.0), ("fp8_e4m3fnuz", 240.0)])
def test_per_tensor_saturates(dtype: str, limit: float) -> None:
    codec, scale = PerTensor(dtype), torch.tensor([0.5])
    x = torch.tensor([[0.0, 1.0, -3.0, 1e9, -1e9, math.inf, math.nan]])
    got = codec.decode(codec.encode(x, scale), scale, torch.float32)
    expected = torch.tensor([[0.0, 1.0, -3.0, limit / 2, -limit / 2, limit / 2, math.nan]])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_the_same_byte_is_another_number_in_the_other_flavour() -> None:
    one = torch.tensor([1.0])
    (ocp,) = PerTensor("fp8_e4m3").encode(one, one)
    (fnuz,) = PerTensor("fp8_e4m3fnuz").encode(one, one)
    assert ocp.view(torch.uint8).item() == 0x38
    assert fnuz.view(torch.uint8).item() == 0x40


@pytest.mark.parametrize(
    ("x", "byte"),
    [
        (1.0, 127),
        (1.0000001, 128),
        (0.9999999, 127),
        (2.0, 128),
        (2.5, 129),
        (0.5, 126),
        (1e-4, 114),
        (math.inf, 255),
        (math.nan, 255),
    ],
)
def test_e8m0_rounds_up(x: float, byte: int) -> None:
    got = e8m0_ceil(torch.tensor([x]))
    assert got.tolist() == [byte]
    if byte < 255:
        value = e8m0_value(got).item()
        assert value == 2.0 ** (byte - 127)
        assert value / 2 < x <= value


def test_e8m0_value_of_every_byte() -> None:
    values = e8m0_value(torch.arange(256).to(torch.uint8))
    assert values[:255].double().tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert values[255].isnan()


def test_fp4_rounds_to_the_nearest_with_ties_to_even() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.linspace(-8, 8, 4097), torch.randn(1000) * 3])
    got = fp4_encode(x)
    for value, code in zip(x.tolist(), got.tolist(), strict=True):
        distance = [abs(abs(value) - v) for v in FP4_VALUES]
        near = [c for c in range(8) if distance[c] == min(distance)]
        expected = next(c for c in near if c % 2 == 0 or len(near) == 1)
        assert code & 7 == expected, value
        assert (code >> 3 == 1) == (math.copysign(1, value) < 0)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert fp4_encode(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert fp4_decode(torch.arange(16).to(torch.uint8)).tolist() == [
        *FP4_VALUES,
        *(-v for v in FP4_VALUES),
    ]


def test_group_scales_literally() -> None:
    x = torch.zeros(1, 512)
    x[0, 3], x[0, 128], x[0, 383] = -896.0, 448.0, 1e-3
    codes, scales = GroupScaled("fp8_e4m3", 128).encode(x, None)
    expected = torch.tensor([[2.0, 1.0, torch.tensor(1e-3).div(448).item(), 2.0**-126]])
    torch.testing.assert_close(scales, expected, rtol=0, atol=0)
    assert codes.float()[0, [3, 128, 383, 384]].tolist() == [-448.0, 448.0, 448.0, 0.0]

    codes, scales = GroupScaled("fp8_e4m3", 128, e8m0=True).encode(x, None)
    # 2, 1, the floor 1e-4 rounded up to 2 ** -13, twice
    assert scales.tolist() == [[128, 127, 114, 114]]
    assert codes.float()[0, [3, 128]].tolist() == [-448.0, 448.0]

    _, scales = GroupScaled("fp8_e4m3", 128, min_amax=1e-4).encode(torch.zeros(1, 128), None)
    assert scales.item() == pytest.approx(1e-4 / 448)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e4m3fnuz"])
@pytest.mark.parametrize(
    ("group", "e8m0", "min_amax"), [(128, False, 0.0), (128, False, 1e-4), (64, True, 0.0)]
)
def test_groups_agree_with_the_reference(
    dtype: str, group: int, e8m0: bool, min_amax: float
) -> None:
    seed = torch.seed() % 2**31
    print("seed", seed)
    torch.manual_seed(seed)
    x = torch.randn(20, 512) * 10 ** (torch.rand(20, 1) * 12 - 6)
    x[0] = 0
    codec = GroupScaled(dtype, group, e8m0=e8m0, min_amax=min_amax)
    codes, scales = codec.encode(x, None)
    want_codes, factors = quant.quantize_groups(
        x,
        group,
        fp8=dtype,
        scale_format="ue8m0" if e8m0 else "fp32",
        min_amax=min_amax,
        min_scale=1e-4 if e8m0 else torch.finfo(torch.float32).tiny,
    )
    assert torch.equal(e8m0_value(scales) if e8m0 else scales, factors)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    got = codec.decode((codes, scales), None, torch.float64)
    want = quant.dequantize_groups(want_codes, factors)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "limit"), [("fp8_e4m3", 448.0), ("fp8_e4m3fnuz", 240.0)])
def test_token_scales_literally(dtype: str, limit: float) -> None:
    x = torch.zeros(3, 96)
    x[0, 3], x[0, 95], x[1, 0] = -2 * limit, 2.0, limit
    codec = TokenScaled(dtype)
    codes, scales = codec.encode(x, None)
    assert scales.tolist() == [[2.0], [1.0], [2.0**-126]]
    assert codes.float()[0, [3, 95]].tolist() == [-limit, 1.0]
    assert torch.equal(codec.decode((codes, scales), None, torch.float32), x)


def test_nvfp4_agrees_with_the_reference() -> None:
    seed = torch.seed() % 2**31
    print("seed", seed)
    torch.manual_seed(seed)
    x = torch.randn(50, 256) * 10 ** (torch.rand(50, 1) * 4 - 2)
    x[0] = 0
    packed, scales = NvFp4().encode(x, None)
    want_packed, want_scales = quant.quantize_nvfp4(x)
    assert torch.equal(packed, want_packed)
    assert torch.equal(scales.float(), want_scales.float())
    got = NvFp4().decode((packed, scales), None, torch.float32)
    assert torch.equal(got, quant.dequantize_nvfp4(want_packed, want_scales, dtype=torch.float32))


def test_nan_in_a_row_stays_in_its_group() -> None:
    layout = layouts.get("fp8_ds656")
    kv_c, k_pe = torch.ones(1, 512), torch.ones(1, 64)
    kv_c[0, 130] = math.nan
    got, rope = layout.dequantise(layout.quantise(kv_c, k_pe), MLADims(1))
    assert got[0, 130].isnan()
    assert not got[0, :128].isnan().any()
    assert not got[0, 256:].isnan().any()
    assert not rope.isnan().any()


@pytest.mark.parametrize(("name", "limit"), [("indexer", 448), ("indexer_shuffled_fnuz", 240)])
def test_indexer_scales_have_a_floor(name: str, limit: int) -> None:
    keys = torch.zeros(2, 128)
    keys[1, 7] = limit
    stored = layouts.get(name).quantise(keys, torch.zeros(2, 0))
    assert stored["kv_c_scale"].flatten().tolist() == pytest.approx([1e-4 / limit, 1.0])
