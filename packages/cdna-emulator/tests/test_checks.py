"""Checkers: a kernel with one mistake gives that one finding, the mended kernel gives none."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.checks import wording
from cdna_emulator.checks.findings import CHECKS, Finding
from cdna_emulator.code_object import CodeObject
from cdna_emulator.launch import Result, run
from cdna_emulator.program import Program, load_program

ARCHS = ("gfx942", "gfx950")
LDS, SCRATCH = 256, 16
#: Arguments of 256 bytes in s[8:9] and s[10:11]; v0: work-item; v1: its dword's offset.
START = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
s_waitcnt lgkmcnt(0)
"""
END = "s_waitcnt vmcnt(0) lgkmcnt(0)"


@dataclass(frozen=True)
class Mistake:
    """A kernel that is right or wrong by what replaces ``{}`` in it.

    The instruction to be found ends in ``;!``, another one that the finding names in ``;<``.
    """

    name: str
    kind: str
    text: str
    wrong: str
    mended: str
    detail: str
    wave: int = 0
    lane: int | None = None
    count: int = 1
    waves: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def lines(self, fill: str) -> list[str]:
        return (START + self.text.replace("{}", fill) + END).split("\n")


def _wait(name, text, wrong, mended, what, **options):
    detail = f"used {what} before a wait for {{other}}"
    return Mistake(name, "missing_wait", text, wrong, mended, detail, **options)


LOAD = "global_load_dword v2, v1, s[8:9] ;<\n{}\nv_add_u32 v3, v2, v0 ;!\n"
SCALAR_LOAD = "s_load_dword s20, s[8:9], 0x0 ;<\n{}\ns_add_u32 s21, s20, 1 ;!\n"
FLAT = """
v_mov_b32 v4, s8
v_mov_b32 v5, s9
flat_load_dword v2, v[4:5] ;<
{}
v_add_u32 v3, v2, v0 ;!
"""
PARTIAL = """
global_load_dword v2, v1, s[8:9]
global_load_dword v3, v1, s[8:9] ;<
global_load_dword v4, v1, s[8:9]
{}
v_add_u32 v5, v3, v0 ;!
"""
LDS_READ = """
ds_write_b32 v1, v0
ds_read_b32 v2, v1 ;<
ds_write_b32 v1, v0
{}
v_add_u32 v3, v2, v0 ;!
"""
COPY = """
s_mov_b32 m0, 0
s_nop 0
global_load_lds_dword v1, s[8:9] ;<
{}
ds_read_b32 v2, v1 ;!
"""
ATOMIC = """
v_mov_b32 v3, 0
v_mov_b32 v4, 7
global_atomic_add v4, v3, v0, s[8:9] sc0 ;<
{}
v_add_u32 v5, v4, v0 ;!
"""
WAITS = [
    _wait("load", LOAD, "", "s_waitcnt vmcnt(0)", "v2"),
    _wait("wrong_counter", LOAD, "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(0)", "v2"),
    _wait("scalar", SCALAR_LOAD, "", "s_waitcnt lgkmcnt(0)", "s20"),
    _wait("scalar_not_zero", SCALAR_LOAD, "s_waitcnt lgkmcnt(1)", "s_waitcnt lgkmcnt(0)", "s20"),
    _wait("flat", FLAT, "s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0) lgkmcnt(0)", "v2"),
    _wait("flat_lds", FLAT, "s_waitcnt lgkmcnt(0)", "s_waitcnt vmcnt(0) lgkmcnt(0)", "v2"),
    _wait("partial", PARTIAL, "s_waitcnt vmcnt(2)", "s_waitcnt vmcnt(1)", "v3"),
    _wait("lds", LDS_READ, "s_waitcnt lgkmcnt(2)", "s_waitcnt lgkmcnt(1)", "v2"),
    _wait("copy", COPY, "", "s_waitcnt vmcnt(0)", "LDS address 0x0", lane=0, count=64),
    _wait("atomic", ATOMIC, "", "s_waitcnt vmcnt(0)", "v4"),
    _wait(
        "wide",
        "v_mov_b32 v9, 0\nglobal_load_dwordx4 v[4:7], v9, s[8:9] ;<\n{}\nv_add_u32 v3, v7, v0 ;!\n",
        "",
        "s_waitcnt vmcnt(0)",
        "v7",
    ),
    _wait(
        "accumulation_register",
        "global_load_dword a2, v1, s[8:9] ;<\n{}\nv_accvgpr_read_b32 v3, a2 ;!\n",
        "",
        "s_waitcnt vmcnt(0)",
        "a2",
    ),
    _wait(
        "overwritten",
        "global_load_dword v2, v1, s[8:9] ;<\n{}\nv_mov_b32 v2, 0 ;!\n",
        "",
        "s_waitcnt vmcnt(0)",
        "v2",
    ),
    _wait(
        "address",
        "ds_write_b32 v1, v1\nds_read_b32 v2, v1 ;<\n{}\nglobal_load_dword v3, v2, s[8:9] ;!\n",
        "",
        "s_waitcnt lgkmcnt(0)",
        "v2",
    ),
    _wait(
        "scratch",
        "scratch_load_dword v2, off, off ;<\n{}\nv_add_u32 v3, v2, v0 ;!\n",
        "",
        "s_waitcnt vmcnt(0)",
        "v2",
    ),
    Mistake(
        "vcc",
        "missing_wait",
        "s_load_dword vcc_lo, s[8:9], 0x0 ;<\n{}\nv_cndmask_b32 v2, 0, v1, vcc ;!\n",
        "s_mov_b32 vcc_hi, 0",
        "s_mov_b32 vcc_hi, 0\ns_waitcnt lgkmcnt(0)",
        "used vcc_lo before a wait for {other}",
    ),
]

