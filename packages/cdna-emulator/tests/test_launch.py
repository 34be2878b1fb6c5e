"""Launches: forms of grid and block, what a kernel starts with, refusals; both cores agree."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject, KernelArgument
from cdna_emulator.errors import (
    ArgumentError,
    CheckError,
    CodeObjectError,
    EmulatorError,
    UnknownInstructionError,
)
from cdna_emulator.launch import Result, run

ARCHS = ("gfx942", "gfx950")
#: Arguments 0, 1 and 2 in s[8:9], s[10:11] and s[12:13]; v0: work-item; v1: its dword's offset.
START = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
s_load_dwordx2 s[12:13], s[0:1], 0x10
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
s_waitcnt lgkmcnt(0)
"""
#: Work-items count themselves.
COUNT = f"""{START}
v_mov_b32 v2, 0
v_mov_b32 v3, 1
global_atomic_add v2, v3, s[8:9]
s_waitcnt vmcnt(0)
"""
#: Sum of 256 floats per workgroup, in a tree through LDS.
SUM = f"""{START}
s_lshl_b32 s16, s2, 10
v_add_u32 v2, s16, v1
global_load_dword v3, v2, s[8:9]
s_movk_i32 s20, 128
s_waitcnt vmcnt(0)
ds_write_b32 v1, v3
s_waitcnt lgkmcnt(0)
s_barrier
halve:
v_cmp_gt_u32 vcc, s20, v0
s_and_saveexec_b64 s[22:23], vcc
s_lshl_b32 s21, s20, 2
v_add_u32 v4, s21, v1
ds_read_b32 v5, v4
ds_read_b32 v6, v1
s_waitcnt lgkmcnt(0)
v_add_f32 v5, v5, v6
ds_write_b32 v1, v5
s_mov_b64 exec, s[22:23]
s_waitcnt lgkmcnt(0)
s_barrier
s_lshr_b32 s20, s20, 1
s_cmp_lg_u32 s20, 0
s_cbranch_scc1 halve
v_cmp_eq_u32 vcc, 0, v0
s_and_saveexec_b64 s[22:23], vcc
ds_read_b32 v5, v1
s_lshl_b32 s16, s2, 2
v_mov_b32 v6, s16
s_waitcnt lgkmcnt(0)
global_store_dword v6, v5, s[10:11]
"""
#: A 16x16 product of f16 matrices with 16 columns each; the second one is transposed.
MATRIX = f"""{START}
v_and_b32 v2, 15, v0
v_lshrrev_b32 v3, 4, v0
v_lshlrev_b32 v4, 5, v2
v_lshl_add_u32 v4, v3, 3, v4
global_load_dwordx2 v[6:7], v4, s[8:9]
global_load_dwordx2 v[8:9], v4, s[10:11]
s_waitcnt vmcnt(0)
v_mfma_f32_16x16x16_f16 v[12:15], v[6:7], v[8:9], 0
v_lshlrev_b32 v5, 8, v3
v_lshl_add_u32 v5, v2, 2, v5
s_nop 15
global_store_dword v5, v12, s[12:13]
global_store_dword v5, v13, s[12:13] offset:64
global_store_dword v5, v14, s[12:13] offset:128
global_store_dword v5, v15, s[12:13] offset:192
"""
#: Neighbours through DPP, private memory, a 64-bit product, a float atomic.
MANY = f"""{START}
s_lshl_b32 s16, s2, 8
v_add_u32 v2, s16, v1
global_load_dword v3, v2, s[8:9]
s_waitcnt vmcnt(0)
s_nop 1
v_add_u32_dpp v4, v3, v3 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf
scratch_store_dword off, v4, off offset:4
s_waitcnt vmcnt(0)
scratch_load_dword v5, off, off offset:4
s_waitcnt vmcnt(0)
v_mad_u64_u32 v[6:7], vcc, v5, v3, 0
v_xor_b32 v6, v6, v7
global_store_dword v2, v6, s[10:11]
v_cvt_f32_u32 v8, v0
v_mov_b32 v9, 0
global_atomic_add_f32 v9, v8, s[12:13]
"""
KERNELS = {"count": COUNT, "sum": SUM, "matrix": MATRIX, "many": MANY}


@cache
def objects(arch: str) -> CodeObject:
    data = assemble_kernels(
        {name: text.split("\n") for name, text in KERNELS.items()},
        arch,
        pointers=3,
        group_segment_size=1024,
        private_segment_size=16,
    )
    return CodeObject.read(data)


