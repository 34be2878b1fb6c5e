"""How one row of numbers becomes stored values, and back: casts, fp8 with scales, NVFP4.

Scales are dequantisation factors: ``real = stored * scale``. All arithmetic is fp32. Values beyond
the largest finite one saturate, because a plain torch cast would turn them into NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from mla_core.dtypes import divided, fp8_max, torch_dtype

# Floors of a group's scale, so that a group of zeros is not divided by zero.
E8M0_MIN = 1e-4
FP32_MIN = torch.finfo(torch.float32).tiny
FP4_MAX = 6.0


@dataclass(frozen=True, slots=True)
class Item:
    """A stored value of one token: name, dtype and how many elements."""

    name: str
    dtype: str
    width: int


class Codec(ABC):
    """Turns rows [T, width] into stored arrays, one for each of ``items``, and back."""

    #: Short name of what the numbers are: "bf16", "fp8_e4m3", "fp4_e2m1".
    dtype: str

    @property
    @abstractmethod
    def scale_kind(self) -> str:
        """Return "none", "per_tensor", "per_token_fp32" or "group<n>_<dtype of the scale>"."""

    @abstractmethod
    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """Return what is stored for a part called ``name`` of ``width`` numbers."""

    @abstractmethod
    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Quantise [T, width]; ``scale`` is the cache's per-tensor factor."""

    @abstractmethod
    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantise to [T, width] of ``dtype``."""


@dataclass(frozen=True, slots=True)
class Cast(Codec):
    """Numbers stored as they are, rounded to ``dtype``."""

    dtype: str

    @property
    def scale_kind(self) -> str:
        """No scales."""
        return "none"

    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """One array."""
        return (Item(name, self.dtype, width),)

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Round to nearest even."""
        return (x.to(torch_dtype(self.dtype)),)

    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Convert."""
        return stored[0].to(dtype)


@dataclass(frozen=True, slots=True)
class PerTensor(Codec):
    """fp8 numbers sharing one fp32 factor, which the cache carries."""

    dtype: str

    @property
    def scale_kind(self) -> str:
        """One factor for the whole cache."""
        return "per_tensor"

    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """One array; the factor is not in the page."""
        return (Item(name, self.dtype, width),)

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Store ``x / scale``, saturated."""
        assert scale is not None
        return (_saturate(x.float() / scale, self.dtype),)

    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return ``stored * scale``."""
        assert scale is not None
        return (stored[0].float() * scale).to(dtype)


@dataclass(frozen=True, slots=True)
class GroupScaled(Codec):
    """fp8 numbers with one scale for each ``group`` of neighbours.

    Parameters
    ----------
    dtype : fp8 dtype of the numbers
    group : int
    e8m0 : bool
        Scales are powers of two, stored as one byte ``b`` meaning ``2 ** (b - 127)``; otherwise
        they are fp32.
    min_amax : float
        Floor of a group's largest magnitude; with 0, a group of zeros gets the smallest scale.
    """

    dtype: str
    group: int
    e8m0: bool = False
    min_amax: float = 0.0

    @property
    def scale_kind(self) -> str:
        """Group size and dtype of the scales."""
        return f"group{self.group}_{'e8m0' if self.e8m0 else 'fp32'}"

    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """Two arrays: the numbers and their scales."""
        scale_dtype = "uint8" if self.e8m0 else "fp32"
        scales = Item(f"{name}_scale", scale_dtype, width // self.group)
        return (Item(name, self.dtype, width), scales)

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Scale each group to the largest finite value."""
        groups = _grouped(x.float(), self.group)
        factor = divided(groups.abs().amax(-1).clamp(min=self.min_amax), fp8_max(self.dtype))
        if self.e8m0:
            scales = e8m0_ceil(factor.clamp(min=E8M0_MIN))
            factor = e8m0_value(scales)
        else:
            factor = scales = factor.clamp(min=FP32_MIN)
        return _saturate(groups / factor[..., None], self.dtype).flatten(-2), scales

    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply each group by its scale."""
        values, scales = stored
        factor = e8m0_value(scales) if self.e8m0 else scales
        groups = _grouped(values.float(), self.group) * factor[..., None]
        return groups.flatten(-2).to(dtype)


@dataclass(frozen=True, slots=True)
class TokenScaled(Codec):
    """fp8 numbers with one fp32 scale for each row, whatever its width."""

    dtype: str

    @property
    def scale_kind(self) -> str:
        """One factor for each token."""
        return "per_token_fp32"

    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """Two arrays: the numbers and their scale."""
        return (Item(name, self.dtype, width), Item(f"{name}_scale", "fp32", 1))

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Scale each row to the largest finite value."""
        return GroupScaled(self.dtype, x.shape[-1]).encode(x, scale)

    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply each row by its scale."""
        return GroupScaled(self.dtype, stored[0].shape[-1]).decode(stored, scale, dtype)


@dataclass(frozen=True, slots=True)
class NvFp4(Codec):
    """e2m1 pairs in a byte (low nibble = even element) with an e4m3 scale for each 16 elements."""

    dtype: str = "fp4_e2m1"
    group: int = 16

    @property
    def scale_kind(self) -> str:
        """Group size and dtype of the scales."""
        return f"group{self.group}_e4m3"

    def items(self, name: str, width: int) -> tuple[Item, ...]:
        """Half a byte for each number, and the scales."""
        scales = Item(f"{name}_scale", "fp8_e4m3", width // self.group)
        return (Item(name, "uint8", width // 2), scales)

    def encode(self, x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Quantise against the *rounded* scale, so that the pair is consistent."""
        groups = _grouped(x.float(), self.group)
        scales = _saturate(divided(groups.abs().amax(-1), FP4_MAX), "fp8_e4m3")
        factor = scales.float()
        codes = fp4_encode(groups / torch.where(factor == 0, 1.0, factor)[..., None]).flatten(-2)
        return codes[..., 0::2] | (codes[..., 1::2] << 4), scales

    def decode(
        self, stored: tuple[torch.Tensor, ...], scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Unpack both nibbles and apply the scales."""
        packed, scales = stored
        values = fp4_decode(torch.stack((packed & 15, packed >> 4), -1).flatten(-2))
        groups = _grouped(values, self.group) * scales.float()[..., None]
        return groups.flatten(-2).to(dtype)


def e8m0_ceil(x: torch.Tensor) -> torch.Tensor:
    """Return the E8M0 byte of the smallest power of two that is >= ``x``, for positive fp32.

    Adding all-ones to the mantissa carries into the exponent unless the mantissa is zero, which is
    exact where a rounded ``log2`` is not. Infinity and NaN give 255, the NaN of E8M0.
    """
    exponent = (x.view(torch.int32).long() + 0x7FFFFF) >> 23
    return exponent.clamp(max=255).to(torch.uint8)


def e8m0_value(byte: torch.Tensor) -> torch.Tensor:
    """Return ``2 ** (byte - 127)`` in fp32; 255 is NaN."""
    return byte.view(torch.float8_e8m0fnu).float()


def fp4_encode(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to e2m1 codes 0..15 (sign in bit 3), ties to even, saturating at 6.

    Magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6: steps of a half below 2, of 1 below 4, then of 2. In
    each range ``round``, which sends ties to even, sends them to the even code as well. (A lookup
    table would be copied from the host at each call, which a graph capture refuses.)
    """
    a = x.abs().clamp(max=FP4_MAX)
    upper = torch.where(a < 4, 2 + a.round(), 4 + (a / 2).round())
    code = torch.where(a < 2, (2 * a).round(), upper).to(torch.uint8)
    return code | (x.signbit().to(torch.uint8) << 3)


def fp4_decode(code: torch.Tensor) -> torch.Tensor:
    """Return the fp32 value of e2m1 codes 0..15."""
    c = (code & 7).float()
    magnitude = torch.where(c < 4, c / 2, torch.where(c < 6, c - 2, 2 * c - 8))
    return torch.where(code >= 8, -magnitude, magnitude)


def _grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _saturate(x: torch.Tensor, dtype: str) -> torch.Tensor:
    limit = fp8_max(dtype)
    return x.clamp(-limit, limit).to(torch_dtype(dtype))
