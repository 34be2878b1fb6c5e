"""Moves, selections, and instructions that carry values between lanes."""

from __future__ import annotations

import numpy as np

from cdna_emulator.instruction import Instruction
from cdna_emulator.numpy_core.operands import raw, scalar, vector_words
from cdna_emulator.numpy_core.registry import Step, handler, lanewise
from cdna_emulator.numpy_core.state import LANES, Array, WaveState


@lanewise("v_mov_b32 v_mov_b64 v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32")
def _move(step: Step, a: Array) -> Array:
    return a


@handler("v_nop")
def _nop(state: WaveState, inst: Instruction) -> None:
    """Do nothing."""


@lanewise("v_cndmask_b32")
def _select(step: Step, a: Array, b: Array, mask: Array) -> Array:
    return np.where(mask, b, a)


@lanewise("v_swap_b32")
def _swap(step: Step, a: Array, b: Array) -> tuple[Array, Array]:
    return b, a


@handler("v_permlane16_swap_b32 v_permlane32_swap_b32")
def _permlane_swap(state: WaveState, inst: Instruction) -> None:
    """Exchange the odd rows of the first register with the even rows of the second."""
    width = 16 if "16" in inst.mnemonic else 32
    first, second = (state.vgpr[operand.index] for operand in inst.operands)
    for start in range(0, LANES, 2 * width):
        low, high = slice(start, start + width), slice(start + width, start + 2 * width)
        kept = second[low].copy()
        second[low] = first[high]
        first[high] = kept


@handler("v_readfirstlane_b32")
def _readfirstlane(state: WaveState, inst: Instruction) -> None:
    lane = int(np.argmax(state.active)) if state.exec else 0
    values = raw(state, inst, 1, 1)[0]
    state.sgpr[inst.operands[0].index] = values[lane]


@handler("v_readlane_b32")
def _readlane(state: WaveState, inst: Instruction) -> None:
    lane = scalar(state, inst.operands[2]) & 63
    state.sgpr[inst.operands[0].index] = vector_words(state, inst, inst.operands[1], 1)[0, lane]


@handler("v_writelane_b32")
def _writelane(state: WaveState, inst: Instruction) -> None:
    lane = scalar(state, inst.operands[2]) & 63
    value = scalar(state, inst.operands[1]) & 0xFFFFFFFF
    index = inst.operands[0].index
    if state.mode.gpr_idx and state.m0 >> 15 & 1:
        index += state.m0 & 0xFF
    state.vgpr[index, lane] = value
