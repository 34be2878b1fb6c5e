"""A code object (ELF file) taken apart: kernels, descriptors, metadata, loadable bytes, lines.

Layouts are those of the LLVM documentation *User Guide for AMDGPU Backend*: ELF header flags,
``NT_AMDGPU_METADATA`` (code object v5 and v6) and dynamic relocations.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgpack
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection
from elftools.elf.segments import NoteSegment

from cdna_emulator.errors import CodeObjectError
from cdna_emulator.kernel import Kernel, KernelArgument, Segment
from cdna_emulator.kernel_descriptor import DESCRIPTOR_BYTES, KernelDescriptor
from cdna_emulator.source_lines import SourceLines

_MACHINE_AMDGPU = 224
_OS_ABI_HSA = 64
#: Low byte of the ELF flags.
_ARCHS = {0x4C: "gfx942", 0x4F: "gfx950"}
#: ABI version byte of the ELF header.
_CODE_OBJECT_VERSIONS = {3: 5, 4: 6}
_NOTE_METADATA = 32
_EXECUTABLE, _WRITABLE = 1, 2
#: Keeps a damaged header from asking for all memory.
_MAX_SEGMENT_BYTES = 2**30
_RELOCATE_ABS64, _RELOCATE_RELATIVE64 = 3, 13

__all__ = ["CodeObject", "Kernel", "KernelArgument", "Segment"]


@dataclass(frozen=True)
class CodeObject:
    """A code object for one architecture; make one with `read`.

    Parameters
    ----------
    arch : str
        ``gfx942`` or ``gfx950``.
    code_object_version : int
        5 or 6.
    kernels : dict of str to Kernel
        By name, in the order of the metadata.
    segments : tuple of Segment
        What a loader maps, at the file's own addresses; `load` moves it.
    symbols : dict of str to (int, int)
        Address and size of every named symbol.
    """

    arch: str
    code_object_version: int
    kernels: dict[str, Kernel]
    segments: tuple[Segment, ...] = field(repr=False)
    symbols: dict[str, tuple[int, int]] = field(repr=False)
    #: (address, symbol's address + addend) of each pointer that a loader has to write.
    pointers: tuple[tuple[int, int], ...] = field(repr=False)
    #: The bytes of the file.
    data: bytes = field(repr=False)

    @classmethod
    def read(cls, source: bytes | str | Path) -> CodeObject:
        """Take a code object apart.

        Parameters
        ----------
        source : bytes or path
            The file's content, or the file.

        Returns
        -------
        CodeObject

        Raises
        ------
        CodeObjectError : it is not a gfx942 or gfx950 code object of version 5 or 6
        """
        if isinstance(source, bytes | bytearray | memoryview):
            return _Reader(bytes(source), "code object").read()
        try:
            data = Path(source).read_bytes()
        except OSError as exc:
            raise CodeObjectError(f"{source}: file must be readable, got {exc}") from exc
        return _Reader(data, str(source)).read()

    def kernel(self, name: str | None = None) -> Kernel:
        """Return a kernel by its name, or the only one."""
        if name is None and len(self.kernels) == 1:
            return next(iter(self.kernels.values()))
        if name is None or name not in self.kernels:
            raise CodeObjectError(
                f"code object: kernel must be one of {', '.join(self.kernels)}, got {name}"
            )
        return self.kernels[name]

    def load(self, base: int) -> tuple[Segment, ...]:
        """Return the segments moved up by ``base``, their pointers with them."""
        images = [bytearray(segment.data) for segment in self.segments]
        for address, target in self.pointers:
            for segment, image in zip(self.segments, images, strict=True):
                if segment.address <= address < segment.address + len(image):
                    at = address - segment.address
                    image[at : at + 8] = (target + base).to_bytes(8, "little")
        return tuple(
            Segment(base + old.address, bytes(image), old.is_executable, old.is_writable)
            for old, image in zip(self.segments, images, strict=True)
        )

    def source_line(self, address: int) -> str | None:
        """Return ``file:line`` of the code at an address; None without debug information."""
        return self._source_lines.at(address)

    @cached_property
    def _source_lines(self) -> SourceLines:
        return SourceLines(ELFFile(io.BytesIO(self.data)))


class _Reader:
    """Reads one ELF file; ``where`` names it in messages."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where

    def error(self, must: str, got: object, todo: str = "") -> CodeObjectError:
        """Make an error in the common form."""
        return CodeObjectError(f"{self.where}: {must}, got {got}{f'; {todo}' if todo else ''}")

    def read(self) -> CodeObject:
        """Check the header, then read everything behind it."""
        try:
            self.elf = ELFFile(io.BytesIO(self.data))
            return self._read()
        except CodeObjectError:
            raise
        except (ELFError, ArithmeticError, AttributeError, TypeError, ValueError) as exc:
            # What the ELF parser raises on damaged tables depends on where the damage is.
            raise self.error(
                "content must be a well-formed ELF file", f"{len(self.data)} bytes: {exc!r}"
            ) from exc

    def _read(self) -> CodeObject:
        self.arch, self.version = self._header()
        self.segments = self._segments()
        self.symbols = self._symbols()
        kernels: dict[str, Kernel] = {}
        for entry in self._metadata():
            kernel = self._kernel(entry)
            kernels[kernel.name] = kernel
        return CodeObject(
            self.arch,
            self.version,
            kernels,
            self.segments,
            self.symbols,
            self._pointers(),
            self.data,
        )

    def _header(self) -> tuple[str, int]:
        header = self.elf.header
        machine = header.e_machine
        if machine not in ("EM_AMDGPU", _MACHINE_AMDGPU):
            raise self.error("machine must be AMDGPU", machine)
        if self.data[7] != _OS_ABI_HSA:
            raise self.error(f"OS ABI must be {_OS_ABI_HSA} (HSA)", self.data[7])
        if header.e_type != "ET_DYN":
            raise self.error(
                "type must be ET_DYN (a linked code object)",
                header.e_type,
                "link it with ld.lld -shared",
            )
        arch = _ARCHS.get(header.e_flags & 0xFF)
        if arch is None:
            raise self.error(
                f"architecture must be {' or '.join(_ARCHS.values())}",
                f"machine {header.e_flags & 0xFF:#x} in the ELF flags",
            )
        version = _CODE_OBJECT_VERSIONS.get(self.data[8])
        if version is None:
            raise self.error(
                "code object version must be 5 or 6 (ABI version 3 or 4)",
                f"ABI version {self.data[8]}",
                "compile with -mcode-object-version=5",
            )
        return arch, version

    def _segments(self) -> tuple[Segment, ...]:
        segments = []
        for segment in self.elf.iter_segments():
            if segment["p_type"] != "PT_LOAD":
                continue
            address, size = segment["p_vaddr"], segment["p_memsz"]
            start, stored = segment["p_offset"], segment["p_filesz"]
            if stored > size or start + stored > len(self.data) or size > _MAX_SEGMENT_BYTES:
                raise self.error(
                    f"segment at {address:#x} must lie in the file and take at most "
                    f"{_MAX_SEGMENT_BYTES} bytes",
                    f"{stored} bytes at {start:#x} for {size} bytes of memory",
                )
            flags = segment["p_flags"]
            segments.append(
                Segment(
                    address,
                    self.data[start : start + stored].ljust(size, b"\0"),
                    bool(flags & _EXECUTABLE),
                    bool(flags & _WRITABLE),
                )
            )
        return tuple(segments)

    def _symbols(self) -> dict[str, tuple[int, int]]:
        return {
            symbol.name: (symbol["st_value"], symbol["st_size"])
            for section in self.elf.iter_sections()
            if isinstance(section, SymbolTableSection)
            for symbol in section.iter_symbols()
            if symbol.name and symbol["st_shndx"] not in ("SHN_UNDEF", "SHN_ABS")
        }

    def _pointers(self) -> tuple[tuple[int, int], ...]:
        pointers = []
        for section in self.elf.iter_sections():
            if not isinstance(section, RelocationSection):
                continue
            table = self.elf.get_section(section["sh_link"])
            assert isinstance(table, SymbolTableSection)
            for entry in section.iter_relocations():
                kind, target = entry["r_info_type"], entry["r_addend"]
                symbol = table.get_symbol(entry["r_info_sym"]) if entry["r_info_sym"] else None
                if kind == _RELOCATE_ABS64 and symbol and symbol["st_shndx"] != "SHN_UNDEF":
                    target += symbol["st_value"]
                elif kind != _RELOCATE_RELATIVE64:
                    raise self.error(
                        "relocations must be pointers into the object itself",
                        f"type {kind} for {symbol.name if symbol else 'no symbol'}",
                        "link what it refers to into the object",
                    )
                pointers.append((entry["r_offset"], target))
        return tuple(pointers)

    def _metadata(self) -> list[dict[str, Any]]:
        """Return the metadata of each kernel."""
        for segment in self.elf.iter_segments():
            if not isinstance(segment, NoteSegment):
                continue
            for note in segment.iter_notes():
                if note["n_name"] == "AMDGPU" and note["n_type"] in (
                    _NOTE_METADATA,
                    "NT_AMDGPU_METADATA",
                ):
                    try:
                        content = msgpack.unpackb(note["n_descdata"])
                        return list(content["amdhsa.kernels"])
                    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as exc:
                        raise self.error(
                            "metadata note must be msgpack with amdhsa.kernels", repr(exc)
                        ) from exc
        raise self.error(
            "metadata note (NT_AMDGPU_METADATA) must be there", "none", "add .amdgpu_metadata"
        )

    def _kernel(self, entry: dict[str, Any]) -> Kernel:
        try:
            name, symbol = entry[".name"], entry[".symbol"]
            place = self.symbols.get(symbol)
            if place is None:
                raise self.error(f"symbol {symbol} must be defined", "metadata alone")
            descriptor = KernelDescriptor.parse(
                self._bytes(place[0], DESCRIPTOR_BYTES, symbol), f"{self.where}: {symbol}"
            )
            start = place[0] + descriptor.entry_offset
            required = entry.get(".reqd_workgroup_size")
            return Kernel(
                name=name,
                symbol=symbol,
                arch=self.arch,
                code_object_version=self.version,
                code=self._bytes(start, self._code_size(name, start), name),
                code_address=start,
                descriptor=descriptor,
                descriptor_address=place[0],
                arguments=tuple(
                    KernelArgument(
                        argument.get(".name", ""),
                        argument[".offset"],
                        argument[".size"],
                        argument[".value_kind"],
                        argument.get(".address_space", ""),
                    )
                    for argument in entry.get(".args", ())
                ),
                kernarg_size=entry[".kernarg_segment_size"],
                kernarg_align=entry[".kernarg_segment_align"],
                group_segment_size=entry[".group_segment_fixed_size"],
                private_segment_size=entry[".private_segment_fixed_size"],
                vgpr_count=entry[".vgpr_count"],
                agpr_count=entry.get(".agpr_count", 0),
                sgpr_count=entry[".sgpr_count"],
                vgpr_spill_count=entry.get(".vgpr_spill_count", 0),
                sgpr_spill_count=entry.get(".sgpr_spill_count", 0),
                max_flat_workgroup_size=entry[".max_flat_workgroup_size"],
                reqd_workgroup_size=(required[0], required[1], required[2]) if required else None,
                uses_dynamic_stack=entry.get(".uses_dynamic_stack", False),
            )
        except KeyError as exc:
            raise self.error(
                f"metadata of kernel {entry.get('.name', '?')} must have {exc.args[0]}",
                f"only {', '.join(entry)}",
            ) from exc

    def _code_size(self, name: str, start: int) -> int:
        """Return the size of the kernel's symbol; without one, what lies before the next symbol."""
        address, size = self.symbols.get(name, (start, 0))
        if address == start and size:
            return size
        ends = [address for address, _ in self.symbols.values() if address > start]
        ends += [
            segment.address + len(segment.data)
            for segment in self.segments
            if segment.address <= start < segment.address + len(segment.data)
        ]
        return min(ends, default=start) - start

    def _bytes(self, address: int, size: int, what: str) -> bytes:
        for segment in self.segments:
            start = address - segment.address
            if start >= 0 and start + size <= len(segment.data) and size:
                return segment.data[start : start + size]
        raise self.error(f"{what} must lie in a loadable segment", f"{address:#x} + {size}")
