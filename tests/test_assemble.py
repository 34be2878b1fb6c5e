"""The code objects in hsa/ are what their sources give, byte for byte, and no check passes idly."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang")
pytest.importorskip("elftools")

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "assemble.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_committed_objects_are_reproduced():
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    for source in ROOT.glob("hsa/gfx*/mla/*.s"):
        assert source.with_suffix(".co").is_file()


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(ROOT / "hsa", tmp_path / "hsa")


def test_another_folder_gives_the_same_bytes(copy):
    kept = {path: path.read_bytes() for path in sorted(copy.glob("gfx*/mla/*.co"))}
    assert kept
    for path in kept:
        path.unlink()
    done = run("--hsa", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in sorted(copy.glob("gfx*/mla/*.co"))} == kept


@pytest.mark.parametrize("damage", ["object", "hash", "source"])
def test_a_difference_is_named(copy, damage):
    victim = sorted(copy.glob("gfx942/mla/*.co"))[0]
    if damage == "object":
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    elif damage == "hash":
        catalog = victim.with_name("mla_asm.csv")
        lines = catalog.read_text().splitlines(keepends=True)
        # The first row's hash, turned around.
        digest = next(cell for cell in lines[1].split(",") if len(cell) == 64)
        catalog.write_text("".join(lines).replace(digest, digest[::-1]))
    else:
        source = victim.with_suffix(".s")
        source.write_text(source.read_text().replace(".set ROWS, 16", ".set ROWS, 32"))
    done = run("--check", "--hsa", copy)
    assert done.returncode == 1
    assert victim.stem in done.stdout + done.stderr
