"""Machine code to text, one line for each instruction, by LLVM's own disassembler.

LLVM is reached through its stable C interface in ``librocmllvm.so``, which the pip package
``rocm-llvm-python`` carries. It runs in a process of its own for each architecture, started at the
first call: some invalid encodings crash it, and that has to be an error here.

Text is as LLVM prints it, with single blanks. A branch prints its 16-bit field as an unsigned
number: the target is ``address + 4 + 4 * field``, with the field taken as signed.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from cdna_emulator import disassembler_worker
from cdna_emulator.errors import ToolchainError, UnknownInstructionError

ARCHS = ("gfx942", "gfx950")

#: LLVM decodes some invalid encodings all the same and remarks on their operands.
_REMARKS = ("/*", "; Warning")


@dataclass(frozen=True, slots=True)
class RawInstruction:
    """One instruction as LLVM prints it.

    Parameters
    ----------
    address : int
        Of its first byte, within the code object.
    size : int
        In bytes, a literal included: a multiple of 4.
    text : str
        Mnemonic, operands and modifiers in LLVM's syntax.
    """

    address: int
    size: int
    text: str


def disassemble(code: bytes, arch: str, address: int = 0) -> list[RawInstruction]:
    """Decode all of ``code``.

    Parameters
    ----------
    code : bytes
        Machine code and nothing else.
    arch : str
        ``gfx942`` or ``gfx950``; some encodings exist in one of them only.
    address : int
        Of the first byte; instruction addresses count from it.

    Returns
    -------
    list of RawInstruction
        In order of address, without gaps.

    Raises
    ------
    UnknownInstructionError : some bytes are no instruction of ``arch``
    ToolchainError : the disassembler is not installed
    """
    if arch not in ARCHS:
        raise UnknownInstructionError(
            f"disassemble: arch must be one of {', '.join(ARCHS)}, got {arch!r}"
        )
    found: list[RawInstruction] = []
    offset = 0
    for size, text in _worker(arch).decode(code, address):
        if not size or any(remark in text for remark in _REMARKS):
            raise UnknownInstructionError(
                f"disassemble: bytes at {address + offset:#x} must be a {arch} instruction, got "
                f"{code[offset : offset + 16].hex(' ', 4)}{f' ({text})' if text else ''}; "
                "was the object built for another architecture, or is there data in its code?"
            )
        found.append(RawInstruction(address + offset, size, text))
        offset += size
    return found


class _Worker:
    """One process that decodes; started anew after it crashed."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.lock = Lock()
        self.start()

    def start(self) -> None:
        """Start the process and wait until it has loaded LLVM."""
        library = str(_find_library())
        # Isolated: nothing that the caller's folder or environment shadows may be imported.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", disassembler_worker.__file__, library, self.arch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        if self.answers.readline() != disassembler_worker.READY:
            reason = self.stop()
            raise ToolchainError(
                f"disassemble: {library} must load and know {self.arch}, got {reason!r}; "
                "run `pip install --force-reinstall rocm-llvm-python`"
            )

    def stop(self) -> str:
        """End the process, if it has not ended by itself; return what it complained about."""
        self.process.kill()
        return self.process.communicate()[1].decode(errors="replace").strip()

    def disown(self) -> None:
        """Close this process's ends of the pipes without ending the worker."""
        for pipe in (self.requests, self.answers, self.process.stderr):
            if pipe is not None:
                pipe.close()
        # Nothing to wait for, and no warning about it.
        self.process.returncode = 0

    def decode(self, code: bytes, address: int) -> list[tuple[int, str]]:
        """Return size and text of each instruction; size 0 comes last where decoding fails."""
        with self.lock:
            if self.process.poll() is not None:
                self.start()
            try:
                return self._ask(code, address)
            except BaseException:
                # An answer read in part would be taken for the next one's.
                self.stop()
                raise

    def _ask(self, code: bytes, address: int) -> list[tuple[int, str]]:
        self.requests.write(disassembler_worker.REQUEST.pack(address, len(code)) + code)
        self.requests.flush()
        lines: list[tuple[int, str]] = []
        missing = len(code)
        while missing > 0:
            line = self.answers.readline().decode()
            if not line:  # it crashed
                self.stop()
            size, _, text = line.strip().partition(" ")
            lines.append((int(size or 0), text))
            if not lines[-1][0]:
                break
            missing -= lines[-1][0]
        return lines


_workers: dict[str, _Worker] = {}
_workers_lock = Lock()


def _worker(arch: str) -> _Worker:
    """Return the worker for an architecture."""
    with _workers_lock:
        if arch not in _workers:
            _workers[arch] = _Worker(arch)
        return _workers[arch]


@atexit.register
def _stop_workers() -> None:
    """End the processes this one has started."""
    for worker in _workers.values():
        worker.stop()


def _forget_workers() -> None:
    """Leave the workers of the process this one was forked from to that one."""
    global _workers_lock
    _workers_lock = Lock()
    for worker in _workers.values():
        worker.disown()
    _workers.clear()


os.register_at_fork(after_in_child=_forget_workers)


def _find_library() -> Path:
    """Find ``librocmllvm.so`` without importing the Python modules around it."""
    spec = importlib.util.find_spec("rocm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (library := Path(folder) / "llvm" / "librocmllvm.so").is_file():
            return library
    raise ToolchainError(
        "disassemble: librocmllvm.so must be installed, found none; "
        "run `pip install rocm-llvm-python`"
    )
