"""The scripts in benchmarks/ that time fused ops: small cases, checked and timed once."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = ["--tokens", "3", "--heads", "2"]
#: Arguments of each script, and how many results they have.
SCRIPTS = {
    "absorbed": (["--shapes", "uk", *FEW, "--weights", "bf16", "mxfp4"], 2),
    "absorbed_rope": ([*FEW, "--weights", "fp8"], 1),
    "cache_writes": (["--tokens", "3", "--layouts", "bf16", "fp8_ds656"], 2),
    "indexer": (FEW, 1),
    "layer": ([*FEW, "--weights", "plain", "fp8", "mxfp4"], 9),
    "norms": (["--tokens", "3", "--kinds", "per_1x128", "--layouts", "", "fp8_ds656"], 2),
    "rope_cache_writes": ([*FEW, "--layouts", "bf16"], 1),
}
#: Widths that the layer's script works with here.
NARROW = {"HIDDEN": 48, "Q_RANK": 40, "RANK": 64, "ROPE": 16, "NOPE": 32, "VALUE": 16}


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script as if it were run, and takes one sample."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)

    def load(name):
        module = importlib.import_module(name)
        for owner in (module, importlib.import_module("cache_writes")):
            if hasattr(owner, "SAMPLES"):
                monkeypatch.setattr(owner, "SAMPLES", 1)
        return module

    yield load
    for name in {*SCRIPTS, "tables"} & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_small_case_is_right_and_timed(name, script, monkeypatch, tmp_path, capsys):
    module = script(name)
    if name == "layer":
        for constant, value in NARROW.items():
            monkeypatch.setattr(module, constant, value)
    arguments, count = SCRIPTS[name]
    rows = tmp_path / "rows.json"
    arguments = [*arguments, "--device", DEVICE, "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    assert module.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + count, printed
    results = json.loads(rows.read_text())
    assert len(results) == count
    assert all(result["median_us"] > 0 for result in results)


def test_a_wrong_layer_is_not_timed(script, monkeypatch, capsys):
    module = script("layer")
    for constant, value in NARROW.items():
        monkeypatch.setattr(module, constant, value)
    in_torch = module.Data.in_torch
    monkeypatch.setattr(module.Data, "in_torch", lambda data: in_torch(data) + 1)
    arguments = ["--parts", "between", *FEW, "--weights", "plain", "--device", DEVICE]
    monkeypatch.setattr(sys, "argv", ["layer", *arguments])
    assert module.main() == 1
    assert "torch is wrong: relative L2 error" in capsys.readouterr().out
