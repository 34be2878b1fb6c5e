"""Products with one weight matrix per head, against fp64 over what the operands stand for."""

from __future__ import annotations

import json

import pytest
import torch

import mla_fusions
from mla_core import LayoutError
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import TOLERANCES, Tolerance, assert_close
from mla_core.testing.poison import poison_

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
NAME_OF = {OCP: "fp8_e4m3", FNUZ: "fp8_e4m3fnuz"}
#: Heads, tokens, N, K: whole tiles, odd tokens, odd everything, many tokens, one head split.
SHAPES = [(2, 16, 32, 128), (3, 5, 64, 96), (2, 3, 40, 160), (1, 150, 48, 64), (1, 1, 32, 512)]

a8w8 = mla_fusions.batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant


def draw(*shape, dtype=FP32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def turned(x, transpose):
    """Return x [heads, tokens, ...] in memory as [tokens, heads, ...], if so."""
    return x.transpose(0, 1).contiguous() if transpose else x


def poisoned(heads, tokens, n, dtype, transpose):
    """Return an output whose rows have poison behind them, and all its memory."""
    shape = (tokens, heads, n + 8) if transpose else (heads, tokens, n + 8)
    memory = poison_(torch.empty(shape, dtype=dtype, device=DEVICE))
    return memory[..., :n], memory


#: Of fp8 products, which the matrix unit of sm90 adds up with some 14 bits.
FP8_SUMS = Tolerance(relative_l2=2e-4, atol=2e-3, rtol=1e-3)


def check(
    call,
    x,
    expected,
    dtype=BF16,
    transposes=(False, True),
    tolerance=TOLERANCES["fp32"],
    **named,
):
    """Compare in fp32 closely, and in another dtype, transposed, between poison."""
    plain = call(x, dtype=FP32, **named)
    assert_close(plain, expected, what="y", tolerance=tolerance)
    heads, tokens, n = expected.shape
    for transpose in transposes:
        y, memory = poisoned(heads, tokens, n, dtype, transpose)
        x_in = turned(x, transpose)
        turns = {"transpose_bm": transpose, "transpose_bm_in": transpose}
        returned = call(x_in, y=y, **turns, **named)
        assert returned is y
        got = y.transpose(0, 1) if transpose else y
        assert torch.equal(got.cpu(), plain.to(dtype).cpu())
        assert memory[..., n:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves(shape, dtype, seed):
    heads, tokens, n, k = shape
    x, w = draw(heads, tokens, k, dtype=dtype), draw(heads, n, k, dtype=dtype)
    bias = draw(heads, 1, n, dtype=dtype)

    def call(x, y=None, **named):
        return mla_fusions.batched_gemm_bf16(x, w, bias, YQ=y, **named)

    check(call, x, gemm.batched_gemm(x, w, bias=bias[:, 0]), dtype)


def test_weights_that_stand_the_other_way(seed):
    """W_UK as a slice of the projection that holds it, without a copy."""
    heads, nope, v, rank = 2, 32, 16, 64
    whole = draw(heads, nope + v, rank, dtype=BF16)
    w_uk = whole[:, :nope].transpose(1, 2)
    x = draw(heads, 3, nope, dtype=BF16)
    got = mla_fusions.batched_gemm_bf16(x, w_uk, dtype=FP32)
    assert_close(got, gemm.batched_gemm(x, w_uk), what="y")
    w8 = whole.to(OCP)[:, :nope].transpose(1, 2)
    one = torch.ones(1, device=DEVICE)
    got = a8w8(x, w8, one, 32, dtype=FP32)
    assert_close(got, gemm.batched_gemm_a8w8(x, w8, 1.0, group_size=32), what="y")


@pytest.mark.parametrize("x_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("fp8", [OCP, FNUZ], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_weights(shape, fp8, x_dtype, seed):
    heads, tokens, n, k = shape
    x, w = draw(heads, tokens, k, dtype=x_dtype), draw(heads, n, k, dtype=fp8)
    x[:, 0] = 0
    scale = torch.tensor([0.375], device=DEVICE)
    bias = draw(heads, n)
    group = 32 if k % 128 else 128

    def call(x, y=None, **named):
        return a8w8(x, w, scale, group, bias, YQ=y, **named)

    expected = gemm.batched_gemm_a8w8(x, w, 0.375, fp8=NAME_OF[fp8], group_size=group, bias=bias)
    multiplies_fp8 = DEVICE == "cuda" and fp8 == OCP
    check(call, x, expected, tolerance=FP8_SUMS if multiplies_fp8 else TOLERANCES["fp32"])


def test_a_last_group_that_is_shorter(seed):
    """Groups of 128 in 160 elements: the last 32 have a scale of their own."""
    x, w = draw(2, 3, 160, dtype=BF16), draw(2, 16, 160, dtype=OCP)
    x[..., 128:] *= 1000
    one = torch.ones((), device=DEVICE)
    parts = [
        gemm.batched_gemm_a8w8(x[..., part], w[..., part], 1.0)
        for part in (slice(0, 128), slice(128, 160))
    ]
    assert_close(a8w8(x, w, one, dtype=FP32) / 1000, sum(parts) / 1000, what="y")
    # Shorter than a group, and not a power of two.
    x, w = x[..., :24].contiguous(), w[..., :24].contiguous()
    expected = gemm.batched_gemm_a8w8(x, w, 1.0)
    assert_close(a8w8(x, w, one, dtype=FP32), expected, what="y")


@pytest.mark.parametrize("prequant", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mxfp4_weights(shape, prequant, seed):
    heads, tokens, n, k = shape
    x = draw(heads, tokens, k, dtype=BF16)
    x[:, 0] = 0
    w, w_scales = quant.quantize_mxfp4(draw(heads, n, k))

    def call(x, **named):
        return mla_fusions.batched_gemm_a16wfp4(x, w, w_scales, prequant=prequant, **named)

    if prequant:
        expected = gemm.batched_gemm_mxfp4(x, w, w_scales)
    else:
        expected = gemm.batched_gemm(x, quant.dequantize_mxfp4(w, w_scales))
    check(call, x, expected)
    if prequant:
        older = mla_fusions.batched_gemm_afp4wfp4_pre_quant(x, w, w_scales, FP32)
        assert torch.equal(older, call(x, dtype=FP32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mxfp4_on_both_sides(shape, seed):
    heads, tokens, n, k = shape
    x, x_scales = quant.quantize_mxfp4(draw(heads, tokens, k))
    w, w_scales = quant.quantize_mxfp4(draw(heads, n, k))
    # The dtypes that torch has for such bytes.
    named = w.view(torch.float4_e2m1fn_x2), w_scales.view(torch.float8_e8m0fnu)

    def call(x, transpose_bm_in=False, **rest):
        scales = turned(x_scales, transpose_bm_in)
        weights, factors = named if transpose_bm_in else (w, w_scales)
        return mla_fusions.batched_gemm_afp4wfp4(
            x, weights, scales, factors, transpose_bm_in=transpose_bm_in, **rest
        )

    check(call, x, gemm.batched_gemm_mxfp4(x, w, w_scales, x_scales=x_scales))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nvfp4_weights(shape, dtype, seed):
    heads, tokens, n, k = shape
    x = draw(heads, tokens, k, dtype=dtype)
    w, w_scales = quant.quantize_nvfp4(draw(heads, n, k))
    factor = torch.tensor([0.25], device=DEVICE)

    def call(x, **named):
        return mla_fusions.batched_gemm_a16wnvfp4(x, w, w_scales, w_global_scale=factor, **named)

    expected = gemm.batched_gemm(x, quant.dequantize_nvfp4(w, w_scales)) * 0.25
    check(call, x, expected)


def test_activations_are_quantised_as_the_reference_does(seed):
    """Weights that pick out single activations show what those became, ties and all."""
    eighths = torch.arange(-64, 64, device=DEVICE) / 8
    x = torch.stack([eighths, eighths / 2, draw(128), draw(128) * 1e-38, draw(128) * 1e37])[None]
    x[0, 0, :32] = torch.linspace(-1.9, 1.9, 32)
    w, w_scales = quant.quantize_mxfp4(torch.eye(128, device=DEVICE)[None])
    got = mla_fusions.batched_gemm_a16wfp4(x, w, w_scales, FP32)
    expected = quant.dequantize_mxfp4(*quant.quantize_mxfp4(x), dtype=FP32)
    assert torch.equal(got, expected)
    w = torch.eye(128, device=DEVICE)[None].to(OCP)
    one = torch.ones(1, device=DEVICE)
    x = x.bfloat16()
    stored, scales = quant.quantize_groups(x, 32, min_amax=1e-10)
    expected = quant.dequantize_groups(stored, scales, dtype=FP32)
    assert torch.equal(a8w8(x, w, one, 32, dtype=FP32), expected)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits_of_k(splits, seed):
    x, w = draw(2, 5, 320, dtype=BF16), draw(2, 48, 320, dtype=BF16)
    bias, scale = draw(2, 48), torch.tensor([0.375], device=DEVICE)
    config = {"BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 4}
    got = mla_fusions.batched_gemm_bf16(
        x, w, bias, FP32, splitK=splits, config=config, transpose_bm=True
    )
    expected = gemm.batched_gemm(x, w, bias=bias, transpose_out=True)
    assert_close(got, expected, what="y")
    w8 = w.to(OCP)
    got = a8w8(x, w8, scale, 64, bias, FP32, splitK=splits)
    expected = gemm.batched_gemm_a8w8(x, w8, 0.375, group_size=64, bias=bias)
    assert_close(got, expected, what="y")
    packed, scales = quant.quantize_mxfp4(w)
    y, memory = poisoned(2, 5, 48, OCP, False)
    mla_fusions.batched_gemm_a16wfp4(
        x, packed, scales, y=y, config=json.dumps({**config, "NUM_KSPLIT": splits}), y_scale=scale
    )
    expected = quant.to_fp8(gemm.batched_gemm_mxfp4(x, packed, scales).float() / 0.375)
    assert_close(y.float(), expected.float(), what="y", dtype="fp8_e4m3")
    assert memory[..., 48:].isnan().all()


def test_few_heads_are_split_unasked():
    from mla_fusions.absorbed import choose_tiles

    assert choose_tiles(1, 1, 128, 512, arch="sm90").splits == 4
    assert choose_tiles(16, 1, 128, 512, arch="sm90").splits == 1
    assert choose_tiles(128, 1, 512, 128, arch="sm90").block_n == 128


@pytest.mark.parametrize("fp8", [OCP, FNUZ], ids=str)
def test_results_in_fp8_saturate(fp8, seed):
    x = draw(2, 5, 64, dtype=BF16) * 8
    w, w_scales = quant.quantize_mxfp4(draw(2, 48, 64))
    scale = torch.tensor([0.05], device=DEVICE)
    got = mla_fusions.batched_gemm_a16wfp4(x, w, w_scales, fp8, y_scale=scale)
    whole = mla_fusions.batched_gemm_a16wfp4(x, w, w_scales, FP32)
    expected = quant.to_fp8(whole / scale, NAME_OF[fp8])
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert (got.float().abs() == torch.finfo(fp8).max).any()


# NumPy warns of what the interpreter multiplies.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_shows(seed):
    x = draw(1, 4, 64, dtype=BF16)
    x[0, 1, 3], x[0, 2, 40] = float("nan"), float("inf")
    w, w_scales = quant.quantize_mxfp4(draw(1, 16, 64))
    for prequant in (True, False):
        y = mla_fusions.batched_gemm_a16wfp4(x, w, w_scales, prequant=prequant)
        bad = ~y.isfinite().all(-1)
        assert bad.tolist() == [[False, True, True, False]]
    w_scales[0, 5, 1] = 255
    y = mla_fusions.batched_gemm_a16wfp4(x[:, :1], w, w_scales)
    assert y.isnan()[0, 0].nonzero().tolist() == [[5]]
    one = torch.ones(1, device=DEVICE)
    y = a8w8(x, draw(1, 16, 64).to(OCP), one)
    assert y.isnan().all(-1).tolist() == [[False, True, True, False]]


def test_scales_at_the_ends_of_their_range():
    """Small powers of two, and the subnormal one of byte 0."""
    w = torch.full((1, 16, 16), 0x22, dtype=torch.uint8, device=DEVICE)
    scales = torch.tensor([0, 1, 127, 253], dtype=torch.uint8, device=DEVICE)
    for k, byte in enumerate(scales):
        factor = 2.0 ** (int(byte) - 127)
        x = torch.full((1, 1, 32), 1 / 32 / factor if k < 3 else 2.0**-127, device=DEVICE)
        got = mla_fusions.batched_gemm_a16wfp4(
            x.bfloat16(), w, byte.expand(1, 16, 1), FP32, prequant=False
        )
        expected = x.bfloat16().double().sum() * factor
        assert_close(got.double(), expected.expand(1, 1, 16).double(), what="y", dtype="fp32")


@pytest.mark.parametrize(("heads", "tokens"), [(2, 0), (0, 3)])
def test_nothing_to_do(heads, tokens):
    x, w = draw(heads, tokens, 32, dtype=BF16), draw(heads, 16, 32, dtype=BF16)
    assert mla_fusions.batched_gemm_bf16(x, w).shape == (heads, tokens, 16)


def test_bytes_behind_rows_are_not_read(seed):
    """Rows of activations, weights and scales lie in wider memory that is NaN."""
    heads, tokens, n, k = 2, 3, 20, 96
    wide = poison_(torch.empty(heads, tokens, k + 16, dtype=BF16, device=DEVICE))
    wide[..., :k] = draw(heads, tokens, k)
    packed, scales = quant.quantize_mxfp4(draw(heads, n, k))
    w = poison_(torch.empty(heads, n + 4, k, dtype=torch.uint8, device=DEVICE))
    w[:, :n, : k // 2] = packed
    s = poison_(torch.empty(heads, n + 4, k, dtype=torch.uint8, device=DEVICE))
    s[:, :n, : k // 32] = scales
    got = mla_fusions.batched_gemm_a16wfp4(
        wide[..., :k], w[:, :n, : k // 2], s[:, :n, : k // 32], FP32, prequant=False
    )
    expected = gemm.batched_gemm(wide[..., :k], quant.dequantize_mxfp4(packed, scales))
    assert_close(got, expected, what="y")


def refusals():
    """Yield calls that must be refused, each with a part of the message."""
    x, w = torch.zeros(2, 3, 64, dtype=BF16), torch.zeros(2, 16, 64, dtype=BF16)
    fp4 = torch.zeros(2, 16, 32, dtype=torch.uint8)
    s32, s16 = fp4[..., :2], fp4[..., :4].view(OCP)
    one = torch.ones(1)
    f = mla_fusions
    yield "XQ must be bfloat16", lambda: f.batched_gemm_bf16(x.float(), w)
    yield "WQ must be \\[2, N, 64\\]", lambda: f.batched_gemm_bf16(x, w[:1])
    yield "WQ must be bfloat16", lambda: f.batched_gemm_bf16(x, w.half())
    yield "dtype must be", lambda: f.batched_gemm_bf16(x, w, dtype=torch.int8)
    yield "bias must be", lambda: f.batched_gemm_bf16(x, w, torch.zeros(2, 15))
    yield (
        "YQ must be \\[3, 2, 16\\]",
        lambda: f.batched_gemm_bf16(x, w, YQ=torch.zeros(2, 3, 16), transpose_bm=True),
    )
    yield "splits must be at least 1", lambda: f.batched_gemm_bf16(x, w, splitK=0)
    yield "power of two from 16 on", lambda: f.batched_gemm_bf16(x, w, config={"BLOCK_SIZE_N": 24})
    yield "at least 1 as K", lambda: f.batched_gemm_bf16(x[..., :0], w[..., :0])
    yield "group_size must be a power of two", lambda: a8w8(x, w.to(OCP), one, 48)
    yield "w_scale must be fp32 with one", lambda: a8w8(x, w.to(OCP), torch.ones(2))
    yield "WQ must be float8", lambda: a8w8(x, w, one)
    yield "multiple of 32 as K", lambda: f.batched_gemm_a16wfp4(x[..., :48], fp4, s32)
    yield "x must be bfloat16", lambda: f.batched_gemm_a16wfp4(x.half(), fp4, s32, prequant=False)
    yield "w_scales must be \\[2, 16, 2\\]", lambda: f.batched_gemm_a16wfp4(x, fp4, fp4[..., :1])
    yield "w must be \\[2, N, 32\\]", lambda: f.batched_gemm_a16wfp4(x, fp4[..., :16], s32)
    yield "x_scales must be", lambda: f.batched_gemm_afp4wfp4(fp4, fp4, s16, s32)
    yield "w_scales must be float8_e4m3fn", lambda: f.batched_gemm_a16wnvfp4(x, fp4, fp4[..., :4])


@pytest.mark.parametrize(("message", "call"), tuple(refusals()), ids=lambda value: str(value)[:40])
def test_refusals(message, call):
    with pytest.raises(LayoutError, match=message):
        call()