def dump(registers, base: str) -> list[str]:
    """Store scalar registers one after the other, by one lane."""
    lines = ["s_mov_b64 exec, 1"]
    for position, register in enumerate(registers):
        lines += [f"v_mov_b32 v1, {register}", f"v_mov_b32 v2, {4 * position}"]
        lines += [f"global_store_dword v2, v1, {base}"]
    return lines


def count(grid, block) -> int:
    counted = np.zeros(1, np.uint32)
    run(objects("gfx942"), "count", grid, block, [counted, None, None])
    return int(counted[0])


# --- grid and block


@pytest.mark.parametrize(
    ("grid", "block", "items"),
    [
        (3, 64, 192),
        ((3,), (64,), 192),
        ([3, 2], [8, 4], 192),
        ((3, 2, 2), (5, 3, 2), 360),
        (np.int64(3), np.array([2, 1, 5]), 30),
        (1, 1024, 1024),
        (1, 1, 1),
        (0, 64, 0),
        ((4, 0, 4), 64, 0),
    ],
)
def test_every_work_item_runs(grid, block, items):
    assert count(grid, block) == items


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        (-1, 64, "grid must be 1 to 3 sizes of 0 or more, got -1"),
        ((1, 1, 1, 1), 64, "grid must be 1 to 3 sizes"),
        ((), 64, "grid must be 1 to 3 sizes"),
        (1.5, 64, "grid must be 1 to 3 sizes of 0 or more, got 1.5"),
        ("4", 64, "grid must be 1 to 3 sizes of 0 or more, got '4'"),
        (1, 0, r"block must be 1 to 1024 work-items, got \(0, 1, 1\)"),
        (1, (33, 32), r"block must be 1 to 1024 work-items, got \(33, 32, 1\)"),
    ],
)
def test_sizes_are_checked(grid, block, message):
    with pytest.raises(ArgumentError, match=f"^run: {message}"):
        count(grid, block)


def test_a_kernel_limits_its_block():
    code_object = objects("gfx942")
    kernel = code_object.kernels["count"]
    args = [np.zeros(1, np.uint32), None, None]
    small = replace(code_object, kernels={"count": replace(kernel, max_flat_workgroup_size=128)})
    run(small, None, 1, 128, args)
    with pytest.raises(ArgumentError, match="block must be at most 128 work-items for count, got"):
        run(small, None, 1, 129, args)
    fixed = replace(code_object, kernels={"count": replace(kernel, reqd_workgroup_size=(8, 4, 1))})
    run(fixed, None, 1, (8, 4), args)
    with pytest.raises(ArgumentError, match=r"block must be \(8, 4, 1\) for count, got \(32, 1"):
        run(fixed, None, 1, 32, args)


# --- what a kernel starts with


def test_dispatch_packet():
    text = ["s_load_dwordx2 s[20:21], s[2:3], 0x0", "s_load_dwordx16 s[24:39], s[0:1], 0x0"]
    text += ["s_waitcnt lgkmcnt(0)", *dump([f"s{24 + i}" for i in range(16)], "s[20:21]")]
    data = assemble_kernels(
        {"k": text},
        "gfx942",
        pointers=1,
        group_segment_size=512,
        private_segment_size=24,
        directives={"user_sgpr_dispatch_ptr": 1, "user_sgpr_count": 4},
    )
    out = np.zeros(16, np.uint32)
    run(data, "k", (2, 3, 1), (16, 4, 2), [out], threads=1)
    words = out.tolist()
    assert words[0] & 0xFF == 2  # a kernel dispatch
    assert words[0] >> 16 == 3  # of three dimensions
    assert [words[1] & 0xFFFF, words[1] >> 16, words[2]] == [16, 4, 2]
    assert words[3:6] == [32, 12, 2]
    assert words[6:8] == [24, 512]


def test_workgroup_ids_follow_the_user_registers():
    text = ["s_load_dwordx2 s[20:21], s[0:1], 0x0", "s_mul_i32 s5, s3, 3", "s_add_u32 s5, s5, s2"]
    text += ["s_lshl_b32 s5, s5, 3", "s_waitcnt lgkmcnt(0)", "s_add_u32 s20, s20, s5"]
    text += ["s_addc_u32 s21, s21, 0", *dump(["s2", "s3"], "s[20:21]")]
    wanted = {"system_sgpr_workgroup_id_y": 0, "system_sgpr_workgroup_id_z": 1}
    data = assemble_kernels({"k": text}, "gfx942", pointers=1, directives=wanted)
    for core, checks in (("native", "all"), ("numpy", "none")):
        out = np.zeros((2, 3, 2), np.uint32)
        run(data, "k", (3, 1, 2), 64, [out], core=core, checks=checks, schedule="run_to_barrier")
        # x and z, without y between them.
        assert [[tuple(cell) for cell in row] for row in out.tolist()] == [
            [(x, z) for x in range(3)] for z in range(2)
        ]


