"""A kernel's instructions with branches resolved and source lines attached."""

from __future__ import annotations

from dataclasses import dataclass

from cdna_emulator.code_object import CodeObject
from cdna_emulator.disassembler import disassemble
from cdna_emulator.errors import UnknownInstructionError
from cdna_emulator.instruction import Instruction, parse


@dataclass(frozen=True)
class Program:
    """What a core executes.

    Parameters
    ----------
    arch : str
    name : str
        Of the kernel.
    instructions : tuple of Instruction
        In order of address.
    targets : tuple of int
        For each instruction the index of its branch target, or -1.
    source_lines : tuple of str or None
        ``file:line`` of each instruction.
    """

    arch: str
    name: str
    instructions: tuple[Instruction, ...]
    targets: tuple[int, ...]
    source_lines: tuple[str | None, ...]

    def index_of(self, address: int) -> int:
        """Return the index of the instruction at an address of the code object."""
        for index, instruction in enumerate(self.instructions):
            if instruction.address == address:
                return index
        raise UnknownInstructionError(
            f"{self.name}: address must be that of an instruction, got {address:#x}"
        )


def load_program(code_object: CodeObject, kernel: str | None = None) -> Program:
    """Disassemble and parse one kernel completely.

    Raises
    ------
    UnknownInstructionError
        An instruction is not known, or a branch leaves the kernel or lands inside an instruction.
    """
    chosen = code_object.kernel(kernel)
    raw = disassemble(chosen.code, code_object.arch, chosen.code_address)
    instructions = tuple(parse(item, code_object.arch) for item in raw)
    return make_program(
        instructions,
        code_object.arch,
        chosen.name,
        tuple(code_object.source_line(item.address) for item in raw),
    )


def make_program(
    instructions: tuple[Instruction, ...],
    arch: str,
    name: str,
    source_lines: tuple[str | None, ...] | None = None,
) -> Program:
    """Resolve the branches of parsed instructions."""
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    targets = []
    for instruction in instructions:
        target = instruction.target
        if target is not None and target not in index_of:
            raise UnknownInstructionError(
                f"{name}: `{instruction.text}` at {instruction.address:#x}: target must be an "
                f"instruction of the kernel, got {target:#x}"
            )
        targets.append(-1 if target is None else index_of[target])
    lines = source_lines or (None,) * len(instructions)
    return Program(arch, name, instructions, tuple(targets), lines)
