"""Norms of query and key, and the query's quantiser, against fp64 and core's quantisers."""

from __future__ import annotations

from enum import Enum

import pytest
import torch

import mla_fusions
from mla_core import LayoutError
from mla_core.reference import quant
from mla_core.reference.norm import rms_norm
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
NAME_OF = {OCP: "fp8_e4m3", FNUZ: "fp8_e4m3fnuz"}
EPS = 1e-5


class QuantType(Enum):
    """As much of ROCm/aiter's as names go."""

    No = 0
    per_Token = 2
    per_1x32 = 3
    per_1x128 = 4


def draw(*shape, dtype=BF16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def side_by_side(num_tokens, n, w, dtype=BF16):
    """Return q and k as one projection makes them, with poison behind."""
    both = poison_(torch.empty(num_tokens, n + w + 8, dtype=dtype, device=DEVICE))
    both[:, : n + w] = draw(num_tokens, n + w, dtype=dtype) * 3
    return both[:, :n], both[:, n : n + w]


def poisoned(rows, columns, dtype):
    memory = poison_(torch.empty(rows, columns + 16, dtype=dtype, device=DEVICE))
    return memory[:, :columns], memory


def is_poison(memory, columns):
    rest = memory[:, columns:]
    if rest.dtype == torch.uint8:
        return bool((rest == 255).all())
    return bool(rest.float().isnan().all())


def close_codes(got, expected):
    """Compare fp8 by value: fp32 may round the other way than fp64 at ties."""
    got, expected = got.float().cpu(), expected.float().cpu()
    assert (got != expected).float().mean() < 0.02
    torch.testing.assert_close(got, expected, rtol=0.13, atol=2.0**-6)


@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("fp8", [OCP, FNUZ], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("group", [None, 64])
def test_fp8(dtype, fp8, group, has_residual, is_gemma, seed):
    """Widths that are no powers of two, the last group being shorter."""
    m, n, w = 5, 352, 48
    q, k = side_by_side(m, n, w, dtype)
    q_weight, k_weight = draw(n, dtype=dtype), draw(w, dtype=dtype)
    residual = draw(m, n, dtype=dtype) if has_residual else None
    groups = 1 if group is None else -(-n // group)
    codes, codes_memory = poisoned(m, n, fp8)
    scales, scales_memory = poisoned(m, groups, FP32)
    whole, whole_memory = poisoned(m, n, dtype)
    k_out, k_memory = poisoned(m, w, dtype)
    kept, kept_memory = poisoned(m, n, dtype)
    arguments = (
        codes, scales, q, q_weight, EPS, whole, k_out, kept if has_residual else None,
        k, k_weight, 1e-3, residual,
    )  # fmt: skip
    if group is None:
        mla_fusions.fused_qk_rmsnorm_per_token_quant(*arguments, is_gemma)
    else:
        mla_fusions.fused_qk_rmsnorm_group_quant(*arguments, group, False, is_gemma)
    y, total = rms_norm(q, q_weight, EPS, residual=residual, is_gemma=is_gemma)
    expected_k, _ = rms_norm(k, k_weight, 1e-3, is_gemma=is_gemma)
    assert_close(whole, y, what="q")
    assert_close(k_out, expected_k, what="k")
    if has_residual:
        assert torch.equal(kept, total.float().to(dtype))
    for start in range(0, n, group or n):
        part = slice(start, start + (group or n))
        size = y[:, part].shape[1]
        stored, factors = quant.quantize_groups(
            y[:, part].float(), size, fp8=NAME_OF[fp8], min_amax=1e-10
        )
        at = start // (group or n)
        torch.testing.assert_close(scales[:, at : at + 1], factors, rtol=1e-5, atol=0)
        close_codes(codes[:, part], stored)
    for memory, columns in (
        (codes_memory, n), (scales_memory, groups), (whole_memory, n), (k_memory, w),
        (kept_memory, n if has_residual else 0),
    ):  # fmt: skip
        assert is_poison(memory, columns)


@pytest.mark.parametrize("has_residual", [False, True])
def test_mxfp4(has_residual, seed):
    m, n = 5, 96
    q, _ = side_by_side(m, n, 8)
    q[0] = 0
    weight = draw(n)
    residual = draw(m, n) if has_residual else None
    codes, codes_memory = poisoned(m, n // 2, torch.uint8)
    scales, scales_memory = poisoned(m, 3, torch.uint8)
    mla_fusions.fused_qk_rmsnorm_group_quant(
        codes, scales, q, weight, EPS, q_residual=residual, group_size=32
    )
    y, _ = rms_norm(q, weight, EPS, residual=residual)
    expected, expected_scales = quant.quantize_mxfp4(y.float())
    assert torch.equal(scales, expected_scales)
    assert (codes != expected).float().mean() < 0.02
    got = quant.dequantize_mxfp4(codes, scales)
    want = quant.dequantize_mxfp4(expected, expected_scales)
    assert float((got - want).norm() / want.norm()) < 0.02
    assert is_poison(codes_memory, n // 2)
    assert is_poison(scales_memory, 3)
    named = torch.empty(m, n // 2, dtype=torch.uint8, device=DEVICE)
    exponents = torch.empty(m, 3, dtype=torch.uint8, device=DEVICE)
    mla_fusions.fused_qk_rmsnorm(
        named.view(torch.float4_e2m1fn_x2),
        exponents.view(torch.float8_e8m0fnu),
        q,
        weight,
        EPS,
        q_residual=residual,
        quant_type=QuantType.per_1x32,
    )
    assert torch.equal(named, codes)
    assert torch.equal(exponents, scales)


def test_transposed_scales(seed):
    """Memory [groups, m], under a shape of the same name or as a transposed view."""
    m, n = 5, 256
    q, weight = draw(m, n), draw(n)
    plain = torch.empty(m, 2, device=DEVICE)
    memory = poison_(torch.empty(2, m, device=DEVICE))
    other = poison_(torch.empty(2, m + 3, device=DEVICE))
    codes = [torch.empty(m, n, dtype=OCP, device=DEVICE) for _ in range(3)]
    for out, scales, turned in zip(
        codes, (plain, memory.view(m, 2), other.T[:m]), (False, True, True), strict=True
    ):
        mla_fusions.fused_qk_rmsnorm_group_quant(out, scales, q, weight, transpose_scale=turned)
        assert torch.equal(out.view(torch.uint8), codes[0].view(torch.uint8))
    assert torch.equal(memory, plain.T)
    assert torch.equal(other[:, :m], plain.T)
    assert other[:, m:].isnan().all()


@pytest.mark.parametrize("has_residual", [False, True])
def test_without_a_quantiser(has_residual, seed):
    """In place, for k and for the residual."""
    m, n, w = 3, 40, 24
    q, k = side_by_side(m, n, w)
    q_weight, k_weight = draw(n), draw(w)
    residual = draw(m, n) if has_residual else None
    y, total = rms_norm(q, q_weight, EPS, residual=residual, is_gemma=True)
    expected_k, _ = rms_norm(k, k_weight, EPS, is_gemma=True)
    out = poison_(torch.empty(m, n, dtype=BF16, device=DEVICE))
    mla_fusions.fused_qk_rmsnorm(
        out, None, q, q_weight, EPS, None, k, residual, k, k_weight, None, residual, True
    )
    assert_close(out, y, what="q")
    assert_close(k, expected_k, what="k")
    if has_residual:
        assert torch.equal(residual, total.float().to(BF16))
    other = poison_(torch.empty(m, n, dtype=BF16, device=DEVICE))
    mla_fusions.fused_qk_rmsnorm_group_quant(
        q=q, q_weight=q_weight, q_epsilon=EPS, q_out_unquantized=other, gemma_norm=True
    )
    if not has_residual:
        assert torch.equal(other, out)


@pytest.mark.parametrize(
    ("kind", "groups"), [("per_Token", 1), ("per_1x128", 2), ("per_128x128", 2), (None, 0)]
)
def test_kinds_by_name(kind, groups, seed):
    q, weight = draw(3, 256), draw(256)
    codes = torch.empty(3, 256, dtype=OCP if groups else BF16, device=DEVICE)
    scales = torch.empty(3, groups, device=DEVICE) if groups else None
    mla_fusions.fused_qk_rmsnorm(codes, scales, q, weight, EPS, quant_type=kind)
    expected, _ = rms_norm(q, weight, EPS)
    if scales is None:
        assert_close(codes, expected, what="q")
    else:
        got = quant.dequantize_groups(codes, scales)
        assert_close(got, expected, what="q", dtype="fp8_e4m3")


def test_a_row_that_is_not_finite_shows(seed):
    q, weight = draw(3, 64), draw(64)
    q[1, 5] = float("nan")
    codes = torch.empty(3, 64, dtype=OCP, device=DEVICE)
    scales = torch.empty(3, 1, device=DEVICE)
    mla_fusions.fused_qk_rmsnorm_group_quant(codes, scales, q, weight, group_size=64)
    assert codes.float().isnan().all(1).tolist() == [False, True, False]
    assert scales.isnan()[:, 0].tolist() == [False, True, False]


def test_no_rows():
    q, weight = draw(0, 64), draw(64)
    out = torch.empty(0, 64, dtype=BF16, device=DEVICE)
    mla_fusions.fused_qk_rmsnorm(out, None, q, weight)


def refusals():
    """Yield calls that must be refused, each with a part of the message."""
    q, weight = torch.zeros(3, 96, dtype=BF16), torch.zeros(96, dtype=BF16)
    codes, scales = torch.zeros(3, 96, dtype=OCP), torch.zeros(3, 1)
    fp4, bytes_ = torch.zeros(3, 48, dtype=torch.uint8), torch.zeros(3, 3, dtype=torch.uint8)
    f = mla_fusions
    group = f.fused_qk_rmsnorm_group_quant
    yield "q and q_weight must be given", lambda: group(codes, scales)
    yield "q_out_quantized must be given", lambda: group(None, scales, q, weight)
    yield "q_out_unquantized must be given", lambda: group(None, None, q, weight)
    yield "group_size must be 32 for MXFP4", lambda: group(fp4, bytes_, q, weight)
    yield "group_size must be a power of two", lambda: group(codes, scales, q, weight, group_size=8)
    yield (
        "multiple of 32 columns",
        lambda: group(fp4, bytes_, q[:, :80], weight[:80], group_size=32),
    )
    yield "q_out_scale must be \\[3, 2\\]", lambda: group(codes, scales, q, weight, group_size=64)
    yield (
        "q_out_scale must be uint8",
        lambda: group(fp4, torch.zeros(3, 3), q, weight, group_size=32),
    )
    yield "q_out_quantized must be float8", lambda: group(q, scales, q, weight)
    yield (
        "q_out_scale must be contiguous",
        lambda: group(
            codes, torch.zeros(3, 4)[:, :2], q, weight, group_size=64, transpose_scale=True
        ),
    )
    yield "q_weight must be \\[96\\]", lambda: group(codes, scales, q, weight[1:])
    yield "q_residual must be", lambda: group(codes, scales, q, weight, q_residual=q.float())
    yield "k_weight and k_out", lambda: group(codes, scales, q, weight, k=q)
    yield "at least one column", lambda: group(codes, scales, q[:, :0], weight[:0])
    token = f.fused_qk_rmsnorm_per_token_quant
    yield "q_out_scale must be \\[3, 1\\]", lambda: token(codes, scales[:, 0], q, weight, EPS)
    yield (
        "quant_type must be",
        lambda: f.fused_qk_rmsnorm(codes, scales, q, weight, quant_type="per_Tensor"),
    )
    yield (
        "must be given for per_Token",
        lambda: f.fused_qk_rmsnorm(codes, None, q, weight, quant_type="per_Token"),
    )
    yield "got both", lambda: f.fused_qk_rmsnorm(q, None, q, weight, q_out_unquantized=q)


@pytest.mark.parametrize(("message", "call"), tuple(refusals()), ids=lambda value: str(value)[:40])
def test_refusals(message, call):
    with pytest.raises(LayoutError, match=message):
        call()