@pytest.mark.parametrize("core", ["native", "numpy"])
def test_preloaded_arguments(core):
    wanted = {"user_sgpr_kernarg_preload_length": 3, "user_sgpr_count": 5}
    # Firmware that does not preload starts here and would store zeros.
    early = ["s_load_dwordx2 s[2:3], s[0:1], 0x0", "s_mov_b32 s4, 0", "s_waitcnt lgkmcnt(0)"]
    early += ["s_branch 61"]
    data = assemble_kernels(
        {"k": [*early, ".p2align 8", *dump(["s4", "s5"], "s[2:3]")]},
        "gfx942",
        directives=wanted,
    )
    code_object = CodeObject.read(data)
    arguments = (
        KernelArgument("out", 0, 8, "global_buffer"),
        KernelArgument("n", 8, 4, "by_value"),
    )
    kernel = replace(code_object.kernels["k"], arguments=arguments, kernarg_size=16)
    out = np.zeros(2, np.uint32)
    run(
        replace(code_object, kernels={"k": kernel}),
        "k",
        (4, 1, 1),
        64,
        {"n": 77, "out": out},
        core=core,
        checks="none",
        schedule="run_to_barrier",
    )
    # s5 is the first system register, behind two words of a pointer and one of a number.
    assert out[0] == 77
    assert out[1] in range(4)


def test_hidden_arguments():
    text = ["s_load_dwordx4 s[20:23], s[0:1], 0x0", "s_waitcnt lgkmcnt(0)"]
    data = assemble_kernels({"k": [*text, *dump(["s22", "s23"], "s[20:21]")]}, "gfx942")
    code_object = CodeObject.read(data)
    arguments = (
        KernelArgument("out", 0, 8, "global_buffer"),
        KernelArgument("", 8, 4, "hidden_block_count_y"),
        KernelArgument("", 12, 2, "hidden_group_size_x"),
        KernelArgument("", 14, 2, "hidden_grid_dims"),
    )
    kernel = replace(code_object.kernels["k"], arguments=arguments, kernarg_size=16)
    out = np.zeros(2, np.uint32)
    run(replace(code_object, kernels={"k": kernel}), None, (2, 5), 32, [out])
    assert out.tolist() == [5, 32 | 2 << 16]


TRITON = Path(__file__).with_name("bridge_kernels.py")


def test_a_compiled_kernel_that_preloads(emulate_kernel, seed):
    """Triton asks for preloaded arguments and puts a prologue in front for old firmware."""
    torch = pytest.importorskip("torch")
    x, out = torch.randn(100), torch.zeros(100)
    kernel = emulate_kernel(f"{TRITON}:scaled_copy", "gfx942")
    result = kernel[(2,)](x, out, 100, 3, 5, 2.0, BLOCK=64)
    torch.testing.assert_close(out, x * 2)
    program = result.profile.program
    first = int(np.flatnonzero(result.profile.executed)[0])
    assert program.instructions[first].address == program.instructions[0].address + 256


def test_dynamic_lds():
    text = ["v_lshlrev_b32 v1, 2, v0", "ds_write_b32 v1, v0 offset:1024", "s_waitcnt lgkmcnt(0)"]
    for arch, most in (("gfx942", 65536), ("gfx950", 163840)):
        data = assemble_kernels({"k": text}, arch, group_segment_size=1024)
        result = run(data, "k", 1, 64, [], strict=False)
        assert {finding.kind for finding in result.findings} == {"lds_out_of_bounds"}
        run(data, "k", 1, 64, [], dynamic_lds=256)
        run(data, "k", 1, 64, [], dynamic_lds=most - 1024)
        with pytest.raises(
            ArgumentError, match=f"LDS must be at most {most} bytes on {arch}, got {most + 1}"
        ):
            run(data, "k", 1, 64, [], dynamic_lds=most - 1023)
    with pytest.raises(ArgumentError, match="dynamic_lds must be 0 bytes or more, got -4"):
        run(data, "k", 1, 64, [], dynamic_lds=-4)