ONLY_FIRST = "v_cmp_gt_u32 vcc, 64, v0\ns_and_saveexec_b64 s[20:21], vcc\n"
ONLY_SECOND = "v_cmp_le_u32 vcc, 64, v0\ns_and_saveexec_b64 s[20:21], vcc\n"
BOTH = "s_mov_b64 exec, s[20:21]\ns_waitcnt lgkmcnt(0)\n"
#: Bytes in LDS of the work-item with the same lane in the other wave's half.
SWAP = "v_and_b32 v3, 0xff, v1\n"
RACES = [
    Mistake(
        "barrier_write",
        "barrier_writes",
        f"{ONLY_FIRST}ds_write_b32 v1, v0 ;<\ns_mov_b64 exec, s[20:21]\n{{}}\ns_barrier ;!\n",
        "",
        "s_waitcnt lgkmcnt(0)",
        "reached the barrier before a wait for the LDS write {other}",
        count=2,
        waves=2,
    ),
    Mistake(
        "write_write",
        "lds_race",
        f"{SWAP}{ONLY_FIRST}ds_write_b32 v3, v0 ;<\n{BOTH}{{}}\n"
        f"{ONLY_SECOND}ds_write_b32 v3, v0 ;!\n{BOTH}",
        "",
        "s_barrier",
        "LDS address 0x0 without a barrier since another wave's {other}",
        wave=1,
        lane=0,
        count=64,
        waves=2,
    ),
    Mistake(
        "read_after_write",
        "lds_race",
        f"{SWAP}{ONLY_FIRST}ds_write_b32 v3, v0 ;<\n{BOTH}{{}}\n"
        f"{ONLY_SECOND}ds_read_b32 v4, v3 ;!\n{BOTH}",
        "s_nop 0",
        "s_barrier",
        "LDS address 0x0 without a barrier since another wave's {other}",
        wave=1,
        lane=0,
        count=64,
        waves=2,
    ),
    Mistake(
        "write_after_read",
        "lds_race",
        f"{SWAP}{ONLY_FIRST}ds_write_b32 v3, v0\nds_read_b32 v4, v3 ;<\n{BOTH}s_barrier\n"
        f"{ONLY_FIRST}ds_read_b32 v4, v3 ;<\n{BOTH}{{}}\n"
        f"{ONLY_SECOND}ds_write_b32 v3, v0 ;!\n{BOTH}",
        "s_nop 0",
        "s_barrier",
        "LDS address 0x0 without a barrier since another wave's {other}",
        wave=1,
        lane=0,
        count=64,
        waves=2,
    ),
    Mistake(
        "one_byte_of_a_dword",
        "lds_race",
        f"{SWAP}{ONLY_FIRST}ds_write_b8 v3, v0 offset:1 ;<\n{BOTH}"
        f"{ONLY_SECOND}v_add_u32 v5, 7, v0\nds_write_b8 v3, v5 {{}} ;!\n{BOTH}",
        "offset:1",
        "offset:2",
        "LDS address 0x0 without a barrier since another wave's {other}",
        wave=1,
        lane=0,
        count=64,
        waves=2,
    ),
    Mistake(
        "atomic_and_store",
        "lds_race",
        f"v_mov_b32 v3, 0\nv_mov_b32 v4, 1\n{ONLY_FIRST}ds_write_b32 v3, v4\n{BOTH}s_barrier\n"
        f"{ONLY_FIRST}ds_add_u32 v3, v4 ;<\n{BOTH}"
        f"{ONLY_SECOND}v_mov_b32 v4, 9\n{{}} v3, v4 ;!\n{BOTH}",
        "ds_write_b32",
        "ds_add_u32",
        "LDS address 0x0 without a barrier since another wave's {other}",
        wave=1,
        lane=0,
        # Lanes that write what the first one did change nothing more.
        count=1,
        waves=2,
    ),
]

