"""Run one instruction on both cores and say where they differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdna_emulator import native_core
from cdna_emulator.instruction import Instruction, Operand
from cdna_emulator.isa import Unit
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.numpy_core import Mode, WaveState, run_wave
from cdna_emulator.program import make_program
from operation_cases.states import LANES, State

Array = np.ndarray[Any, np.dtype[Any]]

#: Bits of MODE that both cores keep.
MODE_BITS = 0x88003FF
#: Of private memory; the native core fills it with ones.
SCRATCH_BYTES = 512
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


@dataclass(frozen=True)
class Tolerance:
    """How results may differ: ``width`` of the floats in them, 0 for plain bits.

    NaNs are equal whatever they carry, since no document says which operand's survives. ``ulps``
    is a distance in units of the last place, ``relative`` one in shares of the largest result.
    ``neighbours`` is the width of small floats that may be next to each other: where a random part
    of the last place is added to denormals, documents leave open which bits of it count.
    """

    width: int = 0
    ulps: int = 0
    relative: float = 0.0
    is_bf16: bool = False
    neighbours: int = 0
    is_bf8: bool = False


def numpy_state(state: State, arch: str, memory: DeviceMemory | None = None) -> WaveState:
    """Return a state of the NumPy core."""
    return WaveState(
        sgpr=state.sgpr.copy(),
        vgpr=state.vgpr.copy(),
        scc=state.scc,
        mode=Mode(state.mode),
        lds=state.lds.copy(),
        scratch=np.full((LANES, SCRATCH_BYTES), 0xFF, np.uint8),
        memory=memory,
        arch=arch,
    )


def run_native(
    instructions: list[Instruction],
    state: State,
    arch: str,
    memory: DeviceMemory | None = None,
) -> tuple[native_core.WaveState, native_core.Counters]:
    """Run instructions, the last of which must be s_endpgm, on the native core."""
    program = make_program(tuple(instructions), arch, "test")
    before = native_core.WaveState(state.sgpr, state.vgpr, state.lds, state.scc, state.mode)
    return native_core.run_wave(program, before, memory=memory, scratch_bytes=SCRATCH_BYTES)


def run_numpy(
    instructions: list[Instruction],
    state: State,
    arch: str,
    memory: DeviceMemory | None = None,
) -> WaveState:
    """Run instructions on the NumPy core."""
    return run_wave(instructions, numpy_state(state, arch, memory))


def differences(native: native_core.WaveState, numpy_: WaveState, inst: Instruction) -> list[str]:
    """Return what differs beyond an instruction's tolerance, in words; a few of each kind."""
    target = inst.operands[0] if inst.operands else None
    allowed = tolerance(inst)
    found = []
    if not same_bytes(native.lds, numpy_.lds, inst):
        found.append(f"LDS at {np.flatnonzero(native.lds != numpy_.lds)[:4].tolist()}")
    if native.scc != numpy_.scc:
        found.append(f"scc native {native.scc} numpy {numpy_.scc}")
    if (native.mode ^ numpy_.mode.bits) & MODE_BITS:
        found.append(f"mode native {native.mode:#x} numpy {numpy_.mode.bits:#x}")
    for index in np.flatnonzero(native.sgpr != numpy_.sgpr)[:4]:
        found.append(f"s{index} native {native.sgpr[index]:#x} numpy {numpy_.sgpr[index]:#x}")
    different = native.vgpr != numpy_.vgpr
    if allowed.is_bf8:
        different &= ~_bytes_close(native.vgpr, numpy_.vgpr)
    if allowed.neighbours:
        different &= ~_neighbours(native.vgpr, numpy_.vgpr, target, allowed.neighbours)
    if allowed.width:
        different &= ~_close(native.vgpr, numpy_.vgpr, allowed)
    for register, lane in np.argwhere(different)[:4]:
        found.append(
            f"v{register}[{lane}] native {native.vgpr[register, lane]:#x} "
            f"numpy {numpy_.vgpr[register, lane]:#x}"
        )
    return found


def _bytes_close(a: Array, b: Array) -> Array:
    """Return where bytes differ by nothing but which NaN they are, as IEEE lays them out."""
    first, second = (x.view(np.uint8) for x in (a, b))
    both_nan = (first & 0x7F > 0x7C) & (second & 0x7F > 0x7C)
    return ((first == second) | both_nan).reshape(*a.shape, 4).all(axis=2)


def _neighbours(a: Array, b: Array, target: Operand | None, width: int) -> Array:
    """Return where all fields of the target are equal or next to each other in order."""
    assert target is not None
    registers = slice(target.index, target.index + target.width)
    words = [np.ascontiguousarray(x[registers].T).view(np.uint8) for x in (a, b)]
    first, second = (np.unpackbits(x, axis=1, bitorder="little") for x in words)
    usable = first.shape[1] // width * width
    weights = 1 << np.arange(width - 1)
    ordered = []
    for bits in (first, second):
        fields = bits[:, :usable].reshape(LANES, -1, width)
        size = (fields[:, :, :-1] * weights).sum(axis=2)
        ordered.append(np.where(fields[:, :, -1] == 1, -size, size))
    close = (np.abs(ordered[0] - ordered[1]) <= 1).all(axis=1)
    result = np.zeros(a.shape, bool)
    result[registers] = close
    return result