def test_sources_of_code_objects(tmp_path):
    data = assemble_kernels({"k": ["s_nop 0"]}, "gfx942")
    path = tmp_path / "k.co"
    path.write_bytes(data)
    for source in (data, bytearray(data), path, str(path), CodeObject.read(data)):
        assert run(source, None, 1, 64, []).instructions == 2


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "gfx950"}, "run: arch must be that of the code object, gfx942, got gfx950"),
        ({"checks": "hazard"}, "run: checks must be all, none or some of waits, .*got .'hazard'"),
        ({"checks": ["waits", "x"]}, r"run: checks must be .*, got \['x'\]"),
        ({"core": "cuda"}, "run: core must be native or numpy, got 'cuda'"),
        ({"core": "numpy"}, "run: the numpy core takes schedule='run_to_barrier' and checks='non"),
        ({"core": "numpy", "checks": "none"}, "run: the numpy core takes schedule="),
        ({"schedule": "round_robin"}, "schedule must be run_to_barrier, .*got 'round_robin'"),
        ({"threads": 0}, "run: threads must be 1 or more, got 0"),
        ({"threads": -2}, "run: threads must be 1 or more, got -2"),
        ({"max_instructions": 0}, "run: max_instructions must be 1 or more, got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        run(objects("gfx942"), "count", 1, 64, [np.zeros(1, np.uint32), None, None], **options)


def test_the_kernel_must_be_there():
    for name, got in (("other", "other"), (None, "none|None")):
        with pytest.raises(CodeObjectError, match=f"kernel must be one of count, sum, .*({got})"):
            run(objects("gfx942"), name, 1, 64, [None, None, None])


def test_arch_may_be_asked_for():
    assert run(objects("gfx942"), "count", 0, 64, [None] * 3, arch="gfx942").instructions == 0


def test_what_is_not_modelled_is_refused_at_load():
    data = assemble_kernels({"k": ["s_nop 0", "s_rfe_b64 s[2:3]"]}, "gfx942")
    with pytest.raises(UnknownInstructionError, match=r"gfx942: .*`s_rfe_b64 s\[2:3\]`: mnemonic"):
        run(data, "k", 0, 64, [])


# --- findings


def test_strict_raises_after_the_arrays_are_written():
    out = np.zeros(64, np.uint32)
    text = f"{START}\nglobal_store_dword v1, v0, s[8:9]\nglobal_store_dword v1, v0, s[8:9] offset:4"
    data = assemble_kernels({"k": text.split("\n")}, "gfx942", pointers=3)
    with pytest.raises(CheckError, match=r"the checkers found 1 mistake\n  out_of_bounds") as found:
        run(data, "k", 1, 64, [out, None, None])
    assert out.tolist() == [0, *range(63)]
    result = run(data, "k", 1, 64, [out, None, None], strict=False)
    assert result.findings == list(found.value.findings)
    assert result.findings_lost == 0


def test_chosen_checks_are_made_and_no_others():
    # A race, an unwritten register, a wait state too few.
    text = f"""{START}
    v_mov_b32 v2, 0
    ds_write_b32 v2, v1
    v_add_u32 v4, v5, v5
    v_mov_b32 v6, v4
    v_readfirstlane_b32 s4, v6
    s_waitcnt lgkmcnt(0)
    """
    data = assemble_kernels({"k": text.split("\n")}, "gfx942", pointers=3, group_segment_size=64)
    expected = {"races": "lds_race", "uninitialised": "uninitialised_vgpr"}
    expected["hazards"] = "wait_states"
    for checks in (*expected, "all", "none", ("races", "hazards"), []):
        result = run(data, "k", 1, 128, [None] * 3, strict=False, checks=checks)
        names = expected if checks == "all" else () if checks == "none" else checks
        names = (names,) if isinstance(names, str) else names
        assert {one.kind for one in result.findings} == {expected[name] for name in names}


def test_findings_beyond_what_there_is_room_for_are_counted():
    lines = [f"{START}"] + ["global_load_dword v2, v1, s[8:9]"] * 1200 + ["s_waitcnt vmcnt(0)"]
    data = assemble_kernels({"k": "\n".join(lines).split("\n")}, "gfx942", pointers=3)
    result = run(data, "k", 1, 64, [None] * 3, strict=False, checks="none", threads=1)
    assert 1000 <= len(result.findings) < 1200
    # Of 64 lanes each.
    assert result.findings_lost == 64 * (1200 - len(result.findings))


def test_a_stuck_kernel_ends():
    data = assemble_kernels({"k": ["again:", "s_branch again"]}, "gfx942")
    result = run(data, "k", 1, 64, [], max_instructions=1000, strict=False)
    assert [one.kind for one in result.findings] == ["instruction_limit"]
    with pytest.raises(EmulatorError, match="must end within 1000 instructions"):
        run(
            data, "k", 1, 64, [],
            max_instructions=1000, core="numpy", checks="none", schedule="run_to_barrier",
        )  # fmt: skip


# --- whole kernels


class Case:
    """Inputs of one kernel of `KERNELS`, and what comes out."""

    def __init__(self, name: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.grid, self.block = name, 5, 64
        if name == "sum":
            self.block = 256
            self.args = [rng.standard_normal(5 * 256).astype(np.float32), np.zeros(5, np.float32)]
            self.args += [np.zeros(1)]
            parts = self.args[0].reshape(5, 256)
            while parts.shape[1] > 1:
                half = parts.shape[1] // 2
                parts = parts[:, :half] + parts[:, half:]
            self.expected = [parts[:, 0]]
            self.outputs, self.tolerance = [1], 0.0
        elif name == "matrix":
            self.grid = 1
            a, b = (rng.standard_normal((16, 16)).astype(np.float16) for _ in range(2))
            self.args = [a, b, np.zeros((16, 16), np.float32)]
            self.expected = [a.astype(np.float64) @ b.astype(np.float64).T]
            self.outputs, self.tolerance = [2], 1e-5
        else:
            x = rng.integers(0, 2**32, 320, dtype=np.uint32)
            self.args = [x, np.zeros(320, np.uint32), np.zeros(1, np.float32)]
            neighbours = x.reshape(-1, 2)[:, ::-1].ravel()
            total = (x + neighbours).astype(np.uint64) * x
            low, high = total & np.uint64(0xFFFFFFFF), total >> np.uint64(32)
            self.expected = [(low ^ high).astype(np.uint32), np.float32([5 * 2016])]
            self.outputs, self.tolerance = [1, 2], 0.0

    def run(self, arch: str, **options: object) -> tuple[Result, list[np.ndarray]]:
        args = [array.copy() for array in self.args]
        result = run(objects(arch), self.name, self.grid, self.block, args, **options)
        return result, [args[number] for number in self.outputs]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["sum", "matrix", "many"])
def test_kernels_are_right_whatever_the_threads(seed, name, arch):
    case = Case(name, seed)
    results = [case.run(arch, threads=threads) for threads in (1, 2, None)]
    for result, outputs in results:
        assert not result.findings
        for output, expected in zip(outputs, case.expected, strict=True):
            np.testing.assert_allclose(output, expected, rtol=0, atol=case.tolerance)
    (first, _), *others = results
    for result, _ in others:
        assert result.instructions == first.instructions
        for counter in ("executed", "bytes", "bank_cycles"):
            np.testing.assert_array_equal(
                getattr(result.profile, counter), getattr(first.profile, counter)
            )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["sum", "matrix", "many"])
