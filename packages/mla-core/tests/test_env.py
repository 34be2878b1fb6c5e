"""Settings: one table, and readers that refuse what it does not allow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mla_core
from mla_core import env
from mla_core.errors import LayoutError


def test_every_variable_is_documented():
    for variable in env.VARIABLES:
        assert re.fullmatch(r"MLA_[A-Z_]+", variable.name)
        assert variable.accepts
        assert variable.meaning.endswith(".")
    assert len({variable.name for variable in env.VARIABLES}) == len(env.VARIABLES)


def test_every_variable_the_source_reads_is_in_the_table():
    source = Path(mla_core.__file__).parent
    read = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r"env\.\w+\(\s*\"(MLA_\w+)\"", path.read_text("utf-8"))
    }
    known = {variable.name for variable in env.VARIABLES}
    assert {"MLA_BACKEND", "MLA_CHECK", "MLA_LOG_LEVEL"} <= read <= known


def test_a_name_outside_the_table_does_not_exist():
    with pytest.raises(KeyError):
        env.text("MLA_NO_SUCH_VARIABLE")


@pytest.mark.parametrize("value", [None, "", "  "])
def test_unset_and_blank_mean_the_default(monkeypatch: pytest.MonkeyPatch, value: str | None):
    for name in ("MLA_LOG_LEVEL", "MLA_CHECK", "MLA_BACKEND", "MLA_HSA_DIR"):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert env.text("MLA_LOG_LEVEL") == "warning"
    assert env.flag("MLA_CHECK") is False
    assert env.names("MLA_BACKEND") == ()
    assert env.directory("MLA_HSA_DIR") is None


def test_flag(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_CHECK", " 1 ")
    assert env.flag("MLA_CHECK") is True
    monkeypatch.setenv("MLA_CHECK", "yes")
    with pytest.raises(LayoutError, match="MLA_CHECK: must be 0 or 1, got 'yes'"):
        env.flag("MLA_CHECK")


def test_choice_ignores_case(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_LOG_LEVEL", "DEBUG")
    assert env.choice("MLA_LOG_LEVEL", ("debug", "info")) == "debug"
    monkeypatch.setenv("MLA_LOG_LEVEL", "loud")
    with pytest.raises(LayoutError, match="MLA_LOG_LEVEL: must be one of debug, info, got 'loud'"):
        env.choice("MLA_LOG_LEVEL", ("debug", "info"))


def test_names_drops_empty_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_BACKEND", ",asm , triton,,")
    assert env.names("MLA_BACKEND") == ("asm", "triton")


def test_directory_must_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MLA_TUNING_PATH", str(tmp_path))
    assert env.directory("MLA_TUNING_PATH") == tmp_path
    monkeypatch.setenv("MLA_TUNING_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(LayoutError, match=r"must be an existing directory, got .*nowhere"):
        env.directory("MLA_TUNING_PATH")
