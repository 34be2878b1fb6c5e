"""Benchmark cases: a name that says everything, and named sets of them in ``sets.toml``.

``decode/bf16/h16/q1/b8/s4096/p64`` is dense decode with bf16 queries over a bf16 cache, 16 heads,
one query token, 8 requests of 4096 cached tokens on pages of 64. A cache in another layout is
named behind the query dtype, ``decode/bf16-fp8ds656/...``; ``/lognormal`` at the end draws ragged
lengths with the given mean.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from mla_core import layouts
from mla_core.dims import MLADims
from mla_core.dtypes import torch_dtype
from mla_core.errors import LayoutError

OPS = ("decode",)
EXTRAS = ("lognormal",)

#: Letters in front of the numbers of a case name, in order.
_NUMBERS = {"h": "num_heads", "q": "q_len", "b": "batch_size", "s": "context", "p": "page_size"}
_LAYOUT_OF = {name.replace("_", ""): name for name in layouts.names()}
#: Spread of ragged lengths: the standard deviation of log(length).
_LOGNORMAL_SIGMA = 1.0


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One benchmark problem; ``str`` gives the name that `parse_case` reads."""

    op: str
    q_dtype: str
    layout: str
    num_heads: int
    q_len: int
    batch_size: int
    context: int
    page_size: int
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no benchmark could run."""
        if self.op not in OPS:
            raise LayoutError(f"BenchCase: op must be one of {', '.join(OPS)}, got {self.op!r}")
        torch_dtype(self.q_dtype)
        layouts.get(self.layout)
        for name in _NUMBERS.values():
            if getattr(self, name) < 1:
                raise LayoutError(f"BenchCase: {name} must be >= 1, got {getattr(self, name)}")
        if unknown := sorted(set(self.extra) - set(EXTRAS)):
            raise LayoutError(
                f"BenchCase: extra must be among {', '.join(EXTRAS)}, got {', '.join(unknown)}"
            )

    def __str__(self) -> str:
        """Return the name."""
        is_plain = self.layout == self.q_dtype
        dtypes = self.q_dtype if is_plain else f"{self.q_dtype}-{self.layout.replace('_', '')}"
        numbers = [f"{letter}{getattr(self, name)}" for letter, name in _NUMBERS.items()]
        return "/".join((self.op, dtypes, *numbers, *self.extra))

    @property
    def dims(self) -> MLADims:
        """DeepSeek-V3 widths with the heads of the case."""
        return MLADims(self.num_heads)

    def kv_lens(self) -> list[int]:
        """Return the cached tokens of each request; the ragged ones are the same in every run."""
        if "lognormal" not in self.extra:
            return [self.context] * self.batch_size
        generator = torch.Generator().manual_seed(self.batch_size * 1_000_003 + self.context)
        draws = torch.exp(_LOGNORMAL_SIGMA * torch.randn(self.batch_size, generator=generator))
        lens = (draws / draws.mean() * self.context).round().clamp(min=self.q_len)
        return [int(length) for length in lens]


@dataclass(frozen=True, slots=True)
class BenchSet:
    """A named list of cases with the contenders that make sense for it."""

    name: str
    description: str
    contenders: tuple[str, ...]
    cases: tuple[BenchCase, ...]


def parse_case(name: str) -> BenchCase:
    """Return the case of a name.

    Raises
    ------
    LayoutError
        The name does not have the form of a case name.
    """
    parts = name.strip("/").split("/")
    form = "<op>/<dtypes>/h<heads>/q<q_len>/b<batch>/s<context>/p<page>[/<extra>]"
    numbers = {}
    if len(parts) < 2 + len(_NUMBERS):
        raise LayoutError(f"BenchCase: name must be {form}, got {name!r}")
    for part, (letter, field) in zip(parts[2:], _NUMBERS.items(), strict=False):
        if not (part.startswith(letter) and part[1:].isdecimal()):
            raise LayoutError(
                f"BenchCase: name must be {form}, got {part!r} for {letter}<number> in {name!r}"
            )
        numbers[field] = int(part[1:])
    q_dtype, _, short_layout = parts[1].partition("-")
    short_layout = short_layout or q_dtype
    if short_layout not in _LAYOUT_OF:
        raise LayoutError(
            f"BenchCase: layout must be one of {', '.join(_LAYOUT_OF)}, got {short_layout!r}"
        )
    extra = tuple(parts[2 + len(_NUMBERS) :])
    return BenchCase(parts[0], q_dtype, _LAYOUT_OF[short_layout], **numbers, extra=extra)


def load_sets(path: Path | None = None) -> dict[str, BenchSet]:
    """Read the packaged case sets, or those of a TOML file of the same form.

    Raises
    ------
    LayoutError
        A set names an unknown key or a bad case; the message names the set.
    """
    if path is None:
        text = resources.files("mla_core.bench").joinpath("sets.toml").read_text("utf-8")
    else:
        text = path.read_text("utf-8")
    return {name: _set(name, table) for name, table in tomllib.loads(text).items()}


def _set(name: str, table: Mapping[str, Any]) -> BenchSet:
    if unknown := sorted(table.keys() - {"description", "contenders", "cases", "grid"}):
        raise LayoutError(
            f"case set {name!r}: keys must be description, contenders, cases or grid, "
            f"got {', '.join(unknown)}"
        )
    cases = [parse_case(case) for case in table.get("cases", ())]
    for grid in table.get("grid", ()):
        cases.extend(_grid(name, grid))
    unique = tuple(dict.fromkeys(cases))
    return BenchSet(name, table["description"], tuple(table.get("contenders", ())), unique)


def _grid(name: str, grid: Mapping[str, Any]) -> list[BenchCase]:
    """Return the product of the listed values, ``heads = [16, 128]`` and so on."""
    expected = {"op", "dtypes", "heads", "q_len", "batch", "context", "page", "extra"}
    if grid.keys() != expected:
        raise LayoutError(
            f"case set {name!r}: a grid must have the keys {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(grid))}"
        )
    axes = (grid[key] for key in ("heads", "q_len", "batch", "context", "page", "extra"))
    return [
        parse_case(f"{grid['op']}/{grid['dtypes']}/h{h}/q{q}/b{b}/s{s}/p{p}/{extra}")
        for h, q, b, s, p, extra in itertools.product(*axes)
    ]
