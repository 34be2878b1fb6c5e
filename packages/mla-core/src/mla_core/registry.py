"""Discovery of backends through entry points, with every failure kept visible.

A record exists for each entry point of the group. Loading one never loads another: a broken or
slow third-party backend costs nothing to a caller who names a different one.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from mla_core.backend import API_VERSION, ENTRY_POINT_GROUP, Backend
from mla_core.errors import BackendUnavailableError
from mla_core.logs import logger

#: A descriptor is meant to import in milliseconds; above this we warn and name it.
SLOW_IMPORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Record:
    """One registered name: where it comes from, and the backend or the reason it is unusable."""

    name: str
    distributions: tuple[str, ...]
    value: str
    backend: Backend | None
    error: Exception | None
    load_seconds: float

    def require(self) -> Backend:
        """Return the backend, or raise with the original cause."""
        if self.backend is None:
            raise BackendUnavailableError(
                f"backend {self.name!r} ({', '.join(self.distributions)}) is unusable: {self.error}"
            ) from self.error
        return self.backend


@functools.cache
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: (p.name, _dist(p))):
        known = found.get(point.name, ())
        # An editable install can list one distribution twice; that is not a conflict.
        if all(_dist(point) != _dist(other) or point.value != other.value for other in known):
            found[point.name] = (*known, point)
    return found


def _dist(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown distribution"


def names() -> tuple[str, ...]:
    """Return every registered backend name, usable or not, sorted."""
    return tuple(_entry_points())


@functools.cache
def record(name: str) -> Record:
    """Return the record of one name, importing its descriptor at first use.

    Raises
    ------
    BackendUnavailableError
        No installed distribution registers the name.
    """
    points = _entry_points().get(name)
    if not points:
        installed = ", ".join(names()) or "none"
        raise BackendUnavailableError(
            f"backend {name!r} is not installed (installed: {installed}); "
            f'pip install "mla-kernels[{name}]" if it is one of ours'
        )
    start = time.perf_counter()
    backend, error = _load(name, points)
    seconds = time.perf_counter() - start
    if seconds > SLOW_IMPORT_SECONDS:
        logger.warning(
            "backend %s (%s) took %.1f s to import; a descriptor must not import its kernels",
            name,
            _dist(points[0]),
            seconds,
        )
    distributions = tuple(_dist(point) for point in points)
    return Record(name, distributions, points[0].value, backend, error, seconds)


def records() -> tuple[Record, ...]:
    """Return the records of all names, best priority first, unusable ones last."""

    def rank(item: Record) -> tuple[bool, int, str]:
        return item.backend is None, -(item.backend.priority if item.backend else 0), item.name

    return tuple(sorted((record(name) for name in names()), key=rank))


def refresh() -> None:
    """Forget what was discovered, so that newly installed backends are seen."""
    _entry_points.cache_clear()
    record.cache_clear()


def _load(name: str, points: tuple[EntryPoint, ...]) -> tuple[Backend | None, Exception | None]:
    if len(points) > 1:
        claims = ", ".join(f"{_dist(point)} ({point.value})" for point in points)
        return None, BackendUnavailableError(
            f"two distributions claim the name {name!r}: {claims}; uninstall one"
        )
    try:
        loaded = points[0].load()
        _check(name, loaded)
    # Third-party code runs here, so anything may come out; it is kept, shown by
    # `mla backends`, and raised when this backend is asked for by name.
    except Exception as exc:
        return None, exc
    return loaded, None


def _check(name: str, loaded: object) -> None:
    if not isinstance(loaded, Backend):
        raise BackendUnavailableError(
            f"entry point {name!r} must give a mla_core.backend.Backend, "
            f"got {type(loaded).__name__}"
        )
    if loaded.name != name:
        raise BackendUnavailableError(
            f"entry point {name!r} gives a backend named {loaded.name!r}; the names must agree"
        )
    if loaded.api_version != API_VERSION:
        raise BackendUnavailableError(
            f"backend {name!r} speaks API version {loaded.api_version}, this mla_core speaks "
            f"{API_VERSION}; install matching versions"
        )
