"""Build the code objects of ``hsa/`` from the sources beside them, or check the committed ones.

    python tools/assemble.py                    build every hsa/gfx*/mla/*.s
    python tools/assemble.py hsa/gfx942/mla/x.s build this one
    python tools/assemble.py --check            build in memory; fail when a committed file differs

The folder names the architecture. Every source may test the symbol ``GFX950`` (0 or 1) and include
files of its own folder, of ``hsa/src/mla`` and of ``hsa/src``. ``<symbol>.s`` becomes
``<symbol>.co``, and the catalog rows that name it get its hash. Only the assembler that
``constraints/assemble.txt`` pins is accepted: with it the bytes depend on the sources alone.
``nox -s assemble`` installs it, checked by hash, and passes its arguments on.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cdna_emulator.assembler import ObjectRow, assemble, object_report
from cdna_emulator.errors import EmulatorError

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints" / "assemble.txt"
CATALOG = "mla_asm.csv"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or check; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", type=Path, help="default: every hsa/gfx*/mla/*.s")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--hsa", type=Path, default=ROOT / "hsa", help="root of the catalogs")
    chosen = parser.parse_args(arguments)
    if problem := wrong_assembler():
        print(problem, file=sys.stderr)
        return 1
    sources = chosen.sources or sorted(chosen.hsa.glob("gfx*/mla/*.s"))
    table = report_table()
    problems = [] if chosen.sources else orphans(chosen.hsa)
    for source in sources:
        try:
            data = build(source, chosen.hsa)
            rows = object_report(data)
        except EmulatorError as exc:
            problems.append(f"{source}: {exc}")
            continue
        for row in rows:
            table.add_row(architecture(source), *map(str, astuple(row)))
        if chosen.check:
            problems += differences(source, data)
        else:
            write(source, data)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for problem in problems:
        print(problem, file=sys.stderr)
    done = "as committed" if chosen.check else "written"
    print(f"{len(sources)} sources, {len(problems)} problems" + ("" if problems else f"; {done}"))
    return 1 if problems else 0


def wrong_assembler() -> str | None:
    """Return what is wrong with the installed assembler, None when it is the pinned one."""
    found = re.search(r"^ziglang==(\S+)", PINS.read_text(), re.MULTILINE)
    assert found, f"{PINS} pins ziglang"
    try:
        installed = version("ziglang")
    except PackageNotFoundError:
        installed = "none"
    if installed == found[1]:
        return None
    return f"assemble: ziglang must be {found[1]}, got {installed}; run `./dev assemble`"


def architecture(source: Path) -> str:
    """Return the architecture that a source's folder names."""
    return source.resolve().parents[1].name


def build(source: Path, hsa: Path) -> bytes:
    """Assemble one source for the architecture of its folder."""
    arch = architecture(source)
    shared = hsa / "src"
    return assemble(
        source,
        arch,
        defines={"GFX950": int(arch == "gfx950")},
        include_dirs=[shared / source.resolve().parent.name, shared],
    )


def write(source: Path, data: bytes) -> None:
    """Write the code object beside its source, and its hash into the catalog."""
    target = source.with_suffix(".co")
    target.write_bytes(data)
    catalog = source.with_name(CATALOG)
    if catalog.is_file() and (text := with_hash(catalog, target.name, data)) is not None:
        catalog.write_text(text, encoding="utf-8", newline="")


def differences(source: Path, data: bytes) -> list[str]:
    """List how the committed code object and catalog differ from a rebuild."""
    target, catalog = source.with_suffix(".co"), source.with_name(CATALOG)
    problems = []
    if not target.is_file():
        problems.append(f"{target}: code object must be committed, got none; run `./dev assemble`")
    elif (committed := target.read_bytes()) != data:
        problems.append(
            f"{target}: sha256 must be {hashlib.sha256(data).hexdigest()} as built from "
            f"{source.name}, got {hashlib.sha256(committed).hexdigest()}; run `./dev assemble`"
        )
    if catalog.is_file() and with_hash(catalog, target.name, data) is not None:
        problems.append(f"{catalog}: sha256 of {target.name} is out of date; run `./dev assemble`")
    return problems


def orphans(hsa: Path) -> list[str]:
    """List code objects that have no source: nobody could rebuild them."""
    return [
        f"{path}: source must lie beside it as {path.stem}.s, got none"
        for path in sorted(hsa.glob("gfx*/mla/*.co"))
        if not path.with_suffix(".s").is_file()
    ]


def with_hash(catalog: Path, co_name: str, data: bytes) -> str | None:
    """Return the catalog's text with a code object's hash in its rows; None when it is there."""
    with catalog.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if "co_name" not in header or "sha256" not in header:
        return None
    name, digest = header.index("co_name"), header.index("sha256")
    changed = False
    for row in rows:
        # A malformed row is for the catalog's reader to refuse.
        if len(row) == len(header) and row[name] == co_name:
            wanted = hashlib.sha256(data).hexdigest()
            changed |= row[digest] != wanted
            row[digest] = wanted
    if not changed:
        return None
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def report_table() -> Table:
    """Return the empty table of what kernels take."""
    table = Table(title="code objects")
    for name in ("arch", *(field.name for field in fields(ObjectRow))):
        text = name in ("arch", "kernel")
        table.add_column(name.replace("_", " "), justify="left" if text else "right", no_wrap=text)
    return table


if __name__ == "__main__":
    sys.exit(main())
