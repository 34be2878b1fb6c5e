"""Every kernel of the catalogs in the emulator: the conformance suite, under hostile schedules.

Each launch runs with all of the emulator's checks, which make any finding an error: missing waits,
races, uninitialised reads, accesses out of bounds, wait states. These tests are the evidence behind
``emulated`` in the catalogs.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

import cdna_emulator
from mla_asm import emulation, read_catalogs, verified_code_object
from mla_asm.decode import with_kernel
from mla_asm.kernargs import DecodeKernargs, check_layout
from mla_core import MLADims
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases

SCHEDULES = cdna_emulator.SCHEDULES
ROWS = [row for rows in read_catalogs().values() for row in rows]
#: Ragged, masked, more rows than a tile, a last tile that is not full; also cut by work lists.
HARD = DecodeCase("hard", (150, 0, 33, 1, 330), (3, 1, 2, 1, 5), dims=MLADims(12), num_kv_splits=3)

each_kernel = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")


def check(row, case, schedule):
    with emulation(row.arch, schedule=schedule) as seen:
        check_decode(
            "asm",
            case,
            fixed_lengths=row.is_persistent,
            replan=lambda plan: with_kernel(plan, row.symbol),
        )
    return seen


@each_kernel
@pytest.mark.parametrize("case", decode_cases("asm", "cpu"), ids=str)
def test_conformance(row, case):
    # Neighbouring cases and kernels meet different schedules, and every kernel meets all of them.
    check(row, case, SCHEDULES[(case.seed + ROWS.index(row)) % len(SCHEDULES)])


@each_kernel
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(row, schedule, seed):
    seen = check(row, replace(HARD, seed=seed), schedule)
    assert len(seen.results) == 1
    assert seen.results[0].findings == []


@each_kernel
def test_the_code_object_declares_the_argument_block(row):
    code_object = cdna_emulator.CodeObject.read(verified_code_object(row))
    kernel = code_object.kernel(row.symbol)
    assert code_object.arch == row.arch
    check_layout(row.symbol, kernel.arguments, kernel.kernarg_size)
    assert kernel.kernarg_size == ctypes.sizeof(DecodeKernargs)
    # A value is by value and the rest are addresses: what sizes alone would not tell.
    kinds = {argument.name: argument.value_kind for argument in kernel.arguments}
    assert {name for name, kind in kinds.items() if kind == "by_value"} == {
        name for name, kind, *_ in DecodeKernargs._fields_ if kind is not ctypes.c_void_p
    }


@each_kernel
def test_nothing_spills(row):
    kernel = cdna_emulator.CodeObject.read(verified_code_object(row)).kernel(row.symbol)
    assert (kernel.vgpr_spill_count, kernel.sgpr_spill_count) == (0, 0)
    assert kernel.private_segment_size == 0
