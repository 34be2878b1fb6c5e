"""A driver for Triton that compiles for an architecture and launches nothing.

With it everything that a launch does on the host runs on a machine without a GPU: binding,
specialising, compiling and the call of the launcher, which only writes down what it gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mla_core import launch


@dataclass(frozen=True, slots=True)
class NullLaunch:
    """What a launcher got: the kernel's name, its grid, its stream and all its arguments."""

    name: str
    grid: tuple[int, int, int]
    stream: int
    args: tuple[Any, ...]


@dataclass(slots=True)
class NullDriver:
    """Stands in for Triton's driver.

    Parameters
    ----------
    target : triton.backends.compiler.GPUTarget
    launches : list of NullLaunch, or None
        Grows by one with each launch; None when they are only timed.
    """

    target: Any
    launches: list[NullLaunch] | None = field(default_factory=list)
    utils: NullDriver = field(init=False)

    def __post_init__(self) -> None:
        """Serve the driver's helpers as well."""
        self.utils = self

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """Return a word no real device has, so that compiled kernels are kept apart."""
        return f"null {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        """Return the default stream."""
        del device
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        """Return shared memory that everything fits in."""
        del device
        return {"max_shared_mem": 2**30}

    def load_binary(self, *arguments: Any) -> tuple[None, str, int, int, int]:
        """Return no module, the kernel's name for a handle, and room for its threads."""
        return None, str(arguments[0]), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a launcher of one kernel."""
        del source
        name, launches = str(metadata.name), self.launches

        def run(*arguments: Any) -> None:
            if launches is not None:
                x, y, z, stream, handle, _, _, enter, leave, *args = arguments
                assert handle == name
                # As real launchers do with hooks.
                for hook in (enter, leave):
                    if hook is not None:
                        hook(None)
                launches.append(NullLaunch(name, (x, y, z), stream, tuple(args)))

        return run


@contextmanager
def null_driver(
    backend: str, arch: int | str, warp_size: int, *, keeps: bool = True
) -> Iterator[NullDriver]:
    """Give Triton a driver for an architecture that launches nothing, in a block.

    Parameters
    ----------
    backend, arch, warp_size
        ``"cuda", 90, 32`` or ``"hip", "gfx942", 64``.
    keeps : bool
        Whether launches are written down.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active
    null = NullDriver(GPUTarget(backend, arch, warp_size), [] if keeps else None)
    driver.set_active(null)
    launch.forget()
    try:
        yield null
    finally:
        driver._active = before
        launch.forget()
