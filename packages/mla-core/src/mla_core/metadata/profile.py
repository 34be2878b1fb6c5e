"""The machine a schedule is made for, and the rounding every planner uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from mla_core.errors import LayoutError

_Number = TypeVar("_Number", int, torch.Tensor)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a planner must know of a device.

    Parameters
    ----------
    arch : str
        Short architecture name, such as ``gfx942``, ``sm90`` or ``cpu``.
    num_cu : int
        Compute units (streaming multiprocessors): workgroups that run at the same time.
    experimental : bool
        Also apply the rows of the tiling table that serve experimental kernels.
    """

    arch: str
    num_cu: int
    experimental: bool = False

    def __post_init__(self) -> None:
        """Refuse a machine that cannot run anything."""
        if self.num_cu < 1:
            raise LayoutError(f"DeviceProfile: num_cu must be >= 1, got {self.num_cu}")


def ceil_div(a: _Number, b: int) -> _Number:
    """Quotient rounded up, of ints or of an integer tensor by an int."""
    return (a + (b - 1)) // b


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is >= ``value``."""
    return ceil_div(value, multiple) * multiple


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, 8 ..."""
    return value > 0 and value & (value - 1) == 0
