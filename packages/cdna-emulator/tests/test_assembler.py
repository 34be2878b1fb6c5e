"""Assembly is reproducible, complains with file and line, and reports what came out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cdna_emulator import assembler
from cdna_emulator.assembler import (
    ObjectRow,
    assemble,
    assemble_kernels,
    assemble_lines,
    object_report,
)
from cdna_emulator.code_object import CodeObject
from cdna_emulator.disassembler import disassemble
from cdna_emulator.errors import ToolchainError

ROOT = Path(__file__).resolve().parents[3]
HEADER = '.amdgcn_target "amdgcn-amd-amdhsa--gfx942"\n.text\n'


def texts(data: bytes, name: str | None = None) -> list[str]:
    code_object = CodeObject.read(data)
    return [line.text for line in disassemble(code_object.kernel(name).code, code_object.arch)]


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Write a source that uses macros, an include and a symbol, as a file in two parts."""
    lines = ['.include "part.inc"', "repeat 3", ".if WIDE == 1", "s_nop 9", ".endif"]
    # The text that assemble_lines would assemble.
    monkeypatch.setattr(assembler, "assemble", lambda text, arch, debug: text)
    text = assemble_lines(lines, "gfx942", name="k")
    monkeypatch.undo()
    path = tmp_path / "one" / "kernel.s"
    path.parent.mkdir()
    path.write_text(text)
    include = ".macro repeat count\n.rept \\count\ns_nop 5\n.endr\n.endm\n"
    path.with_name("part.inc").write_text(include)
    return path


def test_defines_macros_and_includes(source, tmp_path):
    assert texts(assemble(source, "gfx942", defines={"WIDE": 0})) == ["s_nop 5"] * 3 + ["s_endpgm"]
    wide = assemble(source, "gfx942", defines={"WIDE": 1})
    assert texts(wide) == ["s_nop 5"] * 3 + ["s_nop 9", "s_endpgm"]
    # Elsewhere the include is found only when its folder is named.
    shutil.move(source.with_name("part.inc"), tmp_path / "part.inc")
    with pytest.raises(ToolchainError, match=r"Could not find include file 'part\.inc'"):
        assemble(source, "gfx942", defines={"WIDE": 1})
    assert assemble(source, "gfx942", defines={"WIDE": 1}, include_dirs=[tmp_path]) == wide


def test_equal_sources_give_equal_bytes_wherever_they_lie(source, tmp_path, monkeypatch):
    first = assemble(source, "gfx942", defines={"WIDE": 1})
    shutil.copytree(source.parent, tmp_path / "a longer name" / "two")
    second = tmp_path / "a longer name" / "two" / "kernel.s"
    assert assemble(second, "gfx942", defines={"WIDE": 1}) == first
    monkeypatch.chdir(second.parent)
    assert assemble(Path("kernel.s"), "gfx942", defines={"WIDE": 1}) == first
    text = source.read_text()
    assert assemble(text, "gfx942", defines={"WIDE": 1}, include_dirs=[source.parent]) == first
    # Neither where nor with what it was built.
    assert b"LLD" not in first
    assert str(tmp_path).encode() not in first
    with_lines = assemble(source, "gfx942", defines={"WIDE": 1}, debug=True)
    assert CodeObject.read(with_lines).kernel().code == CodeObject.read(first).kernel().code


def test_lines_of_files_are_known_with_debug(source):
    data = assemble(source, "gfx942", defines={"WIDE": 1}, debug=True)
    code_object = CodeObject.read(data)
    start = code_object.kernel().code_address
    assert code_object.source_line(start + 12) is not None
    assert code_object.source_line(start + 12) != code_object.source_line(start)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("s_foo s1", "invalid instruction"),
        ("v_mov_b32 v256, v0", "register index is out of range"),
        ("ds_read_b64_tr_b16 v[0:1], v2", "instruction not supported on this GPU"),
        ('.error "told to"', "told to"),
        ('.warning "careful"', "careful"),
    ],
)
def test_errors_carry_file_and_line(tmp_path, line, reason):
    path = tmp_path / "broken.s"
    path.write_text(f"{HEADER}s_nop 0\n{line}\n")
    with pytest.raises(ToolchainError, match=rf"broken\.s:4:\d+: (error|warning): .*{reason}"):
        assemble(path, "gfx942")
    with pytest.raises(ToolchainError, match=rf"\nsource\.s:4:\d+: (error|warning): .*{reason}"):
        assemble(path.read_text(), "gfx942")


def test_lines_are_counted_from_the_caller_s_first():
    kernels = {"fine": ["s_nop 0"] * 3, "broken": ["s_nop 0", "s_foo"]}
    with pytest.raises(ToolchainError, match=r"\nbroken:2:1: error: invalid instruction"):
        assemble_kernels(kernels, "gfx942")


