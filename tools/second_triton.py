"""Fetch the second Triton whose machine code the emulator's tests execute: ``.nox/triton-VERSION``.

The version beside the pinned one of constraints/cpu.txt compiles the same kernels to other code.
Only its files are laid out, without dependencies; the environment ``.nox/dev`` stays as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = "3.9.0"
FOLDER = ROOT / ".nox" / f"triton-{VERSION}"


def fetch(python: str = sys.executable, log: Callable[[str], object] = print) -> Path:
    """Install the second Triton into its folder unless it is there; return the folder."""
    marker = FOLDER / f"triton-{VERSION}.dist-info"
    if marker.is_dir():
        return FOLDER
    log(f"fetching triton {VERSION} into {FOLDER.relative_to(ROOT)}")
    # Under another name first: an interrupted installation must not look finished.
    unfinished = FOLDER.with_name(FOLDER.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    command += ["--only-binary", ":all:", "--target", str(unfinished), f"triton=={VERSION}"]
    subprocess.run(command, check=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    unfinished.rename(FOLDER)
    return FOLDER


if __name__ == "__main__":
    fetch()
