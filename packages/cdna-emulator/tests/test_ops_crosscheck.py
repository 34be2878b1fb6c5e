"""Every instruction of the op table on both cores, over random operands and states.

The cores were written apart from the instruction set documents; each checks the other. A difference
is settled by the documents. Directed facts are in test_ops_directed.py.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from cdna_emulator import native_core
from cdna_emulator.isa import OPS, Unit
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.numpy_core import HANDLERS

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
assembly, compare, memory_texts, states, texts = (
    importlib.import_module(f"operation_cases.{name}")
    for name in ("assembly", "compare", "memory_texts", "states", "texts")
)
sys.path.remove(str(HERE))

ARCHS = ("gfx942", "gfx950")
#: Texts written for each form of an instruction.
SAMPLES = 3
#: Rounds of writing until every instruction has a legal text.
ATTEMPTS = 30
#: States for each flavour; an instruction draws one of them.
STATES = 8
#: Instructions that only other tests run: they count time, or stop and branch.
UNTOUCHED = {"s_memtime", "s_memrealtime", "s_getpc_b64"}
REGISTER_UNITS = (Unit.VALU, Unit.TRANS, Unit.SALU, Unit.MFMA)
MEMORY_UNITS = (Unit.LDS, Unit.BUFFER, Unit.GLOBAL, Unit.FLAT, Unit.SCRATCH, Unit.SMEM)
_MATRIX_FLAVOURS = {
    "f32": "matrix f32",
    "xf32": "matrix f32",
    "f16": "matrix f16",
    "bf16": "matrix bf16",
    "f64": "matrix f64",
}


def _exists(op, arch):
    return not ({"gfx942", "gfx950"} - {arch}) & op.flags


def _flavour(op):
    kind = op.name.rpartition("_")[2]
    if op.unit is Unit.MFMA:
        # Whole numbers have exact sums; codes of small formats are all interesting.
        return _MATRIX_FLAVOURS.get(kind, "integer")
    types = [*(slot.type for slot in op.slots), kind]
    for flavour in ("f64", "f16", "bf16", "f32"):
        if flavour in types:
            return flavour
    if "f16" in op.name:
        return "f16"
    return "f32" if "f32" in op.name else "integer"


class _Pool:
    """Random states by flavour; drawing one copies its scalar registers and draws a mode."""

    def __init__(self, rng):
        self.rng, self.states = rng, {}

    def draw(self, flavour):
        if flavour not in self.states:
            self.states[flavour] = [states.State(self.rng, flavour) for _ in range(STATES)]
        state = copy.copy(self.states[flavour][int(self.rng.integers(STATES))])
        state.sgpr = state.sgpr.copy()
        state.mode = int(self.rng.choice(states.MODES))
        return state


def _texts(writer, ops, forms, write, arch):
    """Return instructions with their op and form, and the end of a program.

    Operations of which chance wrote nothing legal get more attempts.
    """
    owner, accepted, missing = {}, [], list(ops)
    for _ in range(ATTEMPTS):
        new = {}
        for op in missing:
            for form in forms(op):
                for _ in range(SAMPLES):
                    text = write(writer, op, form)
                    if text is not None:
                        new[text] = (op, form)
        accepted += assembly.accepted([text for text in new if text not in owner], arch)
        owner |= new
        covered = {owner[text][0].name for text in accepted}
        missing = [op for op in missing if op.name not in covered | UNTOUCHED]
        if not missing:
            break
    assert missing == []
    instructions = assembly.parsed([*accepted, "s_endpgm"], arch)
    cases = [(inst, *owner[text]) for inst, text in zip(instructions, accepted, strict=False)]
    return cases, instructions[-1]


def _report(bad):
    shown = [f"{text}\n    {'; '.join(words[:3])}" for text, words in bad[:12]]
    return f"{len(bad)} instructions differ\n" + "\n".join(shown)


def test_no_core_misses_an_instruction():
    assert sorted(HANDLERS) == sorted(OPS)
    assert [name for name in OPS if not native_core.has_handler(name)] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_register_instructions(arch, seed):
    rng = np.random.default_rng(seed)
    ops = [op for op in OPS.values() if op.unit in REGISTER_UNITS and _exists(op, arch)]
    cases, end = _texts(texts.Writer(rng), ops, texts.forms, texts.write, arch)
    pool, bad = _Pool(rng), []
    for inst, op, _ in cases:
        state = pool.draw(_flavour(op))
        if "movrel" in op.name:
            # Pairs of scalar registers begin at even numbers.
            state.sgpr[states.M0] = state.sgpr[states.M0] & 6
        if "v_div_" in op.name:
            # Compilers run division with denormals on; documents do not say what flushing does.
            state.mode |= 0xF0
        native, counters = compare.run_native([inst, end], state, arch)
        words = compare.differences(native, compare.run_numpy([inst, end], state, arch), inst)
        words += [f"native finding of kind {record.kind}" for record in counters.findings]
        if words:
            bad.append((f"{inst.text}  (mode {state.mode:#x})", words))
    assert not bad, _report(bad)


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_instructions(arch, seed):
    rng = np.random.default_rng(seed)
    ops = [op for op in OPS.values() if op.unit in MEMORY_UNITS and _exists(op, arch)]
    cases, end = _texts(texts.Writer(rng), ops, memory_texts.forms, memory_texts.write, arch)
    around = _private_memory(arch)
    pool, bad = _Pool(rng), []
    for inst, op, form in cases:
        flavour = str(rng.choice(["integer", "f32", "f16", "f64"]))
        state = pool.draw(flavour)
        state.vgpr = state.vgpr.copy()
        state.lds = rng.integers(0, 256, memory_texts.LDS_BYTES, np.uint8)
        words = memory_texts.BUFFER_BYTES // 4
        data = states.values(rng, flavour, words, 1)[:, 0].copy().view(np.uint8)
        native_memory, numpy_memory = (_Mapped(data) for _ in range(2))
        memory_texts.prepare(state, rng, op, form, native_memory.base)
        if compare.memory_float_width(inst):
            # Which denormals LDS keeps where the mode flushes them is documented for sums alone.
            state.mode |= 0xF0
        line = [inst, end]
        if op.unit is Unit.SCRATCH or form == "private":
            line = [*around[0], inst, *around[1], end]
        native, counters = compare.run_native(line, state, arch, native_memory.memory)
        numpy_ = compare.run_numpy(line, state, arch, numpy_memory.memory)
        found = compare.differences(native, numpy_, inst)
        if not compare.same_bytes(native_memory.bytes, numpy_memory.bytes, inst):
            found.append("memory differs")
        if bool(counters.findings) != bool(numpy_.faults):
            found.append(f"faults: native {len(counters.findings)}, numpy {numpy_.faults[:2]}")
        if found:
            bad.append((f"{inst.text}  ({form})", found))
    assert not bad, _report(bad)


def _private_memory(arch):
    """Return stores that fill private memory, and loads that show what became of it."""
    offsets = range(0, compare.SCRATCH_BYTES, 16)
    stores = [
        f"scratch_store_dwordx4 off, v[{70 + 4 * k}:{73 + 4 * k}], off offset:{offset}"
        for k, offset in enumerate(offsets)
    ]
    loads = [
        f"scratch_load_dwordx4 a[{70 + 4 * k}:{73 + 4 * k}], off, off offset:{offset}"
        for k, offset in enumerate(offsets)
    ]
    return assembly.parsed(stores, arch), assembly.parsed(loads, arch)


class _Mapped:
    """A buffer of its own with some bytes, mapped at the same device address each time."""

    def __init__(self, data):
        room = np.zeros(data.size + 256, np.uint8)
        start = -room.ctypes.data % 256
        self.bytes = room[start : start + data.size]
        self.bytes[:] = data
        self.memory = DeviceMemory()
        self.base = self.memory.map("buffer", self.bytes.ctypes.data, data.size, room)