def _close(a: Array, b: Array, allowed: Tolerance) -> Array:
    """Return which registers are close enough, half by half or pair by pair as floats go."""
    if allowed.width == 16:
        if allowed.is_bf16:
            halves = [
                _floats_close(
                    (x & np.uint32(0xFFFF0000)).view(np.float32),
                    (y & np.uint32(0xFFFF0000)).view(np.float32),
                    allowed,
                )
                for x, y in ((a, b), (a << np.uint32(16), b << np.uint32(16)))
            ]
            return np.logical_and(*halves)
        both = _floats_close(a.view(np.float16), b.view(np.float16), allowed)
        return both.reshape(*a.shape, 2).all(axis=2)
    if allowed.width == 32:
        return _floats_close(a.view(np.float32), b.view(np.float32), allowed)
    # Pairs begin at even numbers.
    pairs = [_floats_close(_pair(a, k), _pair(b, k), allowed) for k in range(0, len(a), 2)]
    return np.repeat(np.stack(pairs), 2, axis=0)


def _pair(registers: Array, index: int) -> Array:
    low, high = registers[index].astype(np.uint64), registers[index + 1].astype(np.uint64)
    return (low | high << np.uint64(32)).view(np.float64)


def _floats_close(a: Array, b: Array, allowed: Tolerance) -> Array:
    with np.errstate(all="ignore"):
        close = (np.isnan(a) & np.isnan(b)) | (a == b) & (np.signbit(a) == np.signbit(b))
        if allowed.ulps:
            distance = np.abs(a.astype(np.float64) - b.astype(np.float64))
            close |= distance <= allowed.ulps * np.spacing(np.maximum(np.abs(a), np.abs(b)))
        if allowed.relative:
            scale = np.maximum(np.abs(a), np.abs(b)).astype(np.float64)
            close |= np.abs(a.astype(np.float64) - b) <= allowed.relative * scale
    return close


def memory_float_width(inst: Instruction) -> int:
    """Return the width of the floats that an atomic computes with, 0 if it does not."""
    match = re.search(r"_(?:b?f)(16|32|64)$", inst.mnemonic)
    is_atomic = {"atomic", "lds_atomic"} & inst.op.flags
    return int(match[1]) if match and is_atomic else 0


def same_bytes(a: Array, b: Array, inst: Instruction) -> bool:
    """Whether memory is the same afterwards but for what NaNs carry."""
    width = memory_float_width(inst)
    if not width:
        return np.array_equal(a, b)
    if "bf16" in inst.mnemonic:
        x, y = ((v.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for v in (a, b))
    else:
        x, y = a.view(_FLOAT[width]), b.view(_FLOAT[width])
    return bool(_floats_close(x, y, Tolerance(width)).all())


def tolerance(inst: Instruction) -> Tolerance:
    """Return how far results of an instruction may be apart."""
    op, name = inst.op, inst.mnemonic
    if width := memory_float_width(inst):
        return Tolerance(width, is_bf16="bf16" in name)
    if op.unit is Unit.MFMA:
        if "_i32_" in name:
            return Tolerance()
        return Tolerance(64 if "_f64_" in name else 32, relative=2e-6)
    written = [slot.type for slot in op.slots if slot.is_written]
    kind = written[0] if written else ""
    if op.unit is Unit.TRANS:
        if kind == "f64":
            # Documented as an approximation to about 2**-27 that refinement steps start from.
            return Tolerance(64, relative=2.0**-24)
        return Tolerance(16 if kind == "f16" else 32, ulps=1)
    if kind in ("f64", "f32", "pkf32"):
        return Tolerance(64 if kind == "f64" else 32)
    if kind in ("f16", "pk16"):
        return Tolerance(16, is_bf16="bf16" in name)
    # Conversions, whose results are plain bits to the op table.
    scaled = re.fullmatch(r"v_cvt_(?:scalef32_)?(sr_)?(?:pk32_|2xpk16_|pk_)?(\w+?)_(\w+)", name)
    if scaled is None:
        return Tolerance()
    stochastic, result = bool(scaled[1]), scaled[2]
    if stochastic:
        width = int(re.sub(r"\D", "", result))
        return Tolerance(
            width if width == 16 else 0,
            neighbours=width,
            is_bf16=result == "bf16",
            is_bf8=result == "bf8",
        )
    if result in ("f32", "f16", "bf16"):
        return Tolerance(32 if result == "f32" else 16, is_bf16=result == "bf16")
    return Tolerance(is_bf8=result == "bf8")
