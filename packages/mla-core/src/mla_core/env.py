"""Every environment variable the library reads, in one table.

The documentation page, ``mla doctor`` and the readers below use the same rows, so an ``MLA_``
variable that is not here does not exist. Of Triton's own variables ``TRITON_INTERPRET`` matters: it
lets kernels run on a CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mla_core.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Variable:
    """One documented environment variable."""

    name: str
    default: str
    accepts: str
    meaning: str


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "MLA_BACKEND",
        "",
        "comma-separated backend names",
        "Backends to choose from, tried in this order; empty means by priority.",
    ),
    Variable(
        "MLA_LOG_LEVEL",
        "warning",
        "debug, info, warning, error",
        "Level of the `mla_core` logger; `info` prints one line for each plan choice.",
    ),
    Variable(
        "MLA_LOG_SOURCE",
        "0",
        "0 or 1",
        "Append the source file and line to each log line.",
    ),
    Variable(
        "MLA_TUNING_PATH",
        "",
        "a directory",
        "Directory of tuning tables, `<arch>/<op>.json`, whose rows come before the packaged ones; "
        "default: `mla/tuning` in the user's cache directory (`XDG_CACHE_HOME`, else `~/.cache`).",
    ),
    Variable(
        "MLA_AOT_DIR",
        "",
        "a directory",
        "Directory of kernels compiled by `mla aot`; those for the GPU at hand are put into "
        "Triton's cache before the first plan.",
    ),
    Variable(
        "MLA_HSA_DIR",
        "",
        "a directory",
        "Directory of kernel catalogs and code objects, instead of the packaged `hsa/`.",
    ),
    Variable(
        "MLA_ASM_EMULATE",
        "0",
        "0, 1, gfx942, gfx950",
        "Let the `asm` backend run its AMD kernels on CPU tensors in the emulator, slowly; 1 means "
        "gfx942.",
    ),
    Variable(
        "MLA_CHECK",
        "0",
        "0 or 1",
        "Run the expensive checks on every call: index bounds and NaN in live cache rows.",
    ),
)
_BY_NAME = {variable.name: variable for variable in VARIABLES}


def text(name: str) -> str:
    """Return the raw value of a variable of the table, or its default."""
    return os.environ.get(name, "").strip() or _BY_NAME[name].default


def flag(name: str) -> bool:
    """Return a 0/1 variable as a bool."""
    value = text(name)
    if value not in ("0", "1"):
        raise LayoutError(f"{name}: must be 0 or 1, got {value!r}")
    return value == "1"


def choice(name: str, accepted: tuple[str, ...]) -> str:
    """Return a variable that must be one of a few words."""
    value = text(name).lower()
    if value not in accepted:
        raise LayoutError(f"{name}: must be one of {', '.join(accepted)}, got {value!r}")
    return value


def names(name: str) -> tuple[str, ...]:
    """Return a comma-separated variable as a tuple of names, empty parts dropped."""
    return tuple(part.strip() for part in text(name).split(",") if part.strip())


def directory(name: str) -> Path | None:
    """Return a directory variable as a path, or ``None`` when it is not set."""
    value = text(name)
    if not value:
        return None
    path = Path(value)
    if not path.is_dir():
        raise LayoutError(f"{name}: must be an existing directory, got {value!r}")
    return path
