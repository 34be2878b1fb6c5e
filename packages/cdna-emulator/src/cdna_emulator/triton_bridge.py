"""Compile Triton and Gluon kernels for CDNA without a GPU, and run them on the emulator.

>>> kernel = emulate("kernels/copy.py:copy", "gfx942", num_warps=4)        # doctest: +SKIP
>>> result = kernel[(4,)](x, out, x.numel(), BLOCK=256)                    # doctest: +SKIP

A call binds its arguments as Triton's launcher does: constexprs, defaults, integers that are 1 or
multiples of 16, aligned pointers. Compilation happens in a long-lived process of its own, see
`cdna_emulator.triton_worker`; which Triton that process uses is the caller's choice, so two
versions serve side by side.
"""

from __future__ import annotations

import atexit
import collections
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cdna_emulator import triton_worker
from cdna_emulator.errors import ArgumentError, ToolchainError

if TYPE_CHECKING:
    from cdna_emulator.launch import Result

#: Specialisations of kernels kept in memory; Triton keeps all on disk as well.
MAX_KEPT = 512
#: Pointers count as aligned from this many bytes on, and integers as multiples of it.
ALIGNMENT = 16
#: Buffers up to this size may be addressed with 32-bit offsets.
_SMALL_BUFFER = 2**31 - 1

_POINTEE = {
    "bool": "i1",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "uint64": "u64",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2fnuz": "fp8e5b16",
}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A code object and what a launch of it needs.

    Parameters
    ----------
    code_object : bytes
        ELF image with one kernel.
    name : str
        Symbol of the kernel.
    shared : int
        LDS of a workgroup in bytes.
    num_warps : int
        Waves of a workgroup.
    assembly : str
        The compiler's assembly text.
    global_scratch, profile_scratch : int
        Bytes that the compiler asks for per workgroup, behind the kernel's own arguments.
    """

    code_object: bytes = field(repr=False)
    assembly: str = field(repr=False)
    name: str
    shared: int
    num_warps: int
    global_scratch: int
    profile_scratch: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a kernel, as far as binding needs to know it."""

    name: str
    is_constexpr: bool
    type: str
    has_default: bool
    default: Any
    specialize: bool
    align: bool


@dataclass(frozen=True)
class Specialisation:
    """What a set of arguments makes of a kernel's signature."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[str, list[list[Any]]]
    #: Values that are passed at run time, in order.
    passed: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two calls must share to run the same machine code."""
        return repr(self.signature), repr(self.constants), repr(self.attributes)


