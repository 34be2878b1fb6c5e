"""Capabilities: what is derived from a catalog row, and which rows no launcher takes."""

from __future__ import annotations

import pytest

from mla_asm.capabilities import capabilities, capability
from mla_core import MLADims, Problem
from mla_core.errors import LayoutError
from mla_core.problem import Verified

EMULATED = Verified("gfx942", "emulated", "2026-11-21", "a test")
RAN = Verified("gfx942", "ran", "2026-11-22", "a log")


def problem(arch: str = "gfx942", heads: int = 16, **changes) -> Problem:
    fields = {"page_size": 16, "features": frozenset({"lse"})} | changes
    return Problem("decode", arch, "bf16", "bf16", MLADims(heads), **fields)


def test_a_row_becomes_a_capability(make_row):
    derived = capability(make_row(num_heads=range(1, 17), page_sizes=(1, 2, 4, 8, 16)))
    assert derived.kernel == "mla_decode_bf16_m16"
    assert derived.why_not(problem()) == []
    assert derived.why_not(problem(q_len=100, page_size=1)) == []
    assert derived.why_not(problem(features=frozenset({"lse", "non_causal"}))) == []
    for change, reason in (
        ({"heads": 17}, "num_heads=17 (needs 1..16)"),
        ({"page_size": 3}, "page_size=3 (needs 1, 2, 4, 8, 16)"),
        ({"page_size": 32}, "page_size=32 (needs 1, 2, 4, 8, 16)"),
        ({"arch": "gfx950"}, "arch=gfx950 (needs gfx942)"),
        ({"layout": "shuffled"}, "layout=shuffled (needs standard)"),
        ({"features": frozenset({"window"})}, "feature window (needs "),
        ({"features": frozenset({"sink"})}, "feature sink (needs "),
        ({"features": frozenset({"softcap"})}, "feature softcap (needs "),
        ({"features": frozenset({"cp_round_robin"})}, "feature cp_round_robin (needs "),
    ):
        (found,) = derived.why_not(problem(**change))
        assert found.startswith(reason)
    narrow = Problem("decode", "gfx942", "bf16", "bf16", MLADims(16, 256, 32), page_size=16)
    assert derived.why_not(narrow) == [
        "kv_lora_rank=256 (needs 512)",
        "qk_rope_head_dim=32 (needs 64)",
    ]
    assert derived.why_not(Problem("decode", "gfx942", "fp16", "fp16", MLADims(16))) != []


@pytest.mark.parametrize(
    ("changes", "asked", "accepted"),
    [
        ({"q_seq_len": 4}, {"q_len": 4}, True),
        ({"q_seq_len": 4}, {"q_len": 5}, False),
        ({"is_causal": False}, {"q_len": 1}, True),
        ({"is_causal": False}, {"q_len": 2}, False),
        ({"writes_lse": False}, {}, False),
        ({}, {"features": frozenset({"batch_invariant"})}, True),
        ({"is_persistent": True}, {"features": frozenset({"batch_invariant"})}, False),
    ],
)
def test_columns_limit_what_is_taken(make_row, changes, asked, accepted):
    assert (capability(make_row(**changes)).why_not(problem(**asked)) == []) == accepted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "sm90a"}, "the catalog's folder must be gfx942 or gfx950"),
        ({"q_type": "fp8"}, "qType must be bf16 for the launcher of mla_asm, got fp8"),
        ({"kv_type": "byte"}, "kvType must be bf16 for the launcher of mla_asm, got byte"),
        ({"is_prefill": True}, "prefill must be 0 for the launcher of mla_asm, got 1"),
        ({"has_round_robin": True}, "cprr must be 0 for the launcher of mla_asm, got 1"),
        ({"layout": "shuffled"}, "layout must be standard for the launcher"),
    ],
)
def test_rows_without_a_launcher_are_refused(make_row, changes, message):
    with pytest.raises(LayoutError, match=rf"mla_asm\.csv:2: {message}"):
        capability(make_row(**changes))


def test_emulated_rows_are_named_only_and_listed_once(make_row):
    rows = [
        make_row(verified=(EMULATED, RAN)),
        make_row(arch="gfx950", verified=(Verified("gfx950", *proof(EMULATED)),)),
        make_row(arch="gfx950", symbol="another"),
    ]
    shared, other, *native = capabilities(rows)
    assert [(row.kernel, row.archs, row.automatic) for row in native] == [
        ("mla_decode_bf16_m16", {"gfx942"}, True),
        ("mla_decode_bf16_m16", {"gfx950"}, True),
        ("another", {"gfx950"}, True),
    ]
    assert native[0].verified == (EMULATED, RAN)
    assert (shared.archs, shared.automatic) == ({"cpu"}, False)
    # What ran on a GPU proves nothing of the emulator.
    assert shared.verified == (Verified("cpu", *proof(EMULATED)),)
    assert (other.kernel, other.verified) == ("another", ())


def proof(verified: Verified) -> tuple[str, str, str]:
    return verified.level, verified.date, verified.evidence