def test_duplicate_symbols_and_other_architectures_are_refused():
    with pytest.raises(ToolchainError, match="already defined"):
        assemble_kernels({"a": ["same:"], "b": ["same:"]}, "gfx942")
    with pytest.raises(ToolchainError, match="arch must be one of gfx942, gfx950, got 'gfx90a'"):
        assemble(HEADER, "gfx90a")
    with pytest.raises(ToolchainError, match="target id"):
        assemble(HEADER, "gfx950")


def test_a_missing_assembler_is_named(monkeypatch):
    monkeypatch.setattr(assembler.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r'pip install "cdna-emulator\[assemble\]"'):
        assemble(HEADER, "gfx942")


def test_wrapped_lines_make_a_kernel():
    data = assemble_lines(
        ["v_accvgpr_write_b32 a255, v255"],
        "gfx950",
        name="k",
        pointers=2,
        group_segment_size=160 * 1024,
        private_segment_size=64,
        directives={"ieee_mode": 0},
    )
    kernel = CodeObject.read(data).kernel("k")
    assert [(a.name, a.offset, a.size) for a in kernel.arguments] == [
        ("arg0", 0, 8),
        ("arg1", 8, 8),
    ]
    assert {a.value_kind for a in kernel.arguments} == {"global_buffer"}
    assert kernel.kernarg_size == kernel.descriptor.kernarg_size == 16
    assert kernel.group_segment_size == kernel.descriptor.group_segment_size == 163840
    assert kernel.private_segment_size == kernel.descriptor.private_segment_size == 64
    assert kernel.descriptor.enable_private_segment
    assert not kernel.descriptor.ieee_mode
    assert kernel.descriptor.initial_sgprs() == {
        "kernarg_segment_ptr": (0, 2),
        "workgroup_id_x": (2, 1),
        "workgroup_id_y": (3, 1),
        "workgroup_id_z": (4, 1),
    }
    assert texts(data) == ["v_accvgpr_write_b32 a255, v255", "s_endpgm"]


def test_report():
    data = assemble_kernels(
        {"one": ["s_nop 0"], "two": ["s_nop 0"] * 3},
        "gfx942",
        pointers=1,
        group_segment_size=512,
        private_segment_size=16,
        directives={"next_free_vgpr": 40, "accum_offset": 32},
    )
    common = {"vgprs": 40, "agprs": 8, "sgprs": 96, "accum_offset": 32, "lds_bytes": 512}
    common |= {"scratch_bytes": 16, "spills": 0, "kernarg_bytes": 8}
    wanted = [
        ObjectRow(kernel="one", code_bytes=8, **common),
        ObjectRow(kernel="two", code_bytes=16, **common),
    ]
    assert object_report(data) == wanted
    assert object_report(CodeObject.read(data)) == wanted


def run_tool(hsa: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = ROOT / "tools" / "assemble.py"
    command = [sys.executable, str(tool), "--hsa", str(hsa), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not (ROOT / "tools" / "assemble.py").is_file(), reason="not in a checkout")
def test_the_tool_builds_checks_and_keeps_hashes(source, tmp_path):
    hsa = tmp_path / "hsa"
    folder = hsa / "gfx942" / "mla"
    folder.mkdir(parents=True)
    (hsa / "src" / "mla").mkdir(parents=True)
    text = source.read_text().replace("WIDE == 1", "GFX950 == 0")
    (folder / "k.s").write_text(text)
    shutil.copy(source.with_name("part.inc"), hsa / "src" / "mla")
    catalog = folder / "mla_asm.csv"
    catalog.write_text(f"knl_name,co_name,sha256\nk,k.co,{'0' * 64}\nother,other.co,{'1' * 64}\n")

    missing = run_tool(hsa, "--check")
    assert missing.returncode == 1
    assert "k.co: code object must be committed, got none" in missing.stderr
    assert not (folder / "k.co").exists()

    built = run_tool(hsa)
    assert (built.returncode, built.stderr) == (0, "")
    data = (folder / "k.co").read_bytes()
    assert texts(data) == ["s_nop 5"] * 3 + ["s_nop 9", "s_endpgm"]
    assert "gfx942" in built.stdout
    header, row, other = catalog.read_text().splitlines()
    assert (header, other) == ("knl_name,co_name,sha256", f"other,other.co,{'1' * 64}")
    assert row == f"k,k.co,{assembler_hash(data)}"
    checked = run_tool(hsa, "--check")
    assert (checked.returncode, checked.stderr) == (0, "")

    (folder / "k.s").write_text(text.replace("repeat 3", "repeat 4"))
    (folder / "orphan.co").write_bytes(data)
    changed = run_tool(hsa, "--check")
    assert changed.returncode == 1
    assert "k.co: sha256 must be" in changed.stderr
    assert "sha256 of k.co is out of date" in changed.stderr
    assert "orphan.co: source must lie beside it as orphan.s" in changed.stderr
    assert (folder / "k.co").read_bytes() == data

    (folder / "k.s").write_text("s_foo\n")
    broken = run_tool(hsa)
    assert broken.returncode == 1
    assert "k.s:1:1: error: invalid instruction" in broken.stderr
    assert (folder / "k.co").read_bytes() == data


def assembler_hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
