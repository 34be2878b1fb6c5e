"""Static wait states: pairs of instructions that need others between them.

Assemblers insert none of these waits and hardware does not interlock them; a kernel that lacks one
reads a stale register, on some days. The rules are those of the section "Manually inserted wait
states (NOPs)" of AMD's CDNA3 and CDNA4 instruction set documents, with the numbers of passes and
the additions for gfx950 as LLVM's hazard recogniser states them. An instruction is one wait state,
``s_nop N`` is N + 1.

From each instruction the search goes back along all paths of control flow, as far as the longest
wait that one of its rules asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cdna_emulator.checks import registers as regs
from cdna_emulator.checks.findings import Finding
from cdna_emulator.checks.matrix_hazards import forwards, matrix_waits
from cdna_emulator.instruction import Instruction, Operand
from cdna_emulator.isa import Unit
from cdna_emulator.program import Program

#: No rule asks for more.
_LONGEST = 20
_LANE_ACCESS = ("v_readlane_b32", "v_writelane_b32")


@dataclass(frozen=True, slots=True)
class Wait:
    """One broken rule: how many wait states are needed between two instructions, and why."""

    needed: int
    why: str


def find_hazards(program: Program) -> list[Finding]:
    """Return a finding for each instruction that comes too early after another."""
    predecessors = _predecessors(program)
    findings = []
    for index, consumer in enumerate(program.instructions):
        worst: tuple[int, Wait, Instruction] | None = None
        for producer_index, distance, is_forwarded in _before(program, predecessors, index):
            producer = program.instructions[producer_index]
            for wait in _waits(producer, consumer, program.arch, is_forwarded):
                missing = wait.needed - distance
                if missing > 0 and (worst is None or missing > worst[0]):
                    worst = missing, wait, producer
        if worst is not None:
            missing, wait, producer = worst
            plural = "s" if wait.needed > 1 else ""
            findings.append(
                Finding(
                    kind="wait_states",
                    kernel=program.name,
                    address=consumer.address,
                    instruction=consumer.text,
                    detail=f"{wait.why}: needs {wait.needed} wait state{plural} after "
                    f"`{producer.text}` at {producer.address:#x}, has {wait.needed - missing}",
                    source_line=program.source_lines[index],
                )
            )
    return findings


def _predecessors(program: Program) -> list[list[int]]:
    count = len(program.instructions)
    found: list[list[int]] = [[] for _ in range(count)]
    for index, instruction in enumerate(program.instructions):
        ends = instruction.mnemonic in ("s_branch", "s_endpgm", "s_setpc_b64")
        if not ends and index + 1 < count:
            found[index + 1].append(index)
        if program.targets[index] >= 0:
            found[program.targets[index]].append(index)
    return found


def _before(
    program: Program, predecessors: list[list[int]], index: int
) -> Iterator[tuple[int, int, bool]]:
    """Yield instructions that can come before one, with the fewest wait states in between.

    The last value says whether a matrix instruction in between forwards its result to this one's
    accumulator input: what older ones wrote there is then no longer read.
    """
    consumer = program.instructions[index]
    best: dict[tuple[int, bool], int] = {}
    frontier = [(previous, 0, False) for previous in predecessors[index]]
    while frontier:
        current, distance, is_forwarded = frontier.pop()
        place = current, is_forwarded
        if distance >= _LONGEST or best.get(place, _LONGEST) <= distance:
            continue
        best[place] = distance
        instruction = program.instructions[current]
        after = distance + _wait_states(instruction)
        is_forwarded = is_forwarded or forwards(instruction, consumer)
        frontier.extend((previous, after, is_forwarded) for previous in predecessors[current])
    for (current, is_forwarded), distance in best.items():
        yield current, distance, is_forwarded


def _wait_states(instruction: Instruction) -> int:
    if instruction.mnemonic == "s_nop":
        return (instruction.operands[0].bits & 15) + 1
    return 1


def _waits(
    producer: Instruction, consumer: Instruction, arch: str, is_forwarded: bool
) -> Iterator[Wait]:
    """Yield the wait states that ``consumer`` needs after ``producer``."""
    written = regs.writes(producer)
    if regs.is_valu(producer):
        yield from _after_valu(producer, consumer, written, arch)
    elif regs.is_matrix(producer):
        yield from (Wait(*found) for found in matrix_waits(producer, consumer, arch, is_forwarded))
    elif producer.op.unit is Unit.SALU:
        yield from _after_salu(producer, consumer, written)
    elif regs.is_valu(consumer) and regs.store_data(producer) & regs.writes(consumer):
        # Stores wider than 64 bits take their data later than they are issued.
        needed = 1 if regs.has_scalar_offset(producer) else 2
        yield Wait(needed, "overwrites the data of a store of more than 64 bits")


def _after_valu(
    producer: Instruction, consumer: Instruction, written: regs.Registers, arch: str
) -> Iterator[Wait]:
    read = regs.reads(consumer)
    shared = written & read
    vectors = {register for register in shared if regs.is_vector(register)}
    scalars = shared - vectors
    name = consumer.mnemonic
    if _is_dot(producer):
        yield from _after_dot(producer, consumer, vectors)
    if regs.is_matrix(consumer):
        if vectors and not _is_dot(producer):
            yield Wait(2, "matrix operand written by the vector ALU")
        if regs.EXEC_REGISTERS & written:
            yield Wait(4, "matrix instruction after the vector ALU wrote EXEC")
    if scalars and consumer.op.unit.is_vector_memory:
        yield Wait(5, "memory instruction reads a scalar register written by the vector ALU")
    if regs.EXEC_REGISTERS & written and "dpp" in consumer.encoding:
        yield Wait(5, "DPP after the vector ALU wrote EXEC")
    if (regs.EXEC_REGISTERS | regs.VCC_REGISTERS) & written and regs.reads_zero_flags(consumer):
        yield Wait(5, "reads EXECZ or VCCZ after the vector ALU wrote EXEC or VCC")
    if not regs.is_valu(consumer):
        return
    if name.startswith("v_div_fmas") and regs.VCC_REGISTERS & written:
        yield Wait(4, "v_div_fmas reads VCC written by the vector ALU")
    if name in _LANE_ACCESS and scalars & regs.of_operand(consumer.operands[2]):
        yield Wait(4, "lane number written by the vector ALU")
    elif scalars:
        yield Wait(2, "scalar register written by the vector ALU")
    if regs.EXEC_REGISTERS & written and name in (*_LANE_ACCESS, "v_readfirstlane_b32"):
        yield Wait(4, "lane access after the vector ALU wrote EXEC")
    if producer.mnemonic.startswith("v_cmpx") and name.startswith("v_permlane"):
        yield Wait(4, "lane permutation after v_cmpx wrote EXEC")
    if not vectors:
        return
    if "dpp" in consumer.encoding and vectors & regs.of_operand(_first_source(consumer)):
        yield Wait(2, "DPP reads a register written by the vector ALU")
    if name in ("v_readlane_b32", "v_readfirstlane_b32"):
        yield Wait(1, "lane read of a register written by the vector ALU")
    if name.startswith("v_permlane") and arch == "gfx950":
        yield Wait(2, "lane permutation of a register written by the vector ALU")
    if producer.op.unit is Unit.TRANS and consumer.op.unit is not Unit.TRANS:
        yield Wait(1, "reads the result of a transcendental instruction")
    if _writes_half(producer):
        yield Wait(1, "reads a register of which SDWA or op_sel wrote a part")


def _after_dot(producer: Instruction, consumer: Instruction, shared: set[int]) -> Iterator[Wait]:
    """Yield waits for a dot product's result, which only its like forwards, as accumulator."""
    is_memory = consumer.op.unit.is_vector_memory or consumer.op.unit is Unit.LDS
    if not regs.is_valu(consumer) and not is_memory:
        return
    is_same = consumer.mnemonic == producer.mnemonic
    if is_same:
        shared = shared & (
            regs.of_operand(consumer.operands[1]) | regs.of_operand(consumer.operands[2])
        )
    if shared:
        yield Wait(3, "reads the result of a dot product")
    if not is_same and regs.writes(producer) & regs.writes(consumer):
        yield Wait(3, "overwrites the result of a dot product")


