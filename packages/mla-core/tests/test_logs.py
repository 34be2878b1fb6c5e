"""Logging: one handler, a level from the environment, structured lines."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest

from mla_core import logs
from mla_core.errors import LayoutError

Read = Callable[[], str]


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Read]:
    """Take the logger as before the import; return a reader of what it prints."""
    before, level = list(logs.logger.handlers), logs.logger.level
    logs.logger.handlers.clear()
    for name in ("MLA_LOG_LEVEL", "MLA_LOG_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    yield lambda: capsys.readouterr().err
    logs.logger.handlers[:] = before
    logs.logger.setLevel(level)


def test_events_are_silent_by_default(stderr: Read):
    logs.configure()
    logs.event("plan_decode", backend="triton")
    assert stderr() == ""


def test_event_is_one_line_of_fields(stderr: Read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_LOG_LEVEL", "info")
    logs.configure()
    logs.event("plan_decode", backend="triton", num_kv_splits=8, because="fills 132 units")
    assert stderr() == (
        'mla_core INFO plan_decode backend=triton num_kv_splits=8 because="fills 132 units"\n'
    )


def test_source_line_is_the_callers(stderr: Read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_LOG_LEVEL", "info")
    monkeypatch.setenv("MLA_LOG_SOURCE", "1")
    logs.configure()
    logs.event("plan_decode")
    line = stderr()
    assert line.startswith("mla_core INFO plan_decode (")
    assert "test_logs.py:" in line


def test_configuring_again_adds_no_handler(stderr: Read, monkeypatch: pytest.MonkeyPatch):
    logs.configure()
    monkeypatch.setenv("MLA_LOG_LEVEL", "info")
    logs.configure()
    logs.event("once")
    assert stderr().count("once") == 1


def test_handler_of_the_application_is_kept(stderr: Read, monkeypatch: pytest.MonkeyPatch):
    own = logging.StreamHandler(text := io.StringIO())
    own.setFormatter(logging.Formatter("app: %(message)s"))
    logs.logger.addHandler(own)
    monkeypatch.setenv("MLA_LOG_LEVEL", "info")
    logs.configure()
    assert logs.logger.handlers == [own]
    logs.event("plan_decode", backend="triton")
    assert text.getvalue() == "app: plan_decode backend=triton\n"
    assert stderr() == ""


def test_unknown_level_is_refused(stderr: Read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_LOG_LEVEL", "loud")
    with pytest.raises(LayoutError, match="MLA_LOG_LEVEL: must be one of debug, info"):
        logs.configure()
    assert stderr() == ""
