"""Run instructions: one wave after another, each to its next barrier."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cdna_emulator.errors import EmulatorError, UnknownInstructionError
from cdna_emulator.instruction import Instruction
from cdna_emulator.native_core import Counters, FindingRecord
from cdna_emulator.numpy_core.registry import HANDLERS
from cdna_emulator.numpy_core.state import LANES, Fault, Memory, Mode, WaveState
from cdna_emulator.program import Program

if TYPE_CHECKING:
    from cdna_emulator.dispatch import Launch

__all__ = ["HANDLERS", "run_grid", "run_wave", "run_workgroup", "step"]

#: Modules that fill the table when they are imported.
_MODULES = (
    "control",
    "convert",
    "convert_scaled",
    "lds",
    "memory",
    "mfma",
    "packed",
    "salu",
    "transcendental",
    "valu_compare",
    "valu_float",
    "valu_integer",
    "valu_lane",
)
for _module in _MODULES:
    importlib.import_module(f"cdna_emulator.numpy_core.{_module}")

#: Instructions one wave may execute before it counts as stuck.
MAX_INSTRUCTIONS = 10_000_000
_NOWHERE = -1


def step(state: WaveState, inst: Instruction) -> None:
    """Execute one instruction; a branch leaves its target's address in ``state.pc``."""
    function = HANDLERS.get(inst.mnemonic)
    if function is None:
        raise UnknownInstructionError(f"numpy core: no handler for `{inst.text}`")
    state.pc = _NOWHERE
    # Infinities and NaNs are results here.
    with np.errstate(all="ignore"):
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
        state.executed[state.index] += 1
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


# --- whole launches

#: Kinds of finding records, as native/core.h numbers them.
_FAULT_KINDS = {"memory": 1, "lds": 2, "scratch": 12}


def run_grid(program: Program, launch: Launch, max_instructions: int) -> Counters:
    """Run every workgroup of a launch, one after another.

    Returns
    -------
    Counters
        How often each instruction was executed, and accesses out of bounds. Bytes and bank
        conflicts are not counted here.
    """
    count = len(program.instructions)
    executed, bytes_, bank_cycles = (np.zeros(count, np.uint64) for _ in range(3))
    counters = Counters(executed, bytes_, bank_cycles, [], 0, 0)
    for number in range(math.prod(launch.grid)):
        x, rest = number % launch.grid[0], number // launch.grid[0]
        workgroup = (x, rest % launch.grid[1], rest // launch.grid[1])
        waves = _start(program, launch, workgroup)
        run_workgroup(program.instructions, waves, launch.memory, max_instructions=max_instructions)
        for identifier, wave in enumerate(waves):
            for index, times in wave.executed.items():
                counters.executed[index] += times
                counters.instructions += times
            for fault in wave.faults:
                counters.findings.append(_record(program, fault, workgroup, identifier))
    return counters


def _start(program: Program, launch: Launch, workgroup: tuple[int, int, int]) -> list[WaveState]:
    """Return a workgroup's waves as they are when its first instruction executes."""
    descriptor = launch.kernel.descriptor
    system = [
        value
        for value, on in (
            (workgroup[0], descriptor.enable_workgroup_id_x),
            (workgroup[1], descriptor.enable_workgroup_id_y),
            (workgroup[2], descriptor.enable_workgroup_id_z),
        )
        if on
    ]
    items = math.prod(launch.block)
    waves = []
    for number in range(-(-items // LANES)):
        wave = WaveState(mode=Mode(launch.mode), lds=np.zeros(launch.lds_bytes, np.uint8))
        wave.scratch = np.zeros((LANES, launch.kernel.private_segment_size), np.uint8)
        wave.arch, wave.image_base = program.arch, launch.image_base
        wave.index = program.index_of(launch.entry_address)
        registers = [*launch.user_sgprs]
        wave.sgpr[: len(registers)] = registers
        first = descriptor.user_sgpr_count
        wave.sgpr[first : first + len(system)] = system
        item = number * LANES + np.arange(LANES)
        x, rest = item % launch.block[0], item // launch.block[0]
        packed = x
        if descriptor.workitem_id_mode >= 1:
            packed = packed | rest % launch.block[1] << 10
        if descriptor.workitem_id_mode >= 2:
            packed = packed | rest // launch.block[1] << 20
        wave.vgpr[0] = packed
        wave.exec = (1 << min(LANES, items - number * LANES)) - 1
        waves.append(wave)
    return waves


def _record(
    program: Program, fault: Fault, workgroup: tuple[int, int, int], wave: int
) -> FindingRecord:
    record = FindingRecord(
        kind=_FAULT_KINDS[fault.space],
        instruction=fault.index,
        address=program.instructions[fault.index].address,
        wave=wave,
        lane=fault.lane,
        detail0=fault.address,
        detail1=fault.size,
        count=1,
    )
    record.workgroup[:] = workgroup
    return record
