"""`mla tune`: buckets instead of shapes, a check before every time, a table that plans read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mla_core.bench import Settings
from mla_core.bench.cases import BenchCase, parse_case
from mla_core.cli.main import main
from mla_core.dims import MLADims
from mla_core.plan import AttentionOptions, PlanRequest
from mla_core.problem import Problem
from mla_triton import tune, tuning
from mla_triton.backend import GPU_ARCHS
from mla_triton.tuning import DecodeConfig

CASE = parse_case("decode/bf16/h16/q1/b3/s50/p16")
ROW = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1, "programs_per_sm": 1}


def request_of(case: BenchCase, arch: str, **changes) -> PlanRequest:
    problem = Problem(
        op="decode",
        arch=arch,
        q_dtype=case.q_dtype,
        kv_dtype=case.q_dtype,
        dims=MLADims(case.num_heads),
        page_size=case.page_size,
        q_len=case.q_len,
    )
    batch_size, q_len = case.batch_size, case.q_len
    request = PlanRequest(
        problem, AttentionOptions(), batch_size, batch_size * q_len, q_len, case.context, 64
    )
    return replace(request, **changes)


@pytest.mark.parametrize("rows", [1, 16, 17, 24, 64])
def test_a_bucket_holds_what_rounds_up_to_it(rows):
    case = replace(CASE, num_heads=rows)
    row = tuning.Row(tune.bucket(case), DecodeConfig(16, 32, 4, 1), "here")
    at_corner = tune.round_up(case)
    assert (at_corner.batch_size, at_corner.context) == (4, 64)
    for held in (case, at_corner, replace(case, page_size=1024, context=33)):
        assert row.holds(tuning.conditions(request_of(held, "sm90")))
    other = ({"batch_size": 2}, {"batch_size": 5}, {"context": 32}, {"page_size": 1})
    for changes in (*other, {"num_heads": 2 * rows}, {"q_dtype": "fp16"}):
        assert not row.holds(tuning.conditions(request_of(replace(case, **changes), "sm90")))


def test_shapes_of_one_bucket_are_measured_once():
    cases = [replace(CASE, batch_size=b, context=s) for b in (3, 4, 5) for s in (40, 64, 65)]
    assert sorted((case.batch_size, case.context) for case in tune.distinct(cases)) == [
        *((4, 64), (4, 128), (8, 64), (8, 128)),
    ]


@pytest.mark.parametrize("arch", sorted({*GPU_ARCHS, "cpu"}))
@pytest.mark.parametrize("heads", [1, 16, 128])
def test_candidates(arch, heads):
    tried = tune.candidates(arch, replace(CASE, num_heads=heads))
    assert len(set(tried)) == len(tried) >= 2


def test_writing_replaces_rows_of_the_same_bucket(tmp_path):
    path = tmp_path / "sm90" / "decode.json"
    one, two = {"when": tune.bucket(CASE)}, {"when": tune.bucket(replace(CASE, context=4096))}
    tune.write([one | ROW | {"source": "then"}], path)
    tune.write([two | ROW], path)
    tune.write([one | ROW | {"BLOCK_N": 64, "source": "now"}], path)
    assert [row.config.BLOCK_N for row in tuning.read(path)] == [64, 32]
    assert "then" not in path.read_text()
    path.write_text(json.dumps({"source": "elsewhere", "rows": [one | ROW]}))
    tune.write([two | ROW], path)
    assert len(tuning.read(path)) == 2


@pytest.mark.kernel
def test_the_command_writes_what_plans_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLA_TUNING_PATH", str(tmp_path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = ["tune", "--heads", "16", "--batch", "2", "--context", "20", "--page-size", "16"]
    arguments += ["--tiles", "16x16/4/1/1", "16x32/4/1/1", "--samples", "1", "--seconds", "0"]
    arguments += ["--device", device]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "decode/bf16/h16/q1/b2/s32/p16: 16x16/4/1/1, 16x32/4/1/1" in shown
    assert not list(tmp_path.iterdir())
    assert main(arguments) == 0
    assert "1 of 1 buckets written" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/decode.json")
    (row,) = json.loads(path.read_text())
    assert row["BLOCK_N"] in (16, 32)
    assert "torch" in row["source"]
    asked = replace(CASE, batch_size=2, context=30)
    assert tuning.find(request_of(asked, path.parent.name)).where == f"{path}: row 0"


@pytest.mark.kernel
def test_a_wrong_result_is_not_timed(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wrong(*args, out, **kwargs):
        out.zero_()

    monkeypatch.setattr(tune, "decode", wrong)
    settings = Settings(device=device, max_samples=1, min_samples=1, seconds=0)
    steps = list(tune.tune([CASE], [DecodeConfig(16, 32, 4, 1)], settings))
    assert [step.outcome for step in steps] == ["wrong"]


@pytest.mark.parametrize("text", ["16x16", "16x16/4/1", "16/16/4/1/x", "axb/1/1/1"])
def test_tiles_that_are_none(capsys, text):
    assert main(["tune", "--device", "cpu", "--tiles", text]) == 2
    assert f"--tiles must be MxN/WARPS/STAGES/PROGRAMS, got '{text}'" in capsys.readouterr().err
