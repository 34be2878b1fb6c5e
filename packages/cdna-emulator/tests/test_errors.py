"""Errors share a base, and a failed check shows its findings."""

from __future__ import annotations

import pytest

from cdna_emulator import errors
from cdna_emulator.errors import CheckError, EmulatorError


def test_one_base_catches_all():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ours = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(ours) > 5
    assert all(issubclass(kind, EmulatorError) for kind in ours)


@pytest.mark.parametrize("count", [1, 20, 21, 50])
def test_findings_are_kept_and_shown(count):
    findings = [f"finding number {i}" for i in range(count)]
    error = CheckError(findings)
    assert error.findings == tuple(findings)
    first, *lines = str(error).splitlines()
    assert first == f"the checkers found {count} mistake{'' if count == 1 else 's'}"
    shown = [line.strip() for line in lines]
    assert shown[:20] == findings[:20]
    assert shown[20:] == (
        [] if count <= 20 else [f"and {count - 20} more; see the findings of this error"]
    )
