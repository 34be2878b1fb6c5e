"""Kernel catalogs: which code object serves which problem, per architecture.

``hsa/<arch>/mla/mla_asm.csv`` has one row per kernel. The first eleven columns are those of the
catalogs that ROCm/aiter ships, so that rows of either can be compared; the last one pins the bytes.

=============== =====================================================================
column          meaning
=============== =====================================================================
qType, kvType   dtype of the query and of the cache: bf16, fp8 or byte (8-bit segments)
Gqa             query heads per KV head, as the lookup key
ps              1: persistent kernel, driven by a work list
qSeqLen         longest query the kernel takes, 0: any
prefill         1: prefill kernel, 0: decode kernel
causal          1: the kernel masks causally between the query tokens of a request
lse             1: the kernel also writes the final LSE
cprr            1: the kernel masks by round-robin context parallelism
knl_name        symbol of the kernel inside the code object
co_name         file name of the code object, beside the catalog
sha256          SHA-256 of the code object, 64 lower-case hexadecimal digits
=============== =====================================================================

Reading is strict: a wrong header, a malformed or duplicate row, a missing code object and a hash
that does not match are errors that name the file and the line. The first nine columns are the
lookup key, so two rows that agree on them would make the choice arbitrary.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mla_core import env
from mla_core.errors import LayoutError

CATALOG_NAME = "mla_asm.csv"

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
    "sha256",
)
_KEY_COLUMNS = COLUMNS[:9]
_FLAGS = ("ps", "prefill", "causal", "lse", "cprr")
_Q_TYPES = frozenset({"bf16", "fp8"})
_KV_TYPES = frozenset({"bf16", "fp8", "byte"})
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
    sha256: str
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
    return {folder.name: read_catalog(folder / "mla" / CATALOG_NAME) for folder in folders}


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
            key = tuple(cell[name] for name in _KEY_COLUMNS)
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
    for name, accepted in (("qType", _Q_TYPES), ("kvType", _KV_TYPES)):
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
    # A bare name keeps a catalog from reaching code outside its own folder.
    if not cell["co_name"] or Path(cell["co_name"]).name != cell["co_name"]:
        raise LayoutError(f"{where}: co_name must be a bare file name, got {cell['co_name']!r}")
    code_object = path.parent / cell["co_name"]
    if not code_object.is_file():
        raise LayoutError(f"{where}: co_name must be a file beside the catalog, got {code_object}")
    return CatalogRow(
        arch=path.parent.parent.name,
        q_type=cell["qType"],
        kv_type=cell["kvType"],
        gqa=_number(cell, "Gqa", where, least=1),
        is_persistent=flags["ps"],
        q_seq_len=_number(cell, "qSeqLen", where),
        is_prefill=flags["prefill"],
        is_causal=flags["causal"],
        writes_lse=flags["lse"],
        has_round_robin=flags["cprr"],
        symbol=cell["knl_name"],
        code_object=code_object,
        sha256=cell["sha256"],
        where=where,
    )


def _number(
    cell: Mapping[str, str], name: str, where: str, *, least: int = 0, most: int | None = None
) -> int:
    value = cell[name]
    # One spelling per number: "01" and "1" would be different keys for the same kernel.
    is_number = value.isascii() and value.isdecimal() and value == str(int(value))
    if not is_number or int(value) < least or (most is not None and int(value) > most):
        accepted = f"an integer of {least} or more" if most is None else f"{least} or {most}"
        raise LayoutError(f"{where}: {name} must be {accepted}, got {value!r}")
    return int(value)