UNINITIALISED = [
    Mistake(
        "register",
        "uninitialised_vgpr",
        "{}\nv_add_u32 v3, v2, v0 ;!\n",
        "",
        "v_mov_b32 v2, 0",
        "read v2, never written",
        lane=0,
    ),
    Mistake(
        "lanes_of_a_register",
        "uninitialised_vgpr",
        "s_mov_b64 exec, 0xff\nv_mov_b32 v2, 0\n{}\nv_add_u32 v3, v2, v1 ;!\n",
        "s_mov_b64 exec, -1",
        "",
        "read v2, never written",
        lane=8,
    ),
    Mistake(
        "copied_register",
        "uninitialised_vgpr",
        "{}\nv_mov_b32 v3, v2\nv_add_u32 v4, v3, v1 ;!\n",
        "",
        "v_mov_b32 v2, 0",
        "read v3, never written",
        lane=0,
    ),
    Mistake(
        "stored_register",
        "uninitialised_vgpr",
        "{}\nglobal_store_dword v1, v2, s[10:11] ;!\n",
        "",
        "v_mov_b32 v2, 0",
        "read v2, never written",
        lane=0,
    ),
    Mistake(
        "unwritten_scalar",
        "uninitialised_sgpr",
        "{}\ns_add_u32 s21, s20, 1 ;!\n",
        "",
        "s_mov_b32 s20, 0",
        "read s20, never written",
    ),
    Mistake(
        "mask",
        "uninitialised_sgpr",
        "{}\nv_cndmask_b32 v2, 0, v1, vcc ;!\n",
        "",
        "s_mov_b64 vcc, 0",
        "read vcc_lo, never written",
        count=2,
    ),
    Mistake(
        "lds_bytes",
        "uninitialised_lds",
        "{}\nds_read_b32 v2, v1\ns_waitcnt lgkmcnt(0)\nv_add_u32 v3, v2, v1 ;!\n",
        "",
        "ds_write_b32 v1, v0",
        "read LDS address 0x0, never written",
        lane=0,
    ),
    Mistake(
        "lds_half",
        "uninitialised_lds",
        "{} v1, v0\nds_read_b32 v2, v1\ns_waitcnt lgkmcnt(0)\nv_add_u32 v3, v2, v1 ;!\n",
        "ds_write_b16",
        "ds_write_b32",
        "read LDS address 0x0, never written",
        lane=0,
    ),
]


def _bounds(name, text, wrong, mended, detail, lane, count=1, **options):
    return Mistake(
        name, "out_of_bounds", text, wrong, mended, detail, lane=lane, count=count, **options
    )


