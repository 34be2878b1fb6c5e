"""Quantisers and their inverses, bit for bit: fp8 in three granularities, MXFP4 and NVFP4.

Scales are dequantisation factors: real = stored * scale. Arithmetic is fp32, because the bits
that a quantiser stores are defined by the fp32 operations that find them.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch

from mla_core.dtypes import divided, fp8_max, torch_dtype
from mla_core.errors import LayoutError

ScaleFormat = Literal["fp32", "ue8m0"]

E8M0_BIAS = 127
E8M0_NAN = 255
MXFP4_GROUP = 32
NVFP4_GROUP = 16
E2M1_MAX = 6.0
#: Magnitude of each 3-bit e2m1 code; the fourth bit is the sign.
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def to_fp8(x: torch.Tensor, fp8: str = "fp8_e4m3") -> torch.Tensor:
    """Round to the nearest fp8 value, ties to even; beyond the range (and inf) to its end.

    NaN stays NaN. ``fp8`` is a dtype name: ``fp8_e4m3``, ``fp8_e4m3fnuz`` or ``fp8_e5m2``.
    """
    limit = fp8_max(fp8)
    return x.float().clamp(-limit, limit).to(torch_dtype(fp8))


def quantize_per_tensor(
    x: torch.Tensor,
    scale: torch.Tensor | float | None = None,
    *,
    fp8: str = "fp8_e4m3",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store ``x / scale`` in fp8.

    Parameters
    ----------
    x : any shape
    scale : one element, optional
        By default the largest magnitude of ``x`` is stored as the largest fp8 value.

    Returns
    -------
    stored : like ``x``, fp8
    scale : [], fp32
    """
    x = x.float()
    if scale is None:
        amax = x.abs().amax() if x.numel() else x.new_zeros(())
        scale = divided(amax, fp8_max(fp8)).clamp(min=_SMALLEST_NORMAL)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(())
    return to_fp8(x / scale, fp8), scale


