"""Fixtures of mla-core's tests: fake distributions that register backends."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mla_core import registry

InstallBackend = Callable[..., Path]

#: A descriptor with one row for every op that takes anything; ``{extra}`` adds arguments.
BACKEND_MODULE = """
from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError
from mla_core.problem import Capability

BACKEND = Backend(
    name={name!r},
    priority={priority},
    ops=dict(plan_decode="{module}:plan_decode", decode="{module}:decode"),
    capabilities=(Capability(op="decode", kernel="{name}_kernel"{row}),),
    {extra}
)
"""


@pytest.fixture
def install_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InstallBackend]:
    """Put fake distributions on ``sys.path``, as pip would, and forget them afterwards.

    ``install(name, module=..., source=...)`` writes a ``dist-info`` with one entry point and,
    unless ``source`` is None, the module it names. Without ``source`` a working descriptor is
    written from ``priority``, ``row`` (arguments of its capability) and ``extra``.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv("MLA_BACKEND", raising=False)

    def install(
        name: str,
        *,
        source: str | None = "",
        module: str | None = None,
        value: str | None = None,
        distribution: str | None = None,
        priority: int = 200,
        row: str = "",
        extra: str = "",
    ) -> Path:
        distribution = distribution or f"dist-{name}"
        module = module or f"fake_{distribution.replace('-', '_')}"
        info = site / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n"
        )
        point = value or f"{module}:BACKEND"
        (info / "entry_points.txt").write_text(f"[mla_core.backends]\n{name} = {point}\n")
        if source == "":
            row_text = f", {row}" if row else ""
            source = BACKEND_MODULE.format(
                name=name, priority=priority, module=module, row=row_text, extra=extra
            )
        if source is not None:
            (site / f"{module}.py").write_text(textwrap.dedent(source))
        # Forget modules of an earlier test that had the same name.
        monkeypatch.delitem(sys.modules, module, raising=False)
        registry.refresh()
        return site / f"{module}.py"

    yield install
    monkeypatch.undo()
    registry.refresh()
