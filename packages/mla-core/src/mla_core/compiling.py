"""Compiling kernels for GPUs that are not here.

What to compile is not written down anywhere: an op is called on CPU tensors that it takes for the
asked architecture, with the kernels replaced by recorders. What they record is compiled for that
architecture by the code that compiles at a launch, so signature, constants and cache key are those
of a launch on a GPU.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_core.arch import cpu_as
from mla_core.errors import BackendUnavailableError

#: Triton's backend, architecture and threads of a warp.
TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that was recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compile a recorded launch for an architecture; returns Triton's compiled kernel."""
    with _target(arch):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.kwargs)


@contextmanager
def recorded(arch: str, *packages: str) -> Iterator[list[Launch]]:
    """Record launches in a block, in which planning takes the CPU for a GPU.

    Parameters
    ----------
    arch : str
        One of ``TARGETS``.
    packages : str
        Packages whose kernels are recorded, ``"mla_core.kernels"``.

    Yields
    ------
    list of Launch
        Grows by one with each launch; nothing runs, so outputs stay as they are.

    Raises
    ------
    BackendUnavailableError
        Triton is missing, or its interpreter was on when it was imported.
    """
    told = os.environ.get("TRITON_INTERPRET")
    found = list(kernels(*packages))
    launches: list[Launch] = []
    # Launchers take CPU tensors for Triton only where they believe the interpreter is on.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for module, name, kernel in found:
            setattr(module, name, _Recorder(kernel, launches.append))
        with cpu_as(arch):
            yield launches
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)
        if told is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = told


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Stands in a module for its kernel: launchers look it up there when they launch."""

    kernel: Any
    add: Callable[[Launch], None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.add(Launch(self.kernel, grid, args, kwargs))


def kernels(*packages: str) -> Iterator[tuple[ModuleType, str, Any]]:
    """Import every kernel of some packages, and yield each with a module and its name there.

    Raises
    ------
    BackendUnavailableError
        Triton is missing, or its interpreter is on.
    """
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError as exc:
        raise BackendUnavailableError(
            f"aot: triton must be importable, got {exc}; pip install triton"
        ) from exc
    for package in packages:
        for found in pkgutil.walk_packages(
            importlib.import_module(package).__path__, f"{package}."
        ):
            module = importlib.import_module(found.name)
            for name, value in list(vars(module).items()):
                if isinstance(value, InterpretedFunction):
                    raise BackendUnavailableError(
                        "aot: Triton's interpreter must be off, got TRITON_INTERPRET="
                        f"{os.environ.get('TRITON_INTERPRET', '')} when {found.name} was imported; "
                        "unset it"
                    )
                if isinstance(value, JITFunction):
                    yield module, name, value


@contextmanager
def _target(arch: str) -> Iterator[None]:
    """Have Triton compile for an architecture, whatever GPU is here, in a block."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(arch, GPUTarget(*TARGETS[arch])))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True, slots=True)
class _Driver:
    """As much of a driver as compiling takes. Its device is a word, so that caches keep apart."""

    arch: str
    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        del device
        return 0
