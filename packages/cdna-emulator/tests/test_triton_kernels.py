"""Kernels of many kinds, compiled by two Tritons for both architectures, against torch.

The compiler knows the instruction set independently of the emulator: where a layout, a rounding or
an address is misread, results differ. Every run has all checkers on.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from cdna_emulator.triton_bridge import emulate

pytest.importorskip("torch")
pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
case = importlib.import_module("kernel_cases.case")
for _name in ("matmul", "gluon", "reduction", "memory", "elementwise"):
    importlib.import_module(f"kernel_cases.{_name}")
sys.path.remove(str(HERE))

#: Folder of the second Triton, which `./dev env` lays out.
SECOND = Path(os.environ.get("CDNA_EMULATOR_TRITON", HERE.parents[2] / ".nox" / "second-triton"))


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _second_release() -> tuple[int, int] | None:
    found = sorted(SECOND.glob("triton-*.dist-info"))
    return _release(found[0].name.removeprefix("triton-")) if found else None


def _first_release() -> tuple[int, int]:
    try:
        return _release(version("triton"))
    except PackageNotFoundError:
        return (0, 0)


def _cases(release: tuple[int, int] | None) -> list[object]:
    return [
        pytest.param(one, arch, id=f"{one}-{arch}")
        for one in case.CASES
        for arch in one.archs
        if release is None or release >= one.since
    ]


def check(rng, one, arch, triton=None):
    launch = one.build(rng, arch)
    kernel = emulate(one.kernel, arch, options=one.options, triton=triton)
    result = kernel[launch.grid](*launch.args, **launch.constants)
    assert result.instructions > 0
    for actual, expected, tolerance in launch.expect:
        case.check(actual, expected, tolerance)


@pytest.mark.parametrize(("one", "arch"), _cases(_first_release()))
def test_kernel(rng, one, arch):
    check(rng, one, arch)


@pytest.mark.skipif(_second_release() is None, reason=f"no Triton in {SECOND}; run ./dev env")
@pytest.mark.parametrize(("one", "arch"), _cases(_second_release()))
def test_kernel_of_second_triton(rng, one, arch):
    check(rng, one, arch, SECOND)


def test_every_kernel_is_run():
    """A kernel without a case would say nothing."""
    run = {one.kernel.rpartition(":")[2] for one in case.CASES}
    defined = set()
    for path in case.KERNELS.glob("*.py"):
        decorated = path.read_text().split("jit\ndef ")[1:]
        defined |= {text.partition("(")[0] for text in decorated}
    helpers = {name for name in defined if name.startswith("_")}
    assert run == defined - helpers
    assert len(run) >= 40
