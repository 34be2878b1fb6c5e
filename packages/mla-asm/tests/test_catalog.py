"""Catalogs: what is read from a good one, and the message for each way one can be wrong."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from mla_asm import hsa_root, read_catalog, read_catalogs, verified_code_object
from mla_asm.catalog import COLUMNS
from mla_core.errors import LayoutError
from mla_core.problem import Verified

CODE = b"\x7fELF a code object"
SHA256 = hashlib.sha256(CODE).hexdigest()
GOOD = {
    "qType": "bf16",
    "kvType": "fp8",
    "Gqa": "16",
    "ps": "1",
    "qSeqLen": "4",
    "prefill": "0",
    "causal": "1",
    "lse": "0",
    "cprr": "1",
    "knl_name": "mla_decode_bf16_fp8_h16",
    "co_name": "mla_decode_bf16_fp8_h16.co",
    "tile_rows": "64",
    "min_page": "4",
    "max_page": "16",
    "layout": "standard",
    "min_heads": "16",
    "max_heads": "16",
    "source": "mla_decode_bf16_fp8_h16.s",
    "sha256": SHA256,
    "verified": "emulated 2026-11-21 tests/test_decode.py; compiled 2026-11-20 a log of it",
}


def row(**changes: str) -> str:
    return ",".join({**GOOD, **changes}.values())


@pytest.fixture
def write(tmp_path: Path):
    """Write a catalog of gfx942 with its code object beside it, and return its path."""
    folder = tmp_path / "gfx942" / "mla"
    folder.mkdir(parents=True)
    (folder / GOOD["co_name"]).write_bytes(CODE)
    (folder / GOOD["source"]).write_text("; a kernel")

    def write_catalog(*lines: str, header: str = ",".join(COLUMNS)) -> Path:
        path = folder / "mla_asm.csv"
        path.write_text("\n".join((header, *lines)) + "\n")
        return path

    return write_catalog


def test_a_row_is_read_field_by_field(write):
    path = write(
        row(),
        row(Gqa="0", qSeqLen="0", ps="0", cprr="0", min_heads="1", max_heads="128", verified=""),
    )
    first, second = read_catalog(path)
    assert (first.arch, first.q_type, first.kv_type) == ("gfx942", "bf16", "fp8")
    assert (first.gqa, first.q_seq_len, second.q_seq_len) == (16, 4, 0)
    assert (first.is_persistent, first.is_prefill, first.is_causal) == (True, False, True)
    assert (first.writes_lse, first.has_round_robin) == (False, True)
    assert (second.is_persistent, second.has_round_robin) == (False, False)
    assert first.symbol == "mla_decode_bf16_fp8_h16"
    assert first.code_object == path.parent / "mla_decode_bf16_fp8_h16.co"
    assert first.source == path.parent / "mla_decode_bf16_fp8_h16.s"
    assert (first.tile_rows, first.page_sizes, first.layout) == (64, (4, 8, 16), "standard")
    assert (first.num_heads, second.num_heads) == (range(16, 17), range(1, 129))
    assert first.verified == (
        Verified("gfx942", "emulated", "2026-11-21", "tests/test_decode.py"),
        Verified("gfx942", "compiled", "2026-11-20", "a log of it"),
    )
    assert second.verified == ()
    assert (first.where, second.where) == (f"{path}:2", f"{path}:3")
    assert verified_code_object(first) == CODE


def test_only_a_header_gives_no_rows(write):
    assert read_catalog(write()) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qType": "fp16"}, "qType must be one of bf16, fp8, got 'fp16'"),
        ({"kvType": ""}, "kvType must be one of bf16, byte, fp8, got ''"),
        ({"Gqa": "sixteen"}, "Gqa must be an integer of 0 or more, got 'sixteen'"),
        ({"Gqa": "8"}, "min_heads and max_heads must be Gqa=8, got 16 and 16; Gqa is 0 for"),
        ({"qSeqLen": "-1"}, "qSeqLen must be an integer of 0 or more, got '-1'"),
        ({"qSeqLen": "04"}, "qSeqLen must be an integer of 0 or more, got '04'"),
        ({"qSeqLen": "\N{SUPERSCRIPT TWO}"}, "qSeqLen must be an integer of 0 or more"),
        ({"ps": "2"}, "ps must be an integer in 0..1, got '2'"),
        ({"causal": ""}, "causal must be an integer in 0..1, got ''"),
        ({"knl_name": ""}, "knl_name must be a kernel symbol, got nothing"),
        ({"co_name": ""}, "co_name must be a bare file name, got ''"),
        ({"co_name": "../k.co"}, "co_name must be a bare file name, got '../k.co'"),
        ({"co_name": "absent.co"}, "co_name must be a file beside the catalog, got"),
        ({"source": ""}, "source must be a bare file name, got ''"),
        ({"source": "src/k.s"}, "source must be a bare file name, got 'src/k.s'"),
        ({"source": "absent.s"}, "source must be a file beside the catalog, got"),
        ({"tile_rows": "0"}, "tile_rows must be an integer of 1 or more, got '0'"),
        ({"min_page": "3"}, "min_page must be a power of two, got 3"),
        ({"max_page": "24"}, "max_page must be a power of two, got 24"),
        ({"max_page": "2"}, "max_page must be an integer of 4 or more, got '2'"),
        ({"layout": "bf16"}, "layout must be one of "),
        ({"min_heads": "0"}, "min_heads must be an integer of 1 or more, got '0'"),
        ({"max_heads": "15"}, "max_heads must be an integer in 16..128, got '15'"),
        ({"max_heads": "129"}, "max_heads must be an integer in 16..128, got '129'"),
        ({"verified": "ran"}, "verified must be LEVEL DATE EVIDENCE with a level of ran, emulated"),
        ({"verified": "ran today it did"}, "verified must be LEVEL DATE EVIDENCE"),
        ({"verified": "seen 2026-11-21 here"}, "verified must be LEVEL DATE EVIDENCE"),
        (
            {"verified": "ran 2026-11-21 x; ran 2026-11-21"},
            "verified must be LEVEL DATE EVIDENCE with",
        ),
        ({"sha256": SHA256[:-1]}, "sha256 must be 64 lower-case hexadecimal digits"),
        ({"sha256": SHA256.upper()}, "sha256 must be 64 lower-case hexadecimal digits"),
    ],
)
def test_a_bad_cell_is_named_with_file_and_line(write, changes, message):
    path = write(row(qSeqLen="8"), row(**changes))
    with pytest.raises(LayoutError, match=re.escape(f"{path}:3: {message}")):
        read_catalog(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (",".join((*COLUMNS, "speed")), "unknown column 'speed'"),
        (",".join(COLUMNS[:-1]), "missing column 'verified'"),
        (",".join(COLUMNS).replace("Gqa", "gqa"), "unknown column 'gqa'; missing column 'Gqa'"),
        (",".join(reversed(COLUMNS)), "the columns verified, sha256"),
        ("", "missing column 'qType', 'kvType'"),
    ],
)
def test_a_wrong_header_is_line_one(write, header, message):
    path = write(header=header)
    with pytest.raises(LayoutError, match=re.escape(f"{path}:1: the header must be")) as caught:
        read_catalog(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("line", ["", "bf16,fp8", row() + ",more"])
def test_a_row_of_another_length_is_refused(write, line):
    path = write(row(), line)
    with pytest.raises(LayoutError, match=re.escape(f"{path}:3: a row must have 20 cells, got")):
        read_catalog(path)


def test_two_rows_of_one_key_are_refused(write):
    path = write(row(), row(tile_rows="16"), row(knl_name="another_symbol"))
    message = (
        f"{path}:4: the key bf16,fp8,16,1,4,0,1,0,1,64,standard must be unique, got it on line 2"
    )
    with pytest.raises(LayoutError, match=re.escape(message)):
        read_catalog(path)


def test_changed_bytes_are_refused(write):
    path = write(row())
    (only,) = read_catalog(path)
    only.code_object.write_bytes(CODE + b"!")
    message = f"{path}:2: sha256 of {only.code_object.name} must be {SHA256}, got "
    with pytest.raises(LayoutError, match=re.escape(message)):
        verified_code_object(only)


def test_a_code_object_that_went_away_is_refused(write):
    (only,) = read_catalog(write(row()))
    only.code_object.unlink()
    with pytest.raises(LayoutError, match=r"mla_asm\.csv:2: cannot read .*h16\.co"):
        verified_code_object(only)


def test_a_missing_catalog_is_named(tmp_path):
    (tmp_path / "gfx942").mkdir()
    with pytest.raises(LayoutError, match=r"gfx942/mla/mla_asm\.csv: the catalog must be a file"):
        read_catalogs(tmp_path)


def test_the_variable_replaces_the_packaged_catalogs(write, monkeypatch):
    path = write(row())
    monkeypatch.setenv("MLA_HSA_DIR", str(path.parents[2]))
    (path.parents[2] / "src").mkdir()  # includes of the sources, no architecture
    assert hsa_root() == path.parents[2]
    assert {arch: len(rows) for arch, rows in read_catalogs().items()} == {"gfx942": 1}


def test_a_wrong_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLA_HSA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(LayoutError, match="MLA_HSA_DIR: must be an existing directory"):
        hsa_root()


def test_an_installation_without_catalogs_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MLA_HSA_DIR", raising=False)
    monkeypatch.setattr("mla_asm.catalog._PACKAGED", tmp_path / "a")
    monkeypatch.setattr("mla_asm.catalog._CHECKOUT", tmp_path / "b")
    with pytest.raises(LayoutError, match="reinstall mla-asm or set MLA_HSA_DIR"):
        hsa_root()
