"""Run instructions: one wave after another, each to its next barrier."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from cdna_emulator.errors import EmulatorError, UnknownInstructionError
from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core.memory import check_supported
from cdna_emulator.numpy_core.registry import HANDLERS
from cdna_emulator.numpy_core.state import Memory, WaveState

__all__ = ["HANDLERS", "run_wave", "run_workgroup", "step"]

#: Modules that fill the table when they are imported.
for _module in (
    "control convert lds memory mfma packed salu transcendental valu_compare valu_float"
    " valu_integer valu_lane"
).split():
    importlib.import_module(f"cdna_emulator.numpy_core.{_module}")

#: Instructions one wave may execute before it counts as stuck.
MAX_INSTRUCTIONS = 10_000_000
_NOWHERE = -1


def step(state: WaveState, inst: Instruction) -> None:
    """Execute one instruction; a branch leaves its target's address in ``state.pc``."""
    function = HANDLERS.get(inst.mnemonic)
    if function is None:
        raise UnknownInstructionError(f"numpy core: no handler for `{inst.text}`")
    check_supported(inst)
    state.pc = _NOWHERE
    function(state, inst)


def run_wave(
    instructions: Sequence[Instruction],
    state: WaveState,
    memory: Memory | None = None,
    *,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> WaveState:
    """Run one wave until it ends, waits at a barrier or falls off the last instruction.

    Parameters
    ----------
    instructions : sequence of Instruction
        A kernel, or any straight line of instructions.
    state : WaveState
        Changed in place, and returned. ``state.index`` says where to begin.
    memory : Memory, optional
        Device memory; without it every global access is out of bounds.
    max_instructions : int
        Before the wave counts as stuck.
    """
    if memory is not None:
        state.memory = memory
    index_of = {inst.address: index for index, inst in enumerate(instructions)}
    state.status = "running"
    for _ in range(max_instructions):
        if state.index >= len(instructions):
            state.status = "ended"
        if state.status != "running":
            return state
        inst = instructions[state.index]
        step(state, inst)
        if state.pc == _NOWHERE:
            state.index += 1
        elif state.pc in index_of:
            state.index = index_of[state.pc]
        else:
            raise EmulatorError(
                f"numpy core: `{inst.text}` at {inst.address:#x}: target must be an instruction "
                f"of the kernel, got {state.pc:#x}"
            )
    raise EmulatorError(
        f"numpy core: a wave must end within {max_instructions} instructions, got stuck at "
        f"`{instructions[state.index].text}`"
    )


def run_workgroup(
    instructions: Sequence[Instruction],
    waves: Sequence[WaveState],
    memory: Memory | None = None,
    *,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> None:
    """Run the waves of one workgroup to their end, each from barrier to barrier.

    The waves share one LDS: that of the first.
    """
    for wave in waves:
        wave.lds = waves[0].lds
    left = list(waves)
    while left:
        for wave in left:
            run_wave(instructions, wave, memory, max_instructions=max_instructions)
        left = [wave for wave in left if wave.status != "ended"]
