"""Compile Triton and Gluon kernels for CDNA without a GPU, and run them on the emulator.

>>> kernel = emulate("kernels/copy.py:copy", "gfx942", num_warps=4)        # doctest: +SKIP
>>> result = kernel[(4,)](x, out, x.numel(), BLOCK=256)                    # doctest: +SKIP

A call binds its arguments as Triton's launcher does: constexprs, defaults, integers that are 1 or
multiples of 16, aligned pointers. Compilation happens in a long-lived process of its own, see
`cdna_emulator.triton_compiler`; which Triton that process uses is the caller's choice, so two
versions serve side by side.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdna_emulator.errors import ArgumentError
from cdna_emulator.triton_compiler import CompiledKernel, TritonWorker, worker
from cdna_emulator.triton_signature import Specialisation, bind, specialise

if TYPE_CHECKING:
    from cdna_emulator.launch import Result


def emulate(
    kernel: object,
    arch: str,
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    options: Mapping[str, Any] | None = None,
    checks: str | Iterable[str] = "all",
    schedule: str = "round_robin:64",
    triton: str | os.PathLike[str] | None = None,
    **run_options: Any,
) -> EmulatedKernel:
    """Return a kernel that runs on the emulator when it is launched.

    Parameters
    ----------
    kernel : a jitted function, or ``"path/to/file.py:name"`` or ``"package.module:name"``
        It may have been replaced by Triton's interpreter: its module is imported again elsewhere.
    arch : str
        ``gfx942`` or ``gfx950``.
    num_warps, num_stages, options
        Compile options; ``options`` may hold others, such as ``matrix_instr_nonkdim``.
    checks, schedule, run_options
        See `cdna_emulator.run`.
    triton : path, optional
        Folder with another Triton than this process's.
    """
    where, attribute = locate(kernel)
    return EmulatedKernel(
        where,
        attribute,
        arch,
        {"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
        {"checks": checks, "schedule": schedule, **run_options},
        worker(None if triton is None else str(triton)),
    )


@dataclass(frozen=True)
class EmulatedKernel:
    """A kernel bound to an architecture; ``kernel[grid](*args)`` compiles, runs and returns.

    Tensors are CPU tensors or arrays, read and written in place. Compile options such as
    ``num_warps`` may also be passed with the call, as in Triton.
    """

    where: str
    attribute: str
    arch: str
    options: Mapping[str, Any]
    run_options: Mapping[str, Any]
    compiler: TritonWorker
    #: Called with the result of every launch.
    record: Callable[[Any], None] | None = None

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        """Return a function that launches on a grid: a tuple, or a function of the arguments."""
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> CompiledKernel:
        """Compile for the arguments of a call without running it."""
        return self._compile(args, kwargs)[1]

    def _compile(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Specialisation, CompiledKernel, dict[str, Any]]:
        parameters = self.compiler.describe(self.where, self.attribute)
        values, options = bind(self.attribute, parameters, args, kwargs)
        special = specialise(self.attribute, parameters, values)
        options = {**self.options, **options}
        compiled = self.compiler.compile(self.where, self.attribute, self.arch, special, options)
        return special, compiled, values

    def _launch(self, grid: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        from cdna_emulator.launch import run

        special, compiled, values = self._compile(args, kwargs)
        if callable(grid):
            grid = grid(values)
        extent = _grid(self.attribute, grid)
        workgroups = extent[0] * extent[1] * extent[2]
        # Triton passes these two behind the kernel's own arguments, null when unused.
        scratch = [
            _scratch(compiled.global_scratch * workgroups),
            _scratch(compiled.profile_scratch * workgroups),
        ]
        result = run(
            compiled.code_object,
            compiled.name,
            extent,
            (64 * compiled.num_warps, 1, 1),
            [*special.passed, *scratch],
            arch=self.arch,
            # Triton declares no LDS in the object and asks for it at each launch.
            dynamic_lds=compiled.shared,
            **self.run_options,
        )
        if self.record is not None:
            self.record(result)
        return result


@contextmanager
def replaced(
    arch: str,
    *kernels: str,
    checks: str | Iterable[str] = "all",
    schedule: str = "round_robin:64",
    triton: str | os.PathLike[str] | None = None,
) -> Iterator[list[Result]]:
    """Put emulated kernels in the place of jitted ones, ``"package.module:name"``, in a block.

    For launchers that look their kernel up in its module when they launch. The block gets a list
    that grows by the result of each launch.
    """
    results: list[Result] = []
    with ExitStack() as undo:
        for where in kernels:
            emulated = emulate(where, arch, checks=checks, schedule=schedule, triton=triton)
            module, _, name = where.partition(":")
            owner = importlib.import_module(module)
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replace(emulated, record=results.append))
        yield results


def locate(kernel: object) -> tuple[str, str]:
    """Return where the worker finds a kernel: module or path, and the name there."""
    if isinstance(kernel, str):
        where, separator, attribute = kernel.rpartition(":")
        if not separator or not where or not attribute:
            raise ArgumentError(
                f'emulate: kernel must be "file.py:name" or "module:name", got {kernel!r}'
            )
        return (str(Path(where).resolve()) if where.endswith(".py") else where), attribute
    function = kernel
    while not inspect.isfunction(function):
        inner = getattr(function, "fn", None)
        if inner is None:
            raise ArgumentError(
                "emulate: kernel must be a jitted function or a string, "
                f"got {type(kernel).__name__}"
            )
        function = inner
    if "<locals>" in function.__qualname__:
        raise ArgumentError(
            f"emulate: kernel must be defined at module level, got {function.__qualname__}; "
            "another process imports it"
        )
    module = function.__module__
    spec = getattr(sys.modules.get(module), "__spec__", None)
    # Test files and scripts are not importable by name elsewhere.
    if module == "__main__" or spec is None or not _is_importable(module):
        return str(Path(inspect.getfile(function)).resolve()), function.__qualname__
    return module, function.__qualname__


def _is_importable(module: str) -> bool:
    from importlib.util import find_spec

    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    origin = getattr(sys.modules[module], "__file__", None)
    if spec is None or spec.origin is None or origin is None:
        return False
    # A file that pytest imported under a name of its own has a spec, but no entry of sys.path.
    tail = module.replace(".", os.sep)
    stem = origin.removesuffix(".py").removesuffix(os.sep + "__init__")
    return stem.endswith(tail) and stem.removesuffix(tail).rstrip(os.sep) in sys.path


def _grid(name: str, grid: object) -> tuple[int, int, int]:
    extent = (grid,) if isinstance(grid, int) else grid
    if (
        not isinstance(extent, Sequence)
        or not 1 <= len(extent) <= 3
        or not all(isinstance(size, int) and size >= 1 for size in extent)
    ):
        raise ArgumentError(f"{name}: grid must be one to three numbers from 1, got {grid!r}")
    x, y, z = (*extent, 1, 1)[:3]
    return x, y, z


def _scratch(size: int) -> Any:
    import numpy as np

    return np.zeros(size, np.uint8) if size else None
