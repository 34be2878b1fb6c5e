"""The command line: ``python -m cdna_emulator info|disasm|check|run|profile``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from cdna_emulator import tables
from cdna_emulator.assembler import object_report
from cdna_emulator.checks.hazards import find_hazards
from cdna_emulator.code_object import CodeObject
from cdna_emulator.errors import EmulatorError
from cdna_emulator.launch import Result
from cdna_emulator.launch import run as run_kernel
from cdna_emulator.program import load_program
from cdna_emulator.schedule import DEFAULT_SCHEDULE
from cdna_emulator.values import parse_value

_OBJECT = click.argument(
    "code_object", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
_KERNEL = click.option("--kernel", help="Name of the kernel; needed when there are several.")
#: Exit status when checkers found mistakes, and when a command cannot be done as asked.
FOUND, REFUSED = 1, 2


class _Refused(click.ClickException):
    exit_code = REFUSED


class _Group(click.Group):
    """A group whose commands end with a message where the emulator raises an error of its own."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EmulatorError as exc:
            raise _Refused(str(exc)) from exc


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Execute and check gfx942 and gfx950 machine code on a CPU."""


@cli.command()
@_OBJECT
def info(code_object: Path) -> None:
    """Show a code object's kernels and their arguments."""
    read = CodeObject.read(code_object)
    console = Console()
    console.print(f"{read.arch}, code object version {read.code_object_version}")
    console.print(tables.objects(object_report(read)))
    for kernel in read.kernels.values():
        console.print(tables.arguments(kernel))


@cli.command()
@_OBJECT
@_KERNEL
def disasm(code_object: Path, kernel: str | None) -> None:
    """Print a kernel's instructions with addresses, branch targets and source lines."""
    program = load_program(CodeObject.read(code_object), kernel)
    for index, instruction in enumerate(program.instructions):
        target = program.targets[index]
        notes = f"-> {program.instructions[target].address:#x}" if target >= 0 else ""
        notes += f"  {program.source_lines[index]}" if program.source_lines[index] else ""
        click.echo(f"{instruction.address:6x}  {instruction.text:<60}{notes}".rstrip())


@cli.command()
@_OBJECT
@_KERNEL
def check(code_object: Path, kernel: str | None) -> None:
    """Check wait states without running anything."""
    read = CodeObject.read(code_object)
    names = [kernel] if kernel else list(read.kernels)
    found = [item for name in names for item in find_hazards(load_program(read, name))]
    _show_findings(found)


def _launch_options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        _OBJECT,
        _KERNEL,
        click.option("--grid", required=True, help="Workgroups: X[,Y[,Z]]."),
        click.option("--block", default="256", show_default=True, help="Work-items: X[,Y[,Z]]."),
        click.option("--arg", "words", multiple=True, help="One argument; see the README."),
        click.option("--schedule", default=DEFAULT_SCHEDULE, show_default=True),
        click.option("--checks", default="all", show_default=True, help="all, none or names,..."),
        click.option(
            "--dynamic-lds", default=0, show_default=True, help="Bytes beside the kernel's own."
        ),
        click.option("--seed", default=0, show_default=True, help="Of random arguments."),
        click.option("--save", multiple=True, help="NUMBER=PATH: save an array argument as .npy."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@_launch_options
def run(**asked: Any) -> None:
    """Execute a kernel with all checkers and show what they found."""
    result = _run(**asked)
    speed = result.instructions / max(result.seconds, 1e-9)
    click.echo(
        f"{result.instructions:,} wave-instructions in {result.seconds:.3f} s ({speed:,.0f}/s)"
    )
    _show_findings(result.findings)


@cli.command()
@_launch_options
@click.option("--most", default=25, show_default=True, help="Rows of the instruction mix.")
def profile(most: int, **asked: Any) -> None:
    """Execute a kernel and show its instruction mix, bytes and issue estimate."""
    result = _run(**asked)
    console = Console()
    console.print(tables.mix(result.profile, most))
    console.print(tables.units(result.profile))
    console.print(tables.moved(result.profile))
    _show_findings(result.findings)


def _run(
    code_object: Path,
    kernel: str | None,
    grid: str,
    block: str,
    words: tuple[str, ...],
    schedule: str,
    checks: str,
    dynamic_lds: int,
    seed: int,
    save: tuple[str, ...],
) -> Result:
    rng = np.random.default_rng(seed)
    args = [parse_value(word, rng) for word in words]
    saved = [_saved(item, args) for item in save]
    result = run_kernel(
        code_object,
        kernel,
        _sizes("--grid", grid),
        _sizes("--block", block),
        args,
        schedule=schedule,
        checks=checks if checks in ("all", "none") else checks.split(","),
        dynamic_lds=dynamic_lds,
        strict=False,
    )
    for array, path in saved:
        try:
            np.save(path, array)
        except OSError as exc:
            raise click.BadParameter(f"--save: {path} must be a file to write, got {exc}") from exc
    return result


def _saved(item: str, args: list[Any]) -> tuple[Any, str]:
    """Return the array and the path that one ``--save`` names."""
    number, _, path = item.partition("=")
    is_number = number.isascii() and number.isdecimal() and int(number) < len(args)
    if not is_number or not path or not isinstance(args[int(number)], np.ndarray):
        raise click.BadParameter(
            "--save must be NUMBER=PATH with the number of an array among the arguments, from 0, "
            f"got {item!r}"
        )
    return args[int(number)], path


def _sizes(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise click.BadParameter(f"{option} must be X[,Y[,Z]], got {text!r}")
    return [int(part) for part in parts]


def _show_findings(found: list[Any]) -> None:
    if not found:
        click.echo("no findings")
        return
    Console().print(tables.findings(found))
    raise SystemExit(FOUND)


def main() -> None:
    """Run the command line."""
    cli()
