"""Profiles: exact counts of instructions and bytes, and what matrix instructions cost."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest

from cdna_emulator import profile as profile_module
from cdna_emulator import tables
from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.checks.matrix_hazards import passes
from cdna_emulator.code_object import CodeObject
from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import OPS, Unit
from cdna_emulator.launch import run
from cdna_emulator.profile import Profile, matrix_cycles

ARCHS = ("gfx942", "gfx950")
START = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
s_waitcnt lgkmcnt(0)
"""
KERNELS = {
    "loop": f"{START}\ns_mov_b32 s20, 7\nagain:\nv_add_u32 v2, v1, v0\ns_sub_u32 s20, s20, 1\n"
    "s_cmp_lg_u32 s20, 0\ns_cbranch_scc1 again",
    "spaces": f"""{START}
    v_mov_b32 v9, 0
    global_load_dwordx4 v[4:7], v9, s[8:9]
    global_load_ubyte v3, v9, s[8:9]
    global_atomic_add v9, v0, s[10:11]
    ds_write_b64 v9, v[0:1]
    ds_add_u32 v9, v0
    s_mov_b32 m0, 0
    s_nop 0
    global_load_lds_dword v1, s[8:9]
    scratch_store_dwordx2 off, v[0:1], off
    v_mov_b32 v10, s8
    v_mov_b32 v11, s9
    flat_load_dwordx2 v[12:13], v[10:11]
    s_mov_b32 s12, s10
    s_and_b32 s13, s11, 0xffff
    s_movk_i32 s14, 0x100
    s_mov_b32 s15, 0x20000
    buffer_store_dword v0, v1, s[12:15], 0 offen
    s_waitcnt vmcnt(0) lgkmcnt(0)
    ds_read_b128 v[16:19], v9
    s_waitcnt lgkmcnt(0)
    """,
    "masked": f"""{START}
    s_mov_b64 exec, 0x7
    global_load_dword v2, v1, s[8:9]
    s_mov_b64 exec, 0
    global_load_dword v3, v1, s[8:9]
    """,
    "matrix": """
    v_mov_b32 v2, 0
    v_mov_b32 v3, 0
    s_nop 1
    v_mfma_f32_16x16x16_f16 a[0:3], v[2:3], v[2:3], 0
    v_mfma_f32_16x16x16_f16 a[4:7], v[2:3], v[2:3], 0
    v_exp_f32 v4, v2
    """,
    "conflicts": """
    v_and_b32 v0, 0x3ff, v0
    v_lshlrev_b32 v1, 2, v0
    v_lshlrev_b32 v2, 7, v0
    v_mov_b32 v3, 0
    ds_write_b32 v1, v0
    ds_write_b32 v2, v0
    ds_write_b32 v3, v3
    s_waitcnt lgkmcnt(0)
    """,
}


@cache
def objects(arch: str) -> CodeObject:
    data = assemble_kernels(
        {name: text.split("\n") for name, text in KERNELS.items()},
        arch,
        pointers=2,
        group_segment_size=8192,
        private_segment_size=16,
    )
    return CodeObject.read(data)


def profiled(name: str, arch: str = "gfx942", grid: int = 1, block: int = 64) -> Profile:
    args = [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]
    return run(objects(arch), name, grid, block, args, checks="none").profile


@pytest.mark.parametrize("arch", ARCHS)
def test_every_wave_instruction_is_counted(arch):
    profile = profiled("loop", arch, grid=3, block=128)
    waves = 6
    assert profile.mix == Counter(
        {
            "s_load_dwordx4": waves,
            "v_and_b32": waves,
            "v_lshlrev_b32": waves,
            "s_waitcnt": waves,
            "s_mov_b32": waves,
            "v_add_u32": 7 * waves,
            "s_sub_u32": 7 * waves,
            "s_cmp_lg_u32": 7 * waves,
            "s_cbranch_scc1": 7 * waves,
            "s_endpgm": waves,
        }
    )
    assert profile.wave_instructions == 34 * waves == profile.mix.total()
    assert profile.units == Counter(smem=6, valu=54, salu=132 - 42, control=12 + 42)


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_by_space_and_direction(arch):
    assert profiled("spaces", arch).bytes_moved == {
        "flat load": 64 * 8,
        "global atomic": 64 * 4,
        "global load": 64 * (16 + 1),
        "global store": 64 * 4,
        "global to lds": 64 * 4,
        "lds atomic": 64 * 4,
        "lds load": 64 * 16,
        "lds store": 64 * 8,
        "scalar load": 16,
        "scratch store": 64 * 8,
    }