def quantize_groups(
    x: torch.Tensor,
    group_size: int,
    *,
    fp8: str = "fp8_e4m3",
    scale_format: ScaleFormat = "fp32",
    min_amax: float = 0.0,
    min_scale: float = _SMALLEST_NORMAL,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store each run of ``group_size`` elements of the last dimension in fp8 with its own scale.

    scale = max(max(amax, min_amax) / fp8_max, min_scale), rounded up to a power of two for
    ``ue8m0``. One group as wide as the row is quantisation per token.

    Parameters
    ----------
    x : [..., dim]
    group_size : int
        Divides ``dim``.
    scale_format : "fp32" or "ue8m0"
    min_amax, min_scale : float
        Floors that keep a group of zeros away from 0 / 0.

    Returns
    -------
    stored : [..., dim], fp8
    scales : [..., dim / group_size], fp32
    """
    groups = _grouped("quantize_groups", x.float(), group_size)
    amax = groups.abs().amax(dim=-1).clamp(min=min_amax)
    scales = divided(amax, fp8_max(fp8)).clamp(min=min_scale)
    if scale_format == "ue8m0":
        scales = ceil_power_of_two(scales)
    return to_fp8(groups / scales[..., None], fp8).flatten(-2), scales


def dequantize_groups(
    stored: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Multiply each group of the last dimension by its scale.

    Parameters
    ----------
    stored : [..., dim]
    scales : [..., num_groups]
        ``num_groups`` divides ``dim``.
    """
    num_groups = scales.shape[-1]
    if num_groups == 0 or stored.shape[-1] % num_groups:
        raise LayoutError(
            f"dequantize_groups: scales must have a last dimension that divides "
            f"{stored.shape[-1]}, got {tuple(scales.shape)}; one scale belongs to each group"
        )
    groups = torch.unflatten(stored.to(dtype), -1, (num_groups, -1))
    return (groups * scales.to(dtype)[..., None]).flatten(-2)


def ceil_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """Round positive fp32 numbers up to a power of two; powers of two stay."""
    mantissa, exponent = torch.frexp(x.float())
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def e8m0_encode(scales: torch.Tensor) -> torch.Tensor:
    """Return the byte ``e + 127`` of powers of two ``2 ** e``; exponents are clamped to its range.

    The range is -127 to 127: the byte 255 is NaN.
    """
    _, exponent = torch.frexp(scales.double())
    return (exponent - 1 + E8M0_BIAS).clamp(0, E8M0_NAN - 1).to(torch.uint8)


def e8m0_decode(codes: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return ``2 ** (byte - 127)``, NaN for the byte 255."""
    exponent = codes.to(torch.int32) - E8M0_BIAS
    scales = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return torch.where(codes == E8M0_NAN, torch.nan, scales).to(dtype)


def e2m1_encode(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest e2m1 value, ties to the even code; magnitudes past 6 become 6.

    Returns
    -------
    codes : like ``x``, uint8
        0..7 for the magnitudes of ``E2M1_MAGNITUDES``, plus 8 for negative numbers, -0 included.
    """
    magnitude = x.float().abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, (a, b) in enumerate(itertools.pairwise(E2M1_MAGNITUDES)):
        middle = (a + b) / 2
        # From an odd code a tie goes up, to the even neighbour.
        code += (magnitude >= middle) if lower % 2 else (magnitude > middle)
    return code + 8 * torch.signbit(x).to(torch.uint8)


def e2m1_decode(codes: torch.Tensor, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the values of 4-bit codes."""
    table = torch.tensor(E2M1_MAGNITUDES, dtype=dtype, device=codes.device)
    return torch.cat([table, -table])[codes.long()]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes [..., dim] into bytes [..., dim / 2], the even element in the low half."""
    if codes.shape[-1] % 2:
        raise LayoutError(
            f"pack_nibbles: codes must have an even last dimension, got {tuple(codes.shape)}; "
            "pad the row"
        )
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_nibbles`: bytes [..., dim / 2] to codes [..., dim]."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups of 32 to e2m1 with one power-of-two scale.

    The group's largest magnitude is rounded to a power of two, up from a mantissa of 1.75 on:
    below that, saturating it at 6 costs less than halving the resolution of the group. The scale
    is a quarter of that power, so that it lands on 3.5 to 7.

    Parameters
    ----------
    x : [..., dim], finite
        ``dim`` is a multiple of 32.

    Returns
    -------
    packed : [..., dim / 2], uint8
        See `pack_nibbles`.
    scales : [..., dim / 32], uint8
        See `e8m0_decode`.
    """
    groups = _grouped("quantize_mxfp4", x.float(), MXFP4_GROUP)
    bits = groups.abs().amax(dim=-1).view(torch.int32)
    # Adding a quarter of the mantissa range carries into the exponent from 1.75 on.
    biased_exponent = (bits + 0x200000) >> 23
    exponent = (biased_exponent - 127 - 2).clamp(-127, 127)
    scaled = torch.ldexp(groups.double(), -exponent[..., None])
    codes = e2m1_encode(scaled.float()).flatten(-2)
    return pack_nibbles(codes), (exponent + E8M0_BIAS).to(torch.uint8)


def dequantize_mxfp4(
    packed: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Undo `quantize_mxfp4`: [..., dim / 2] and [..., dim / 32] bytes to [..., dim]."""
    values = e2m1_decode(unpack_nibbles(packed), dtype=dtype)
    return dequantize_groups(values, e8m0_decode(scales, dtype=dtype), dtype=dtype)


def quantize_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise groups of 16 to e2m1 with one e4m3 scale, ``amax / 6`` rounded to nearest.

    Parameters
    ----------
    x : [..., dim]
        ``dim`` is a multiple of 16.

    Returns
    -------
    packed : [..., dim / 2], uint8
        See `pack_nibbles`.
    scales : [..., dim / 16], fp8_e4m3
        A group whose scale rounds to 0 stores zeros.
    """
    groups = _grouped("quantize_nvfp4", x.float(), NVFP4_GROUP)
    scales = to_fp8(divided(groups.abs().amax(dim=-1), E2M1_MAX))
    divisors = scales.float()[..., None]
    scaled = torch.where(divisors == 0, 0.0, groups / divisors)
    return pack_nibbles(e2m1_encode(scaled).flatten(-2)), scales


def dequantize_nvfp4(
    packed: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Undo `quantize_nvfp4`: [..., dim / 2] bytes and [..., dim / 16] scales to [..., dim]."""
    return dequantize_groups(e2m1_decode(unpack_nibbles(packed), dtype=dtype), scales, dtype=dtype)


def _grouped(op: str, x: torch.Tensor, group_size: int) -> torch.Tensor:
    if x.shape[-1] % group_size:
        raise LayoutError(
            f"{op}: x must have a last dimension that is a multiple of {group_size}, got "
            f"{tuple(x.shape)}; pad the row"
        )
    return torch.unflatten(x, -1, (-1, group_size))
