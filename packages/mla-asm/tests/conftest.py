"""What the tests of this package share: a HIP runtime that only takes notes, and catalog rows."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mla_asm import CatalogRow


@pytest.fixture(scope="session")
def fake_hip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the fake runtime once and return its library."""
    # Under its own name: one that is loaded under the real name would be taken for the real one.
    library = tmp_path_factory.mktemp("hip") / "libfakehip.so"
    source = Path(__file__).with_name("fake_hip.c")
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library


@pytest.fixture
def notes(fake_hip: Path) -> ctypes.CDLL:
    """Return the fake runtime's own variables, cleared."""
    library = ctypes.CDLL(str(fake_hip))
    for name in ("loads", "launches", "next_error"):
        ctypes.c_int.in_dll(library, name).value = 0
    return library


@pytest.fixture
def make_row():
    """Return a maker of catalog rows: that of the first kernel, with changes."""
    row = CatalogRow(
        arch="gfx942",
        q_type="bf16",
        kv_type="bf16",
        gqa=0,
        is_persistent=False,
        q_seq_len=0,
        is_prefill=False,
        is_causal=True,
        writes_lse=True,
        has_round_robin=False,
        symbol="mla_decode_bf16_m16",
        code_object=Path("mla_decode_bf16_m16.co"),
        tile_rows=16,
        page_sizes=(1, 2, 4, 8, 16, 32, 64),
        layout="standard",
        num_heads=range(1, 129),
        source=Path("mla_decode_bf16_m16.s"),
        sha256="0" * 64,
        verified=(),
        where="mla_asm.csv:2",
    )
    return functools.partial(replace, row)
