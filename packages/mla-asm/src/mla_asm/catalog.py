"""Kernel catalogs: which code object serves which problem, per architecture.

``hsa/<arch>/mla/mla_asm.csv`` has one row per kernel. The first eleven columns are those of the
catalogs that ROCm/aiter ships, so that rows of either can be compared; the others say what our
kernels take, where their bytes come from and how they were verified.

==================== =================================================================
column               meaning
==================== =================================================================
qType, kvType        dtype of the query and of the cache: bf16, fp8 or byte (8-bit segments)
Gqa                  query heads per KV head, 0: any of min_heads..max_heads
ps                   1: persistent kernel, driven by a work list
qSeqLen              longest query the kernel takes, 0: any
prefill              1: prefill kernel, 0: decode kernel
causal               1: the kernel masks causally when its arguments ask for it
lse                  1: the kernel also writes the final LSE
cprr                 1: the kernel masks by round-robin context parallelism
knl_name             symbol of the kernel inside the code object
co_name              file name of the code object, beside the catalog
tile_rows            query rows (query tokens times heads) of one workgroup
min_page, max_page   smallest and largest page size, powers of two like all between
layout               layout family of the cache, such as standard
min_heads, max_heads fewest and most query heads
source               file name of the source, beside the catalog
sha256               SHA-256 of the code object, 64 lower-case hexadecimal digits
verified             ``LEVEL DATE EVIDENCE``, several separated by ``;``, or nothing
==================== =================================================================

Reading is strict: a wrong header, a malformed or duplicate row, a missing file and a hash that does
not match are errors that name the file and the line. ``KEY_COLUMNS`` are the lookup key, so two
rows that agree on them would make the choice arbitrary.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from mla_core import env, layouts
from mla_core.dims import MAX_HEADS
from mla_core.errors import LayoutError
from mla_core.problem import LEVELS, Verified

CATALOG_NAME = "mla_asm.csv"
#: Folder beside those of the architectures: what their sources include.
SHARED_SOURCES = "src"

COLUMNS: tuple[str, ...] = (
    "qType",
    "kvType",
    "Gqa",
    "ps",
    "qSeqLen",
    "prefill",
    "causal",
    "lse",
    "cprr",
    "knl_name",
    "co_name",
    "tile_rows",
    "min_page",
    "max_page",
    "layout",
    "min_heads",
    "max_heads",
    "source",
    "sha256",
    "verified",
)
KEY_COLUMNS = (*COLUMNS[:9], "tile_rows", "layout")
_FLAGS = ("ps", "prefill", "causal", "lse", "cprr")
_WORDS = {
    "qType": frozenset({"bf16", "fp8"}),
    "kvType": frozenset({"bf16", "fp8", "byte"}),
    "layout": frozenset(layout.family for layout in layouts.ALL.values()),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PACKAGED = Path(__file__).parent / "hsa"
# An editable install runs from packages/mla-asm/src/mla_asm of a checkout.
_CHECKOUT = Path(__file__).parent.joinpath("../../../../hsa").resolve()


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """One kernel of a catalog, with the place it was read from."""

    arch: str
    q_type: str
    kv_type: str
    gqa: int
    is_persistent: bool
    q_seq_len: int
    is_prefill: bool
    is_causal: bool
    writes_lse: bool
    has_round_robin: bool
    symbol: str
    code_object: Path
    tile_rows: int
    page_sizes: tuple[int, ...]
    layout: str
    num_heads: range
    source: Path
    sha256: str
    verified: tuple[Verified, ...]
    where: str


def hsa_root() -> Path:
    """Return the directory of the catalogs: ``MLA_HSA_DIR``, the installed one, or the checkout's.

    Raises
    ------
    LayoutError
        ``MLA_HSA_DIR`` is not a directory, or this installation carries no catalogs.
    """
    if (chosen := env.directory("MLA_HSA_DIR")) is not None:
        return chosen
    for candidate in (_PACKAGED, _CHECKOUT):
        if candidate.is_dir():
            return candidate
    raise LayoutError(
        f"hsa_root: the catalogs must be in {_PACKAGED} or {_CHECKOUT}, got neither; "
        "reinstall mla-asm or set MLA_HSA_DIR"
    )


def read_catalogs(root: Path | None = None) -> dict[str, tuple[CatalogRow, ...]]:
    """Read the catalog of every architecture folder below ``root``, `hsa_root` by default."""
    root = hsa_root() if root is None else root
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return {
        folder.name: read_catalog(folder / "mla" / CATALOG_NAME)
        for folder in folders
        if folder.name != SHARED_SOURCES
    }


def read_catalog(path: Path) -> tuple[CatalogRow, ...]:
    """Read one ``<arch>/mla/mla_asm.csv``; a catalog with only its header gives no rows.

    Raises
    ------
    LayoutError
        Anything in the file is not as the table at the top says; the message has file and line.
    """
    if not path.is_file():
        raise LayoutError(f"{path}: the catalog must be a file, got none; restore the header line")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        _check_header(next(reader, []), path)
        rows: list[CatalogRow] = []
        first_seen: dict[tuple[str, ...], int] = {}
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(COLUMNS):
                raise LayoutError(
                    f"{where}: a row must have {len(COLUMNS)} cells, got {len(cells)}"
                )
            cell = dict(zip(COLUMNS, cells, strict=True))
            rows.append(_parse_row(cell, path, where))
            key = tuple(cell[name] for name in KEY_COLUMNS)
            if (earlier := first_seen.setdefault(key, reader.line_num)) != reader.line_num:
                raise LayoutError(
                    f"{where}: the key {','.join(key)} must be unique, got it on line {earlier} "
                    "as well; remove one row"
                )
    return tuple(rows)


def verified_code_object(row: CatalogRow) -> bytes:
    """Return the bytes of a row's code object after checking them against the catalog's hash."""
    try:
        code = row.code_object.read_bytes()
    except OSError as exc:
        raise LayoutError(f"{row.where}: cannot read {row.code_object}: {exc}") from exc
    found = hashlib.sha256(code).hexdigest()
    if found != row.sha256:
        raise LayoutError(
            f"{row.where}: sha256 of {row.code_object.name} must be {row.sha256}, got {found}; "
            "rebuild the code object or correct the catalog"
        )
    return code


def _check_header(header: list[str], path: Path) -> None:
    if tuple(header) == COLUMNS:
        return
    unknown = [name for name in header if name not in COLUMNS]
    missing = [name for name in COLUMNS if name not in header]
    complaints = [
        f"unknown column {', '.join(map(repr, unknown))}" if unknown else "",
        f"missing column {', '.join(map(repr, missing))}" if missing else "",
    ]
    found = "; ".join(filter(None, complaints)) or f"the columns {', '.join(header)}"
    raise LayoutError(f"{path}:1: the header must be {','.join(COLUMNS)}, got {found}")


def _parse_row(cell: Mapping[str, str], path: Path, where: str) -> CatalogRow:
    flags = {name: _number(cell, name, where, most=1) == 1 for name in _FLAGS}
    for name, accepted in _WORDS.items():
        if cell[name] not in accepted:
            raise LayoutError(
                f"{where}: {name} must be one of {', '.join(sorted(accepted))}, got {cell[name]!r}"
            )
    if not cell["knl_name"]:
        raise LayoutError(f"{where}: knl_name must be a kernel symbol, got nothing")
    if not _SHA256.fullmatch(cell["sha256"]):
        raise LayoutError(
            f"{where}: sha256 must be 64 lower-case hexadecimal digits, got {cell['sha256']!r}"
        )
    arch = path.parent.parent.name
    gqa = _number(cell, "Gqa", where)
    fewest = _number(cell, "min_heads", where, least=1)
    most = _number(cell, "max_heads", where, least=fewest, most=MAX_HEADS)
    if gqa and (fewest, most) != (gqa, gqa):
        raise LayoutError(
            f"{where}: min_heads and max_heads must be Gqa={gqa}, got {fewest} and {most}; "
            "Gqa is 0 for a kernel of any head count"
        )
    return CatalogRow(
        arch=arch,
        q_type=cell["qType"],
        kv_type=cell["kvType"],
        gqa=gqa,
        is_persistent=flags["ps"],
        q_seq_len=_number(cell, "qSeqLen", where),
        is_prefill=flags["prefill"],
        is_causal=flags["causal"],
        writes_lse=flags["lse"],
        has_round_robin=flags["cprr"],
        symbol=cell["knl_name"],
        code_object=_beside(cell, "co_name", path, where),
        tile_rows=_number(cell, "tile_rows", where, least=1),
        page_sizes=_page_sizes(cell, where),
        layout=cell["layout"],
        num_heads=range(fewest, most + 1),
        source=_beside(cell, "source", path, where),
        sha256=cell["sha256"],
        verified=_evidence(cell["verified"], arch, where),
        where=where,
    )


def _number(
    cell: Mapping[str, str], name: str, where: str, *, least: int = 0, most: int | None = None
) -> int:
    value = cell[name]
    # One spelling per number: "01" and "1" would be different keys for the same kernel.
    is_number = value.isascii() and value.isdecimal() and value == str(int(value))
    if not is_number or int(value) < least or (most is not None and int(value) > most):
        accepted = f"of {least} or more" if most is None else f"in {least}..{most}"
        raise LayoutError(f"{where}: {name} must be an integer {accepted}, got {value!r}")
    return int(value)


def _page_sizes(cell: Mapping[str, str], where: str) -> tuple[int, ...]:
    smallest = _number(cell, "min_page", where, least=1)
    largest = _number(cell, "max_page", where, least=smallest)
    for name, value in (("min_page", smallest), ("max_page", largest)):
        if value & (value - 1):
            raise LayoutError(f"{where}: {name} must be a power of two, got {value}")
    return tuple(1 << log2 for log2 in range(smallest.bit_length() - 1, largest.bit_length()))


def _beside(cell: Mapping[str, str], name: str, path: Path, where: str) -> Path:
    # A bare name keeps a catalog from reaching code outside its own folder.
    if not cell[name] or Path(cell[name]).name != cell[name]:
        raise LayoutError(f"{where}: {name} must be a bare file name, got {cell[name]!r}")
    file = path.parent / cell[name]
    if not file.is_file():
        raise LayoutError(f"{where}: {name} must be a file beside the catalog, got {file}")
    return file


def _evidence(text: str, arch: str, where: str) -> tuple[Verified, ...]:
    found = []
    for part in filter(None, map(str.strip, text.split(";"))):
        level, day, evidence = [*part.split(maxsplit=2), "", "", ""][:3]
        try:
            date.fromisoformat(day)
        except ValueError:
            evidence = ""
        if level not in LEVELS or not evidence:
            raise LayoutError(
                f"{where}: verified must be LEVEL DATE EVIDENCE with a level of "
                f"{', '.join(LEVELS)} and a date like 2026-11-21, got {part!r}"
            )
        found.append(Verified(arch, level, day, evidence))
    return tuple(found)
