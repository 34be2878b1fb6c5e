"""Run a backend's Triton kernels on the CPU as AMD machine code, in the emulator.

Inside `emulated_triton` planning believes that the CPU is, say, a gfx942, and launchers that look a
kernel up in its module when they launch find one that compiles for that architecture and executes
instruction by instruction. Unlike Triton's interpreter it computes what the compiler made of the
kernel, in the arithmetic of the hardware. Needs the package ``cdna-emulator``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mla_core.arch import cpu_as
from mla_core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from cdna_emulator.launch import Result

#: The kernels of this package.
CORE_KERNELS = ("mla_core.kernels.reduce:reduce_partials_kernel",)


@contextmanager
def emulated_triton(
    arch: str,
    *kernels: str,
    checks: str = "all",
    schedule: str = "round_robin:64",
    triton: str | None = None,
) -> Iterator[list[Result]]:
    """Emulate kernels, each ``"package.module:name"``, and those of this package in a block.

    Parameters
    ----------
    arch : str
        ``gfx942`` or ``gfx950``.
    checks, schedule
        See `cdna_emulator.run`.
    triton : str, optional
        Folder of another Triton that compiles.

    Yields
    ------
    list of cdna_emulator.Result
        Grows by one with each launch.

    Raises
    ------
    BackendUnavailableError
        The emulator is not installed.
    """
    try:
        from cdna_emulator.triton_bridge import replaced
    except ImportError as exc:
        raise BackendUnavailableError(
            f"emulated_triton: cdna_emulator must be importable, got {exc}; "
            'pip install "cdna-emulator[triton]"'
        ) from exc
    told = os.environ.get("TRITON_INTERPRET")
    # Backends take CPU tensors for Triton only where they believe the interpreter is on.
    os.environ["TRITON_INTERPRET"] = "1"
    every = (*CORE_KERNELS, *kernels)
    try:
        with (
            cpu_as(arch),
            replaced(arch, *every, checks=checks, schedule=schedule, triton=triton) as results,
        ):
            yield results
    finally:
        if told is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = told
