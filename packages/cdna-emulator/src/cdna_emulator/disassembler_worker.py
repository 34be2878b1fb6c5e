"""The process in which LLVM decodes machine code; `disassembler` starts it and talks to it.

LLVM's C interface crashes on some invalid encodings (it writes a remark to a stream that only its
own tools set up), so it must not run inside the caller's process.

A request on standard input is the address and the number of bytes (two 64-bit numbers), then the
bytes. The answer is one line for each instruction, its size and its text, written as soon as it is
decoded; a line ``0`` says that the next bytes are no instruction. Standard library only: it runs as
a script, without this package on its path.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

REQUEST = struct.Struct("<QQ")
READY = b"ready\n"

_TEXT_BYTES = 512


def load(path: str) -> ctypes.CDLL:
    """Load LLVM and prepare its AMDGPU target."""
    library = ctypes.CDLL(path)
    for part in ("TargetInfo", "TargetMC", "Disassembler"):
        getattr(library, f"LLVMInitializeAMDGPU{part}")()
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    library.LLVMCreateDisasmCPUFeatures.restype = pointer
    library.LLVMCreateDisasmCPUFeatures.argtypes = [
        *(text, text, text),  # triple, processor, features
        *(pointer, ctypes.c_int, pointer, pointer),  # callbacks for symbols: none
    ]
    library.LLVMDisasmInstruction.restype = size
    library.LLVMDisasmInstruction.argtypes = [
        *(pointer, pointer, ctypes.c_uint64),  # context, bytes, how many there are
        *(ctypes.c_uint64, text, size),  # address, where the text goes, its room
    ]
    return library


def main(path: str, arch: str) -> None:
    """Answer requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        library = load(path)
    except (OSError, AttributeError) as exc:
        sys.exit(str(exc))
    triple = b"amdgcn-amd-amdhsa"
    context = library.LLVMCreateDisasmCPUFeatures(triple, arch.encode(), b"", None, 0, None, None)
    if not context:
        sys.exit(f"{path} has no disassembler for {arch}")
    os.write(1, READY)
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    while header := sys.stdin.buffer.read(REQUEST.size):
        address, size = REQUEST.unpack(header)
        code = ctypes.create_string_buffer(sys.stdin.buffer.read(size), size)
        start, offset = ctypes.addressof(code), 0
        while offset < size:
            used = library.LLVMDisasmInstruction(
                context, start + offset, size - offset, address + offset, text, _TEXT_BYTES
            )
            # Unbuffered, so that what came before a crash is known.
            os.write(1, b"%d %s\n" % (used, b" ".join(text.value.split())) if used else b"0\n")
            if not used:
                break
            offset += used


if __name__ == "__main__":
    main(*sys.argv[1:])
