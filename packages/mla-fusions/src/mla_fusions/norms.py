"""Norms of the latents between a layer's two projections, with the quantiser behind them fused in.

An MLA layer norms the query's latent (``q_a``) and the cache's (``kv_a``), which one product made
side by side. One launch norms both and quantises the former for the projection that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_fusions.absorbed import FLOATING, FP8_OF
from mla_fusions.compiling import uncompiled
from mla_fusions.rows import NATIVE_FP8, power_of_two, require_kernel

#: Kinds of quantisers, as in `mla_fusions.kernels.absorbed`.
NONE, FP8, MXFP4 = range(3)
FP4 = (torch.uint8, torch.float4_e2m1fn_x2)
_SCALE_BYTES = (torch.uint8, torch.float8_e8m0fnu)
#: Group sizes by the name of ROCm/aiter's ``QuantType``; None is one for the whole row.
_GROUP_OF = {
    "per_Token": None,
    "per_1x32": 32,
    "per_1x128": 128,
    "per_128x128": 128,
    "per_256x128": 128,
    "per_1024x128": 128,
}


@uncompiled
def fused_qk_rmsnorm_group_quant(
    q_out_quantized: torch.Tensor | None = None,
    q_out_scale: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    q_epsilon: float = 1e-6,
    q_out_unquantized: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_res_out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_epsilon: float | None = None,
    q_residual: torch.Tensor | None = None,
    group_size: int = 128,
    transpose_scale: bool = False,
    gemma_norm: bool = False,
) -> None:
    """Norm q, quantise it in groups, and norm k, in one launch and into the given tensors.

    ``q / sqrt(mean(q^2) + eps) * weight``, with ``q + q_residual`` in place of q where given.
    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_out_quantized : [m, n], float8_e4m3fn or float8_e4m3fnuz; or [m, n / 2], MXFP4, optional
        MXFP4 is uint8 or float4_e2m1fn_x2, two e2m1 codes a byte, the even element in the low half.
    q_out_scale : fp32 [m, ceil(n / group_size)]; for MXFP4 uint8 or float8_e8m0fnu, optional
        Dequantisation factors; bytes b stand for ``2 ** (b - 127)``. Without it q is not quantised.
    q : [m, n], bf16, fp16 or fp32
    q_weight : [n], bf16, fp16 or fp32
    q_epsilon : float
        Added to the mean of the squares.
    q_out_unquantized : [m, n], like q, optional; required if q is not quantised
    k_out : [m, w], like k; required with k
        May be k.
    q_res_out : [m, n], like q, optional
        Gets the sum of q and the residual, or q without one; may be ``q_residual``.
    k : [m, w], bf16, fp16 or fp32, optional
    k_weight : [w], bf16, fp16 or fp32; required with k
    k_epsilon : float, optional
        By default ``q_epsilon``.
    q_residual : [m, n], like q, optional
    group_size : int
        Elements that share a scale: a power of two from 16 on, 32 for MXFP4.
    transpose_scale : bool
        Scales of one group stand together: the memory of ``q_out_scale`` holds [groups, m].
    gemma_norm : bool
        Weights are stored as their difference from 1, of q and of k.

    Raises
    ------
    LayoutError

    Notes
    -----
    The last dimension of everything is contiguous; rows may be slices of wider ones. The sum with
    the residual is normed, and the norm quantised, before they are rounded. Differences from aiter:
    any architecture, either flavour of fp8, fp32 too; a row is divided by its scale, not
    multiplied by its rounded reciprocal; transposed scales work for MXFP4; ``k_out`` is required
    with k; 64-bit addresses.
    """
    op = "fused_qk_rmsnorm_group_quant"
    quant, group = NONE, None
    if q_out_scale is not None:
        if q_out_quantized is None:
            raise LayoutError(f"{op}: q_out_quantized must be given with q_out_scale, got None")
        quant, group = quantiser_of(op, q_out_quantized, group_size), group_size
    elif q_out_unquantized is None:
        raise LayoutError(f"{op}: q_out_unquantized must be given without q_out_scale, got None")
    _norm(
        op, quant, group, q_out_quantized, q_out_scale, q, q_weight, q_epsilon, q_out_unquantized,
        k_out, q_res_out, k, k_weight, k_epsilon, q_residual, transpose_scale, gemma_norm,
    )  # fmt: skip


@uncompiled
def fused_qk_rmsnorm_per_token_quant(
    q_out_quantized: torch.Tensor,
    q_out_scale: torch.Tensor,
    q: torch.Tensor,
    q_weight: torch.Tensor,
    q_epsilon: float,
    q_out_unquantized: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_res_out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_epsilon: float | None = None,
    q_residual: torch.Tensor | None = None,
    gemma_norm: bool = False,
) -> None:
    """Norm q, quantise it to fp8 with a scale for each row, and norm k, in one launch.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_out_quantized : [m, n], float8_e4m3fn or float8_e4m3fnuz
    q_out_scale : fp32 [m, 1]
    q, q_weight, q_epsilon, q_out_unquantized, k_out, q_res_out, k, k_weight, k_epsilon, q_residual
        As in `fused_qk_rmsnorm_group_quant`, which also says what differs from the original.
    gemma_norm : bool

    Raises
    ------
    LayoutError
    """
    op = "fused_qk_rmsnorm_per_token_quant"
    _norm(
        op, FP8, None, q_out_quantized, q_out_scale, q, q_weight, q_epsilon, q_out_unquantized,
        k_out, q_res_out, k, k_weight, k_epsilon, q_residual, False, gemma_norm,
    )  # fmt: skip


@uncompiled
def fused_qk_rmsnorm(
    q_out_quantized: torch.Tensor | None = None,
    q_out_scale: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    q_epsilon: float = 1e-6,
    q_out_unquantized: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_res_out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    k_epsilon: float | None = None,
    q_residual: torch.Tensor | None = None,
    gemma_norm: bool = False,
    quant_type: object = None,
    group_size: int | None = None,
    transpose_scale: bool = False,
) -> None:
    """Norm q and k in one launch, and quantise q as ``quant_type`` says.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_out_quantized, q_out_scale, ..., gemma_norm, transpose_scale
        As in `fused_qk_rmsnorm_group_quant`. Without a quantiser ``q_out_quantized`` gets the norm
        of q, and ``q_out_unquantized`` may have it in its place.
    quant_type : a member of aiter's ``QuantType``, or its name, or None
        No, per_Token, per_1x32 or per_1x128; per_128x128, per_256x128 and per_1024x128 are
        per_1x128. None is No.
    group_size : int, optional
        By default what ``quant_type`` says.

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter: as for `fused_qk_rmsnorm_group_quant`, and without a quantiser the
    residual, ``gemma_norm`` and the other outputs count too, which the original leaves out.
    """
    op = "fused_qk_rmsnorm"
    kind = str(getattr(quant_type, "name", quant_type or "No"))
    if kind == "No":
        if (q_out_quantized is None) == (q_out_unquantized is None):
            raise LayoutError(
                f"{op}: one of q_out_quantized and q_out_unquantized must be given without a "
                f"quantiser, got {'neither' if q_out_quantized is None else 'both'}"
            )
        out = q_out_unquantized if q_out_quantized is None else q_out_quantized
        _norm(
            op, NONE, None, None, None, q, q_weight, q_epsilon, out,
            k_out, q_res_out, k, k_weight, k_epsilon, q_residual, False, gemma_norm,
        )  # fmt: skip
        return
    if kind not in _GROUP_OF:
        raise LayoutError(
            f"{op}: quant_type must be No, {', '.join(_GROUP_OF)} or None, got {kind}"
        )
    if q_out_quantized is None or q_out_scale is None:
        raise LayoutError(f"{op}: q_out_quantized and q_out_scale must be given for {kind}")
    rest = (k_out, q_res_out, k, k_weight, k_epsilon, q_residual)
    if kind == "per_Token":
        _norm(
            op, FP8, None, q_out_quantized, q_out_scale, q, q_weight, q_epsilon,
            q_out_unquantized, *rest, False, gemma_norm,
        )  # fmt: skip
        return
    fused_qk_rmsnorm_group_quant(
        q_out_quantized,
        q_out_scale,
        q,
        q_weight,
        q_epsilon,
        q_out_unquantized,
        *rest,
        group_size=group_size or _GROUP_OF[kind] or 128,
        transpose_scale=transpose_scale,
        gemma_norm=gemma_norm,
    )


def _norm(
    op: str,
    quant: int,
    group: int | None,
    codes: torch.Tensor | None,
    scales: torch.Tensor | None,
    q: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    q_eps: float,
    q_out: torch.Tensor | None,
    k_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    k: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    k_eps: float | None,
    residual: torch.Tensor | None,
    transpose_scale: bool,
    is_gemma: bool,
) -> None:
    """Check everything and launch; ``group`` None is the whole row."""
    if q is None or q_weight is None:
        raise LayoutError(f"{op}: q and q_weight must be given, got None")
    query = query_of(
        op, quant, group, codes, scales, q, q_weight, q_eps, q_out, residual_out, residual,
        transpose_scale,
    )  # fmt: skip
    device, num_tokens, k_width = q.device, q.shape[0], 0
    if k is not None:
        if k_weight is None or k_out is None:
            raise LayoutError(f"{op}: k_weight and k_out must be given with k, got None")
        check_tensor(op, "k", k, shape=(num_tokens, "w"), dtypes=FLOATING, device=device)
        k_width = k.shape[1]
        if not k_width:
            raise LayoutError(f"{op}: k must have at least one column, got {tuple(k.shape)}")
        check_tensor(op, "k_weight", k_weight, shape=(k_width,), dtypes=FLOATING, device=device)
        shape = (num_tokens, k_width)
        check_tensor(op, "k_out", k_out, shape=shape, dtypes=(k.dtype,), device=device)
    if not num_tokens:
        return
    require_kernel(op, arch_of(device))
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.norms import norm_rows_kernel

    launch(
        norm_rows_kernel,
        (num_tokens, 1 if k is None else 2),
        *query.args,
        k,
        k_weight if k is not None else None,
        k_out if k is not None else None,
        float(q_eps if k_eps is None else k_eps),
        _stride(k),
        _stride(k_out if k is not None else None),
        **query.constants,
        K_WIDTH=k_width,
        K_BLOCK=power_of_two(k_width or 1),
        IS_GEMMA=is_gemma,
        num_warps=max(query.num_warps, _warps_of(k_width)),
    )


@dataclass(frozen=True, slots=True)
class NormedQuery:
    """What `mla_fusions.kernels.norms.norm_query` gets: arguments behind the token, constants."""

    args: tuple[object, ...]
    constants: dict[str, object]
    num_warps: int


def query_of(
    op: str,
    quant: int,
    group: int | None,
    codes: torch.Tensor | None,
    scales: torch.Tensor | None,
    q: torch.Tensor,
    q_weight: torch.Tensor,
    eps: float,
    q_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    residual: torch.Tensor | None,
    transpose_scale: bool,
) -> NormedQuery:
    """Check a query's norm; ``group`` None is the whole row.

    Raises
    ------
    LayoutError
    """
    device = q.device
    check_tensor(op, "q", q, shape=("m", "n"), dtypes=FLOATING, device=device)
    num_tokens, width = q.shape
    if not width:
        raise LayoutError(f"{op}: q must have at least one column, got {tuple(q.shape)}")
    check_tensor(op, "q_weight", q_weight, shape=(width,), dtypes=FLOATING, device=device)
    for name, tensor in (
        ("q_residual", residual),
        ("q_res_out", residual_out),
        ("q_out_unquantized", q_out),
    ):
        if tensor is not None:
            shape = (num_tokens, width)
            check_tensor(op, name, tensor, shape=shape, dtypes=(q.dtype,), device=device)
    flavour, bias, scale_strides = "", 7, (0, 0)
    group = group or power_of_two(width)
    if quant != NONE:
        codes, scales, scale_strides = _check_quantised(
            op, quant, group, codes, scales, q, transpose_scale
        )
        flavour, bias = FP8_OF.get(codes.dtype, ("", 7))
        codes = codes.view(torch.uint8)
    args = (
        q,
        q_weight,
        residual,
        codes if quant else None,
        scales if quant else None,
        q_out,
        residual_out,
        float(eps),
        q.stride(0),
        _stride(residual),
        _stride(codes if quant else None),
        *scale_strides,
        _stride(q_out),
        _stride(residual_out),
    )
    constants: dict[str, object] = {
        "Q_SHAPE": (width, power_of_two(-(-width // group)), group),
        "QUANT": quant,
        "BIAS": bias,
        "IS_NATIVE": NATIVE_FP8.get(arch_of(device)) == flavour,
    }
    return NormedQuery(args, constants, _warps_of(width))


def quantiser_of(op: str, codes: torch.Tensor, group: int | None) -> int:
    """Return the kind of quantiser that the dtype of ``codes`` stands for.

    Raises
    ------
    LayoutError
        It has no groups of ``group`` elements.
    """
    if codes.dtype in FP4:
        if group != 32:
            raise LayoutError(f"{op}: group_size must be 32 for MXFP4, got {group}")
        return MXFP4
    if group is not None and (group < 16 or group & (group - 1)):
        raise LayoutError(f"{op}: group_size must be a power of two from 16 on, got {group}")
    return FP8


def _warps_of(width: int) -> int:
    """Return the warps of a program that norms a row."""
    return max(1, min(8, power_of_two(width or 1) // 512))


def _check_quantised(
    op: str,
    quant: int,
    group: int,
    codes: torch.Tensor | None,
    scales: torch.Tensor | None,
    q: torch.Tensor,
    transpose_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Check what quantised rows are written to; return it with the strides of the scales."""
    if codes is None or scales is None:
        raise LayoutError(f"{op}: q_out_quantized and q_out_scale must be given, got None")
    num_tokens, width = q.shape
    num_groups = -(-width // group)
    if quant == MXFP4 and width % group:
        raise LayoutError(f"{op}: q must have a multiple of {group} columns, got {width}")
    shape = (num_tokens, width // 2 if quant == MXFP4 else width)
    dtypes = FP4 if quant == MXFP4 else tuple(FP8_OF)
    check_tensor(op, "q_out_quantized", codes, shape=shape, dtypes=dtypes, device=q.device)
    shape, dtypes = (num_tokens, num_groups), _SCALE_BYTES if quant == MXFP4 else (torch.float32,)
    if transpose_scale:
        # Whether the tensor is shaped as its memory or as its meaning.
        if scales.shape == shape and scales.stride(0) == 1 and num_tokens > 1:
            check_tensor(op, "q_out_scale", scales.T, shape=shape[::-1], dtypes=dtypes,
                         device=q.device)  # fmt: skip
            strides = (1, scales.stride(1))
        else:
            check_tensor(op, "q_out_scale", scales, shape=shape, dtypes=dtypes, device=q.device)
            if not scales.is_contiguous():
                raise LayoutError(
                    f"{op}: q_out_scale must be contiguous, or have strides (1, >= m), for "
                    f"transpose_scale, got strides {scales.stride()}"
                )
            strides = (1, num_tokens)
    else:
        check_tensor(op, "q_out_scale", scales, shape=shape, dtypes=dtypes, device=q.device)
        strides = (scales.stride(0), scales.stride(1))
    if quant == MXFP4:
        scales = scales.view(torch.uint8)
    return codes, scales, strides


def _stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
