"""Selection: who is asked, in which order, and what is said about those who are not taken."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import mla_core
from mla_core import MLADims, Problem, explain, use_backend
from mla_core.errors import BackendUnavailableError, UnsupportedProblemError
from mla_core.select import probe_failure, select

InstallBackend = Callable[..., Path]

PROBLEM = Problem(
    op="decode", arch="cpu", q_dtype="bf16", kv_dtype="bf16", dims=MLADims(16), page_size=64
)
RAISING_PROBE = "probe=lambda arch: (_ for _ in ()).throw({error}),"
UNAVAILABLE = RAISING_PROBE.format(error="BackendUnavailableError('no driver 7 here')")
CRASHES = RAISING_PROBE.format(error="OSError('libdriver.so: wrong ELF class')")


def test_highest_priority_wins(install_backend: InstallBackend):
    install_backend("low", priority=150)
    install_backend("high", priority=250)
    choice = select(PROBLEM)
    assert choice.backend.name == "high"
    assert choice.capability.kernel == "high_kernel"
    assert choice.because == "automatic choice by priority"
    assert choice.rejected == ()


def test_equal_priorities_are_settled_by_name(install_backend: InstallBackend):
    install_backend("beta", priority=250)
    install_backend("alpha", priority=250)
    assert select(PROBLEM).backend.name == "alpha"


def test_argument_beats_context_beats_variable_beats_priority(
    install_backend: InstallBackend, monkeypatch: pytest.MonkeyPatch
):
    for priority, name in enumerate(("argument", "context", "variable", "priority"), start=200):
        install_backend(name, priority=priority)
    monkeypatch.setenv("MLA_BACKEND", "variable")
    with use_backend("context"):
        choice = select(PROBLEM, "argument")
        assert (choice.backend.name, choice.because) == (
            "argument",
            "backend='argument' was passed",
        )
        choice = select(PROBLEM)
        assert (choice.backend.name, choice.because) == (
            "context",
            "use_backend(context) is active",
        )
    choice = select(PROBLEM)
    assert (choice.backend.name, choice.because) == ("variable", "MLA_BACKEND=variable")
    monkeypatch.delenv("MLA_BACKEND")
    assert select(PROBLEM).backend.name == "priority"


def test_variable_is_a_list_tried_in_order(
    install_backend: InstallBackend, monkeypatch: pytest.MonkeyPatch
):
    install_backend("picky", row="num_heads=frozenset({128})")
    install_backend("second", priority=1)
    monkeypatch.setenv("MLA_BACKEND", " picky, second ,reference")
    choice = select(PROBLEM)
    assert choice.backend.name == "second"
    assert [str(verdict) for verdict in choice.rejected] == ["picky: num_heads=16 (needs 128)"]


def test_contexts_nest_and_end(install_backend: InstallBackend):
    install_backend("outer")
    install_backend("inner")
    with use_backend("outer"):
        with use_backend("inner", "outer"):
            assert select(PROBLEM).backend.name == "inner"
        assert select(PROBLEM).backend.name == "outer"
        with pytest.raises(KeyError), use_backend("inner"):
            raise KeyError
        assert select(PROBLEM).backend.name == "outer"


def test_context_does_not_reach_other_threads(install_backend: InstallBackend):
    install_backend("chosen", priority=-1)
    install_backend("usual")
    seen = []
    with use_backend("chosen"):
        thread = threading.Thread(target=lambda: seen.append(select(PROBLEM).backend.name))
        thread.start()
        thread.join()
        assert select(PROBLEM).backend.name == "chosen"
    assert seen == ["usual"]


@pytest.mark.parametrize("door", ["argument", "context", "variable"])
@pytest.mark.parametrize(
    ("source", "extra", "cause", "message"),
    [
        (None, "", None, "'vega' is not installed"),
        ("import no_such_package", "", ModuleNotFoundError, "unusable: No module named"),
        ("", UNAVAILABLE, None, "no driver 7 here"),
        ("", CRASHES, OSError, "probe failed on cpu: OSError: libdriver.so"),
    ],
    ids=["missing", "broken", "probe", "probe_crash"],
)
def test_named_backend_that_cannot_run_raises_with_its_cause(
    install_backend: InstallBackend,
    monkeypatch: pytest.MonkeyPatch,
    door: str,
    source: str | None,
    extra: str,
    cause: type[Exception] | None,
    message: str,
):
    if source is not None:
        install_backend("vega", source=source, extra=extra)
    if door == "variable":
        monkeypatch.setenv("MLA_BACKEND", "vega,reference")

    def ask() -> None:
        if door == "context":
            with use_backend("vega"):
                select(PROBLEM)
        else:
            select(PROBLEM, "vega" if door == "argument" else None)

    with pytest.raises(BackendUnavailableError, match=message) as info:
        ask()
    assert cause is None or isinstance(info.value.__cause__, cause)


@pytest.mark.parametrize(
    ("source", "extra", "reason"),
    [
        ("raise RuntimeError('broken build')", "", "unusable: broken build"),
        ("", UNAVAILABLE, "no driver 7 here"),
        ("", CRASHES, "its probe failed on cpu: OSError: libdriver.so: wrong ELF class"),
    ],
    ids=["broken", "probe", "probe_crash"],
)
def test_automatic_choice_skips_and_keeps_the_reason(
    install_backend: InstallBackend, source: str, extra: str, reason: str
):
    install_backend("vega", source=source, extra=extra)
    install_backend("works", priority=150)
    choice = select(PROBLEM)
    assert choice.backend.name == "works"
    reasons = {verdict.backend: str(verdict) for verdict in explain(PROBLEM).verdicts}
    assert reason in reasons["vega"]
    # A broken descriptor has no priority, so it comes last and is not even passed over.
    assert [verdict.backend for verdict in choice.rejected] == ([] if source else ["vega"])


def test_probe_is_asked_about_the_architecture_of_the_problem(install_backend: InstallBackend):
    install_backend(
        "nova", extra="probe=lambda arch: exec('raise ValueError(arch)') if arch != 'cpu' else 0,"
    )
    backend = select(PROBLEM).backend
    assert backend.name == "nova"
    assert probe_failure(backend, "cpu") is None
    assert "ValueError: sm90" in str(probe_failure(backend, "sm90"))


def test_row_that_is_not_automatic_runs_only_when_named(install_backend: InstallBackend):
    install_backend("nova", row="automatic=False")
    install_backend("usual", priority=150)
    choice = select(PROBLEM)
    assert choice.backend.name == "usual"
    assert "nova_kernel on cpu runs only when 'nova' is named" in str(choice.rejected[0])
    assert select(PROBLEM, "nova").backend.name == "nova"
    with use_backend("nova"):
        assert select(PROBLEM).backend.name == "nova"


def test_first_matching_row_of_a_backend_is_taken(install_backend: InstallBackend):
    rows = "page_sizes=frozenset({1})), Capability(op='decode', kernel='any_page'"
    install_backend("nova", row=rows)
    assert select(PROBLEM).capability.kernel == "any_page"


def test_error_lists_one_reason_for_each_backend(install_backend: InstallBackend):
    install_backend("broken", source="raise RuntimeError('broken build')")
    install_backend("picky", row="q_dtypes=frozenset({'fp16'}), page_sizes=range(1, 33)")
    problem = Problem("decode", "cpu", "int8", "bf16", MLADims(16), page_size=64)
    with pytest.raises(UnsupportedProblemError) as info:
        select(problem)
    lines = str(info.value).splitlines()
    assert str(problem) in lines[0]
    assert "automatic choice by priority" in lines[0]
    by_name = {line.split(":")[0].strip(): line for line in lines[1:]}
    assert by_name.keys() == {record.name for record in mla_core.backends()}
    assert "q_dtype=int8 (needs fp16); page_size=64 (needs 1..32)" in by_name["picky"]
    assert "unusable: broken build" in by_name["broken"]
    assert "q_dtype=int8 (needs" in by_name["reference"]


def test_reason_of_the_closest_row_is_shown(install_backend: InstallBackend):
    rows = (
        "archs=frozenset({'sm90'}), num_heads=frozenset({128})), "
        "Capability(op='decode', kernel='near', num_heads=frozenset({8})"
    )
    install_backend("nova", row=rows)
    verdict = select(PROBLEM).rejected[0]
    assert verdict.reasons == ("num_heads=16 (needs 8)",)


def test_named_backend_without_the_op_is_unsupported(install_backend: InstallBackend):
    install_backend("nova")
    problem = Problem("sparse_decode", "cpu", "bf16", "bf16", MLADims(16))
    with pytest.raises(UnsupportedProblemError, match="nova: offers no sparse_decode"):
        select(problem, "nova")


def test_naming_a_backend_imports_no_other(install_backend: InstallBackend):
    install_backend("other", source="raise SystemError")
    install_backend("nova")
    assert select(PROBLEM, "nova").backend.name == "nova"
    assert "fake_dist_other" not in sys.modules


def test_explain_gives_the_choice_and_every_verdict(install_backend: InstallBackend):
    install_backend("nova")
    explanation = explain(PROBLEM)
    assert explanation.chosen is not None
    assert explanation.chosen.backend.name == "nova"
    assert explanation.failure is None
    verdicts = {verdict.backend: verdict for verdict in explanation.verdicts}
    assert verdicts.keys() == {record.name for record in mla_core.backends()}
    assert verdicts["reference"].reasons == ()
    assert verdicts["reference"].kernel == "torch_online_softmax"
    assert str(verdicts["nova"]) == "nova: nova_kernel"


@pytest.mark.parametrize("backend", ["vega", "picky"])
def test_explain_never_raises_for_a_no(install_backend: InstallBackend, backend: str):
    install_backend("picky", row="num_heads=frozenset({8})")
    explanation = explain(PROBLEM, backend)
    assert explanation.chosen is None
    assert explanation.failure is not None
    assert backend in explanation.failure


def test_no_installed_backend_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mla_core.select.registry.records", lambda: ())
    with pytest.raises(UnsupportedProblemError, match="no backend is installed"):
        select(PROBLEM)