class TritonWorker:
    """A compiler process; it starts at the first request and again after it died."""

    def __init__(self, python_path: str | os.PathLike[str] | None = None) -> None:
        """Remember where Triton lies: a folder of ``pip install --target``, or None for ours."""
        self.python_path = None if python_path is None else Path(python_path).resolve()
        if self.python_path is not None and not (self.python_path / "triton").is_dir():
            raise ToolchainError(
                f"TritonWorker: python_path must hold a triton package, got {self.python_path}; "
                "make one with pip install --no-deps --target FOLDER triton==VERSION"
            )
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._described: dict[tuple[str, str], tuple[Parameter, ...]] = {}
        self._compiled: collections.OrderedDict[Any, CompiledKernel] = collections.OrderedDict()

    def describe(self, where: str, attribute: str) -> tuple[Parameter, ...]:
        """Return the parameters of a kernel."""
        found = self._described.get((where, attribute))
        if found is None:
            answer = self.request("describe", where=where, attribute=attribute)
            found = tuple(Parameter(**parameter) for parameter in answer["parameters"])
            self._described[where, attribute] = found
        return found

    def compile(
        self,
        where: str,
        attribute: str,
        arch: str,
        special: Specialisation,
        options: Mapping[str, Any],
    ) -> CompiledKernel:
        """Compile one specialisation; the latest ones are kept."""
        key = (where, attribute, arch, special.key, repr(sorted(options.items())))
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        compiled = CompiledKernel(
            **self.request(
                "compile_kernel",
                where=where,
                attribute=attribute,
                arch=arch,
                signature=special.signature,
                constants=special.constants,
                attributes=special.attributes,
                options=dict(options),
            )
        )
        self._compiled[key] = compiled
        if len(self._compiled) > MAX_KEPT:
            self._compiled.popitem(last=False)
        return compiled

    def request(self, op: str, **arguments: Any) -> Any:
        """Ask the process for one thing.

        Raises
        ------
        ToolchainError
            The compiler refused, or the process died; the message holds what it printed.
        """
        with self._lock:
            process = self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            assert self._errors is not None
            begin = self._errors.seek(0, os.SEEK_END)
            try:
                triton_worker.write_message(process.stdin, {"op": op, **arguments})
                answer = triton_worker.read_message(process.stdout)
            except (EOFError, BrokenPipeError) as exc:
                code = process.wait()
                self._process = None
                raise ToolchainError(
                    f"triton {op}: the compiler must answer, got exit status {code}; it printed:\n"
                    f"{self._printed(begin)}"
                ) from exc
            if "error" in answer:
                raise ToolchainError(
                    f"triton {op} of {arguments.get('attribute')} for {arguments.get('arch')}: "
                    f"{answer['error']}{self._printed(begin)}"
                )
        return answer["ok"]

    def close(self) -> None:
        """Stop the process."""
        with self._lock:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process.wait()
                assert self._process.stdout is not None
                self._process.stdout.close()
                self._process = None
            if self._errors is not None:
                self._errors.close()
                self._errors = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        # What this process can import, the kernels' modules can; the chosen Triton comes first.
        path = [entry for entry in sys.path if entry]
        if self.python_path is not None:
            path.insert(0, str(self.python_path))
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if self._errors is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(Path(triton_worker.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        atexit.register(self.close)
        return self._process

    def _printed(self, begin: int) -> str:
        assert self._errors is not None
        self._errors.seek(begin)
        return self._errors.read().decode(errors="replace")[-4000:]


@cache
def worker(python_path: str | None = None) -> TritonWorker:
    """Return the compiler process for a Triton, shared by everybody."""
    return TritonWorker(python_path)


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


def bind(
    name: str,
    parameters: Sequence[Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the value of each parameter, and the keyword arguments that are none."""
    if len(args) > len(parameters):
        raise ArgumentError(
            f"{name}: at most {len(parameters)} arguments must be passed, got {len(args)}"
        )
    values = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)}
    options: dict[str, Any] = {}
    known = {parameter.name for parameter in parameters}
    for key, value in kwargs.items():
        if key in values:
            raise ArgumentError(f"{name}: argument {key} must be passed once, got it twice")
        (values if key in known else options)[key] = value
    for parameter in parameters:
        if parameter.name not in values:
            if not parameter.has_default:
                raise ArgumentError(f"{name}: argument {parameter.name} must be passed, got none")
            values[parameter.name] = parameter.default
    return {parameter.name: values[parameter.name] for parameter in parameters}, options


def specialise(
    name: str, parameters: Sequence[Parameter], values: Mapping[str, Any]
) -> Specialisation:
    """Return the signature that Triton would compile for these values."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[str, list[list[Any]]] = {}
    passed: list[Any] = []
    for parameter in parameters:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = _constant(value)
            continue
        kind, hints = _classify(f"{name}: argument {parameter.name}", parameter, value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
            continue
        if hints:
            attributes[parameter.name] = hints
        passed.append(value)
    return Specialisation(signature, constants, attributes, tuple(passed))


def _classify(where: str, parameter: Parameter, value: Any) -> tuple[str, list[list[Any]]]:
    """Return the type of a run-time argument and what the compiler may assume of it."""
    hints: list[list[Any]] = []
    if isinstance(value, bool):
        return parameter.type or "u1", hints
    if isinstance(value, int):
        if parameter.specialize and value == 1:
            return "constexpr", hints
        if parameter.specialize and parameter.align and value % ALIGNMENT == 0:
            hints.append(["tt.divisibility", ALIGNMENT])
        return parameter.type or _integer_type(where, value), hints
    if isinstance(value, float):
        return parameter.type or "fp32", hints
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise ArgumentError(
            f"{where} must be a tensor, an array, int, float, bool or None, "
            f"got {type(value).__name__}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _POINTEE:
        raise ArgumentError(f"{where} must be of a dtype in {', '.join(_POINTEE)}, got {dtype}")
    if parameter.specialize and parameter.align and _address(value) % ALIGNMENT == 0:
        hints.append(["tt.divisibility", ALIGNMENT])
    if _storage_bytes(value) <= _SMALL_BUFFER:
        # Lets the compiler use buffer instructions, as it does for real tensors.
        hints.append(["tt.pointer_range", 32])
    return "*" + _POINTEE[dtype], hints


def _integer_type(where: str, value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    if -(2**63) <= value < 2**63:
        return "i64"
    if 0 <= value < 2**64:
        return "u64"
    raise ArgumentError(f"{where} must fit in 64 bits, got {value}")


def _constant(value: Any) -> Any:
    """Replace a dtype of this process's Triton, which the worker's may not be."""
    if type(value).__module__.startswith("triton.") and type(value).__name__ == "dtype":
        return ("triton dtype", value.name)
    return value


def _address(value: Any) -> int:
    pointer = getattr(value, "data_ptr", None)
    return int(pointer() if pointer is not None else value.ctypes.data)


def _storage_bytes(value: Any) -> int:
    storage = getattr(value, "untyped_storage", None)
    return int(storage().size() if storage is not None else value.nbytes)


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
