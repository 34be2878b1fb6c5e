"""Choosing a backend for a problem, and saying why.

Order of precedence: the ``backend=`` argument, then `use_backend`, then ``MLA_BACKEND``, then
priority. A backend that is *named* and missing or broken raises with its cause; automatic choice
skips it and keeps the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from mla_core import env, registry
from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError, UnsupportedProblemError
from mla_core.problem import Capability, Problem

_PREFERRED: ContextVar[tuple[str, ...]] = ContextVar("mla_core_preferred_backends", default=())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one backend answers to one problem; no reasons means yes."""

    backend: str
    kernel: str | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """One line: ``triton: page_size=3 (needs 16, 64)``."""
        return f"{self.backend}: {'; '.join(self.reasons) or self.kernel}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend and capability row that will serve a problem, and how it came to be chosen."""

    problem: Problem
    backend: Backend
    capability: Capability
    because: str
    rejected: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The choice for a problem, if any, beside the verdict of every installed backend."""

    problem: Problem
    chosen: Choice | None
    verdicts: tuple[Verdict, ...]
    failure: str | None


@contextmanager
def use_backend(*backend_names: str) -> Iterator[None]:
    """Prefer these backends, tried in order, inside a ``with`` block (per thread and task)."""
    for name in backend_names:
        registry.record(name).require()
    token = _PREFERRED.set(backend_names)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


def select(problem: Problem, backend: str | None = None) -> Choice:
    """Return the backend that serves a problem.

    Raises
    ------
    BackendUnavailableError
        A named backend is missing, broken, or cannot run on this machine.
    UnsupportedProblemError
        No candidate has a matching capability; the message gives one reason per backend.
    """
    named, because = _named(backend)
    candidates = named or tuple(record.name for record in registry.records())
    rejected: list[Verdict] = []
    for name in candidates:
        if named:
            _probe(registry.record(name).require(), problem.arch)
        verdict, capability = _judge(name, problem, is_named=bool(named))
        if capability is not None:
            chosen = registry.record(name).require()
            return Choice(problem, chosen, capability, because, tuple(rejected))
        rejected.append(verdict)
    reasons = "".join(f"\n  {verdict}" for verdict in rejected) or "\n  no backend is installed"
    raise UnsupportedProblemError(f"{problem.op}: no kernel for {problem}; {because}:{reasons}")


def explain(problem: Problem, backend: str | None = None) -> Explanation:
    """Return the choice `select` would make and every backend's verdict; never raises for a no."""
    named, _ = _named(backend)
    verdicts = tuple(
        _judge(record.name, problem, is_named=record.name in named)[0]
        for record in registry.records()
    )
    try:
        return Explanation(problem, select(problem, backend), verdicts, None)
    except (BackendUnavailableError, UnsupportedProblemError) as exc:
        return Explanation(problem, None, verdicts, str(exc))


def probe_failure(backend: Backend, arch: str) -> str | None:
    """Return why a backend cannot run on this machine for an architecture; ``None`` if it can."""
    try:
        _probe(backend, arch)
    except BackendUnavailableError as exc:
        return str(exc)
    return None


def _probe(backend: Backend, arch: str) -> None:
    """Run a backend's probe; whatever it raises comes out as `BackendUnavailableError`."""
    try:
        backend.probe(arch)
    except BackendUnavailableError:
        raise
    # Third-party code: a driver that fails to load may raise anything, and one broken backend
    # must not end the search. The cause stays in the message and in the chain.
    except Exception as exc:
        raise BackendUnavailableError(
            f"backend {backend.name!r}: its probe failed on {arch}: {type(exc).__name__}: {exc}"
        ) from exc


def preference() -> tuple[str, ...]:
    """Return the backend names that `use_backend` or ``MLA_BACKEND`` asks for; none by default."""
    return _named(None)[0]


def _named(backend: str | None) -> tuple[tuple[str, ...], str]:
    if backend is not None:
        return (backend,), f"backend={backend!r} was passed"
    if preferred := _PREFERRED.get():
        return preferred, f"use_backend({', '.join(preferred)}) is active"
    if configured := env.names("MLA_BACKEND"):
        return configured, f"MLA_BACKEND={','.join(configured)}"
    return (), "automatic choice by priority"


def _judge(name: str, problem: Problem, *, is_named: bool) -> tuple[Verdict, Capability | None]:
    """Ask one backend; the capability is its first row without a reason against it."""
    record = registry.record(name)
    if record.backend is None:
        return Verdict(name, None, (f"unusable: {record.error}",)), None
    backend = record.backend
    rows = [row for row in backend.capabilities if row.op == problem.op]
    if not rows:
        return Verdict(name, None, (f"offers no {problem.op}",)), None
    if failure := probe_failure(backend, problem.arch):
        return Verdict(name, None, (failure,)), None
    closest: list[str] | None = None
    for row in rows:
        reasons = row.why_not(problem)
        if not reasons and not (row.automatic or is_named):
            reasons = [f"{row.kernel} on {problem.arch} runs only when {name!r} is named"]
        if not reasons:
            return Verdict(name, row.kernel, ()), row
        if closest is None or len(reasons) < len(closest):
            closest = reasons
    return Verdict(name, None, tuple(closest or ())), None
