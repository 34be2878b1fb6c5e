"""The table from mnemonics to handlers, and the common shape of lane-wise instructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core.operands import read, write
from cdna_emulator.numpy_core.state import Mode, WaveState

Handler = Callable[[WaveState, Instruction], None]

#: Every handler by mnemonic without encoding suffix.
HANDLERS: dict[str, Handler] = {}


@dataclass(frozen=True, slots=True)
class Step:
    """The instruction being executed and the wave that executes it."""

    state: WaveState
    inst: Instruction

    @property
    def mode(self) -> Mode:
        """The MODE register."""
        return self.state.mode

    @property
    def clamp(self) -> bool:
        """Whether integer results saturate and float results are clamped."""
        return "clamp" in self.inst.modifiers


def handler(names: str) -> Callable[[Handler], Handler]:
    """Register a handler that does everything itself."""

    def register(function: Handler) -> Handler:
        _add(names, function)
        return function

    return register


def lanewise(names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of source values that returns the results for each written operand."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        add_lanewise(names, function)
        return function

    return register


def add_lanewise(names: str, function: Callable[..., Any]) -> None:
    """Register ``function(step, *sources)``, a result or a tuple of results."""

    def execute(state: WaveState, inst: Instruction) -> None:
        slots = inst.op.slots
        sources = [read(state, inst, k) for k, slot in enumerate(slots) if slot.is_read]
        results = function(Step(state, inst), *sources)
        if not isinstance(results, tuple):
            results = (results,)
        written = [k for k, slot in enumerate(slots) if slot.is_written]
        for position, values in zip(written, results, strict=True):
            write(state, inst, position, values)

    _add(names, execute)


def _add(names: str, function: Handler) -> None:
    for name in names.split():
        if name in HANDLERS:
            raise ValueError(f"numpy core: {name} must have one handler, got two")
        HANDLERS[name] = function


def words_of(text: str) -> list[str]:
    """Split a list of names."""
    return text.split()