DESCRIPTOR = "s_mov_b32 s12, s8\ns_and_b32 s13, s9, 0xffff\ns_movk_i32 s14, 0x200\n"
DESCRIPTOR += "s_mov_b32 s15, 0x20000\n"
BOUNDS = [
    _bounds(
        "load_behind",
        "global_load_dword v2, v1, s[8:9]{} ;!\n",
        " offset:1",
        "",
        "loaded 4 bytes at byte 253 of arg0 (256 bytes), the last 1 past its end",
        63,
    ),
    _bounds(
        "load_before",
        "global_load_dword v2, v1, s[8:9]{} ;!\n",
        " offset:-1",
        "",
        "loaded 4 bytes at 1 byte before arg0 (256 bytes)",
        0,
    ),
    _bounds(
        "store_behind",
        "global_store_byte v1, v0, s[10:11] offset:{} ;!\n",
        "4",
        "3",
        "stored 1 byte at 0 bytes past the end of arg1 (256 bytes)",
        63,
    ),
    _bounds(
        "store_before",
        "global_store_byte v1, v0, s[10:11] offset:{} ;!\n",
        "-1",
        "0",
        "stored 1 byte at 1 byte before arg1 (256 bytes)",
        0,
    ),
    _bounds(
        "atomic_behind",
        "global_atomic_add v1, v0, s[10:11]{} ;!\n",
        " offset:4",
        "",
        "updated 4 bytes at 0 bytes past the end of arg1 (256 bytes)",
        63,
    ),
    _bounds(
        "atomic_before",
        "global_atomic_add v1, v0, s[10:11]{} ;!\n",
        " offset:-4",
        "",
        "updated 4 bytes at 4 bytes before arg1 (256 bytes)",
        0,
    ),
    _bounds(
        "scalar_load",
        "s_load_dwordx4 s[20:23], s[8:9], {} ;!\n",
        "0xf4",
        "0xf0",
        "loaded 16 bytes at byte 244 of arg0 (256 bytes), the last 4 past its end",
        None,
    ),
    _bounds(
        "copy_to_lds",
        "s_mov_b32 m0, 0\nv_add_u32 v4, {}, v1\nglobal_load_lds_dword v4, s[8:9] ;!\n",
        "4",
        "0",
        "loaded 4 bytes at 0 bytes past the end of arg0 (256 bytes)",
        63,
    ),
    _bounds(
        "descriptor",
        DESCRIPTOR + "buffer_load_dword v2, v1, s[12:15], 0 offen offset:{} ;!\n",
        "8",
        "0",
        "loaded 4 bytes at 0 bytes past the end of arg0 (256 bytes)",
        62,
        2,
    ),
    _bounds(
        "flat_behind",
        "v_mov_b32 v5, s9\nv_add_co_u32 v4, vcc, s8, v1\ns_nop 1\n"
        "v_addc_co_u32 v5, vcc, 0, v5, vcc\nflat_load_dword v2, v[4:5]{} ;!\n",
        " offset:2",
        "",
        "loaded 4 bytes at byte 254 of arg0 (256 bytes), the last 2 past its end",
        63,
    ),
    _bounds(
        "null",
        "s_mov_b64 s[20:21], {}\nglobal_load_dword v2, v1, s[20:21] ;!\n",
        "0",
        "s[8:9]",
        "loaded 4 bytes at 0x0, in no buffer's slot",
        0,
        64,
    ),
    _bounds(
        "argument_block",
        "s_load_dword s20, s[0:1], {} ;!\n",
        "0x10",
        "0xc",
        "loaded 4 bytes at 0 bytes past the end of the kernel's arguments (16 bytes, read-only)",
        None,
    ),
    Mistake(
        "lds_store",
        "lds_out_of_bounds",
        "ds_write_b8 v1, v0 offset:{} ;!\n",
        "4",
        "3",
        "stored 1 byte at LDS address 0x100",
        lane=63,
    ),
    Mistake(
        "lds_load",
        "lds_out_of_bounds",
        "ds_write_b32 v1, v0\nds_read_b32 v2, v1{} ;!\n",
        " offset:4",
        "",
        "loaded 4 bytes at LDS address 0x100",
        lane=63,
    ),
    Mistake(
        "lds_atomic",
        "lds_out_of_bounds",
        "ds_write_b32 v1, v0\nds_add_u32 v1, v0{} ;!\n",
        " offset:4",
        "",
        "updated 4 bytes at LDS address 0x100",
        lane=63,
    ),
    Mistake(
        "scratch_load",
        "scratch_out_of_bounds",
        "scratch_load_dword v2, off, off offset:{} ;!\n",
        "13",
        "12",
        "loaded 4 bytes at private address 0xd",
        lane=0,
        count=64,
    ),
    Mistake(
        "scratch_store",
        "scratch_out_of_bounds",
        "scratch_store_dword off, v0, off offset:{} ;!\n",
        "16",
        "12",
        "stored 4 bytes at private address 0x10",
        lane=0,
        count=64,
    ),
]

