"""Tuning tables: first match wins, and every mistake in one names file and row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla_core.dims import MLADims
from mla_core.errors import LayoutError, MLAError, UnsupportedProblemError
from mla_core.plan import AttentionOptions, PlanRequest, build_plan
from mla_core.problem import Problem
from mla_triton import tuning
from mla_triton.backend import BACKEND, GPU_ARCHS
from mla_triton.tuning import DecodeConfig

ROW = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def request_of(
    arch="sm90",
    heads=16,
    q_len=1,
    q_dtype="bf16",
    rank=512,
    features=(),
    kv_dtype=None,
    layout="standard",
):
    problem = Problem(
        op="decode",
        arch=arch,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype or q_dtype,
        dims=MLADims(heads, rank),
        layout=layout,
        page_size=64,
        q_len=q_len,
        features=frozenset(features),
    )
    return PlanRequest(problem, AttentionOptions(), 4, 4 * q_len, q_len, 1000, 64)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a function that installs a table for sm90, which has no packaged one here."""
    monkeypatch.setenv("MLA_TUNING_PATH", str(tmp_path))
    monkeypatch.setattr(tuning, "_PACKAGED", tmp_path / "nothing")
    (tmp_path / "sm90").mkdir()

    def install(rows):
        (tmp_path / "sm90" / "decode.json").write_text(json.dumps(rows))
        tuning.read.cache_clear()

    return install


def test_first_match_wins(table):
    table(
        [
            {"when": {"num_rows": {"max": 16}}} | ROW | {"BLOCK_N": 16},
            {"when": {"num_rows": {"min": 17, "max": 64}, "q_dtype": ["fp16"]}} | ROW,
            {"when": {"kv_lora_rank": 1024}} | ROW | {"BLOCK_N": 128},
            {"when": {}} | ROW | {"BLOCK_N": 64},
        ]
    )
    assert tuning.choose(request_of(heads=16)).BLOCK_N == 16
    assert tuning.choose(request_of(heads=17)).BLOCK_N == 64
    assert tuning.choose(request_of(heads=17, q_dtype="fp16")).BLOCK_N == 32
    assert tuning.choose(request_of(heads=65, q_dtype="fp16")).BLOCK_N == 64
    assert tuning.choose(request_of(heads=17, rank=1024)).BLOCK_N == 128


def test_conditions_on_the_cache(table):
    table(
        [
            {"when": {"kv_dtype": "fp8_e4m3", "layout": ["seg656", "ds656"]}} | ROW,
            {"when": {"layout": "seg656"}} | ROW | {"BLOCK_N": 16},
            {"when": {}} | ROW | {"BLOCK_N": 64},
        ]
    )
    assert tuning.choose(request_of(kv_dtype="fp8_e4m3", layout="ds656")).BLOCK_N == 32
    assert tuning.choose(request_of(kv_dtype="fp8_e4m3fnuz", layout="seg656")).BLOCK_N == 16
    assert tuning.choose(request_of(kv_dtype="fp8_e4m3")).BLOCK_N == 64


