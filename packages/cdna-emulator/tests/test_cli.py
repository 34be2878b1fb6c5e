"""The command line: what it prints, when it exits with what, and what it says to mistakes."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.cli import FOUND, REFUSED, cli

START = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
s_lshl_b32 s2, s2, 8
v_add_u32 v1, s2, v1
s_waitcnt lgkmcnt(0)
"""
KERNELS = {
    # y = 3 x for 64 dwords of each workgroup
    "triple": f"""{START}
    global_load_dword v2, v1, s[8:9]
    s_waitcnt vmcnt(0)
    v_mul_u32_u24 v2, 3, v2
    global_store_dword v1, v2, s[10:11]
    """,
    "hasty": f"{START}\nglobal_load_dword v2, v1, s[8:9]\nglobal_store_dword v1, v2, s[10:11]",
    "close": "v_mov_b32 v1, v0\nv_readfirstlane_b32 s4, v1\ns_branch done\ndone:\ns_nop 0",
    "lds": "v_lshlrev_b32 v1, 2, v0\nds_write_b32 v1, v0\ns_waitcnt lgkmcnt(0)",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    lines = {name: text.split("\n") for name, text in KERNELS.items()}
    found = tmp_path_factory.mktemp("objects") / "kernels.co"
    found.write_bytes(assemble_kernels(lines, "gfx950", pointers=2, debug=True))
    return str(found)


def invoke(*words, columns="200"):
    return CliRunner(env={"COLUMNS": columns}).invoke(cli, [str(word) for word in words])


def launch(path, kernel, *more, command="run"):
    args = ("--arg", "arange:u32:128", "--arg", "zeros:u32:128")
    return invoke(command, path, "--kernel", kernel, "--grid", 2, "--block", 64, *args, *more)


def test_info(path):
    result = invoke("info", path)
    assert result.exit_code == 0
    assert result.output.startswith("gfx950, code object version 5\n")
    for word in (*KERNELS, "VGPR", "spills", "arg0", "global_buffer", "0x8"):
        assert word in result.output


def test_narrow_terminals_lose_nothing(tmp_path):
    name = "a_kernel_with_a_name_that_is_longer_than_what_fits_in_a_column_of_a_table"
    (tmp_path / "k.co").write_bytes(assemble_kernels({name: ["s_nop 0"]}, "gfx942"))
    result = invoke("info", tmp_path / "k.co", columns="60")
    assert "…" not in result.output
    columns = [
        line.split("│")[1].strip() for line in result.output.split("\n") if line.count("│") == 10
    ]
    assert "".join(columns).startswith(name)


def test_disasm(path):
    result = invoke("disasm", path, "--kernel", "close")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[1] for line in lines] == [
        "v_mov_b32_e32",
        "v_readfirstlane_b32",
        "s_branch",
        "s_nop",
        "s_endpgm",
    ]
    address = int(lines[3].split()[0], 16)
    assert f"-> {address:#x}" in lines[2]
    assert lines[1].endswith("  close:2")


def test_check(path):
    result = invoke("check", path, "--kernel", "triple")
    assert (result.exit_code, result.output) == (0, "no findings\n")
    result = invoke("check", path)
    assert result.exit_code == FOUND
    assert re.search(r"\b1 finding\s", result.output)
    assert "wait_states" in result.output
    assert re.search(r"close\+0x[0-9a-f]+ close:2", result.output)


def test_run(path, tmp_path):
    saved = tmp_path / "out.npy"
    result = launch(path, "triple", "--save", f"1={saved}", "--schedule", "reversed")
    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    assert re.fullmatch(r"22 wave-instructions in \d+\.\d{3} s \([\d,]+/s\)", first)
    assert second == "no findings"
    np.testing.assert_array_equal(np.load(saved), 3 * np.arange(128))