CONTROL = [
    Mistake(
        "barriers",
        "divergent_barrier",
        "v_readfirstlane_b32 s4, v0\ns_cmp_lt_u32 s4, 64\ns_cbranch_scc1 {}\n"
        "s_barrier ;!\ns_endpgm\n{}:\ns_nop 0\n",
        "other_barrier",
        "no_barrier",
        "waves of the workgroup wait at different barriers; another is {other}",
        wave=1,
        waves=2,
    ),
    Mistake(
        "loop",
        "instruction_limit",
        "s_mov_b32 s20, 5\ns_mov_b32 s22, {}\ntimes_{}:\ns_sub_u32 s20, s20, s22\n"
        "s_cmp_lg_u32 s20, 0\ns_cbranch_scc1 times_{} ;!\n",
        "0",
        "1",
        "still running after 1001 wave-instructions of the workgroup",
        options={"max_instructions": 1001},
    ),
    Mistake(
        "trap",
        "unsupported",
        "{} ;!\n",
        "s_trap 2",
        "s_nop 2",
        "stops the wave; nothing is there to resume it",
    ),
]
MISTAKES = WAITS + RACES + UNINITIALISED + BOUNDS + CONTROL
assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)


def _lines(mistake: Mistake, is_wrong: bool) -> list[str]:
    fill = mistake.wrong if is_wrong else mistake.mended
    lines = mistake.lines(fill)
    if mistake.name == "barriers":
        # The second barrier is behind the label, in one of the two kernels.
        place = lines.index("s_nop 0")
        lines[place] = "s_barrier ;<" if is_wrong else "s_nop 0"
    return lines


@cache
def objects(arch: str) -> CodeObject:
    kernels = {}
    for mistake in MISTAKES:
        for name, is_wrong in ((f"{mistake.name}_wrong", True), (f"{mistake.name}_right", False)):
            kernels[name] = [line.partition(" ;")[0] for line in _lines(mistake, is_wrong)]
    data = assemble_kernels(
        kernels,
        arch,
        pointers=2,
        group_segment_size=LDS,
        private_segment_size=SCRATCH,
        debug=True,
    )
    return CodeObject.read(data)


def launch(mistake: Mistake, arch: str, is_wrong: bool, **options: Any) -> Result:
    name = f"{mistake.name}_{'wrong' if is_wrong else 'right'}"
    args = [np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)]
    options = {"schedule": "run_to_barrier", **mistake.options, **options}
    return run(objects(arch), name, 1, 64 * mistake.waves, args, strict=False, **options)


def _index(program: Program, name: str, line: int) -> int:
    return program.source_lines.index(f"{name}:{line}")


