"""The demo with Triton kernels alone: writes, prompts and steps."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("triton")

from rich.console import Console

from mla_core import demo

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_op_runs_on_triton(tmp_path, dtype):
    console = Console(file=io.StringIO(), width=160)
    status = demo.main(
        size="tiny",
        steps=4,
        requests=1,
        contexts=(40,),
        out_dir=tmp_path,
        device=DEVICE,
        backend="triton,fusions",
        dtype=dtype,
        prefill="absorbed",
        console=console,
    )
    printed = console.file.getvalue()
    assert status == 0, printed
    table = printed.partition("Which kernel ran")[2].partition("Summary")[0]
    ran = [[cell.strip() for cell in line.split("│")[1:4]] for line in table.splitlines()]
    ran = [row for row in ran if len(row) == 3 and row[0]]
    merge = "triton" if DEVICE == "cuda" else "torch"
    assert ran == [
        ["write_kv_cache", "fusions", "write_rows"],
        ["decode of prompts", "triton", "flash_decode"],
        ["decode", "triton", "flash_decode"],
        ["decode, q_len 4", "triton", "flash_decode"],
        ["reduce_partials", merge, f"{merge} reduce"],
    ]
