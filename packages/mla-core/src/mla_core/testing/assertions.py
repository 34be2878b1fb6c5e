"""Comparing results: one tolerance table and a message that says where and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.dtypes import dtype_name


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits on the relative L2 error of a whole tensor and on each single element.

    An element passes when ``|actual - expected| <= atol + rtol * |expected|``.
    """

    relative_l2: float
    atol: float
    rtol: float


#: What rounding of operands and results of each dtype can explain, for values of order one.
TOLERANCES: dict[str, Tolerance] = {
    "fp64": Tolerance(1e-12, 1e-11, 1e-11),
    "fp32": Tolerance(2e-5, 1e-4, 1e-4),
    "fp16": Tolerance(2e-3, 5e-3, 1e-2),
    "bf16": Tolerance(1e-2, 3e-2, 3e-2),
    "fp8_e4m3": Tolerance(6e-2, 2e-1, 2e-1),
    "fp8_e4m3fnuz": Tolerance(6e-2, 2e-1, 2e-1),
}


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``|actual - expected| / |expected|`` in fp64; NaN when either holds one."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    what: str,
    dtype: torch.dtype | str | None = None,
    tolerance: Tolerance | None = None,
) -> None:
    """Fail with the worst position when a tensor is not close to what was expected.

    Infinities must agree exactly, and a NaN anywhere fails.

    Parameters
    ----------
    what : str
        Name of the tensor for the message.
    dtype : torch.dtype or short name, optional
        Row of ``TOLERANCES``; default: the dtype of ``actual``.
    tolerance : Tolerance, optional
        Used instead of the table.
    """
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    if tolerance is None:
        name = dtype if isinstance(dtype, str) else dtype_name(dtype or actual.dtype)
        tolerance = TOLERANCES[name]
    if not actual.numel():
        return
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    is_infinite = got.isinf() | want.isinf()
    limit = tolerance.atol + tolerance.rtol * want.abs()
    difference = (got - want).abs()
    bad = torch.where(is_infinite, got != want, ~(difference <= limit))
    finite_got, finite_want = got[~is_infinite], want[~is_infinite]
    error = relative_l2(finite_got, finite_want) if finite_got.numel() else 0.0
    if not bool(bad.any()) and error <= tolerance.relative_l2:
        return
    score = torch.where(bad, (difference / limit).nan_to_num(nan=torch.inf), -1.0)
    score = score if bool(bad.any()) else difference.nan_to_num(nan=torch.inf)
    position = tuple(
        int(i) for i in torch.unravel_index(score.flatten().argmax(), tuple(got.shape))
    )
    cosine = torch.nn.functional.cosine_similarity(finite_got, finite_want, dim=0)
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {got.numel()} elements are off "
        f"({100 * float(bad.double().mean()):.2f}%), worst at {position}: got "
        f"{got[position].item():.6g}, expected {want[position].item():.6g}; relative L2 "
        f"{error:.3g} (limit {tolerance.relative_l2:g}), cosine {float(cosine):.6f}"
    )
