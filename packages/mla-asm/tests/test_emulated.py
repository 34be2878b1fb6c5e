"""Every kernel of the catalogs in the emulator: the conformance suite under every schedule.

Each launch runs with all of the emulator's checks, which make any finding an error: missing waits,
races, uninitialised reads, accesses out of bounds, wait states. These tests are the evidence behind
``emulated`` in the catalogs.
"""

from __future__ import annotations

import ctypes
import functools

import pytest

import cdna_emulator
from mla_asm import emulation, read_catalogs, verified_code_object
from mla_asm.decode import with_kernel
from mla_asm.kernargs import FIELDS, DecodeKernargs, check_layout
from mla_core import MLADims
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases

ROWS = [row for rows in read_catalogs().values() for row in rows]
CASES = [
    *decode_cases("asm", "cpu"),
    # Masked, more rows than a tile and a last tile that is not full, cut by splits and work lists.
    DecodeCase("hard", (150, 0, 33, 1, 330), (3, 1, 2, 1, 6), dims=MLADims(12), num_kv_splits=3),
    DecodeCase("hard", (700, 0, 33, 9), (3, 1, 2, 1), dims=MLADims(40), page_size=1),
]

# Kernels and schedules take turns on one case before the next one is built.
built = functools.lru_cache(maxsize=1)(DecodeCase.build)
each_kernel = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")


@each_kernel
@pytest.mark.parametrize("schedule", cdna_emulator.SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conformance(case, schedule, row):
    with emulation(row.arch, schedule=schedule):
        check_decode(
            "asm",
            case,
            inputs=built(case),
            fixed_lengths=row.is_persistent,
            replan=lambda plan: with_kernel(plan, row.symbol),
        )


@each_kernel
def test_the_code_object_declares_the_argument_block(row):
    code_object = cdna_emulator.CodeObject.read(verified_code_object(row))
    kernel = code_object.kernel(row.symbol)
    assert code_object.arch == row.arch
    check_layout(row.symbol, kernel.arguments, kernel.kernarg_size)
    assert kernel.kernarg_size == ctypes.sizeof(DecodeKernargs)
    # Which arguments are values and which are addresses: sizes alone would not tell.
    values = {item.name for item in kernel.arguments if item.value_kind == "by_value"}
    assert values == {name for name, kind in FIELDS.items() if kind is not ctypes.c_void_p}


@each_kernel
def test_nothing_spills(row):
    kernel = cdna_emulator.CodeObject.read(verified_code_object(row)).kernel(row.symbol)
    assert (kernel.vgpr_spill_count, kernel.sgpr_spill_count) == (0, 0)
    assert kernel.private_segment_size == 0


@pytest.mark.parametrize("value", ["1", "gfx942", "gfx950"])
def test_the_variable_is_enough(monkeypatch, value):
    monkeypatch.setenv("MLA_ASM_EMULATE", value)
    check_decode("asm", CASES[0])
