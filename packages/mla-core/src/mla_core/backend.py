"""The contract of a backend: one frozen descriptor, imported without loading any kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mla_core.errors import BackendUnavailableError
from mla_core.problem import Capability

#: Version of the descriptor and of the op signatures; a backend built for another one is refused.
API_VERSION = 1

ENTRY_POINT_GROUP = "mla_core.backends"


def always_available(arch: str) -> None:
    """Probe of a backend that runs anywhere."""
    del arch


@dataclass(frozen=True, slots=True, eq=False)
class Backend:
    """What a distribution registers in the entry-point group ``mla_core.backends``.

    Parameters
    ----------
    name : str
        Must equal the entry point's name.
    priority : int
        Automatic choice prefers the higher number: reference 0, triton 50, asm 100.
    capabilities : tuple of Capability
        May be empty: the backend is then listed, and offers nothing.
    ops : mapping of str to str
        Op name to ``"package.module:function"``, imported at first use. For each op of the
        capabilities there is one function; ``decode`` also needs ``plan_decode``. The signatures
        are those of ``docs/howto/add-a-backend``.
    probe : callable
        ``probe(arch)`` raises ``BackendUnavailableError`` with a reason when this machine lacks
        something. Cheap, and creates no device context.
    description : str
        One sentence for ``mla backends``.
    commands : mapping of str to str
        Commands of ``mla`` that this backend brings: name to module, imported when the command
        runs. Its docstring is the help; it has ``add_arguments(parser)`` and
        ``run(options) -> int``, the exit status.
    integrations : mapping of str to str
        Functions that prepare another library's model to run through more of this backend than its
        ops: the library's name to ``"package.module:function"``, imported at first use.
    """

    name: str
    priority: int
    capabilities: tuple[Capability, ...]
    ops: Mapping[str, str]
    probe: Callable[[str], None] = always_available
    description: str = ""
    commands: Mapping[str, str] = field(default_factory=dict)
    integrations: Mapping[str, str] = field(default_factory=dict)
    api_version: int = API_VERSION
    _loaded: dict[str, Callable[..., Any]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Freeze ``ops`` and check that every capability has a function behind it."""
        object.__setattr__(self, "ops", MappingProxyType(dict(self.ops)))
        object.__setattr__(self, "commands", MappingProxyType(dict(self.commands)))
        object.__setattr__(self, "integrations", MappingProxyType(dict(self.integrations)))
        offered = {capability.op for capability in self.capabilities}
        needed = offered | ({"plan_decode"} if "decode" in offered else set())
        if missing := sorted(needed - self.ops.keys()):
            raise BackendUnavailableError(
                f"Backend: ops of {self.name!r} must name a function for each op of its "
                f"capabilities, missing {', '.join(missing)}"
            )

    def load(self, op: str) -> Callable[..., Any]:
        """Import and return the function behind an op, keeping it for the next call."""
        function = self._loaded.get(op)
        if function is None:
            function = self._loaded[op] = self._import(op)
        return function

    def integration(self, library: str) -> Callable[..., Any]:
        """Import and return the function that prepares a library's model.

        Raises
        ------
        BackendUnavailableError
            The backend brings none, or it cannot be imported.
        """
        where = self.integrations.get(library)
        if where is None:
            known = ", ".join(self.integrations) or "none"
            raise BackendUnavailableError(
                f"backend {self.name!r}: integration must be one of {known}, got {library!r}"
            )
        return self._function(library, where)

    def _import(self, op: str) -> Callable[..., Any]:
        where = self.ops.get(op)
        if where is None:
            raise BackendUnavailableError(
                f"backend {self.name!r}: op must be one of {', '.join(self.ops)}, got {op!r}"
            )
        return self._function(op, where)

    def _function(self, name: str, where: str) -> Callable[..., Any]:
        module_name, _, attribute = where.partition(":")
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as exc:
            raise BackendUnavailableError(
                f"backend {self.name!r}: cannot load {name} from {where!r}: {exc}"
            ) from exc
        return function
