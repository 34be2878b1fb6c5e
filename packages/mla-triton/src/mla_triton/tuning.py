"""Tuning tables: which tile sizes serve a decode problem.

``<arch>/decode.json`` is a list of rows, read top to bottom; the first whose ``when`` holds is
taken. The user's table comes first, from the directory ``MLA_TUNING_PATH`` or else the user's
cache directory, and then the packaged one, whose last row holds always. A row may tell its
``source``, as those of ``mla tune`` do, and a table may be an object with its ``rows``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from mla_core import env
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.plan import PlanRequest

_PACKAGED = Path(__file__).parent / "configs"
_WORDS = ("q_dtype", "kv_dtype", "layout")
_NUMBERS = ("num_rows", "kv_lora_rank", "page_size", "batch_size", "kv_len")
_CONDITIONS = (*_WORDS, *_NUMBERS)
#: What a row of a ``batch_invariant`` plan must not depend on.
_OF_THE_BATCH = ("batch_size", "kv_len")


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
class Row:
    """One row of a table.

    Parameters
    ----------
    when : mapping
        Conditions, which all have to hold: a value, a list of values, or for numbers a range of
        ``min`` and ``max``, both included.
    config : DecodeConfig
    where : str
        File and number, for messages.
    """

    when: Mapping[str, object]
    config: DecodeConfig
    where: str

    def holds(self, asked: Mapping[str, object]) -> bool:
        """Say whether every condition holds; one on something that is not asked does not."""
        return all(
            name in asked and _matches(asked[name], wanted) for name, wanted in self.when.items()
        )


def choose(request: PlanRequest) -> DecodeConfig:
    """Return the configuration of the first row that holds for a request.

    Raises
    ------
    UnsupportedProblemError
        There is no table for the architecture.
    LayoutError
        A table has an unknown key or value; the message names file and row.
    """
    return find(request).config


def find(request: PlanRequest) -> Row:
    """Return the first row that holds for a request; raises as `choose`."""
    asked = conditions(request)
    listed = rows(request.problem.arch)
    return next(row for row in listed if row.holds(asked))


def conditions(request: PlanRequest) -> dict[str, object]:
    """Return what the conditions of rows are compared with.

    ``num_rows`` counts the heads of all query tokens of the longest request, ``kv_len`` its cached
    tokens, an upper bound where planning was given one. Under ``batch_invariant``, where the choice
    must not depend on the other requests, it counts one query token, and rows with a condition on
    ``batch_size`` or ``kv_len`` do not hold.
    """
    problem = request.problem
    is_invariant = "batch_invariant" in problem.features
    q_len = 1 if is_invariant else max(request.max_seqlen_q, 1)
    asked: dict[str, object] = {
        "q_dtype": problem.q_dtype,
        "kv_dtype": problem.kv_dtype,
        "layout": problem.layout,
        "num_rows": problem.dims.num_heads * q_len,
        "kv_lora_rank": problem.dims.kv_lora_rank,
        "page_size": problem.page_size,
        "batch_size": request.batch_size,
        "kv_len": request.max_seqlen_k,
    }
    if is_invariant:
        for name in _OF_THE_BATCH:
            del asked[name]
    return asked


def rows(arch: str) -> tuple[Row, ...]:
    """Return the rows for an architecture in the order of their precedence; raises as `choose`."""
    packaged = read(_PACKAGED / arch / "decode.json")
    listed = read(user_directory() / arch / "decode.json") + packaged
    if not listed:
        raise UnsupportedProblemError(
            f"triton: a tuning table must exist for the architecture, got none for {arch!r}; "
            "make one with `mla tune`"
        )
    if listed[-1].when:
        raise LayoutError(
            f"{listed[-1].where}: the last row must have an empty `when`, so that one matches"
        )
    return listed


def user_directory() -> Path:
    """Return where the user's tables are, which need not exist.

    ``MLA_TUNING_PATH``, else ``mla/tuning`` in the cache directory of the XDG base directory
    specification: ``XDG_CACHE_HOME``, else ``~/.cache``.
    """
    if told := env.directory("MLA_TUNING_PATH"):
        return told
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification wants relative paths ignored.
    cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return cache / "mla" / "tuning"


@functools.cache
def read(path: Path) -> tuple[Row, ...]:
    """Return the rows of a table, none if there is no such file.

    Read once in a process; ``read.cache_clear()`` forgets.

    Raises
    ------
    LayoutError
        The file has an unknown key or value; the message names file and row.
    """
    if not path.is_file():
        return ()
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise LayoutError(f"{path}: must be JSON, got {exc}") from exc
    listed = table.get("rows") if isinstance(table, dict) else table
    if not isinstance(listed, list):
        raise LayoutError(f"{path}: must be a list of rows or an object with `rows`")
    return tuple(_parse(f"{path}: row {index}", row) for index, row in enumerate(listed))


def _parse(where: str, listed: object) -> Row:
    if not isinstance(listed, dict):
        raise LayoutError(f"{where}: must be an object, got {type(listed).__name__}")
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
    source = values.pop("source", "")
    if not isinstance(source, str):
        raise LayoutError(f"{where}: `source` must be a text, got {type(source).__name__}")
    known = {field.name for field in fields(DecodeConfig)}
    if unknown := sorted(values.keys() - known):
        raise LayoutError(f"{where}: keys must be among {', '.join(sorted(known))}, got {unknown}")
    try:
        return Row(when, DecodeConfig(**values), where)
    except (TypeError, LayoutError) as exc:
        raise LayoutError(f"{where}: {exc}") from exc


def _matches(value: object, wanted: object) -> bool:
    """Whether a value is the wanted one, one of a list, or within ``{"min": a, "max": b}``."""
    if isinstance(wanted, dict):
        assert isinstance(value, int)
        return bool(wanted.get("min", value) <= value <= wanted.get("max", value))
    return value in wanted if isinstance(wanted, list) else value == wanted