def test_findings_of_a_run(path, tmp_path):
    saved = tmp_path / "out.npy"
    result = launch(path, "hasty", "--save", f"1={saved}")
    assert result.exit_code == FOUND
    assert re.search(r"\b1 finding\s", result.output)
    assert "missing_wait" in result.output
    assert "used v2 before a wait for" in result.output
    where = [line.split("│")[2].strip() for line in result.output.split("\n") if "│" in line]
    assert re.fullmatch(
        r"hasty\+0x[0-9a-f]+ hasty:10 workgroup 0,0,0 wave 0 \(2 times\)",
        " ".join(where).strip(),
    )
    np.testing.assert_array_equal(np.load(saved), np.arange(128))
    result = launch(path, "hasty", "--checks", "races,bounds")
    assert result.exit_code == REFUSED
    assert "checks must be all, none or some of" in result.output
    assert launch(path, "hasty", "--checks", "races,barriers").exit_code == 0
    assert launch(path, "hasty", "--checks", "none").exit_code == 0


def test_random_arguments_follow_the_seed(path, tmp_path):
    found = []
    for seed in (1, 1, 2):
        words = ("--grid", 1, "--block", 64, "--arg", "random:u16:128", "--arg", "zeros:u32:64")
        result = invoke(
            "run",
            path,
            "--kernel",
            "triple",
            *words,
            "--seed",
            seed,
            "--save",
            f"0={tmp_path}/x.npy",
        )
        assert result.exit_code == 0, result.output
        found.append(np.load(tmp_path / "x.npy"))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_profile(path):
    result = launch(path, "triple", "--most", 3, command="profile")
    assert result.exit_code == 0, result.output
    assert "22 wave-instructions" in result.output
    assert "cycles are an estimate" in result.output
    assert re.search(r"global load\W+512", result.output)
    assert re.search(r"global store\W+512", result.output)
    assert result.output.splitlines()[-1] == "no findings"
    mix = result.output.split("units")[0]
    assert len(re.findall(r"^│", mix, re.MULTILINE)) == 3
    assert launch(path, "hasty", command="profile").exit_code == FOUND


def test_dynamic_lds(path):
    words = ("run", path, "--kernel", "lds", "--grid", 1, "--block", 64)
    words += ("--arg", "null", "--arg", "null")
    assert "lds_out_of_bounds" in invoke(*words).output
    assert invoke(*words, "--dynamic-lds", 256).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kernel", "other"], "kernel must be one of triple, hasty, close, lds, got other"),
        ([], "kernel must be one of triple, hasty, close, lds, got None"),
        (["--kernel", "triple", "--arg", "null"], "args must be 2 values (arg0, arg1), got 1"),
        (["--kernel", "triple", "--arg", "full:4"], "argument must be zeros|random|arange:DTYPE"),
        (["--kernel", "triple", "--schedule", "x"], "schedule must be run_to_barrier, reversed"),
        (["--kernel", "triple", "--grid", "1;2"], "--grid must be X[,Y[,Z]], got '1;2'"),
        (["--kernel", "triple", "--block", "4,x"], "--block must be X[,Y[,Z]], got '4,x'"),
        (["--kernel", "triple", "--block", "2048"], "block must be 1 to 1024 work-items"),
        (["--kernel", "triple", "--save", "0"], "--save must be NUMBER=PATH"),
        (["--kernel", "triple", "--arg", "null", "--save", "0=x"], "--save must be NUMBER=PATH"),
        (["--kernel", "triple", "--save", "7=x"], "got '7=x'"),
    ],
)
@pytest.mark.parametrize("command", ["run", "profile"])
def test_what_cannot_be_done_is_said(path, command, words, message):
    grid = [] if "--grid" in words else ["--grid", "1"]
    result = invoke(command, path, *grid, *words)
    assert result.exit_code == REFUSED
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_results_go_where_files_can_be_written(path, tmp_path):
    result = launch(path, "triple", "--save", f"1={tmp_path}/nowhere/out.npy")
    assert result.exit_code == REFUSED
    assert "--save" in result.output
    assert "nowhere/out.npy" in result.output


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.co").write_text("not an object")
    for command in ("info", "disasm", "check"):
        result = invoke(command, tmp_path / "text.co")
        assert result.exit_code == REFUSED
        assert result.output.startswith("Error: ")
        assert "text.co" in result.output
    result = invoke("info", tmp_path / "missing.co")
    assert result.exit_code == REFUSED
    assert "does not exist" in result.output


def test_help():
    for words in (["-h"], ["run", "--help"], ["profile", "-h"]):
        result = invoke(*words)
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")


def test_as_a_module(path):
    """The package runs as a module, with the exit status of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "cdna_emulator", "check", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == FOUND
    assert "wait_states" in done.stdout
    assert not done.stderr
