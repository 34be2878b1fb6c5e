"""Quotients that are made without dividing give the codes of those that are divided."""

from __future__ import annotations

import numpy
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import language as tl

from mla_fusions.kernels._quantise import divided, fp8_codes, fp8_quotients

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = {7: torch.float8_e4m3fn, 8: torch.float8_e4m3fnuz}
LIMIT = {7: 448.0, 8: 240.0}
#: Scales that an element-wise division takes by a slow path, and some between.
SCALES = (
    *(1.0, 3.0, 0.05, 2.0 - 2.0**-23, 1.0 + 2.0**-23, 2.0**100, 2.0**-100, 1.1 * 2.0**127),
    *(2.0**-126, 1.7 * 2.0**-126, 2.0**-127, 3 * 2.0**-149, 2.0**-149, -0.3, -1.9 * 2.0**-130),
    *(0.0, -0.0, float("inf"), float("-inf"), float("nan")),
)
ODD = (0.0, -0.0, 2.0**-149, -(2.0**-149), 1e-40, -1e-40, 3e38, -3e38)
ODD = (*ODD, float("inf"), float("-inf"), float("nan"))


@triton.jit
def codes_kernel(
    x_ptr,
    s_ptr,
    codes_ptr,
    BIAS: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    IS_BOUND: tl.constexpr,
    IS_ONE: tl.constexpr,
    N: tl.constexpr,
):
    n = tl.arange(0, N)
    start = tl.program_id(0) * N
    s = tl.load(s_ptr + tl.program_id(0)) if IS_ONE else tl.load(s_ptr + start + n)
    codes = fp8_quotients(tl.load(x_ptr + start + n), s, BIAS, IS_NATIVE, IS_BOUND)
    tl.store(codes_ptr + start + n, codes)


@triton.jit
def rounded_kernel(x_ptr, codes_ptr, BIAS: tl.constexpr, N: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(codes_ptr + n, fp8_codes(tl.load(x_ptr + n), BIAS, False))


@triton.jit
def divided_kernel(x_ptr, s_ptr, out_ptr, LIMIT: tl.constexpr, N: tl.constexpr):
    n = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + n, divided(tl.load(x_ptr + n), tl.load(s_ptr + n), LIMIT))


def codes_of(x, s, bias, *, is_native=False, is_bound=False):
    """Return the codes of rows of x with one s each, or of elements with one each."""
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=DEVICE)
    is_one = s.ndim < x.ndim
    constants = {"BIAS": bias, "IS_NATIVE": is_native, "IS_BOUND": is_bound, "IS_ONE": is_one}
    # The interpreter would warn of infinities.
    with numpy.errstate(all="ignore"):
        codes_kernel[(x.shape[0],)](x.to(DEVICE), s.to(DEVICE), codes, **constants, N=x.shape[1])
    return codes.cpu()


def wanted(x, s, bias):
    """Return the codes of correctly rounded quotients, that torch does not saturate."""
    quotients = x / (s[:, None] if s.ndim < x.ndim else s)
    return quotients.clamp(-LIMIT[bias], LIMIT[bias]).to(DTYPE[bias]).view(torch.uint8)


def assert_codes(got, want, bias):
    # The sign of NaN is left to the chip.
    is_nan = want & 0x7F == 0x7F if bias == 7 else want == 0x80
    got_nan = got & 0x7F == 0x7F if bias == 7 else got == 0x80
    assert torch.equal(is_nan, got_nan)
    assert torch.equal(got[~is_nan], want[~is_nan])


def edges(bias):
    """Return what rounding to fp8 depends on: its numbers, and those halfway between two."""
    codes = torch.arange(127 if bias == 7 else 128).to(torch.uint8)
    numbers = codes.view(DTYPE[bias]).float()
    return torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])


def around(x):
    """Return numbers, and their closest four neighbours."""
    bits = x.view(torch.int32)
    return torch.cat([(bits + step).view(torch.float32) for step in range(-2, 3)], -1)


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("bias", [7, 8])
def test_any_scale(bias, is_native, rng):
    if is_native and bias == 8 and DEVICE == "cuda":
        pytest.skip("no chip that is tested compiled converts to fnuz")
    scales = torch.tensor(SCALES)
    odd = torch.tensor(ODD).expand(len(SCALES), -1)
    ties = (edges(bias) * scales.nan_to_num(1.0, 1.0, 1.0)[:, None]).clamp(-3e38, 3e38)
    ties = around(ties.where(ties.abs() > 1e-44, 1.0))
    spread = torch.randn(len(SCALES), 4096 - odd.shape[1] - ties.shape[1], generator=rng)
    x = torch.cat([odd, ties, 300 * spread * scales[:, None]], 1)
    x = torch.cat([x, -x], 1)
    assert_codes(codes_of(x, scales, bias, is_native=is_native), wanted(x, scales, bias), bias)


@pytest.mark.parametrize("bias", [7, 8])
def test_ties_and_their_neighbours(bias, rng):
    # Scales of any 23 bits of mantissa, and elements that lie around each edge times the scale.
    scales = torch.rand(256, generator=rng) + 1
    scales[:2] = torch.tensor([1.0, 2.0 - 2.0**-23])
    x = around(edges(bias)[1:] * scales[:, None])
    x = torch.nn.functional.pad(x, (0, 2048 - x.shape[1]), value=1.0)
    assert_codes(codes_of(x, scales, bias), wanted(x, scales, bias), bias)
    assert_codes(codes_of(x, scales[:, None].expand_as(x).contiguous(), bias),
                 wanted(x, scales, bias), bias)  # fmt: skip


@pytest.mark.parametrize("bias", [7, 8])
def test_scales_of_their_groups(bias, rng):
    # As quantisers have them: nothing is larger than 448 times the scale, which may be subnormal
    # before it is floored, infinite or NaN.
    x = torch.randn(64, 128, generator=rng) * 2.0 ** torch.linspace(-140, 120, 64)[:, None]
    x[3, 5], x[4, 6], x[5] = float("inf"), float("nan"), 0.0
    x[6] = -0.0
    amax = x.abs().amax(1)
    scales = (amax / LIMIT[bias]).clamp(min=2.0**-126)
    got = codes_of(x, scales, bias, is_bound=True)
    assert_codes(got, wanted(x, scales, bias), bias)


def test_quotients_are_rounded_correctly_where_e2m1_changes(rng):
    edge = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0])
    scales = torch.arange(1, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    x = around(edge * scales[:, None])
    x = torch.nn.functional.pad(x, (0, 128 - x.shape[1]), value=-0.0)
    s = scales[:, None].expand_as(x).contiguous()
    out = torch.zeros_like(x, device=DEVICE)
    divided_kernel[(126,)](x.to(DEVICE), s.to(DEVICE), out, LIMIT=6.0, N=128)
    assert torch.equal(out.cpu(), x / s)
    assert torch.equal(out.cpu().signbit(), x.signbit())


@pytest.mark.parametrize("bias", [7, 8])
def test_rounding_saturates(bias):
    x = torch.tensor([0.0, -0.0, 500.0, -500.0, 3e38, float("inf"), -float("inf"), float("nan")])
    codes = torch.zeros(8, dtype=torch.uint8, device=DEVICE)
    rounded_kernel[(1,)](x.to(DEVICE), codes, BIAS=bias, N=8)
    assert_codes(codes.cpu(), wanted(x[None], torch.ones(1), bias)[0], bias)
