"""Assemble many single instructions at once and leave out those that LLVM refuses."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from elftools.elf.elffile import ELFFile

from cdna_emulator.disassembler import disassemble
from cdna_emulator.instruction import Instruction, parse

_TRIPLE = "amdgcn-amd-amdhsa"


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collect what C++ code writes to the process's standard error."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines.extend(file.read().splitlines())


def _assemble(lines: Sequence[str], arch: str) -> tuple[bytes, list[str]]:
    from triton._C import libtriton

    libtriton.llvm.init_targets()
    function = libtriton.amd.assemble_amdgcn
    source = "\n".join(lines) + "\n"
    arguments = (source, arch, "")
    if "arg3" in function.__doc__:
        arguments = (source, _TRIPLE, arch, "")
    with _captured_stderr() as complaints:
        object_file = function(*arguments)
    return object_file, complaints


def accepted(lines: Sequence[str], arch: str) -> list[str]:
    """Return the lines that LLVM assembles for an architecture."""
    left = list(dict.fromkeys(lines))
    while left:
        object_file, complaints = _assemble(left, arch)
        if object_file:
            return left
        refused = {line.strip() for line in complaints}
        kept = [line for line in left if line.strip() not in refused]
        assert len(kept) < len(left), complaints[:10]
        left = kept
    return left


def parsed(lines: Sequence[str], arch: str) -> list[Instruction]:
    """Assemble lines that are known to be legal, disassemble and parse them."""
    object_file, complaints = _assemble(lines, arch)
    assert object_file, complaints[:10]
    code = ELFFile(io.BytesIO(object_file)).get_section_by_name(".text").data()
    found = [parse(raw, arch) for raw in disassemble(code, arch)]
    assert len(found) == len(lines), "every line is one instruction"
    return found
