"""Matrix instructions: gather the matrices from the lanes, multiply, scatter the result.

The matrices are ordinary arrays here: A is ``[block, row, k]``, B ``[block, k, column]``, C and D
``[block, row, column]``. Sums are formed in float64 and rounded once to f32; hardware rounds in
between in a way that no document gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from cdna_emulator.instruction import Instruction, Operand
from cdna_emulator.isa import OPS, Unit
from cdna_emulator.numpy_core.formats import (
    EIGHT_BIT,
    F8F6F4,
    bf16_to_float,
    decode,
    scale_value,
)
from cdna_emulator.numpy_core.operands import bits, number, scalar
from cdna_emulator.numpy_core.registry import handler
from cdna_emulator.numpy_core.state import LANE, LANES, Array, WaveState

_NAME = re.compile(r"v_mfma_(?:scale_)?(f32|i32|f64)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(\w+)")
#: Elements in one scaled block.
_BLOCK = 32


@dataclass(frozen=True)
class MatrixShape:
    """Sizes of a matrix instruction and the types of its sides."""

    rows: int
    columns: int
    depth: int
    blocks: int
    result: str
    sides: tuple[str, str]

    @staticmethod
    def of(mnemonic: str) -> MatrixShape:
        """Take a mnemonic apart."""
        match = _NAME.fullmatch(mnemonic)
        if match is None:
            raise ValueError(f"numpy core: {mnemonic} must be a matrix instruction")
        result, rows, columns, depth, blocks, types = match.groups()
        first, _, second = types.partition("_")
        return MatrixShape(
            int(rows), int(columns), int(depth), int(blocks or 1), result, (first, second or first)
        )

    @property
    def per_lane(self) -> int:
        """Elements of A, and of B, that one lane holds."""
        return self.rows * self.depth * self.blocks // LANES


# --- elements


def _register_bits(state: WaveState, operand: Operand, width: int, count: int) -> Array:
    """Return ``count`` x 64 fields of ``width`` bits, from the lowest bit of the registers up."""
    words = -(-width * count // 32)
    rows = state.vgpr[operand.index : operand.index + words]
    found = np.zeros((count, LANES), np.uint64)
    for k in range(count):
        word, shift = divmod(width * k, 32)
        value = rows[word].astype(np.uint64) >> np.uint64(shift)
        if shift + width > 32:
            value |= rows[word + 1].astype(np.uint64) << np.uint64(32 - shift)
        if width > 32:
            value = rows[word].astype(np.uint64) | rows[word + 1].astype(np.uint64) << np.uint64(32)
        found[k] = value & np.uint64((1 << width) - 1)
    return found


def _round_xf32(values: Array) -> Array:
    """Round f32 to ten bits of mantissa, nearest even."""
    word = values.view(np.uint32)
    rounded = word + np.uint32(0xFFF) + (word >> np.uint32(13) & np.uint32(1))
    kept = np.where(np.isfinite(values), rounded & np.uint32(0xFFFFE000), word)
    return kept.astype(np.uint32).view(np.float32)


def _elements(state: WaveState, inst: Instruction, side: int, shape: MatrixShape) -> Array:
    """Return what each lane holds of A or B as float64, or int64 for integers."""
    kind, count = shape.sides[side], shape.per_lane
    operand = inst.operands[1 + side]
    if kind == "f8f6f4":
        form = F8F6F4[number(inst, "cbsz" if side == 0 else "blgp")]
        return decode(_register_bits(state, operand, form.bits, count), form)
    if kind in ("fp8", "bf8"):
        return decode(_register_bits(state, operand, 8, count), EIGHT_BIT[state.arch][kind])
    if kind == "i8":
        return (
            _register_bits(state, operand, 8, count).astype(np.uint8).view(np.int8).astype(np.int64)
        )
    if kind == "bf16":
        return bf16_to_float(_register_bits(state, operand, 16, count)).astype(np.float64)
    if kind == "f16":
        halves = _register_bits(state, operand, 16, count).astype(np.uint16)
        return halves.view(np.float16).astype(np.float64)
    if kind == "f64":
        values = _register_bits(state, operand, 64, count).view(np.float64)
        return -values if bits(inst, "neg", 0, 3)[side] else values
    singles = _register_bits(state, operand, 32, count).astype(np.uint32).view(np.float32)
    return (_round_xf32(singles) if kind == "xf32" else singles).astype(np.float64)


# --- layouts


def _depth_of(inst: Instruction, side: int, shape: MatrixShape, group: Array, k: int) -> Array:
    """Return which ``k`` of the product an element of each lane is."""
    count = shape.per_lane
    if shape.sides[side] == "f8f6f4":
        form = F8F6F4[number(inst, "cbsz" if side == 0 else "blgp")]
        if form.bits == 8:
            # Registers 0 to 3 cover the first half of the depth, 4 to 7 the second.
            half, within = divmod(k, count // 2)
            return half * (shape.depth // 2) + group * (count // 2) + within
    return group * count + k


def _lanes_of_b(inst: Instruction, values: Array) -> Array:
    """Apply ``blgp``, which copies or turns groups of lanes of B."""
    pattern = number(inst, "blgp")
    if pattern in (1, 2):
        return values[:, 32 * (pattern - 1) + (LANE & 31)]
    if pattern == 3:
        return values[:, LANE + 16 & 63]
    if pattern >= 4:
        return values[:, 16 * (pattern - 4) + (LANE & 15)]
    return values


def gather(state: WaveState, inst: Instruction, side: int, shape: MatrixShape) -> Array:
    """Return A or B as ``[block, row or column, k]``."""
    values = _elements(state, inst, side, shape)
    extent = shape.rows if side == 0 else shape.columns
    mixes_lanes = shape.sides[side] not in ("f8f6f4", "f64")
    if side == 1 and mixes_lanes:
        values = _lanes_of_b(inst, values)
    index = LANE % extent
    block = LANE // extent % shape.blocks
    group = LANE // (extent * shape.blocks)
    matrix = np.zeros((shape.blocks, extent, shape.depth), values.dtype)
    for k in range(shape.per_lane):
        matrix[block, index, _depth_of(inst, side, shape, group, k)] = values[k]
    size = number(inst, "cbsz") if mixes_lanes else 0
    if side == 0 and size:
        # One block of each 2**cbsz is used for all of them.
        chosen = np.arange(shape.blocks) >> size << size | number(inst, "abid") & (1 << size) - 1
        matrix = matrix[chosen]
    return matrix


def result_places(shape: MatrixShape) -> tuple[Array, Array, Array, int]:
    """Return block, row and column for ``[register, lane]``, and registers of one value."""
    count = shape.rows * shape.columns * shape.blocks // LANES
    register = np.arange(count)[:, None]
    lane = LANE[None, :]
    column = np.broadcast_to(lane % shape.columns, (count, LANES))
    if shape.result == "f64":
        group = lane // shape.columns
        if shape.blocks > 1:
            return (
                np.broadcast_to(group % shape.blocks, (count, LANES)),
                np.broadcast_to(group // shape.blocks, (count, LANES)),
                column,
                2,
            )
        return np.zeros((count, LANES), int), 4 * register + group, column, 2
    if shape.rows == 4:
        block = np.broadcast_to(lane // 4, (count, LANES))
        return block, np.broadcast_to(register, (count, LANES)), column, 1
    per_block = shape.rows * shape.columns // LANES
    block, within = np.divmod(register, per_block)
    groups = LANES // shape.columns
    row = within // 4 * 4 * groups + lane // shape.columns * 4 + within % 4
    return np.broadcast_to(block, (count, LANES)), row, column, 1


def _accumulator(state: WaveState, inst: Instruction, shape: MatrixShape) -> Array:
    """Return C as ``[block, row, column]``, in the result's type."""
    operand = inst.operands[3]
    block, row, column, width = result_places(shape)
    dtype = {"f32": np.float32, "i32": np.int32, "f64": np.float64}[shape.result]
    matrix = np.zeros((shape.blocks, shape.rows, shape.columns), dtype)
    if operand.kind == "vgpr":
        words = np.ascontiguousarray(state.vgpr[operand.index : operand.index + width * len(block)])
        if width == 2:
            low, high = words[0::2].astype(np.uint64), words[1::2].astype(np.uint64)
            words = low | high << np.uint64(32)
        matrix[block, row, column] = words.view(dtype)
    elif width == 2:
        matrix[:] = np.array([operand.bits], np.uint64).view(np.float64)[0]
    else:
        matrix[:] = np.array([scalar(state, operand) & 0xFFFFFFFF], np.uint32).view(dtype)[0]
    if shape.result == "f64" and bits(inst, "neg", 0, 3)[2]:
        matrix = -matrix
    return matrix


