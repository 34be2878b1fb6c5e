"""Each documented kind of bad input raises its error with its message."""

from __future__ import annotations

import pytest

from mla_core.testing.bad_input import BAD_INPUTS, BadInput


@pytest.mark.parametrize("row", BAD_INPUTS, ids=lambda row: row.what)
def test_message(row: BadInput):
    assert row.message in row.provoke()


def test_there_are_enough_and_each_is_named_once():
    assert len(BAD_INPUTS) >= 30
    assert len({row.what for row in BAD_INPUTS}) == len(BAD_INPUTS)


def test_a_call_that_raises_nothing_is_found():
    with pytest.raises(AssertionError, match="harmless: nothing was raised"):
        BadInput("harmless", lambda: None, "").provoke()
