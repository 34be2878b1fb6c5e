"""The NumPy core as a machine: branches, barriers, limits, faults, and compiled kernels."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from cdna_emulator.errors import EmulatorError, UnknownInstructionError
from cdna_emulator.memory import DeviceMemory
from cdna_emulator.numpy_core import Fault, Mode, WaveState, run_wave, run_workgroup
from cdna_emulator.triton_bridge import emulate

pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
assembly = importlib.import_module("operation_cases.assembly")
case = importlib.import_module("kernel_cases.case")
for _name in ("matmul", "gluon", "reduction", "memory", "elementwise"):
    importlib.import_module(f"kernel_cases.{_name}")
sys.path.remove(str(HERE))

ARCH = "gfx942"
#: Compiled kernels of one run, drawn anew each time; all of them take a minute.
DRAWN = 40


def test_a_loop_runs_until_its_condition_fails():
    loop = assembly.parsed(
        [
            "s_mov_b32 s30, 0",
            "s_add_u32 s30, s30, 3",
            "s_cmp_lt_u32 s30, 30",
            "s_cbranch_scc1 -3",
            "s_endpgm",
        ],
        ARCH,
    )
    state = run_wave(loop, WaveState())
    assert (int(state.sgpr[30]), state.status) == (30, "ended")
    assert state.executed == {0: 1, 1: 10, 2: 10, 3: 10, 4: 1}


def test_calls_return_to_the_instruction_after():
    lines = ["s_call_b64 s[40:41], 2", "s_mov_b32 s31, 7", "s_endpgm", "s_mov_b32 s30, 5"]
    program = assembly.parsed([*lines, "s_setpc_b64 s[40:41]"], ARCH)
    state = WaveState(image_base=0x1234_0000_0000)
    run_wave(program, state)
    assert (int(state.sgpr[30]), int(state.sgpr[31])) == (5, 7)
    assert state.pair(40) == 0x1234_0000_0004


def test_waves_meet_at_barriers():
    """Each wave writes its number and, after the barrier, reads the other's."""
    program = assembly.parsed(
        [
            "v_mov_b32_e32 v1, s30",
            "s_lshl_b32 s31, s30, 2",
            "v_mov_b32_e32 v2, s31",
            "ds_write_b32 v2, v1",
            "s_waitcnt lgkmcnt(0)",
            "s_barrier",
            "v_xor_b32_e32 v2, 4, v2",
            "ds_read_b32 v3, v2",
            "s_waitcnt lgkmcnt(0)",
            "s_endpgm",
        ],
        ARCH,
    )
    waves = [WaveState(lds=np.zeros(64, np.uint8)) for _ in range(2)]
    for number, wave in enumerate(waves):
        wave.sgpr[30] = number
        wave.exec = 1
    run_workgroup(program, waves)
    assert [int(wave.vgpr[3, 0]) for wave in waves] == [1, 0]


def test_a_wave_that_never_ends_is_stopped():
    with pytest.raises(EmulatorError, match="must end within 100 instructions"):
        run_wave(assembly.parsed(["s_branch -1"], ARCH), WaveState(), max_instructions=100)


def test_a_branch_out_of_the_program_is_an_error():
    with pytest.raises(EmulatorError, match="target must be an instruction"):
        run_wave(assembly.parsed(["s_branch 40", "s_endpgm"], ARCH), WaveState())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("s_trap 2", "halting and trapping"),
        ("s_getreg_b32 s0, hwreg(HW_REG_HW_ID)", "must be HW_REG_MODE"),
    ],
)
def test_what_is_not_modelled_is_an_error_that_names_it(line, words):
    program = assembly.parsed([line], ARCH)
    with pytest.raises(UnknownInstructionError, match=words):
        run_wave(program, WaveState())


def test_accesses_out_of_bounds_are_recorded_and_read_zero():
    data = np.arange(16, dtype=np.uint32)
    memory = DeviceMemory()
    base = memory.map("data", data.ctypes.data, data.nbytes, data)
    state = WaveState(lds=np.zeros(64, np.uint8))
    state.exec = 0b11
    state.set_pair(30, base)
    state.vgpr[1, :2] = [60, 64]
    state.vgpr[2] = 9
    program = assembly.parsed(
        ["global_load_dword v2, v1, s[30:31]", "ds_read_b32 v3, v1", "s_endpgm"], ARCH
    )
    run_wave(program, state, memory)
    assert state.vgpr[2, :3].tolist() == [15, 0, 9]
    assert state.faults == [Fault("memory", 0, 1, base + 64, 4), Fault("lds", 1, 1, 64, 4)]


def test_mode_fields():
    mode = Mode(0b11_1001_0110)
    assert (mode.round32, mode.round64) == (2, 1)
    assert (mode.flush_inputs32, mode.flush_outputs32) == (False, True)
    assert (mode.flush_inputs64, mode.flush_outputs64) == (True, False)
    assert mode.dx10_clamp
    assert mode.ieee
    mode.gpr_idx = True
    assert mode.bits == 0b11_1001_0110 | 1 << 27


def test_compiled_kernels(rng, seed):
    """Triton knows the instruction set independently; torch says what is right."""
    cases = [(one, arch) for one in case.CASES if one.since <= (3, 7) for arch in one.archs]
    for one, arch in random.Random(seed).sample(cases, DRAWN):
        launch = one.build(rng, arch)
        kernel = emulate(
            one.kernel,
            arch,
            options=one.options,
            core="numpy",
            checks="none",
            schedule="run_to_barrier",
        )
        kernel[launch.grid](*launch.args, **launch.constants)
        for actual, expected, tolerance in launch.expect:
            case.check(actual, expected, tolerance)
