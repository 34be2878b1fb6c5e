"""Pytest fixtures: Triton kernels as emulated machine code, and a chosen schedule and checks.

Registered by the package's entry point; ``-p no:cdna_emulator`` leaves it out. Nothing of the
emulator is imported until a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cdna_emulator.launch import Result
    from cdna_emulator.triton_bridge import EmulatedKernel


@pytest.fixture
def emulate_kernel() -> Callable[..., EmulatedKernel]:
    """Return `cdna_emulator.triton_bridge.emulate`; skip the test where Triton is missing."""
    pytest.importorskip("triton")
    from cdna_emulator.triton_bridge import emulate

    return emulate


@pytest.fixture
def emulated_triton() -> Iterator[Callable[..., list[Result]]]:
    """Return a function that emulates jitted kernels in their modules until the test ends.

    ``emulated_triton("gfx942", "package.module:kernel", ...)`` returns a list that grows by the
    result of each launch; see `cdna_emulator.triton_bridge.replaced` for its options.
    """
    pytest.importorskip("triton")
    from cdna_emulator.triton_bridge import replaced

    with ExitStack() as undo:

        def use(arch: str, *kernels: str, **options: Any) -> list[Result]:
            return undo.enter_context(replaced(arch, *kernels, **options))

        yield use
