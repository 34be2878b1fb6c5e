"""Tuning tables: which tile sizes serve a decode problem.

``configs/<arch>/decode.json`` is a list of rows, read top to bottom; the first whose ``when`` holds
is taken, and the last one holds always. ``MLA_TUNING_PATH`` names a directory that replaces the
packaged ``configs``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from mla_core import env
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.plan import PlanRequest

_PACKAGED = Path(__file__).parent / "configs"
_CONDITIONS = ("q_dtype", "kv_dtype", "layout", "num_rows", "kv_lora_rank", "page_size")
_WORDS = ("q_dtype", "kv_dtype", "layout")


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """One row's answer.

    Parameters
    ----------
    BLOCK_M : int
        Query rows (token x head) of a program, a power of two >= 16.
    BLOCK_N : int
        Cached tokens of a loop step, a power of two >= 16.
    num_warps, num_stages : int
        Triton's launch parameters.
    programs_per_sm : int
        Programs that fit on one multiprocessor, for the split heuristic.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1

    def __post_init__(self) -> None:
        """Refuse what no kernel could run."""
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise LayoutError(
                    f"DecodeConfig: {field.name} must be an integer of 1 or more, got {value!r}"
                )
        for name in ("BLOCK_M", "BLOCK_N"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise LayoutError(f"DecodeConfig: {name} must be a power of two >= 16, got {value}")

    @property
    def launch(self) -> dict[str, int]:
        """The numbers a launch takes."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class _Row:
    when: Mapping[str, object]
    config: DecodeConfig

    def holds(self, asked: Mapping[str, object]) -> bool:
        return all(_matches(asked[name], wanted) for name, wanted in self.when.items())


def choose(request: PlanRequest) -> DecodeConfig:
    """Return the configuration of the first row that holds for a request.

    The number of query rows counts all query tokens of the longest request, or one token under
    ``batch_invariant``, where the choice must not depend on the other requests.

    Raises
    ------
    UnsupportedProblemError
        There is no table for the architecture.
    LayoutError
        The table has an unknown key or value; the message names file and row.
    """
    problem = request.problem
    q_len = 1 if "batch_invariant" in problem.features else max(request.max_seqlen_q, 1)
    asked = {
        "q_dtype": problem.q_dtype,
        "kv_dtype": problem.kv_dtype,
        "layout": problem.layout,
        "num_rows": problem.dims.num_heads * q_len,
        "kv_lora_rank": problem.dims.kv_lora_rank,
        "page_size": problem.page_size,
    }
    root = env.directory("MLA_TUNING_PATH") or _PACKAGED
    return next(
        row.config for row in _table(root / problem.arch / "decode.json") if row.holds(asked)
    )


@functools.cache
def _table(path: Path) -> tuple[_Row, ...]:
    if not path.is_file():
        raise UnsupportedProblemError(
            f"triton: a tuning table must exist for the architecture, got no {path}; "
            "copy one of a similar chip there and run tools/tune_decode.py"
        )
    listed = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(_parse(f"{path}: row {index}", row) for index, row in enumerate(listed))
    if not rows or rows[-1].when:
        raise LayoutError(f"{path}: the last row must have an empty `when`, so that one matches")
    return rows


def _parse(where: str, listed: Mapping[str, object]) -> _Row:
    values = dict(listed)
    when = values.pop("when", None)
    if not isinstance(when, dict):
        raise LayoutError(f"{where}: `when` must be an object, got {type(when).__name__}")
    if unknown := sorted(when.keys() - set(_CONDITIONS)):
        raise LayoutError(
            f"{where}: `when` must use {', '.join(_CONDITIONS)}, got {', '.join(unknown)}"
        )
    for name, wanted in when.items():
        if isinstance(wanted, dict) and (name in _WORDS or wanted.keys() - {"min", "max"}):
            raise LayoutError(
                f"{where}: `when` {name} must be a value, a list or, for numbers, a range of min "
                f"and max, got {wanted}"
            )
    known = {field.name for field in fields(DecodeConfig)}
    if unknown := sorted(values.keys() - known):
        raise LayoutError(f"{where}: keys must be among {', '.join(sorted(known))}, got {unknown}")
    try:
        return _Row(when, DecodeConfig(**values))  # type: ignore[arg-type]
    except (TypeError, LayoutError) as exc:
        raise LayoutError(f"{where}: {exc}") from exc


def _matches(value: object, wanted: object) -> bool:
    """Whether a value is the wanted one, one of a list, or within ``{"min": a, "max": b}``."""
    if isinstance(wanted, dict):
        assert isinstance(value, int)
        return bool(wanted.get("min", value) <= value <= wanted.get("max", value))
    return value in wanted if isinstance(wanted, list) else value == wanted
