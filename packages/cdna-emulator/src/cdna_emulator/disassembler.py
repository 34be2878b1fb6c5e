"""Machine code to text, one line for each instruction, by LLVM's own disassembler.

LLVM is reached through its stable C interface in ``librocmllvm.so``, which the pip package
``rocm-llvm-python`` carries. The library is loaded at the first call.

Text is as LLVM prints it, without leading blanks. A branch prints its 16-bit field as an unsigned
number: the target is ``address + 4 + 4 * field``, with the field taken as signed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cdna_emulator.errors import ToolchainError, UnknownInstructionError

ARCHS = ("gfx942", "gfx950")

_TRIPLE = b"amdgcn-amd-amdhsa"
_TEXT_BYTES = 512
#: LLVM decodes some invalid encodings into operands that say so in such a comment.
_INVALID_MARK = "/*"


@dataclass(frozen=True, slots=True)
class RawInstruction:
    """One instruction as LLVM prints it.

    Parameters
    ----------
    address : int
        Of its first byte, within the code object.
    size : int
        4, 8 or 12 bytes, or 16 with a literal after a long encoding.
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
        ``gfx942`` or ``gfx950``; they share encodings that mean different things.
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
    library = _library()
    context = library.LLVMCreateDisasmCPUFeatures(_TRIPLE, arch.encode(), b"", None, 0, None, None)
    if not context:
        raise ToolchainError(f"disassemble: LLVM must know {arch}, got no disassembler for it")
    try:
        return _decode(library, context, code, arch, address)
    finally:
        library.LLVMDisasmDispose(context)


def _decode(
    library: ctypes.CDLL, context: int, code: bytes, arch: str, address: int
) -> list[RawInstruction]:
    """Decode instruction after instruction until the bytes end."""
    buffer = (ctypes.c_uint8 * len(code)).from_buffer_copy(code)
    start = ctypes.addressof(buffer)
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    found = []
    offset = 0
    while offset < len(code):
        size = library.LLVMDisasmInstruction(
            context, start + offset, len(code) - offset, address + offset, text, _TEXT_BYTES
        )
        line = " ".join(text.value.decode().split()) if size else ""
        if not size or _INVALID_MARK in line:
            raise UnknownInstructionError(
                f"disassemble: bytes at {address + offset:#x} must be a {arch} instruction, got "
                f"{code[offset : offset + 16].hex(' ', 4)}{f' ({line})' if line else ''}; "
                "was the object built for another architecture, or is there data in its code?"
            )
        found.append(RawInstruction(address + offset, size, line))
        offset += size
    return found


@cache
def _library() -> ctypes.CDLL:
    """Load LLVM and prepare its AMDGPU target."""
    library = ctypes.CDLL(str(_find_library()))
    for part in ("TargetInfo", "TargetMC", "Disassembler"):
        getattr(library, f"LLVMInitializeAMDGPU{part}")()
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    library.LLVMCreateDisasmCPUFeatures.restype = pointer
    library.LLVMCreateDisasmCPUFeatures.argtypes = [
        *(text, text, text),  # triple, processor, features
        *(pointer, ctypes.c_int, pointer, pointer),  # callbacks for symbols: none
    ]
    library.LLVMDisasmInstruction.restype = size
    library.LLVMDisasmInstruction.argtypes = [pointer, pointer, ctypes.c_uint64]
    library.LLVMDisasmInstruction.argtypes += [ctypes.c_uint64, text, size]
    library.LLVMDisasmDispose.restype = None
    library.LLVMDisasmDispose.argtypes = [pointer]
    return library


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
