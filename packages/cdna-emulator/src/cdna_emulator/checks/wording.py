"""From the native core's finding records to `Finding` with words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdna_emulator.checks.findings import Finding
from cdna_emulator.instruction import AGPR_BASE, M0, VCC
from cdna_emulator.memory import DeviceMemory, bytes_of
from cdna_emulator.native_core import Counters, FindingRecord
from cdna_emulator.program import Program


@dataclass(frozen=True)
class _Context:
    program: Program
    memory: DeviceMemory
    record: FindingRecord

    def instruction(self, index: int) -> str:
        """Return text and address of another instruction, by its index."""
        if not 0 <= index < len(self.program.instructions):
            return "the start of the workgroup"
        other = self.program.instructions[index]
        line = self.program.source_lines[index]
        return f"`{other.text}` at {other.address:#x}{f' ({line})' if line else ''}"


#: Scalar registers that have names of their own.
_SPECIAL_NAMES = {VCC: "vcc_lo", VCC + 1: "vcc_hi", M0: "m0"}
#: How the core tells scalar registers and LDS addresses from vector registers.
_SGPR_DETAIL, _LDS_DETAIL = 1024, 1 << 32
#: The number of bytes of an access; above it the core has marks of its own.
_BYTES_MASK = 0xFFFFFFFF


def _place(detail: int) -> str:
    """Name what was used before its data arrived."""
    if detail & _LDS_DETAIL:
        return f"LDS address {detail & (_LDS_DETAIL - 1):#x}"
    if detail >= _SGPR_DETAIL:
        return _scalar(detail - _SGPR_DETAIL)
    return _vector(detail)


def _scalar(number: int) -> str:
    return _SPECIAL_NAMES.get(number, f"s{number}")


def _vector(number: int) -> str:
    return f"v{number}" if number < AGPR_BASE else f"a{number - AGPR_BASE}"


def _access(context: _Context) -> str:
    flags = context.program.instructions[context.record.instruction].op.flags
    if not flags.isdisjoint({"atomic", "lds_atomic"}):
        verb = "updated"
    else:
        verb = "stored" if "store" in flags else "loaded"
    return f"{verb} {bytes_of(context.record.detail1 & _BYTES_MASK)}"


def _out_of_bounds(context: _Context) -> str:
    address, size = context.record.detail0, context.record.detail1 & _BYTES_MASK
    return f"{_access(context)} at {context.memory.describe(address, size)}"


#: By the beginning of a mnemonic: what in the instruction a core cannot execute.
_UNSUPPORTED: tuple[tuple[str, Callable[[_Context], str]], ...] = (
    (
        "s_setpc s_swappc",
        lambda c: f"jumps to where no instruction is, {c.memory.describe(c.record.detail0)}",
    ),
    ("ds_read_b", lambda c: f"must be executed by all lanes, EXEC is {c.record.detail0:#x}"),
    ("ds_swizzle", lambda c: f"pattern {c.record.detail0:#x} is not modelled"),
    ("v_mfma", lambda c: f"format must be 0 to 4, got {c.record.detail0}"),
    ("s_movrel", lambda c: f"scalar register {c.record.detail0} does not exist"),
    (
        "s_getreg s_setreg",
        lambda c: (
            f"hardware register {c.record.detail0}, or what is written to it, is not modelled"
        ),
    ),
    ("s_trap s_sethalt", lambda c: "stops the wave; nothing is there to resume it"),
)


def _unsupported(context: _Context) -> str:
    if context.record.detail0 == len(context.program.instructions):
        return "execution runs past the last instruction"
    mnemonic = context.program.instructions[context.record.instruction].mnemonic
    for beginnings, words in _UNSUPPORTED:
        if mnemonic.startswith(tuple(beginnings.split())):
            return words(context)
    return f"not modelled (code {context.record.detail0:#x})"


_WORDS: dict[int, tuple[str, Callable[[_Context], str]]] = {
    1: ("out_of_bounds", _out_of_bounds),
    2: (
        "lds_out_of_bounds",
        lambda c: f"{_access(c)} at LDS address {c.record.detail0:#x}",
    ),
    3: (
        "missing_wait",
        lambda c: (
            f"used {_place(c.record.detail0)} before a wait for " + c.instruction(c.record.detail1)
        ),
    ),
    4: (
        "barrier_writes",
        lambda c: (
            "reached the barrier before a wait for the LDS write " + c.instruction(c.record.detail0)
        ),
    ),
    5: (
        "lds_race",
        lambda c: (
            f"LDS address {c.record.detail1:#x} without a barrier since another wave's "
            + c.instruction(c.record.detail0)
        ),
    ),
    6: ("uninitialised_vgpr", lambda c: f"read {_vector(c.record.detail0)}, never written"),
    7: ("uninitialised_lds", lambda c: f"read LDS address {c.record.detail0:#x}, never written"),
    8: (
        "divergent_barrier",
        lambda c: (
            "waves of the workgroup wait at different barriers; another is "
            + c.instruction(c.record.detail0)
        ),
    ),
    9: (
        "instruction_limit",
        lambda c: f"still running after {c.record.detail0} wave-instructions of the workgroup",
    ),
    10: ("unsupported", _unsupported),
    11: (
        "misaligned",
        lambda c: f"address {c.record.detail0:#x} needs a multiple of {c.record.detail1}",
    ),
    12: (
        "scratch_out_of_bounds",
        lambda c: f"{_access(c)} at private address {c.record.detail0:#x}",
    ),
    13: ("uninitialised_sgpr", lambda c: f"read {_scalar(c.record.detail0)}, never written"),
}


def describe(program: Program, memory: DeviceMemory, counters: Counters) -> list[Finding]:
    """Return the findings of a run, one per kind and instruction, in order of address."""
    merged: dict[tuple[int, int], FindingRecord] = {}
    counts: dict[tuple[int, int], int] = {}
    for record in counters.findings:
        key = (record.kind, record.instruction)
        merged.setdefault(key, record)
        counts[key] = counts.get(key, 0) + record.count
    findings = []
    for key, record in merged.items():
        kind, words = _WORDS[record.kind]
        index = record.instruction
        instruction = program.instructions[index]
        findings.append(
            Finding(
                kind=kind,
                kernel=program.name,
                address=instruction.address,
                instruction=instruction.text,
                detail=words(_Context(program, memory, record)),
                source_line=program.source_lines[index],
                workgroup=(record.workgroup[0], record.workgroup[1], record.workgroup[2]),
                wave=record.wave,
                lane=record.lane if record.lane >= 0 else None,
                count=counts[key],
            )
        )
    return sorted(findings, key=lambda finding: finding.address)