def _marked(lines: list[str], mark: str) -> int:
    """Return the number of the last line that ends in a mark."""
    return max(number for number, line in enumerate(lines, 1) if line.endswith(mark))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_mistake_is_found_and_nothing_else(mistake, arch):
    name = f"{mistake.name}_wrong"
    program = load_program(objects(arch), name)
    lines = _lines(mistake, True)
    line = _marked(lines, ";!")
    index = _index(program, name, line)
    detail = mistake.detail
    if "{other}" in detail:
        number = _marked(lines, ";<")
        other = program.instructions[_index(program, name, number)]
        detail = detail.replace(
            "{other}", f"`{other.text}` at {other.address:#x} ({name}:{number})"
        )
    assert launch(mistake, arch, True).findings == [
        Finding(
            kind=mistake.kind,
            kernel=name,
            address=program.instructions[index].address,
            instruction=program.instructions[index].text,
            detail=detail,
            source_line=f"{name}:{line}",
            workgroup=(0, 0, 0),
            wave=mistake.wave,
            lane=mistake.lane,
            count=mistake.count,
        )
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_mended_kernel_has_no_finding(mistake, arch):
    assert launch(mistake, arch, False).findings == []


#: Which check finds what; other kinds are found whatever is chosen.
CHECK_OF = {
    "missing_wait": "waits",
    "barrier_writes": "barrier_writes",
    "lds_race": "races",
    "uninitialised_vgpr": "uninitialised",
    "uninitialised_sgpr": "uninitialised",
    "uninitialised_lds": "uninitialised",
    "divergent_barrier": "barriers",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_its_own_check_finds_it_alone(mistake):
    for check in CHECKS:
        found = launch(mistake, "gfx942", True, checks=check).findings
        is_chosen = check == CHECK_OF.get(mistake.kind, check)
        assert [one.kind for one in found] == [mistake.kind] * is_chosen
    everything_else = [check for check in CHECKS if check != CHECK_OF.get(mistake.kind)]
    if len(everything_else) < len(CHECKS):
        assert launch(mistake, "gfx942", True, checks=everything_else).findings == []


def test_what_is_out_of_bounds_changes_nothing():
    """Stores miss everything, loads return zero, and neighbours in host memory stay as they are."""
    around = np.full(3 * 64, 7, np.uint32)
    given, out = around[:64], around[64:128]
    for name in ("store_behind", "store_before", "atomic_behind", "atomic_before"):
        out[:] = 0
        run(objects("gfx942"), f"{name}_wrong", 1, 64, [given, out], strict=False)
        assert (around[:64] == 7).all()
        assert (around[128:] == 7).all()
        assert out.any()


@pytest.mark.parametrize(
    ("name", "verb"), [("store_behind", "stored 1 byte"), ("atomic_behind", "updated 4 bytes")]
)
def test_read_only_arrays(name, verb):
    fixed = np.zeros(64, np.uint32)
    fixed.flags.writeable = False
    args = [np.zeros(64, np.uint32), fixed]
    (found,) = run(objects("gfx942"), f"{name}_right", 1, 64, args, strict=False).findings
    assert found.kind == "out_of_bounds"
    assert found.detail.startswith(f"{verb} at byte ")
    assert found.detail.endswith("of arg1 (256 bytes, read-only)")
    assert not fixed.any()


def test_findings_in_words():
    mistake = next(one for one in MISTAKES if one.name == "load_behind")
    (found,) = launch(mistake, "gfx942", True).findings
    assert str(found) == (
        f"out_of_bounds: load_behind_wrong+{found.address:#x} (load_behind_wrong:6) "
        "`global_load_dword v2, v1, s[8:9] offset:1`: loaded 4 bytes at byte 253 of arg0 "
        "(256 bytes), the last 1 past its end [workgroup 0,0,0 wave 0 lane 63]"
    )
    mistake = next(one for one in MISTAKES if one.name == "null")
    (found,) = launch(mistake, "gfx942", True).findings
    assert str(found).endswith("[workgroup 0,0,0 wave 0 lane 0, 64 times]")


def test_findings_of_several_workgroups_are_one():
    mistake = next(one for one in MISTAKES if one.name == "load_behind")
    for threads in (1, 2):
        args = [np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)]
        result = run(
            objects("gfx942"), "load_behind_wrong", (5, 4), 128, args, strict=False, threads=threads
        )
        (found,) = result.findings
        assert (found.workgroup, found.wave, found.lane) == ((0, 0, 0), 0, 63)
        # One lane of each first wave, all of each second one.
        assert found.count == 20 * 65
    assert mistake.count == 1


def test_words_for_every_kind():
    """A kind of the native core that has no words would fail when it is first met."""
    assert sorted(wording._WORDS) == list(range(1, 14))
    assert len({kind for kind, _ in wording._WORDS.values()}) == 13