def test_inactive_lanes_move_nothing():
    profile = profiled("masked")
    assert profile.bytes_moved == {"global load": 12, "scalar load": 16}
    assert profile.mix["global_load_dword"] == 2
    # A workgroup that fills one wave and a half.
    whole = run(
        objects("gfx942"), "spaces", 1, 48, [np.zeros(64, np.uint32)] * 2, checks="none"
    ).profile
    assert whole.bytes_moved["lds load"] == 48 * 16


def test_matrix_share_and_estimate():
    profile = profiled("matrix", grid=4)
    assert profile.mfma_share == pytest.approx(2 / 7)
    assert profile.estimated_cycles == {
        "valu": 4 * 2 * 4,
        "control": 4 * 2 * 4,
        "mfma": 4 * 2 * 16,
        "trans": 4 * 16,
    }
    assert profiled("loop").mfma_share == 0


def test_bank_conflicts_cost_cycles():
    """64 lanes in 64 different dwords of LDS, in one bank, and at one address."""
    profile = profiled("conflicts")
    counted = [
        int(cycles)
        for instruction, cycles in zip(
            profile.program.instructions, profile.bank_cycles, strict=True
        )
        if instruction.mnemonic == "ds_write_b32"
    ]
    spread, one_bank, one_address = counted
    assert spread < one_bank
    assert one_bank >= 32
    assert one_address <= spread
    assert profile.estimated_cycles["lds"] == sum(counted)


def test_nothing_executed():
    profile = profiled("loop", grid=0)
    assert profile.wave_instructions == 0
    assert profile.mfma_share == 0
    assert profile.bytes_moved == {}
    assert set(profile.estimated_cycles.values()) <= {0}


def test_the_estimate_is_called_one():
    assert "estimate" in (profile_module.__doc__ or "")
    assert "estimate" in (Profile.estimated_cycles.__doc__ or "")
    assert "estimate" in str(tables.units(profiled("matrix")).title)


# --- matrix instructions

MATRIX = sorted(name for name, op in OPS.items() if op.unit is Unit.MFMA)


def instruction_of(mnemonic: str, **modifiers: int) -> Instruction:
    return Instruction(mnemonic, "vop3p", OPS[mnemonic], (), dict(modifiers), 0, 8, mnemonic)


def is_of(mnemonic: str, arch: str) -> bool:
    """Whether an architecture has the instruction; a flag names the only one."""
    return arch in OPS[mnemonic].flags or OPS[mnemonic].flags.isdisjoint(ARCHS)


@pytest.mark.parametrize(
    ("arch", "mnemonic"), [(arch, name) for arch in ARCHS for name in MATRIX if is_of(name, arch)]
)
def test_every_matrix_instruction_has_a_cost(mnemonic, arch):
    cycles = matrix_cycles(instruction_of(mnemonic), arch)
    assert cycles in (8, 16, 32, 64)
    assert passes(instruction_of(mnemonic), arch) == cycles // 4


#: Peak rates without sparsity in 10^12 operations per second, compute units and peak clock in MHz,
#: of AMD's data sheets: MI300X (gfx942) and MI355X (gfx950); the instruction that reaches each.
SHEETS = {
    "gfx942": (304, 2100, {
        "v_mfma_f64_16x16x4_f64": 163.4,
        "v_mfma_f32_16x16x4_f32": 163.4,
        "v_mfma_f32_32x32x2_f32": 163.4,
        "v_mfma_f32_16x16x8_xf32": 653.7,
        "v_mfma_f32_32x32x8_f16": 1307.4,
        "v_mfma_f32_16x16x16_bf16": 1307.4,
        "v_mfma_f32_32x32x16_fp8_fp8": 2614.9,
        "v_mfma_i32_16x16x32_i8": 2614.9,
    }),
    "gfx950": (256, 2400, {
        "v_mfma_f64_16x16x4_f64": 78.6,
        "v_mfma_f32_32x32x2_f32": 157.3,
        "v_mfma_f32_16x16x32_f16": 2516.6,
        "v_mfma_f32_32x32x16_bf16": 2516.6,
        "v_mfma_i32_32x32x32_i8": 5033.2,
        "v_mfma_f32_16x16x128_f8f6f4": 5033.2,
        "v_mfma_scale_f32_32x32x64_f8f6f4": 5033.2,
    }),
}  # fmt: skip
#: gfx950 reaches its highest rate with inputs of 6 and 4 bits.
NARROW = (10066.3, {"cbsz": 4, "blgp": 2})