def _scales(state: WaveState, inst: Instruction, side: int, shape: MatrixShape) -> Array:
    """Return the scale of each row or column and each block of 32 along the depth."""
    operand = inst.operands[4 + side]
    if operand.kind == "vgpr":
        words = state.vgpr[operand.index]
    else:
        words = np.full(LANES, scalar(state, operand) & 0xFFFFFFFF, np.uint32)
    byte = bits(inst, "op_sel", 0)[side] | bits(inst, "op_sel_hi", 0)[side] << 1
    values = scale_value(words >> np.uint32(8 * byte) & np.uint32(255))
    extent = shape.rows if side == 0 else shape.columns
    scales = np.zeros((extent, shape.depth // _BLOCK))
    scales[LANE % extent, LANE // extent] = values
    return np.repeat(scales, _BLOCK, axis=1)


# --- the instructions


def multiply(a: Array, b: Array, c: Array) -> Array:
    """Return ``a @ b + c`` rounded to C's type; ``b`` has its depth last."""
    if c.dtype.kind == "i":
        result: Array = (np.einsum("bik,bjk->bij", a, b) + c.astype(np.int64)).astype(np.int32)
        return result
    total = c.astype(np.float64)
    for k in range(a.shape[2]):
        total = total + a[:, :, None, k] * b[:, None, :, k]
    return total.astype(c.dtype)


@handler(" ".join(name for name, op in OPS.items() if op.unit is Unit.MFMA))
def _matrix(state: WaveState, inst: Instruction) -> None:
    shape = MatrixShape.of(inst.mnemonic)
    a, b = (gather(state, inst, side, shape) for side in (0, 1))
    if "_scale_" in inst.mnemonic:
        a = a * _scales(state, inst, 0, shape)
        b = b * _scales(state, inst, 1, shape)
    result = multiply(a, b, _accumulator(state, inst, shape))
    block, row, column, width = result_places(shape)
    values = np.ascontiguousarray(result[block, row, column])
    target = inst.operands[0].index
    if width == 1:
        state.vgpr[target : target + len(values)] = values.view(np.uint32)
        return
    words = values.view(np.uint64)
    state.vgpr[target : target + 2 * len(values) : 2] = words.astype(np.uint32)
    state.vgpr[target + 1 : target + 2 * len(values) : 2] = (words >> np.uint64(32)).astype(
        np.uint32
    )
