"""Running the AMD kernels on CPU tensors, in the emulator of the package ``cdna-emulator``.

``MLA_ASM_EMULATE=1`` (or ``gfx942``, ``gfx950``) turns it on for a process, `emulation` for a block
of code. Machine code is executed instruction by instruction with every checker on, thousands of
times slower than a GPU: for tests and for looking inside, never for work.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mla_asm.capabilities import ARCHS
from mla_asm.catalog import CatalogRow, verified_code_object
from mla_asm.kernargs import Arguments, check_layout
from mla_core import env
from mla_core.errors import BackendUnavailableError, LayoutError
from mla_core.logs import event

if TYPE_CHECKING:
    from cdna_emulator import CodeObject, Result

#: Compute units that planning assumes, so that even small batches are split.
NUM_CU = 4
DEFAULT_SCHEDULE = "round_robin:64"


@dataclass(frozen=True, slots=True)
class Emulation:
    """How kernels are emulated, and what came of it.

    Parameters
    ----------
    arch : str
    schedule : str
        Order in which waves run, one of ``cdna_emulator.SCHEDULES``.
    results : list of cdna_emulator.Result
        Instructions and profile of every launch.
    """

    arch: str
    schedule: str = DEFAULT_SCHEDULE
    results: list[Result] = field(default_factory=list)


_ACTIVE: ContextVar[Emulation | None] = ContextVar("mla_asm_emulation", default=None)


@contextmanager
def emulation(arch: str = "gfx942", *, schedule: str = DEFAULT_SCHEDULE) -> Iterator[Emulation]:
    """Emulate an architecture inside a ``with`` block, whatever ``MLA_ASM_EMULATE`` says.

    Parameters
    ----------
    arch, schedule
        See `Emulation`, which the block gets; its ``results`` grow with each launch.
    """
    if arch not in ARCHS:
        raise LayoutError(f"emulation: arch must be {' or '.join(ARCHS)}, got {arch!r}")
    active = Emulation(arch, schedule)
    token = _ACTIVE.set(active)
    try:
        yield active
    finally:
        _ACTIVE.reset(token)


def emulated_arch() -> str | None:
    """Return the architecture that CPU tensors stand for, ``None`` when nothing is emulated."""
    if (active := _ACTIVE.get()) is not None:
        return active.arch
    asked = env.choice("MLA_ASM_EMULATE", ("0", "1", *ARCHS))
    return {"0": None, "1": ARCHS[0]}.get(asked, asked)


def probe() -> None:
    """Raise when CPU tensors cannot be emulated here.

    Raises
    ------
    BackendUnavailableError
    """
    if emulated_arch() is None:
        raise BackendUnavailableError(
            "asm kernels run on the CPU only in an emulator, slowly; set MLA_ASM_EMULATE=1"
        )
    if importlib.util.find_spec("cdna_emulator") is None:
        raise BackendUnavailableError(
            'the emulator is not installed; pip install "mla-asm[emulator]"'
        )


def run(
    row: CatalogRow, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Arguments
) -> None:
    """Execute a kernel on CPU tensors, under all checks.

    Raises
    ------
    cdna_emulator.CheckError
        A checker found something.
    """
    import cdna_emulator

    _announce(row.arch)
    active = _ACTIVE.get() or Emulation(row.arch)
    result = cdna_emulator.run(
        _code_object(row),
        row.symbol,
        grid,
        block,
        dict(arguments),
        arch=row.arch,
        schedule=active.schedule,
        checks="all",
        strict=True,
    )
    active.results.append(result)


@functools.cache
def _announce(arch: str) -> None:
    """Say once that results come from an emulator."""
    event("asm_emulate", arch=arch, because="MLA_ASM_EMULATE or mla_asm.emulation; slow")


@functools.lru_cache(maxsize=64)
def _code_object(row: CatalogRow) -> CodeObject:
    """Read a row's code object, and compare its argument block with the declared one."""
    from cdna_emulator import CodeObject

    code_object = CodeObject.read(verified_code_object(row))
    kernel = code_object.kernel(row.symbol)
    check_layout(f"{row.code_object}: {row.symbol}", kernel.arguments, kernel.kernarg_size)
    return code_object
