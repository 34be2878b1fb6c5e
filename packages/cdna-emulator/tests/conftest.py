"""Running single instructions on one wave of the native core."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject
from cdna_emulator.native_core import WaveState, run_wave
from cdna_emulator.program import Program, load_program

EXEC = 126


class Instructions:
    """Some instructions of one architecture, assembled together, each runnable by its text."""

    def __init__(self, texts: Sequence[str], arch: str) -> None:
        names = {text: f"k{number}" for number, text in enumerate(texts)}
        data = assemble_kernels({name: text.splitlines() for text, name in names.items()}, arch)
        code_object = CodeObject.read(data)
        self.programs: dict[str, Program] = {
            text: load_program(code_object, name) for text, name in names.items()
        }

    def run(
        self,
        text: str,
        registers: Mapping[int, np.ndarray],
        *,
        scalars: Mapping[int, int] | None = None,
        mode: int = 0x3F0,
        exec_mask: int = 2**64 - 1,
    ) -> np.ndarray:
        """Return all vector registers after the instruction; those not given hold 0xdeadbeef."""
        vgpr = np.full((512, 64), 0xDEADBEEF, np.uint32)
        for number, value in registers.items():
            vgpr[number] = value
        sgpr = np.zeros(128, np.uint32)
        for number, word in (scalars or {}).items():
            sgpr[number] = word
        sgpr[EXEC], sgpr[EXEC + 1] = exec_mask & 0xFFFFFFFF, exec_mask >> 32
        state = WaveState(sgpr, vgpr, np.zeros(64, np.uint8), mode=mode)
        after, counters = run_wave(self.programs[text], state)
        assert not counters.findings
        return after.vgpr


@pytest.fixture(scope="session")
def instructions() -> Callable[[Sequence[str], str], Instructions]:
    """Return what assembles instructions for one architecture."""
    return Instructions
