"""Short dtype names used in capabilities, catalogs, case names and messages."""

from __future__ import annotations

import torch

from mla_core.errors import LayoutError

_TORCH_OF: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}
_NAME_OF = {dtype: name for name, dtype in _TORCH_OF.items()}

FP8_DTYPES = frozenset({"fp8_e4m3", "fp8_e4m3fnuz", "fp8_e5m2"})


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a short name such as ``"bf16"``."""
    try:
        return _TORCH_OF[name]
    except KeyError:
        accepted = ", ".join(_TORCH_OF)
        raise LayoutError(f"dtype: name must be one of {accepted}, got {name!r}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a torch dtype."""
    try:
        return _NAME_OF[dtype]
    except KeyError:
        accepted = ", ".join(_NAME_OF.values())
        raise LayoutError(f"dtype: must be one of {accepted}, got {dtype}") from None


def itemsize(name: str) -> int:
    """Bytes of one element of the named dtype."""
    return torch_dtype(name).itemsize


def fp8_max(name: str) -> float:
    """Largest finite value of an fp8 dtype: 448 for e4m3 (OCP), 240 for e4m3fnuz."""
    return float(torch.finfo(torch_dtype(name)).max)


def fp8_of_arch(arch: str) -> str:
    """Return the e4m3 flavour an architecture computes with.

    gfx942 (CDNA3) implements the FNUZ encoding; every other supported chip the OCP one. A byte
    written in one flavour means another number in the other.
    """
    return "fp8_e4m3fnuz" if arch == "gfx942" else "fp8_e4m3"


def divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """Divide correctly rounded on every device: CUDA multiplies by 1 / ``by`` for a number."""
    return x / torch.full_like(x, by)
