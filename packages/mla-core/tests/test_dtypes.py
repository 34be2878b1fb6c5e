"""Short dtype names and what the fp8 flavours of each architecture are."""

from __future__ import annotations

import pytest
import torch

from mla_core.dtypes import (
    FP8_DTYPES,
    dtype_name,
    fp8_max,
    fp8_of_arch,
    itemsize,
    torch_dtype,
)
from mla_core.errors import LayoutError

DTYPES = [
    ("bf16", torch.bfloat16, 2),
    ("fp16", torch.float16, 2),
    ("fp32", torch.float32, 4),
    ("fp64", torch.float64, 8),
    ("fp8_e4m3", torch.float8_e4m3fn, 1),
    ("fp8_e4m3fnuz", torch.float8_e4m3fnuz, 1),
    ("fp8_e5m2", torch.float8_e5m2, 1),
    ("uint8", torch.uint8, 1),
    ("int32", torch.int32, 4),
    ("int64", torch.int64, 8),
]


@pytest.mark.parametrize(("name", "dtype", "size"), DTYPES)
def test_names_both_ways(name: str, dtype: torch.dtype, size: int) -> None:
    assert torch_dtype(name) == dtype
    assert dtype_name(dtype) == name
    assert itemsize(name) == size


@pytest.mark.parametrize(
    ("name", "largest"), [("fp8_e4m3", 448.0), ("fp8_e4m3fnuz", 240.0), ("fp8_e5m2", 57344.0)]
)
def test_fp8_max(name: str, largest: float) -> None:
    assert name in FP8_DTYPES
    assert fp8_max(name) == largest
    assert torch.tensor(largest).to(torch_dtype(name)).float().item() == largest


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("gfx942", "fp8_e4m3fnuz"),
        ("gfx950", "fp8_e4m3"),
        ("sm90", "fp8_e4m3"),
        ("cpu", "fp8_e4m3"),
    ],
)
def test_flavour_follows_the_architecture(arch: str, name: str) -> None:
    assert fp8_of_arch(arch) == name


def test_unknown_dtypes_list_the_known_ones() -> None:
    with pytest.raises(LayoutError, match=r"must be one of bf16, fp16, .*, got 'half'"):
        torch_dtype("half")
    with pytest.raises(LayoutError, match=r"must be one of bf16, fp16, .*, got torch.int8"):
        dtype_name(torch.int8)
