"""A driver for Triton that compiles for an architecture and launches nothing.

With it everything that a launch does on the host in Python runs on a machine without a GPU:
binding, specialising, compiling and Triton's launcher, down to the function in C, in whose stead
arguments are written down.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mla_core import launch


@dataclass(frozen=True, slots=True)
class NullLaunch:
    """What a launcher got: the kernel's name, its grid, its stream and all its arguments."""

    name: str
    grid: tuple[int, int, int]
    stream: int
    args: tuple[Any, ...]


class NullDriver:
    """Stands in for Triton's driver.

    Launches go through all of Triton's own launcher in Python, so that they take the time and get
    the arguments that they would on a device; what is left out is the function in C behind it.

    Parameters
    ----------
    target : triton.backends.compiler.GPUTarget
    keeps : bool
        Whether ``launches``, a list of NullLaunch, grows with each launch.
    """

    def __init__(self, target: Any, keeps: bool = True) -> None:
        self.target = target
        self.launches: list[NullLaunch] = []
        #: Makes launches; tests put others here.
        self.launch = _NullFunction(self.launches, target.backend) if keeps else partial(_nothing)
        #: Serves the driver's helpers as well.
        self.utils = self
        self._device = f"null {target.arch}"

    def get_current_target(self) -> Any:
        """Return what to compile for."""
        return self.target

    def get_current_device(self) -> str:
        """Return a word no real device has, so that compiled kernels are kept apart."""
        return self._device

    def set_current_device(self, device: int | str) -> None:
        """Make a device current: one that was so before, or one of a tensor."""
        is_index = isinstance(device, int)
        self._device = f"null {self.target.arch}:{device}" if is_index else str(device)

    def get_current_stream(self, device: str) -> int:
        """Return the default stream of the first device, or a number for another's."""
        return int(device.partition(":")[2] or 0)

    def get_device_properties(self, device: str) -> dict[str, int]:
        """Return shared memory that everything fits in."""
        del device
        return {"max_shared_mem": 2**30}

    def load_binary(self, *arguments: Any) -> tuple[None, str, int, int, int]:
        """Return no module, the kernel's name for a handle, and room for its threads."""
        return None, str(arguments[0]), 0, 0, 1024

    def build_signature_metadata(self, signature: Any) -> bytes:
        """Return what tells the function in C about types, which is not called."""
        return str(signature).encode()

    def fill_tma_descriptor(self, *arguments: Any) -> tuple[Any, ...]:
        """Return what would be written into a descriptor."""
        return tuple(map(_freeze, arguments))

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return Triton's launcher of one kernel, made without building anything in C."""
        name = {"cuda": "nvidia", "hip": "amd"}[self.target.backend]
        module = importlib.import_module(f"triton.backends.{name}.driver")
        stand_ins = {
            # Triton 3.6 builds a module for each kernel; later ones have one function for all.
            "make_launcher": lambda *arguments: "",
            "compile_module_from_src": lambda **arguments: self,
            "library_dirs": list,
            "PyKernelArg": lambda **arguments: arguments,
            "ARG_CONSTEXPR": 0,
            "ARG_KERNEL": 1,
            "ARG_TUPLE": 2,
        }
        before = {key: vars(module)[key] for key in stand_ins if key in vars(module)}
        vars(module).update({key: stand_ins[key] for key in before})
        try:
            make = module.CudaLauncher if name == "nvidia" else module.HIPLauncher
            return make(source, metadata)
        finally:
            vars(module).update(before)


class _NullFunction:
    """Stands in for the function in C: calls the hooks that it would, and writes launches down."""

    def __init__(self, launches: list[NullLaunch], backend: str) -> None:
        self._launches = launches
        # AMD's function takes one more argument in front.
        self._front = 1 if backend == "hip" else 0

    def __call__(self, *arguments: Any) -> None:
        x, y, z, stream, name, *others = arguments[self._front :]
        # Then come what says how to launch, the kernel's packed metadata, what hooks get, and both.
        place = next(nth for nth, value in enumerate(others) if isinstance(value, tuple))
        told, enter, leave, *args = others[place + 1 :]
        if args and isinstance(args[-1], (tuple, list)):
            args = list(args[-1])
        for hook in (enter, leave):
            if hook is not None:
                hook(told)
        self._launches.append(NullLaunch(name, (x, y, z), stream, tuple(args)))


def _nothing(*arguments: Any) -> None:
    del arguments


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, (tuple, list)) else value


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
    null = NullDriver(GPUTarget(backend, arch, warp_size), keeps)
    driver.set_active(null)
    launch.forget()
    try:
        yield null
    finally:
        driver._active = before
        launch.forget()
