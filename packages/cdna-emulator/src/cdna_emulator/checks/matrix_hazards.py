"""Wait states around matrix instructions.

A matrix instruction takes 2, 4, 8 or 16 passes of four cycles. Those that run on the matrix core
proper ("XDL") deliver their result one state later than those on f32 ("SGEMM"), and gfx950 adds one
more to all but the shortest. Instructions on f64 ("DGEMM") have numbers of their own, and gfx950
needs eight more states for those of 16 rows, which take 16 passes there instead of 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from cdna_emulator.checks import registers as regs
from cdna_emulator.instruction import Instruction
from cdna_emulator.isa import Unit
from cdna_emulator.profile import matrix_cycles

_CYCLES_PER_PASS = 4
_F64_SMALL = "4x4x4"
#: More states on gfx950 for f64 with 16 rows.
_SLOWER_F64 = {"gfx942": 0, "gfx950": 8}


def passes(instruction: Instruction, arch: str) -> int:
    """Return how many passes a matrix instruction takes."""
    return matrix_cycles(instruction, arch) // _CYCLES_PER_PASS


def _is_f64(mnemonic: str) -> bool:
    return mnemonic.endswith("_f64")


def _is_xdl(mnemonic: str) -> bool:
    """Whether the matrix core proper executes it: everything but f32 and f64 inputs."""
    return not mnemonic.endswith(("_f32", "_f64"))


def forwards(producer: Instruction, consumer: Instruction) -> bool:
    """Whether a matrix instruction's result is the accumulator input of another, all of it."""
    if not (regs.is_matrix(producer) and regs.is_matrix(consumer)):
        return False
    return regs.writes(producer) == regs.of_operand(consumer.operands[3])


def matrix_waits(
    producer: Instruction, consumer: Instruction, arch: str, is_forwarded: bool
) -> Iterator[tuple[int, str]]:
    """Yield (wait states, reason) that ``consumer`` needs after a matrix instruction.

    With ``is_forwarded`` its accumulator input comes from another matrix instruction in between.
    """
    result = regs.writes(producer)
    if regs.is_matrix(consumer):
        yield from _matrix_after_matrix(producer, consumer, result, arch, is_forwarded)
        return
    is_memory = consumer.op.unit.is_vector_memory or consumer.op.unit is Unit.LDS
    if not is_memory and not regs.is_valu(consumer):
        return
    if result & regs.reads(consumer):
        yield _until_result(producer, arch, is_memory), "reads the result of a matrix instruction"
    if result & regs.writes(consumer):
        # The longer way of f64 on gfx950 matters to readers alone.
        needed = _until_result(producer, "gfx942" if _is_f64(producer.mnemonic) else arch, False)
        yield needed, "overwrites the result of a matrix instruction"
    if _is_xdl(producer.mnemonic) and regs.is_valu(consumer):
        accumulated = regs.of_operand(producer.operands[3])
        if accumulated & regs.writes(consumer):
            needed = passes(producer, arch) - 1
            yield needed, "overwrites the accumulator input of a matrix instruction"
    if _is_f64(producer.mnemonic) and consumer.mnemonic in ("v_fma_f64", "v_fmac_f64"):
        yield 2, "v_fma_f64 after a matrix instruction on f64"


def _until_result(producer: Instruction, arch: str, is_memory: bool) -> int:
    name = producer.mnemonic
    if _is_f64(name):
        if _F64_SMALL in name:
            return 9 if is_memory else 6
        return 18 if is_memory else 11 + _SLOWER_F64[arch]
    return _overlap(producer, arch, xdl_extra=3, other_extra=2)


def _overlap(producer: Instruction, arch: str, xdl_extra: int, other_extra: int) -> int:
    count = passes(producer, arch)
    if not _is_xdl(producer.mnemonic):
        return count + other_extra
    return count + xdl_extra + (arch == "gfx950" and count != 2)


def _matrix_after_matrix(
    producer: Instruction,
    consumer: Instruction,
    result: regs.Registers,
    arch: str,
    is_forwarded: bool,
) -> Iterator[tuple[int, str]]:
    name, next_name = producer.mnemonic, consumer.mnemonic
    inputs = regs.of_operand(consumer.operands[1]) | regs.of_operand(consumer.operands[2])
    for scale in consumer.operands[4:]:
        inputs |= regs.of_operand(scale)
    if result & inputs:
        if _is_f64(name):
            needed = 6 if _F64_SMALL in name else 11 + _SLOWER_F64[arch]
        else:
            needed = _overlap(producer, arch, xdl_extra=3, other_extra=2)
        yield needed, "matrix input is the result of a matrix instruction"
    accumulator = regs.of_operand(consumer.operands[3])
    if is_forwarded or not result & accumulator:
        return
    if result == accumulator:
        # Results are forwarded to the accumulator input of the same registers.
        if _is_f64(name) and _F64_SMALL in name and _F64_SMALL in next_name:
            yield 4, "accumulator input is the result of a matrix instruction"
        elif passes(producer, arch) == 2:
            yield 2, "accumulator input is the result of a matrix instruction"
    elif _is_f64(name):
        if not _is_xdl(next_name):
            needed = 4 if _F64_SMALL in name else 9 + _SLOWER_F64[arch]
            yield needed, "accumulator input overlaps the result of a matrix instruction"
    elif _is_xdl(name) or not _is_xdl(next_name):
        needed = _overlap(producer, arch, xdl_extra=1, other_extra=0)
        if arch == "gfx950" and _is_xdl(next_name) and passes(producer, arch) == 2:
            needed += 1  # here the shortest are no exception
        yield needed, "accumulator input overlaps the result of a matrix instruction"
