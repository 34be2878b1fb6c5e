"""What the tests of this package share: a HIP runtime that only takes notes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake_hip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake runtime once and return its library."""
    # Under its own name: one that is loaded under the real name would be taken for the real one.
    library = tmp_path_factory.mktemp("hip") / "libfakehip.so"
    source = Path(__file__).with_name("fake_hip.c")
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library
