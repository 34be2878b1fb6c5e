"""What a case is: a kernel, compile options, and a function that draws data and expectations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

KERNELS = Path(__file__).parents[1] / "kernels"
ARCHS = ("gfx942", "gfx950")

#: Every case, in the order of definition.
CASES: list[Case] = []


@dataclass(frozen=True)
class Launch:
    """One launch: its arguments, and for each output the expected values and a tolerance."""

    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    expect: tuple[tuple[torch.Tensor, torch.Tensor, float], ...] = ()


@dataclass(frozen=True)
class Case:
    """A kernel on fresh data; ``str`` is its test id."""

    name: str
    kernel: str
    build: Callable[[torch.Generator, str], Launch]
    archs: tuple[str, ...] = ARCHS
    options: dict[str, Any] = field(default_factory=dict)
    #: Oldest Triton release, as (major, minor), whose compiler takes the kernel.
    since: tuple[int, int] = (3, 7)

    def __str__(self) -> str:
        return self.name


def case(
    kernel: str,
    *variants: Any,
    archs: tuple[str, ...] = ARCHS,
    since: tuple[int, int] = (3, 7),
    **options: Any,
) -> Callable[[Callable[..., Launch]], Callable[..., Launch]]:
    """Register a case, or one for each variant, which is passed on to the function.

    The function gets a generator, the architecture and, where there are any, the variant's values.
    """
    where = f"{KERNELS / kernel.split(':')[0]}:{kernel.split(':')[1]}"

    def register(function: Callable[..., Launch]) -> Callable[..., Launch]:
        for variant in variants or [()]:
            values = variant if isinstance(variant, tuple) else (variant,)
            name = "-".join([function.__name__, *(_shown(value) for value in values)])

            def build(rng: torch.Generator, arch: str, values: tuple[Any, ...] = values) -> Launch:
                return function(rng, arch, *values)

            CASES.append(Case(name, where, build, archs, options, since))
        return function

    return register


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare: bits for integers, absolute plus relative error for floats, NaN where NaN is due."""
    assert actual.shape == expected.shape
    if not actual.is_floating_point():
        wrong = actual != expected
    else:
        got, want = actual.double(), expected.double()
        close = (got - want).abs() <= tolerance * (1 + want.abs())
        wrong = ~(close | (got == want) | (got.isnan() & want.isnan()))
    if wrong.any():
        first = tuple(int(index) for index in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong, the first at {first}: "
            f"got {actual[first].item()}, expected {expected[first].item()}"
        )


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw standard normal values."""
    return torch.randn(*shape, generator=rng).to(dtype)


def uniform(
    rng: torch.Generator, low: float, high: float, *shape: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw evenly between two limits."""
    return (low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)).to(dtype)


def integers(
    rng: torch.Generator, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Draw integers from low up to, but not including, high."""
    return torch.randint(low, high, shape, generator=rng).to(dtype)


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return an output that shows where nothing was written."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan")).to(dtype)
    return torch.full(shape, 77, dtype=dtype)