def _after_salu(
    producer: Instruction, consumer: Instruction, written: regs.Registers
) -> Iterator[Wait]:
    movrel = consumer.mnemonic.startswith("s_movrel")
    if regs.M0_REGISTER in written and (regs.uses_m0(consumer) or movrel):
        yield Wait(1, "uses M0 just written by the scalar ALU")
    if producer.mnemonic.startswith("s_setreg"):
        which = regs.hardware_register(producer)
        if which is not None and which == regs.hardware_register(consumer):
            yield Wait(2, "accesses a hardware register just set")


def _first_source(instruction: Instruction) -> Operand:
    written = sum(operand.slot.is_written for operand in instruction.operands)
    return instruction.operands[min(written, len(instruction.operands) - 1)]


def _writes_half(instruction: Instruction) -> bool:
    if instruction.encoding == "sdwa":
        return instruction.modifiers.get("dst_sel", 6) != 6
    selected = instruction.modifiers.get("op_sel", ())
    # In VOP3 the fourth bit selects the half that is written; packed forms have no such bit.
    return (
        isinstance(selected, tuple)
        and len(selected) == len(instruction.operands)
        and bool(selected[-1])
    )


def _is_dot(instruction: Instruction) -> bool:
    return instruction.mnemonic.startswith("v_dot")
