"""The compiler process, and the kernels it has compiled; see `cdna_emulator.triton_worker`."""

from __future__ import annotations

import atexit
import collections
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from cdna_emulator import triton_worker
from cdna_emulator.errors import ToolchainError
from cdna_emulator.triton_signature import Parameter, Specialisation

#: Specialisations of kernels kept in memory; Triton keeps all on disk as well.
MAX_KEPT = 512


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
        if os.environ.get(triton_worker.INSIDE):
            # A compiler process imports the file of a kernel. When that file is a script whose
            # launches run on import, another process here would import it again, without end.
            raise SystemExit("a kernel was launched while its file was imported to compile it")
        environment = {**os.environ, "TRITON_INTERPRET": "0", triton_worker.INSIDE: "1"}
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