def test_rows_count_query_tokens_unless_batch_invariant(table):
    table([{"when": {"num_rows": {"max": 16}}} | ROW, {"when": {}} | ROW | {"BLOCK_N": 64}])
    assert tuning.choose(request_of(q_len=2)).BLOCK_N == 64
    assert tuning.choose(request_of(q_len=2, features=["batch_invariant"])).BLOCK_N == 32


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a tuning table must exist for the architecture, got none for 'sm90'"),
        ({"row": []}, "must be a list of rows or an object with `rows`"),
        ([3], "row 0: must be an object, got int"),
        ([{"when": {"num_rows": 1}} | ROW], "last row must have an empty `when`"),
        ([ROW], r"row 0: `when` must be an object, got NoneType"),
        (
            [{"when": {"heads": 1}} | ROW],
            "row 0: `when` must use q_dtype, kv_dtype, layout, num_rows",
        ),
        ([{"when": {}, "BLOCK_K": 1} | ROW], r"keys must be among .* got \['BLOCK_K'\]"),
        ([{"when": {}} | ROW | {"BLOCK_M": 24}], "BLOCK_M must be a power of two >= 16, got 24"),
        ([{"when": {}} | ROW | {"BLOCK_N": 8}], "BLOCK_N must be a power of two >= 16, got 8"),
        ([{"when": {}, "BLOCK_M": 16}], "row 0: .*missing"),
        ([{"when": {}} | ROW | {"num_warps": 0}], "row 0: .*num_warps must be an integer .* got 0"),
        ([{"when": {}} | ROW | {"num_warps": "4"}], "row 0: .*num_warps must be .* got '4'"),
        ([{"when": {"num_rows": {"mx": 3}}} | ROW], "row 0: `when` num_rows must be .* a range"),
        ([{"when": {"q_dtype": {"max": 3}}} | ROW], "row 0: `when` q_dtype must be .* a range"),
        ([{"when": {"layout": {"min": 3}}} | ROW], "row 0: `when` layout must be .* a range"),
    ],
    ids=[
        *("empty", "object", "number", "no-default", "no-when", "condition", "key", "odd"),
        *("small", "missing", "zero", "text", "range", "words", "layout"),
    ],
)
def test_mistakes_in_a_table(table, rows, message):
    table(rows)
    with pytest.raises(MLAError, match=message):
        tuning.choose(request_of())


def test_a_file_that_is_no_json(table, tmp_path):
    (tmp_path / "sm90" / "decode.json").write_text("BLOCK_M: 16")
    tuning.read.cache_clear()
    with pytest.raises(LayoutError, match=r"decode\.json: must be JSON, got"):
        tuning.choose(request_of())


def test_the_users_rows_come_before_the_packaged(tmp_path, monkeypatch):
    monkeypatch.delenv("MLA_TUNING_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mla" / "tuning" / "sm90").mkdir(parents=True)
    rows = [{"when": {"batch_size": {"max": 4}, "kv_len": {"min": 513, "max": 1024}}} | ROW]
    path = tmp_path / "mla" / "tuning" / "sm90" / "decode.json"
    path.write_text(json.dumps({"source": {"device": "one"}, "rows": rows}))
    tuning.read.cache_clear()
    assert tuning.find(request_of()).where == f"{path}: row 0"
    assert tuning.find(replace(request_of(), batch_size=5)).where.startswith(str(tuning._PACKAGED))
    assert tuning.find(replace(request_of(), max_seqlen_k=512)).where != f"{path}: row 0"
    # What depends on the batch must not choose for a request that must not.
    invariant = tuning.find(request_of(features=["batch_invariant"]))
    assert invariant.where.startswith(str(tuning._PACKAGED))


@pytest.mark.parametrize(
    ("told", "base"), [("/tmp/x", "/tmp/x"), ("x", "~/.cache"), ("", "~/.cache")]
)
def test_the_users_directory(monkeypatch, told, base):
    monkeypatch.delenv("MLA_TUNING_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", told)
    assert tuning.user_directory() == Path(base).expanduser() / "mla" / "tuning"


def test_no_table_for_the_architecture(table):
    with pytest.raises(UnsupportedProblemError, match="tuning table must exist"):
        tuning.choose(request_of(arch="sm80"))


@pytest.mark.parametrize("arch", sorted({*GPU_ARCHS, "cpu"}))
def test_packaged_tables_are_complete(arch):
    for heads in (1, 16, 20, 32, 64, 128):
        for rank in (256, 512, 1024):
            for dtype in ("bf16", "fp32"):
                config = tuning.choose(request_of(arch, heads, 1, dtype, rank))
                assert isinstance(config, DecodeConfig)
                assert set(config.launch) == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}


def test_a_new_tuning_path_reaches_plans_made_before(tmp_path, monkeypatch):
    request, indptr = request_of(arch="cpu"), torch.zeros(1, dtype=torch.int32)
    assert build_plan(request, BACKEND, indptr).schedule.config["BLOCK_N"] == 64
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "decode.json").write_text(json.dumps([{"when": {}} | ROW]))
    monkeypatch.setenv("MLA_TUNING_PATH", str(tmp_path))
    assert build_plan(request, BACKEND, indptr).schedule.config["BLOCK_N"] == 32
