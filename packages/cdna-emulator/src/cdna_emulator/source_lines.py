"""Which source line each instruction comes from, by the DWARF line table of a code object."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import PurePosixPath

from elftools.elf.elffile import ELFFile


class SourceLines:
    """The line table of one ELF file; empty when the file has no debug information."""

    def __init__(self, elf: ELFFile) -> None:
        #: From each address on, ``file:line``; None where code belongs to no line.
        rows: dict[int, str | None] = {}
        dwarf = elf.get_dwarf_info() if elf.has_dwarf_info() else None
        for unit in dwarf.iter_CUs() if dwarf else ():
            program = dwarf.line_program_for_CU(unit) if dwarf else None
            if program is None:
                continue
            # Up to version 4 files count from 1.
            first = 0 if program.header.version >= 5 else 1
            files = [
                PurePosixPath(entry.name.decode(errors="replace")).name
                for entry in program.header.file_entry
            ]
            for entry in program.get_entries():
                state = entry.state
                if state is None:
                    continue
                if state.end_sequence:
                    # Another sequence may begin right here.
                    rows.setdefault(state.address, None)
                else:
                    # Line 0 marks what the compiler made up.
                    name = f"{files[state.file - first]}:{state.line}"
                    rows[state.address] = name if state.line else None
        self._addresses = sorted(rows)
        self._names = [rows[address] for address in self._addresses]

    def at(self, address: int) -> str | None:
        """Return ``file:line`` of the code at an address, None when that is not known."""
        position = bisect_right(self._addresses, address) - 1
        return self._names[position] if position >= 0 else None
