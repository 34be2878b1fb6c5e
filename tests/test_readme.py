"""The README's example runs as printed, and the commands it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_example_decodes():
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    out, lse = names["out"], names["lse"]
    assert out.shape == (2, 128, 512)
    assert lse.shape == (2, 128)
    # The first pages are shared, so the short request is the formula over the first 70 rows.
    kv_c, k_pe = names["kv_c"][:70].float(), names["k_pe"][:70].float()
    scores = names["ql_nope"][1].float() @ kv_c.T + names["q_pe"][1].float() @ k_pe.T
    scores *= names["dims"].sm_scale
    torch.testing.assert_close(lse[1], scores.logsumexp(-1), rtol=1e-3, atol=1e-3)
    want = scores.softmax(-1) @ kv_c
    torch.testing.assert_close(out[1].float(), want, rtol=2e-2, atol=2e-2)


def test_the_commands_work():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line.partition("#")[0].split() for line in lines]
    ours = [command for command in commands if command[:1] == ["mla"]]
    assert {command[1] for command in ours} == {"backends", "explain", "doctor"}
    for _, *arguments in ours:
        subprocess.run(
            [sys.executable, "-m", "mla_core", *arguments], check=True, capture_output=True
        )


def test_every_task_it_names_is_a_session():
    named = set(re.findall(r"\./dev ([a-z_]+)", README))
    sessions = set(re.findall(r"^def ([a-z_]+)\(session", (ROOT / "noxfile.py").read_text(), re.M))
    assert {"demo", "tests", "docs"} <= named
    assert named <= sessions