def peak(mnemonic: str, arch: str, **modifiers: int) -> float:
    """Return 10^12 operations per second at one instruction after the other."""
    units, megahertz, _ = SHEETS[arch]
    shape = next(word for word in mnemonic.split("_") if word[0].isdigit())
    rows, columns, depth = map(int, shape.split("x"))
    cycles = matrix_cycles(instruction_of(mnemonic, **modifiers), arch)
    return 2 * rows * columns * depth / cycles * 4 * units * megahertz / 1e6


@pytest.mark.parametrize(
    ("arch", "mnemonic"), [(arch, name) for arch in ARCHS for name in SHEETS[arch][2]]
)
def test_peak_rates_are_those_of_the_data_sheets(arch, mnemonic):
    assert peak(mnemonic, arch) == pytest.approx(SHEETS[arch][2][mnemonic], rel=1e-3)


def test_narrow_formats_are_twice_as_fast():
    rate, formats = NARROW
    for name in ("v_mfma_f32_16x16x128_f8f6f4", "v_mfma_scale_f32_32x32x64_f8f6f4"):
        assert peak(name, "gfx950", **formats) == pytest.approx(rate, rel=1e-3)
        # One input of 8 bits is enough to be slow.
        assert peak(name, "gfx950", cbsz=0, blgp=4) == pytest.approx(rate / 2, rel=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_small_blocks_and_inherited_shapes(arch):
    """What gfx950 took over kept its cycles; several blocks take those of f32."""
    for name, cycles in {
        "v_mfma_f32_16x16x16_f16": 16,
        "v_mfma_f32_32x32x8_bf16": 32,
        "v_mfma_f32_16x16x32_fp8_bf8": 16,
        "v_mfma_f32_16x16x4_4b_f16": 32,
        "v_mfma_f32_32x32x4_2b_bf16": 64,
        "v_mfma_i32_32x32x4_2b_i8": 64,
        "v_mfma_f32_4x4x4_16b_f16": 8,
        "v_mfma_f32_4x4x1_16b_f32": 8,
        "v_mfma_f64_4x4x4_4b_f64": 16,
    }.items():
        assert matrix_cycles(instruction_of(name), arch) == cycles


def test_other_instructions_have_no_shape():
    with pytest.raises(ValueError, match="v_add_u32: must name a matrix shape"):
        matrix_cycles(instruction_of("v_add_u32"), "gfx942")


@pytest.mark.parametrize("arch", ARCHS)
def test_bank_conflicts(arch):
    banks = {"gfx942": 32, "gfx950": 64}[arch]
    head = "v_and_b32 v0, 63, v0\nv_lshlrev_b32 v1, {shift}, v0\nv_mov_b32 v2, 0\nv_mov_b32 v3, 0"
    cases = {
        # Lanes side by side, one bank for all, and two lanes for every bank.
        "free": (2, "ds_write_b32 v1, v2", 0),
        "one_bank": (banks.bit_length() + 1, "ds_write_b32 v1, v2", 64 - 2),
        "two_each": (3, "ds_write_b32 v1, v2", 2 if arch == "gfx942" else 0),
        "wide": (4, "ds_write_b128 v1, v[2:5]", 0),
        "pairs": (3, "ds_write2_b32 v1, v2, v3 offset1:1", 4 if arch == "gfx942" else 0),
    }
    kernels = {
        name: f"{head.format(shift=shift)}\nv_mov_b32 v4, 0\nv_mov_b32 v5, 0\n{line}".split("\n")
        for name, (shift, line, _) in cases.items()
    }
    code = assemble_kernels(kernels, arch, group_segment_size=1 << 15)
    for name, (_, _, expected) in cases.items():
        profile = run(code, name, 1, 64, [], checks="none").profile
        assert profile.bank_conflict_cycles == expected, name
