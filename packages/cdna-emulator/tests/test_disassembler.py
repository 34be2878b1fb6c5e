"""Machine code becomes text, and what is no instruction becomes an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cdna_emulator import disassembler
from cdna_emulator.assembler import assemble_lines
from cdna_emulator.code_object import CodeObject
from cdna_emulator.disassembler import RawInstruction, disassemble
from cdna_emulator.errors import ToolchainError, UnknownInstructionError

#: Instructions of both architectures, spelt as LLVM prints them.
COMMON = (
    "s_mov_b32 s0, 0x12345678",
    "s_load_dwordx4 s[4:7], s[0:1], 0x10",
    "s_waitcnt vmcnt(3) lgkmcnt(0)",
    "v_mov_b32_e32 v1, 1.0",
    "v_add_f32_e64 v1, |v2|, -v3 clamp mul:2",
    "v_add_u32_sdwa v1, v2, v3 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_0",
    "v_mov_b32_dpp v1, v2 row_newbcast:3 row_mask:0xf bank_mask:0xf",
    "v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]",
    "buffer_load_dwordx4 v[0:3], v4, s[8:11], s12 offen offset:4080 sc0",
    "buffer_load_dword v4, s[8:11], 0 offen lds",
    "global_load_dwordx4 v[4:7], v[0:1], off offset:-4096 nt",
    "ds_read2st64_b32 v[0:1], v2 offset0:1 offset1:255",
    "scratch_load_dword v0, off, s32 offset:16",
    "v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel_hi:[0,1,1]",
)
GFX950 = (
    "v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]",
    "ds_read_b64_tr_b16 v[0:1], v2 offset:512",
    "v_permlane32_swap_b32_e32 v0, v1",
    "v_cvt_pk_bf16_f32 v0, v1, v2",
    "global_load_lds_dwordx4 v[0:1], off",
)


def words(*values: int) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in values)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_text_assembles_and_comes_back(arch):
    lines = [*COMMON, *(GFX950 if arch == "gfx950" else ())]
    kernel = CodeObject.read(assemble_lines(lines, arch)).kernel()
    found = disassemble(kernel.code, arch, kernel.code_address)
    texts = [instruction.text for instruction in found]
    assert texts == [*lines, "s_endpgm"]
    address = kernel.code_address
    for instruction in found:
        assert instruction.address == address
        address += instruction.size
    assert address == kernel.code_address + len(kernel.code)
    # Printed text assembles to the same bytes.
    assert CodeObject.read(assemble_lines(texts[:-1], arch)).kernel().code == kernel.code


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_branch_targets_can_be_derived(arch):
    lines = ["back:", "s_nop 0", "s_cbranch_scc1 ahead", "s_branch back", "ahead:", "s_nop 1"]
    kernel = CodeObject.read(assemble_lines(lines, arch)).kernel()
    found = disassemble(kernel.code, arch, 0x1000)
    assert found[1:3] == [
        RawInstruction(0x1004, 4, "s_cbranch_scc1 1"),
        RawInstruction(0x1008, 4, "s_branch 65533"),
    ]
    assert found[3].address == 0x1004 + 4 + 4 * 1
    assert found[0].address == 0x1008 + 4 + 4 * (65533 - 65536)


def test_architectures_are_told_apart():
    for line in GFX950:
        code = CodeObject.read(assemble_lines([line], "gfx950")).kernel().code
        assert disassemble(code, "gfx950")[0].text == line
        with pytest.raises(UnknownInstructionError, match="bytes at 0x0 must be a gfx942 instr"):
            disassemble(code, "gfx942")
    with pytest.raises(
        UnknownInstructionError, match="must be one of gfx942, gfx950, got 'gfx90a'"
    ):
        disassemble(b"", "gfx90a")


def test_nothing_gives_nothing():
    assert disassemble(b"", "gfx942") == []


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (words(0xFFFFFFFF, 0xFFFFFFFF), "ffffffff ffffffff"),
        # s_mov_b32 s0 with a literal that is cut off.
        (words(0xBE8000FF), "ff0080be"),
        # Crashes LLVM: a matrix core instruction with a register that does not exist there.
        (bytes.fromhex("f962fe159d378555cc41ef0637781958"), "f962fe15 9d378555"),
        # Decoded, with remarks: an invalid register, an odd pair of scalar registers.
        (words(0xBE8000FE), r"fe0080be.*src_lds_direct"),
        (bytes.fromhex("5f20958f"), r"5f20958f.*Warning"),
        (b"\0\0", "0000"),
    ],
)
def test_what_is_no_instruction_is_named_with_its_address(bad, named):
    good = words(0xBE800081)
    with pytest.raises(UnknownInstructionError, match=rf"bytes at 0x2004 must be .*{named}"):
        disassemble(good + bad, "gfx950", 0x2000)
    # The next call works, whatever happened to the process.
    assert disassemble(good, "gfx950") == [RawInstruction(0, 4, "s_mov_b32 s0, 1")]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(disassembler, "_workers", {})
    monkeypatch.setattr(disassembler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match="pip install rocm-llvm-python"):
        disassemble(words(0xBF810000), "gfx942")


def test_a_broken_library_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "librocmllvm.so"
    broken.write_text("no library")
    monkeypatch.setattr(disassembler, "_workers", {})
    monkeypatch.setattr(disassembler, "_find_library", lambda: broken)
    with pytest.raises(
        ToolchainError, match=r"must load and know gfx942, got .*(too short|invalid ELF)"
    ):
        disassemble(words(0xBF810000), "gfx942")


def test_processes_end_with_their_owner():
    script = (
        "import os, warnings; warnings.simplefilter('error')\n"
        "from cdna_emulator import disassembler\n"
        "disassembler.disassemble(b'\\x00\\x00\\x81\\xbf', 'gfx942')\n"
        "print(disassembler._workers['gfx942'].process.pid)\n"
        # A forked process has its own worker, and leaves that of its parent alone.
        "child = os.fork()\n"
        "text = disassembler.disassemble(b'\\x00\\x00\\x80\\xbf', 'gfx942')[0].text\n"
        "assert text == 's_nop 0'\n"
        "if not child: raise SystemExit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert disassembler.disassemble(b'\\x01\\x00\\x80\\xbf', 'gfx942')[0].text == 's_nop 1'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    gone = subprocess.run(["ps", "-p", done.stdout.strip()], capture_output=True, check=False)
    assert gone.returncode == 1
