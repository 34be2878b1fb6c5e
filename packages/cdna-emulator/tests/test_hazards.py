"""Wait states: each rule with one state too few and with enough, along every path of control flow.

Numbers are those of AMD's CDNA3 and CDNA4 instruction set documents and of LLVM's hazard
recogniser; they are written out here, not computed as the checker computes them.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.checks.hazards import find_hazards
from cdna_emulator.code_object import CodeObject
from cdna_emulator.program import Program, load_program

ARCHS = ("gfx942", "gfx950")
DPP = "quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf"
#: (first instruction, second one, wait states between them, reason)
VECTOR = [
    # Scalar registers and masks that the vector ALU writes.
    ("v_readfirstlane_b32 s8, v9", "v_add_u32 v1, s8, v2", 2, "scalar register written by the v"),
    ("v_readfirstlane_b32 s8, v9", "s_add_u32 s1, s8, 1", 0, ""),
    ("v_cmp_eq_u32 vcc, v8, v9", "v_cndmask_b32 v1, v2, v3, vcc", 2, "scalar register written"),
    ("v_cmp_eq_u32 s[8:9], v8, v9", "v_cndmask_b32 v1, v2, v3, s[8:9]", 2, "scalar register writ"),
    ("v_add_co_u32 v1, vcc, v2, v3", "v_addc_co_u32 v4, vcc, v5, v6, vcc", 2, "scalar register w"),
    ("v_cmp_eq_u32 vcc, v8, v9", "v_div_fmas_f32 v1, v2, v3, v4", 4, "v_div_fmas reads VCC"),
    ("v_cmp_eq_u32 vcc, v8, v9", "s_mov_b32 s1, src_vccz", 5, "reads EXECZ or VCCZ"),
    ("v_cmpx_eq_u32 vcc, v8, v9", "v_mov_b32 v1, src_execz", 5, "reads EXECZ or VCCZ"),
    ("v_readfirstlane_b32 s8, v9", "buffer_load_dword v1, v2, s[8:11], 0 offen", 5, "memory instr"),
    ("v_readfirstlane_b32 s11, v9", "buffer_store_dword v1, v2, s[8:11], 0 offen", 5, "memory ins"),
    ("v_readfirstlane_b32 s20, v9", "buffer_load_dword v1, v2, s[8:11], s20 offen", 5, "memory in"),
    ("v_readfirstlane_b32 s8, v9", "global_load_dword v1, v2, s[8:9]", 5, "memory instruction rea"),
    ("v_readfirstlane_b32 s8, v9", "s_load_dword s1, s[8:9], 0x0", 0, ""),
    ("s_mov_b32 s8, s9", "global_load_dword v1, v2, s[8:9]", 0, ""),
    # Lanes.
    ("v_readfirstlane_b32 s8, v9", "v_readlane_b32 s9, v3, s8", 4, "lane number written"),
    ("v_readfirstlane_b32 s8, v9", "v_writelane_b32 v3, 7, s8", 4, "lane number written"),
    ("v_readfirstlane_b32 s8, v9", "v_writelane_b32 v3, s8, 5", 2, "scalar register written"),
    ("v_mov_b32 v3, v9", "v_readfirstlane_b32 s8, v3", 1, "lane read of a register"),
    ("v_mov_b32 v3, v9", "v_readlane_b32 s8, v3, 5", 1, "lane read of a register"),
    ("v_cmpx_eq_u32 vcc, v8, v9", "v_readfirstlane_b32 s8, v3", 4, "lane access after the vector"),
    ("v_cmpx_eq_u32 vcc, v8, v9", "v_readlane_b32 s8, v3, 5", 4, "lane access after the vector A"),
    ("v_cmpx_eq_u32 vcc, v8, v9", "v_writelane_b32 v3, s8, 5", 4, "lane access after the vector A"),
    ("v_mov_b32 v3, v9", f"v_mov_b32_dpp v1, v3 {DPP}", 2, "DPP reads a register written"),
    ("v_cmpx_eq_u32 vcc, v8, v9", f"v_mov_b32_dpp v1, v3 {DPP}", 5, "DPP after the vector ALU wro"),
    ("s_mov_b64 exec, s[8:9]", f"v_mov_b32_dpp v1, v3 {DPP}", 0, ""),
    # Results that are not forwarded.
    ("v_mov_b32 v3, v9", "v_add_u32 v1, v3, v3", 0, ""),
    ("v_exp_f32 v3, v9", "v_mul_f32 v1, v3, v3", 1, "reads the result of a transcendental"),
    ("v_exp_f32 v3, v9", "v_exp_f32 v1, v3", 0, ""),
    (
        "v_mov_b32_sdwa v3, v9 dst_sel:WORD_1",
        "v_add_u32 v1, v2, v3",
        1,
        "reads a register of which SDWA",
    ),
    ("v_mov_b32_sdwa v3, v9 src0_sel:WORD_1", "v_add_u32 v1, v2, v3", 0, ""),
    (
        "v_fma_f16 v3, v8, v8, v9 op_sel:[0,0,0,1]",
        "v_add_u32 v1, v2, v3",
        1,
        "reads a register of which",
    ),
    ("v_fma_f16 v3, v8, v8, v9 op_sel:[1,0,0,0]", "v_add_u32 v1, v2, v3", 0, ""),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_add_u32 v1, v2, v3", 3, "reads the result of a dot produ"),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "ds_write_b32 v1, v3", 3, "reads the result of a dot produ"),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_mov_b32 v3, 0", 3, "overwrites the result of a dot prod"),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_dot8_i32_i4 v4, v8, v9, v3", 3, "reads the result of a d"),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_dot4_i32_i8 v4, v3, v9, v10", 3, "reads the result of a "),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_dot4_i32_i8 v3, v8, v9, v3", 0, ""),
    # The scalar ALU.
    ("s_mov_b32 m0, s9", "global_load_lds_dword v[2:3], off", 1, "uses M0 just written"),
    ("s_mov_b32 m0, s9", "buffer_load_dword v2, s[8:11], 0 offen lds", 1, "uses M0 just written"),
    ("s_mov_b32 m0, s9", "s_movrels_b32 s1, s2", 1, "uses M0 just written"),
    ("s_mov_b32 m0, s9", "ds_write_b32 v1, v2", 0, ""),
    (
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3",
        "s_getreg_b32 s1, hwreg(HW_REG_MODE)",
        2,
        "accesses a hardware register just set",
    ),
    (
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 4), 3",
        2,
        "accesses a hardware register just set",
    ),
    (
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 3",
        "s_getreg_b32 s1, hwreg(HW_REG_HW_ID)",
        0,
        "",
    ),
    # Data of stores that are still to be taken.
    (
        "global_store_dwordx4 v1, v[4:7], s[8:9]",
        "v_mov_b32 v7, 0",
        2,
        "overwrites the data of a st",
    ),
    (
        "global_store_dwordx3 v1, v[4:6], s[8:9]",
        "v_mov_b32 v4, 0",
        2,
        "overwrites the data of a st",
    ),
    ("global_store_dwordx2 v1, v[4:5], s[8:9]", "v_mov_b32 v4, 0", 0, ""),
    ("global_store_dwordx4 v1, v[4:7], s[8:9]", "v_mov_b32 v1, 0", 0, ""),
    ("scratch_store_dwordx4 off, v[4:7], off", "v_mov_b32 v5, 0", 2, "overwrites the data of a st"),
    ("flat_store_dwordx4 v[2:3], v[4:7]", "v_mov_b32 v5, 0", 2, "overwrites the data of a store"),
    ("buffer_store_dwordx4 v[4:7], v1, s[8:11], 0 offen", "v_mov_b32 v5, 0", 2, "overwrites the d"),
    ("buffer_store_dwordx4 v[4:7], v1, s[8:11], s20 offen", "v_mov_b32 v5, 0", 1, "overwrites the"),
    (
        "buffer_atomic_cmpswap_x2 v[4:7], v1, s[8:11], 0 offen",
        "v_mov_b32 v5, 0",
        2,
        "overwrites the data of a store",
    ),
    # Matrix instructions as the second one.
    ("v_mov_b32 v3, v9", "v_mfma_f32_16x16x4_f32 v[4:7], v2, v3, 0", 2, "matrix operand written"),
    (
        "v_mov_b32 v3, v9",
        "v_mfma_f32_16x16x4_f32 v[4:7], v8, v9, v[2:5]",
        2,
        "matrix operand writt",
    ),
    ("v_accvgpr_write_b32 a3, v9", "v_mfma_f32_16x16x4_f32 a[4:7], a3, v9, 0", 2, "matrix operand"),
    ("v_dot4_i32_i8 v3, v8, v9, v10", "v_mfma_f32_16x16x4_f32 v[4:7], v2, v3, 0", 0, ""),
    (
        "v_cmpx_eq_u32 vcc, v8, v9",
        "v_mfma_f32_16x16x4_f32 v[4:7], v2, v3, 0",
        4,
        "matrix instruction after the vector ALU wrote EXEC",
    ),
]
PERMUTATIONS = [
    ("v_mov_b32 v3, v9", "v_permlane32_swap_b32 v3, v4", 2, "lane permutation of a register"),
    ("v_mov_b32 v3, v9", "v_permlane16_swap_b32 v4, v3", 2, "lane permutation of a register"),
    ("v_cmpx_eq_u32 vcc, v8, v9", "v_permlane32_swap_b32 v3, v4", 4, "lane permutation after v_cm"),
]


@dataclass(frozen=True)
class Matrix:
    """A matrix instruction with its result at v64, inputs at v0 and v16, and v128 accumulated."""

    name: str
    core: str  # "xdl", "f32" or "f64"
    passes: int
    result: int  # registers
    source: int
    extra: str = ""

    def text(self, result: int = 64, accumulated: int | None = 128) -> str:
        inputs = ", ".join(_registers(first, self.source) for first in (0, 16))
        added = "0" if accumulated is None else _registers(accumulated, self.result)
        return (
            f"v_mfma_{self.name} {_registers(result, self.result)}, {inputs}, {added}{self.extra}"
        )


def _registers(first: int, count: int) -> str:
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


NARROW = " cbsz:4 blgp:4"
#: Numbers of passes: AMD's ISA documents, and LLVM's scheduling models of both architectures.
MATRICES = {
    "gfx942": [
        Matrix("f32_4x4x4_16b_f16", "xdl", 2, 4, 2),
        Matrix("f32_16x16x16_f16", "xdl", 4, 4, 2),
        Matrix("f32_16x16x32_fp8_bf8", "xdl", 4, 4, 2),
        Matrix("i32_16x16x32_i8", "xdl", 4, 4, 2),
        Matrix("f32_16x16x8_xf32", "xdl", 4, 4, 2),
        Matrix("f32_16x16x4_4b_bf16", "xdl", 8, 16, 2),
        Matrix("i32_16x16x4_4b_i8", "xdl", 8, 16, 1),
        Matrix("f32_32x32x8_bf16", "xdl", 8, 16, 2),
        Matrix("i32_32x32x16_i8", "xdl", 8, 16, 2),
        Matrix("f32_32x32x4_2b_f16", "xdl", 16, 32, 2),
        Matrix("i32_32x32x4_2b_i8", "xdl", 16, 32, 1),
        Matrix("f32_4x4x1_16b_f32", "f32", 2, 4, 1),
        Matrix("f32_16x16x4_f32", "f32", 8, 4, 1),
        Matrix("f32_16x16x1_4b_f32", "f32", 8, 16, 1),
        Matrix("f32_32x32x2_f32", "f32", 16, 16, 1),
        Matrix("f64_4x4x4_4b_f64", "f64", 4, 2, 2),
        Matrix("f64_16x16x4_f64", "f64", 8, 8, 2),
    ],
    "gfx950": [
        Matrix("f32_4x4x4_16b_f16", "xdl", 2, 4, 2),
        Matrix("f32_16x16x16_f16", "xdl", 4, 4, 2),
        Matrix("f32_16x16x32_f16", "xdl", 4, 4, 4),
        Matrix("i32_16x16x64_i8", "xdl", 4, 4, 4),
        Matrix("f32_16x16x128_f8f6f4", "xdl", 8, 4, 8),
        Matrix("f32_16x16x128_f8f6f4", "xdl", 4, 4, 4, NARROW),
        Matrix("f32_32x32x8_bf16", "xdl", 8, 16, 2),
        Matrix("f32_32x32x16_bf16", "xdl", 8, 16, 4),
        Matrix("i32_32x32x32_i8", "xdl", 8, 16, 4),
        Matrix("f32_32x32x64_f8f6f4", "xdl", 16, 16, 8),
        Matrix("f32_32x32x64_f8f6f4", "xdl", 8, 16, 4, NARROW),
        Matrix("f32_32x32x4_2b_f16", "xdl", 16, 32, 2),
        Matrix("f32_4x4x1_16b_f32", "f32", 2, 4, 1),
        Matrix("f32_16x16x4_f32", "f32", 8, 4, 1),
        Matrix("f32_32x32x2_f32", "f32", 16, 16, 1),
        Matrix("f64_4x4x4_4b_f64", "f64", 4, 2, 2),
        Matrix("f64_16x16x4_f64", "f64", 16, 8, 2),
    ],
}
#: States until the result can be read or overwritten, by passes.
XDL_RESULT = {"gfx942": {2: 5, 4: 7, 8: 11, 16: 19}, "gfx950": {2: 5, 4: 8, 8: 12, 16: 20}}
F32_RESULT = {2: 4, 8: 10, 16: 18}
#: States until a part of it can be accumulated.
XDL_ACCUMULATED = {"gfx942": {2: 3, 4: 5, 8: 9, 16: 17}, "gfx950": {2: 4, 4: 6, 8: 10, 16: 18}}
XDL_THEN_OTHER = {"gfx942": {2: 3, 4: 5, 8: 9, 16: 17}, "gfx950": {2: 3, 4: 6, 8: 10, 16: 18}}
XDL_READS = {2: 1, 4: 3, 8: 7, 16: 15}
XDL, F32, F64 = (
    "v_mfma_f32_4x4x4_16b_f16 v[200:203], v[0:1], v[16:17], v[62:65]",
    "v_mfma_f32_4x4x1_16b_f32 v[200:203], v0, v16, v[62:65]",
    "v_mfma_f64_4x4x4_4b_f64 v[200:201], v[0:1], v[16:17], v[64:65]",
)
READ, MEMORY, WRITE = "v_add_u32 v250, v64, v251", "ds_write_b32 v250, v65", "v_mov_b32 v64, 0"
LOAD, INPUT = "ds_read_b32 v64, v250", "v_mfma_f32_4x4x1_16b_f32 v[200:203], v64, v0, 0"
SCALED = "v_mfma_scale_f32_16x16x128_f8f6f4 v[200:203], v[0:7], v[16:23], 0, v64, v1"


def after_matrix(arch: str) -> list[tuple[str, str, int, str]]:
    cases = []
    for matrix in MATRICES[arch]:
        first, passes = matrix.text(), matrix.passes
        same = matrix.text(64, 64)
        is_small = "4x4" in matrix.name
        if matrix.core == "xdl":
            result = memory = overwrite = XDL_RESULT[arch][passes]
            states = {XDL: XDL_ACCUMULATED[arch][passes], F32: XDL_THEN_OTHER[arch][passes]}
            states |= {F64: states[F32], same: 2 if passes == 2 else 0}
        elif matrix.core == "f32":
            result = memory = overwrite = F32_RESULT[passes]
            states = {XDL: 0, F32: passes, F64: passes, same: 2 if passes == 2 else 0}
        else:
            slower = 8 if arch == "gfx950" else 0
            result = 6 if is_small else 11 + slower
            memory = 9 if is_small else 18
            overwrite = 6 if is_small else 11
            other = 4 if is_small else 9 + slower
            states = {XDL: 0, F32: other, F64: other, same: 4 if is_small else 0}
        reads = "reads the result of a matrix instruction"
        cases += [(first, READ, result, reads), (first, MEMORY, memory, reads)]
        for second in (WRITE, LOAD):
            cases.append((first, second, overwrite, "overwrites the result of a matrix instructio"))
        inputs = [INPUT] + [SCALED] * (arch == "gfx950")
        for second in inputs:
            cases.append((first, second, result, "matrix input is the result of a matrix instruct"))
        for second, needed in states.items():
            cases.append((first, second, needed, "accumulator input"))
        war = XDL_READS[passes] if matrix.core == "xdl" else 0
        cases.append((first, "v_mov_b32 v128, 0", war, "overwrites the accumulator input of a mat"))
        fused = "v_fma_f64 v[200:201], v[202:203], v[202:203], v[202:203]"
        needed = 2 if matrix.core == "f64" else 0
        cases.append((first, fused, needed, "v_fma_f64 after a matrix instruction on f64"))
    return cases


def cases(arch: str) -> list[tuple[str, str, int, str]]:
    return VECTOR + (PERMUTATIONS if arch == "gfx950" else []) + after_matrix(arch)


def waiting(states: int) -> list[str]:
    return [f"s_nop {min(states - at, 16) - 1}" for at in range(0, states, 16)]


@cache
def programs(arch: str) -> list[tuple[Program, Program]]:
    """Return each case with one state too few, and with as many as it needs."""
    kernels = {}
    for number, (first, second, needed, _) in enumerate(cases(arch)):
        for name, states in (("short", needed - 1), ("right", needed)):
            kernels[f"{name}{number}"] = [first, *waiting(states), second]
    code_object = CodeObject.read(assemble_kernels(kernels, arch))
    return [
        (load_program(code_object, f"short{number}"), load_program(code_object, f"right{number}"))
        for number in range(len(cases(arch)))
    ]


@pytest.mark.parametrize(
    ("arch", "number"),
    [
        pytest.param(arch, number, id=f"{arch}-{first}-{second}")
        for arch in ARCHS
        for number, (first, second, _, _) in enumerate(cases(arch))
    ],
)
def test_rule(arch, number):
    _, _, needed, why = cases(arch)[number]
    short, right = programs(arch)[number]
    assert find_hazards(right) == []
    if needed == 0:
        return
    (found,) = find_hazards(short)
    first, second = short.instructions[0], short.instructions[-2]
    assert (found.kind, found.address, found.instruction) == (
        "wait_states",
        second.address,
        second.text,
    )
    assert found.detail.startswith(why)
    plural = "s" if needed > 1 else ""
    place = f"`{first.text}` at {first.address:#x}"
    assert found.detail.endswith(
        f": needs {needed} wait state{plural} after {place}, has {needed - 1}"
    )


def test_every_instruction_between_counts():
    lines = ["v_readfirstlane_b32 s8, v9", "s_nop 1", "v_mov_b32 v3, 0", "s_waitcnt vmcnt(0)"]
    load = "global_load_dword v1, v2, s[8:9]"
    kernels = {"four": [*lines, load], "five": [*lines, "s_add_u32 s1, s2, s3", load]}
    code_object = CodeObject.read(assemble_kernels(kernels, "gfx942"))
    (found,) = find_hazards(load_program(code_object, "four"))
    assert found.detail.endswith("has 4")
    assert find_hazards(load_program(code_object, "five")) == []


def test_the_worst_of_several_is_reported():
    lines = ["v_cmpx_eq_u32 vcc, v8, v9", "v_mov_b32 v3, v9", "v_readfirstlane_b32 s8, v3"]
    (found,) = find_hazards(load_program(CodeObject.read(assemble_kernels({"k": lines}, "gfx942"))))
    assert found.detail.startswith("lane access after the vector ALU wrote EXEC: needs 4")


CHAIN = [
    "v_mfma_f32_16x16x4_f32 v[72:75], v0, v16, v[72:75]",
    "v_mfma_f32_16x16x4_f32 v[70:73], v0, v16, v[72:75]",
    "v_mfma_f32_16x16x4_f32 v[70:73], v0, v16, v[70:73]",
]


@pytest.mark.parametrize("arch", ARCHS)
def test_forwarding_hides_older_results(arch):
    """A chain whose registers slide: the third reads what the second wrote, the first no longer."""
    without = [CHAIN[0], CHAIN[2]]
    sideways = [CHAIN[0], "s_cbranch_scc1 at", CHAIN[1], "at:", CHAIN[2]]
    kernels = {"chain": CHAIN, "without": without, "sideways": sideways}
    code_object = CodeObject.read(assemble_kernels(kernels, arch))
    assert find_hazards(load_program(code_object, "chain")) == []
    for name, states in (("without", 0), ("sideways", 1)):
        (found,) = find_hazards(load_program(code_object, name))
        assert found.detail.startswith("accumulator input overlaps the result")
        assert found.detail.endswith(f"has {states}")


WRITES, USES = "v_readfirstlane_b32 s8, v9", "global_load_dword v1, v2, s[8:9]"
#: Control flow between the two, and the states on the shortest way; -1: there is none.
FLOWS = {
    "branch_over_the_wait": ([WRITES, "s_cbranch_scc1 at1", "s_nop 7", "at1:", USES], 1),
    "both_ways_wait": ([WRITES, "s_cbranch_scc1 at2", "s_nop 7", "at2:", "s_nop 3", USES], -1),
    "jump_over_another": ([WRITES, "s_branch at3", USES, "at3:", "s_nop 0", USES], 2),
    "loop": (["at4:", USES, "s_nop 7", WRITES, "s_nop 1", "s_cbranch_scc1 at4"], 3),
    "waiting_loop": (["at5:", USES, "s_nop 7", WRITES, "s_nop 3", "s_cbranch_scc1 at5"], -1),
    "end_between": (["s_cbranch_scc1 at6", WRITES, "s_endpgm", "at6:", USES], -1),
    "nested_loops": (
        [
            "at7:",
            "s_nop 0",
            "at8:",
            USES,
            "s_nop 7",
            "s_cbranch_scc1 at8",
            WRITES,
            "s_cbranch_scc0 at7",
        ],
        2,
    ),
    "own_loop": (["at9:", "v_readlane_b32 s8, v3, s8", "s_cbranch_scc1 at9"], 1),
}


@pytest.mark.parametrize("arch", ARCHS)
def test_control_flow(arch):
    kernels = {name: lines for name, (lines, _) in FLOWS.items()}
    code_object = CodeObject.read(assemble_kernels(kernels, arch))
    for name, (_, states) in FLOWS.items():
        found = find_hazards(load_program(code_object, name))
        assert [int(one.detail.rpartition(" ")[2]) for one in found] == [states] * (states >= 0)


def test_lines_of_the_source():
    lines = ["v_mov_b32 v3, v9", "v_readfirstlane_b32 s8, v3"]
    program = load_program(CodeObject.read(assemble_kernels({"k": lines}, "gfx942")))
    marked = Program(
        program.arch, program.name, program.instructions, program.targets, ("a.s:1", "a.s:2", None)
    )
    (found,) = find_hazards(marked)
    assert found.source_line == "a.s:2"
    assert str(found).startswith(f"wait_states: k+{found.address:#x} (a.s:2) `v_readfirstlane_b32")


HERE = Path(__file__).parent


@pytest.mark.parametrize("arch", ARCHS)
def test_compilers_code_has_none(emulate_kernel, rng, arch):
    """LLVM inserts what is missing: it would be a mistake of the checker."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(HERE))
    try:
        case = importlib.import_module("kernel_cases.case")
        importlib.import_module("kernel_cases.matmul")
        importlib.import_module("kernel_cases.reduction")
    finally:
        sys.path.remove(str(HERE))
    chosen = [one for one in case.CASES if arch in one.archs][::6]
    assert len(chosen) >= 3
    for one in chosen:
        launch = one.build(rng, arch)
        kernel = emulate_kernel(one.kernel, arch, options=one.options, checks="none")
        result = kernel[launch.grid](*launch.args, **launch.constants)
        assert find_hazards(result.profile.program) == []
