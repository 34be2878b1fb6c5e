"""Branches, and instructions that concern the wave as a whole."""

from __future__ import annotations

from collections.abc import Callable

from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.salu import get, put
from cdna_emulator.numpy_core.state import WaveState


def _go(state: WaveState, address: int) -> None:
    """Continue at an address of the code object; the core turns it into an index."""
    state.pc = address


def _next_pc(state: WaveState, inst: Instruction) -> int:
    """Return the device address of the instruction after this one."""
    return state.image_base + inst.address + inst.size


_CONDITIONS: dict[str, Callable[[WaveState], bool]] = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: bool(w.scc),
    "s_cbranch_vccz": lambda w: w.vcc == 0,
    "s_cbranch_vccnz": lambda w: w.vcc != 0,
    "s_cbranch_execz": lambda w: w.exec == 0,
    "s_cbranch_execnz": lambda w: w.exec != 0,
}


def _branch(name: str, condition: Callable[[WaveState], bool]) -> None:
    @handler(name)
    def execute(state: WaveState, inst: Instruction) -> None:
        if condition(state):
            _go(state, inst.operands[0].bits)


for _name, _condition in _CONDITIONS.items():
    _branch(_name, _condition)


@handler("s_getpc_b64")
def _getpc(state: WaveState, inst: Instruction) -> None:
    put(state, inst, 0, _next_pc(state, inst), 64)


@handler("s_setpc_b64")
def _setpc(state: WaveState, inst: Instruction) -> None:
    _go(state, get(state, inst, 0, 64) - state.image_base)


@handler("s_swappc_b64")
def _swappc(state: WaveState, inst: Instruction) -> None:
    target = get(state, inst, 1, 64)
    put(state, inst, 0, _next_pc(state, inst), 64)
    _go(state, target - state.image_base)


@handler("s_call_b64")
def _call(state: WaveState, inst: Instruction) -> None:
    put(state, inst, 0, _next_pc(state, inst), 64)
    _go(state, inst.operands[1].bits)


@handler("s_endpgm")
def _end(state: WaveState, inst: Instruction) -> None:
    state.status = "ended"


@handler("s_barrier")
def _barrier(state: WaveState, inst: Instruction) -> None:
    state.status = "at barrier"


@handler(
    "s_nop s_sleep s_setprio s_sendmsg s_waitcnt s_icache_inv s_wakeup s_dcache_inv s_dcache_wb"
    " buffer_wbl2 buffer_inv ds_nop"
)
def _timing_only(state: WaveState, inst: Instruction) -> None:
    """Change nothing that a program can read: memory is ordered and always up to date here."""


@handler("s_sethalt s_trap")
def _needs_a_debugger(state: WaveState, inst: Instruction) -> None:
    raise UnknownInstructionError(
        f"numpy core: `{inst.text}`: halting and trapping are not modelled"
    )


@handler("s_memtime s_memrealtime")
def _clock(state: WaveState, inst: Instruction) -> None:
    state.clock += 1
    put(state, inst, 0, state.clock, 64)