def test_both_cores_agree(seed, name, arch):
    case = Case(name, seed)
    native, outputs = case.run(arch, schedule="run_to_barrier", checks="none")
    numpy, others = case.run(arch, schedule="run_to_barrier", checks="none", core="numpy")
    for output, other in zip(outputs, others, strict=True):
        np.testing.assert_allclose(output, other, rtol=0, atol=case.tolerance)
    assert native.instructions == numpy.instructions > 0
    np.testing.assert_array_equal(native.profile.executed, numpy.profile.executed)


def test_both_cores_find_what_is_out_of_bounds():
    text = f"""{START}
    global_store_dword v1, v0, s[8:9] offset:4
    ds_write_b32 v1, v0 offset:8
    s_waitcnt lgkmcnt(0)
    scratch_load_dword v2, off, off offset:16
    """
    data = assemble_kernels(
        {"k": text.split("\n")}, "gfx942", pointers=3, group_segment_size=256,
        private_segment_size=16,
    )  # fmt: skip
    found = []
    for core in ("native", "numpy"):
        result = run(
            data, "k", 2, 64, [np.zeros(64, np.uint32), None, None],
            core=core, checks="none", schedule="run_to_barrier", strict=False,
        )  # fmt: skip
        found.append(result.findings)
    assert [one.kind for one in found[0]] == [
        "out_of_bounds",
        "lds_out_of_bounds",
        "scratch_out_of_bounds",
    ]
    assert found[0] == found[1]
