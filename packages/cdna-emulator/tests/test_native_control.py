"""Calls, jumps, hardware registers and the gpr-index mode of the native core."""

from __future__ import annotations

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject
from cdna_emulator.native_core import WaveState, run_wave
from cdna_emulator.program import load_program

VCC, M0, EXEC = 106, 124, 126
UNSUPPORTED = 10
MODE = 0x3F0


def _run(text, *, scalars=None, vgpr=None, mode=MODE, arch="gfx942"):
    code_object = CodeObject.read(assemble_kernels({"k": text.split("\n")}, arch))
    sgpr = np.zeros(128, np.uint32)
    sgpr[EXEC : EXEC + 2] = 0xFFFFFFFF
    for number, value in (scalars or {}).items():
        sgpr[number] = value
    if vgpr is None:
        vgpr = np.zeros((512, 64), np.uint32)
    state = WaveState(sgpr, vgpr, np.zeros(64, np.uint8), mode=mode)
    return run_wave(load_program(code_object), state)


def test_call_returns_to_the_instruction_after_it():
    text = """s_mov_b32 s0, 1
s_call_b64 s[4:5], function
s_add_u32 s0, s0, 10
s_branch finish
function:
s_add_u32 s0, s0, 100
s_setpc_b64 s[4:5]
finish:
s_nop 0"""
    after, counters = _run(text)
    assert not counters.findings
    assert after.sgpr[0] == 111


def test_swappc_leaves_its_return_address():
    text = """s_getpc_b64 s[6:7]
base:
s_add_u32 s6, s6, function-base
s_addc_u32 s7, s7, 0
s_swappc_b64 s[4:5], s[6:7]
s_add_u32 s0, s0, 10
s_branch finish
function:
s_add_u32 s0, s0, 100
s_setpc_b64 s[4:5]
finish:
s_nop 0"""
    after, counters = _run(text)
    assert not counters.findings
    assert after.sgpr[0] == 110


def test_jump_between_instructions_is_found():
    text = """s_getpc_b64 s[4:5]
s_add_u32 s4, s4, 2
s_setpc_b64 s[4:5]"""
    _, counters = _run(text)
    assert [record.kind for record in counters.findings] == [UNSUPPORTED]


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 0xb", 0x3F0, 0x3FB),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 0", 0x3F0, 0x3C0),
        ("s_setreg_b32 hwreg(HW_REG_MODE, 8, 2), s1", 0x3F0, 0x1F0),
        ("s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1", 0x3F0, 0x8003F0),
    ],
)
def test_mode_fields_are_written_alone(text, before, after):
    state, counters = _run(text, scalars={1: 1}, mode=before)
    assert not counters.findings
    assert state.mode == after


def test_mode_reads_back():
    state, _ = _run("s_getreg_b32 s0, hwreg(HW_REG_MODE, 2, 6)", mode=0x3C4)
    assert state.sgpr[0] == 0x3C4 >> 2 & 0x3F


@pytest.mark.parametrize(
    "text",
    [
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 12, 1), 1",  # exceptions that trap
        "s_getreg_b32 s0, hwreg(HW_REG_GPR_ALLOC)",
        "s_trap 2",
        "s_sethalt 1",
    ],
)
def test_what_is_not_modelled_is_found(text):
    _, counters = _run(text)
    assert [record.kind for record in counters.findings] == [UNSUPPORTED]


@pytest.fixture
def registers(seed):
    return np.random.default_rng(seed).integers(0, 1 << 32, (512, 64), dtype=np.uint32)


@pytest.mark.parametrize(
    ("operands", "source", "other", "target"),
    [
        ("SRC0", 12, 20, 30),
        ("SRC1", 10, 22, 30),
        ("DST", 10, 20, 32),
        ("SRC0,SRC1,DST", 12, 22, 32),
    ],
)
def test_gpr_index_moves_the_named_operands(registers, operands, source, other, target):
    text = f"""s_set_gpr_idx_on s0, gpr_idx({operands})
v_sub_u32_e32 v30, v10, v20
s_set_gpr_idx_off
v_mov_b32_e32 v40, v11"""
    after, counters = _run(text, scalars={0: 2, M0: 0xABCD0000}, vgpr=registers)
    assert not counters.findings
    expected = registers.copy()
    expected[target] = registers[source] - registers[other]
    expected[40] = registers[11]
    assert np.array_equal(after.vgpr, expected)
    assert after.sgpr[M0] >> 16 == 0xABCD


def test_gpr_index_changes_while_it_is_on(registers):
    text = """s_set_gpr_idx_on s0, gpr_idx(SRC0)
v_mov_b32_e32 v30, v10
s_set_gpr_idx_idx s1
v_mov_b32_e32 v31, v10
s_set_gpr_idx_mode gpr_idx(DST)
v_mov_b32_e32 v32, v10
s_set_gpr_idx_off"""
    after, _ = _run(text, scalars={0: 3, 1: 7}, vgpr=registers)
    expected = registers.copy()
    expected[30], expected[31], expected[39] = registers[13], registers[17], registers[10]
    assert np.array_equal(after.vgpr, expected)


def test_gpr_index_outside_the_file_is_found(registers):
    text = """s_set_gpr_idx_on s0, gpr_idx(SRC0)
v_mov_b32_e32 v30, v10
s_set_gpr_idx_off"""
    _, counters = _run(text, scalars={0: 250}, vgpr=registers)
    assert [record.kind for record in counters.findings] == [UNSUPPORTED]


def test_saveexec_and_branches_on_masks(registers):
    text = """v_cmp_gt_u32_e32 vcc, s0, v1
s_and_saveexec_b64 s[4:5], vcc
s_cbranch_execz nobody
v_mov_b32_e32 v2, 7
nobody:
s_or_b64 exec, exec, s[4:5]
s_mov_b64 s[6:7], exec"""
    registers[1] = np.arange(64)
    for limit in (0, 20):
        after, _ = _run(text, scalars={0: limit}, vgpr=registers)
        expected = np.where(np.arange(64) < limit, 7, registers[2])
        assert np.array_equal(after.vgpr[2], expected)
        assert after.sgpr[VCC] == (1 << limit) - 1
        assert after.sgpr[6] == after.sgpr[7] == 0xFFFFFFFF
