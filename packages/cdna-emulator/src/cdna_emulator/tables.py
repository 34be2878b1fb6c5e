"""Readable tables of objects, profiles and findings, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from cdna_emulator.assembler import ObjectRow
from cdna_emulator.checks.findings import Finding
from cdna_emulator.code_object import Kernel
from cdna_emulator.profile import Profile


def objects(rows: Sequence[ObjectRow]) -> Table:
    """Return one row per kernel: registers, LDS, scratch, spills, sizes."""
    table = Table(title="kernels")
    table.add_column("kernel", overflow="fold")
    for name in ("VGPR", "AGPR", "SGPR", "LDS", "scratch", "spills", "code", "kernarg"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        numbers = (
            row.vgprs,
            row.agprs,
            row.sgprs,
            row.lds_bytes,
            row.scratch_bytes,
            row.spills,
            row.code_bytes,
            row.kernarg_bytes,
        )
        table.add_row(row.kernel, *map(str, numbers))
    return table


def arguments(kernel: Kernel) -> Table:
    """Return the argument block of a kernel."""
    table = Table(title=f"arguments of {kernel.name}")
    for name in ("offset", "size", "name", "kind"):
        side: Literal["left", "right"] = "right" if name in ("offset", "size") else "left"
        table.add_column(name, justify=side, overflow="fold")
    for argument in kernel.arguments:
        table.add_row(
            f"{argument.offset:#x}", str(argument.size), argument.name, argument.value_kind
        )
    return table


def mix(profile: Profile, most: int) -> Table:
    """Return the instruction mix, most frequent first."""
    table = Table(title=f"{profile.wave_instructions:,} wave-instructions")
    table.add_column("instruction", overflow="fold")
    table.add_column("executed", justify="right", overflow="fold")
    table.add_column("share", justify="right", overflow="fold")
    for name, count in profile.mix.most_common(most):
        table.add_row(name, f"{count:,}", f"{count / profile.wave_instructions:.1%}")
    return table


def units(profile: Profile) -> Table:
    """Return executed instructions and estimated issue cycles per unit."""
    table = Table(
        title="units (cycles are an estimate from issue slots, without latency)",
        caption=f"LDS cycles lost to bank conflicts: {profile.bank_conflict_cycles:,}",
    )
    table.add_column("unit", overflow="fold")
    for name in ("executed", "share", "issue cycles"):
        table.add_column(name, justify="right", overflow="fold")
    for unit, count in profile.units.most_common():
        cycles = profile.estimated_cycles.get(unit, 0)
        table.add_row(unit, f"{count:,}", f"{count / profile.wave_instructions:.1%}", f"{cycles:,}")
    return table


def moved(profile: Profile) -> Table:
    """Return the bytes that active lanes loaded and stored."""
    table = Table(title="bytes moved by active lanes")
    table.add_column("space and direction", overflow="fold")
    table.add_column("bytes", justify="right", overflow="fold")
    for space, count in profile.bytes_moved.items():
        table.add_row(space, f"{count:,}")
    return table


def findings(found: Sequence[Finding]) -> Table:
    """Return what the checkers found."""
    table = Table(title=f"{len(found)} finding{'s' if len(found) != 1 else ''}")
    for name in ("kind", "where", "instruction", "what"):
        table.add_column(name, overflow="fold")
    for item in found:
        where = f"{item.kernel}+{item.address:#x}"
        where += f" {item.source_line}" if item.source_line else ""
        where += f" workgroup {','.join(map(str, item.workgroup))}" if item.workgroup else ""
        where += f" wave {item.wave}" if item.wave is not None else ""
        where += f" lane {item.lane}" if item.lane is not None else ""
        where += f" ({item.count} times)" if item.count > 1 else ""
        table.add_row(item.kind, where, item.instruction, item.detail)
    return table
