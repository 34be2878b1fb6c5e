"""Execute AMD CDNA3 and CDNA4 (gfx942, gfx950) machine code on a CPU, with checkers.

    import numpy as np
    from cdna_emulator import run

    result = run("kernel.co", "saxpy", grid=4, block=256, args=(x, y, 2.0))
    print(result.profile.mix)

`run` executes a code object over NumPy arrays and torch CPU tensors, instruction by instruction,
and raises when the kernel uses a register before its load arrived, races in LDS, reads what was
never written, leaves its buffers, or breaks a wait-state rule.
"""

from cdna_emulator.__about__ import __version__
from cdna_emulator.assembler import assemble, object_report
from cdna_emulator.checks.findings import CHECKS, Finding
from cdna_emulator.code_object import CodeObject, Kernel
from cdna_emulator.disassembler import disassemble
from cdna_emulator.errors import (
    ArgumentError,
    CheckError,
    CodeObjectError,
    EmulatorError,
    ToolchainError,
    UnknownInstructionError,
)
from cdna_emulator.launch import Result, run
from cdna_emulator.profile import Profile
from cdna_emulator.schedule import SCHEDULES, Schedule

__all__ = [
    "CHECKS",
    "SCHEDULES",
    "ArgumentError",
    "CheckError",
    "CodeObject",
    "CodeObjectError",
    "EmulatorError",
    "Finding",
    "Kernel",
    "Profile",
    "Result",
    "Schedule",
    "ToolchainError",
    "UnknownInstructionError",
    "__version__",
    "assemble",
    "disassemble",
    "object_report",
    "run",
]
