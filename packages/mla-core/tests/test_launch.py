"""Launches that skip Triton's own launch code do the same as it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_core.launch import launch

pytest.importorskip("triton")


def test_launches_of_compiled_kernels():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch_check.py"))],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "launches agree\n"


def test_stand_ins_are_called_as_they_are():
    class StandIn:
        def __getitem__(self, grid):
            return lambda *args, **constants: seen.append((grid, args, constants))

    seen = []
    launch(StandIn(), (2, 3), 1, "two", BLOCK=4)
    assert seen == [((2, 3), (1, "two"), {"BLOCK": 4})]
