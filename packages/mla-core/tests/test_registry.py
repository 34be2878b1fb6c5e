"""Discovery: a bad backend stays visible with its cause and never hurts another one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mla_core import registry
from mla_core.errors import BackendUnavailableError
from mla_core.logs import logger

InstallBackend = Callable[..., Path]


def _record(name: str) -> registry.Record:
    return {record.name: record for record in registry.records()}[name]


def test_reference_is_registered_like_any_other_backend():
    record = _record("reference")
    assert record.require().name == "reference"
    assert record.distributions == ("mla-core",)
    assert record.error is None


def test_working_backend_is_found(install_backend: InstallBackend):
    install_backend("nova", priority=70)
    record = _record("nova")
    assert record.require().priority == 70
    assert record.distributions == ("dist-nova",)
    assert record.value == "fake_dist_nova:BACKEND"


@pytest.mark.parametrize(
    ("source", "value", "cause", "message"),
    [
        ("import no_such_package", None, ModuleNotFoundError, "no_such_package"),
        ("raise RuntimeError('driver too old')", None, RuntimeError, "driver too old"),
        ("syntax error here", None, SyntaxError, "invalid syntax"),
        (None, None, ModuleNotFoundError, "fake_dist_nova"),
        ("x = 1", None, AttributeError, "BACKEND"),
        ("BACKEND = 'a string'", None, BackendUnavailableError, "got str"),
        ("x = 1", "fake_dist_nova", BackendUnavailableError, "got module"),
    ],
    ids=["import", "raises", "syntax", "no_module", "no_object", "wrong_object", "no_attribute"],
)
def test_bad_backend_keeps_its_cause(
    install_backend: InstallBackend,
    source: str | None,
    value: str | None,
    cause: type[Exception],
    message: str,
):
    install_backend("nova", source=source, value=value)
    record = _record("nova")
    assert record.backend is None
    assert isinstance(record.error, cause)
    with pytest.raises(BackendUnavailableError, match=f"'nova' \\(dist-nova\\).*{message}") as info:
        record.require()
    assert info.value.__cause__ is record.error
    assert _record("reference").backend is not None


def test_descriptor_without_the_function_of_an_op_is_refused(install_backend: InstallBackend):
    install_backend(
        "nova",
        source="""
        from mla_core.backend import Backend
        from mla_core.problem import Capability
        BACKEND = Backend("nova", 1, (Capability(op="decode", kernel="k"),), {"decode": "m:f"})
        """,
    )
    with pytest.raises(BackendUnavailableError, match="missing plan_decode"):
        _record("nova").require()


def test_name_must_agree_with_the_entry_point(install_backend: InstallBackend):
    path = install_backend("nova")
    path.write_text(path.read_text().replace("name='nova'", "name='vega'"))
    with pytest.raises(BackendUnavailableError, match="'nova' gives a backend named 'vega'"):
        _record("nova").require()


def test_other_api_version_is_refused(install_backend: InstallBackend):
    install_backend("nova", extra="api_version=99,")
    with pytest.raises(BackendUnavailableError, match="API version 99, this mla_core speaks 1"):
        _record("nova").require()


def test_two_distributions_with_one_name_make_it_unusable(install_backend: InstallBackend):
    install_backend("nova", distribution="one")
    install_backend("nova", distribution="two")
    record = _record("nova")
    assert record.backend is None
    assert record.distributions == ("one", "two")
    with pytest.raises(BackendUnavailableError) as info:
        record.require()
    for part in ("one (fake_one:BACKEND)", "two (fake_two:BACKEND)", "uninstall one"):
        assert part in str(info.value)
    assert not {"fake_one", "fake_two"} & sys.modules.keys(), "neither may be imported"


def test_one_distribution_listed_twice_is_no_conflict(
    install_backend: InstallBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install_backend("nova")
    again = tmp_path / "editable" / "dist_nova-1.2.3.dist-info"
    again.mkdir(parents=True)
    first = tmp_path / "site-packages" / "dist_nova-1.2.3.dist-info"
    for file in first.iterdir():
        (again / file.name).write_text(file.read_text())
    monkeypatch.syspath_prepend(again.parent)
    registry.refresh()
    assert _record("nova").require().name == "nova"


def test_missing_name_lists_what_is_installed(install_backend: InstallBackend):
    install_backend("nova")
    with pytest.raises(BackendUnavailableError, match=r"'vega' is not installed.*nova.*reference"):
        registry.record("vega")


def test_slow_import_is_reported_with_its_distribution(
    install_backend: InstallBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(registry, "SLOW_IMPORT_SECONDS", 0.05)
    monkeypatch.setattr(logger, "propagate", True)
    path = install_backend("nova")
    path.write_text("import time\ntime.sleep(0.06)\n" + path.read_text())
    with caplog.at_level(logging.WARNING, logger="mla_core"):
        record = registry.record("nova")
    assert record.load_seconds >= 0.06
    assert record.backend is not None, "slow is not broken"
    assert [r for r in caplog.records if "nova (dist-nova) took" in r.getMessage()]


def test_quick_import_is_not_reported(
    install_backend: InstallBackend, caplog: pytest.LogCaptureFixture
):
    install_backend("nova")
    with caplog.at_level(logging.WARNING, logger="mla_core"):
        registry.record("nova")
    assert not caplog.records


def test_naming_one_backend_loads_no_other(install_backend: InstallBackend):
    install_backend("nova", source="raise SystemError('must not be imported')")
    install_backend("vega")
    assert registry.record("vega").require().name == "vega"
    assert "fake_dist_nova" not in sys.modules


def test_each_descriptor_is_imported_once(install_backend: InstallBackend):
    install_backend("nova")
    assert registry.record("nova") is registry.record("nova")
    assert registry.records()[0] is registry.record("nova")


def test_refresh_sees_new_distributions(install_backend: InstallBackend):
    assert "nova" not in registry.names()
    install_backend("nova")  # refreshes
    assert "nova" in registry.names()


def test_without_refresh_the_answer_is_kept(
    install_backend: InstallBackend, monkeypatch: pytest.MonkeyPatch
):
    registry.names()
    monkeypatch.setattr(registry, "refresh", lambda: None)
    install_backend("nova")
    assert "nova" not in registry.names()


def test_records_come_best_first_and_unusable_last(install_backend: InstallBackend):
    install_backend("aaa", source="raise RuntimeError")
    install_backend("low", priority=1)
    install_backend("high", priority=900)
    install_backend("also_high", priority=900)
    names = [record.name for record in registry.records()]
    assert names[:2] == ["also_high", "high"]
    assert names[-1] == "aaa"
    assert names.index("low") < names.index("reference")
