"""Errors: one tree that also fits the built-in exceptions callers already catch."""

from __future__ import annotations

import pytest

from mla_core import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.LayoutError, ValueError),
        (errors.BackendUnavailableError, RuntimeError),
        (errors.UnsupportedProblemError, NotImplementedError),
    ],
)
def test_each_error_is_ours_and_a_builtin_one(error: type[Exception], builtin: type[Exception]):
    assert issubclass(error, errors.MLAError)
    assert issubclass(error, builtin)
    with pytest.raises(errors.MLAError, match="decode: q must be"):
        raise error("decode: q must be 3-D, got 2-D")


def test_the_kinds_are_told_apart():
    kinds = (errors.LayoutError, errors.BackendUnavailableError, errors.UnsupportedProblemError)
    for kind in kinds:
        others = tuple(other for other in kinds if other is not kind)
        assert not issubclass(kind, others)
