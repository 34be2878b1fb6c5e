"""Problems and capabilities: one gate, one reason for each mismatch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.dims import MLADims
from mla_core.errors import LayoutError
from mla_core.problem import FEATURES, OPS, Capability, Problem, describe_values

PROBLEM = Problem(
    op="decode",
    arch="sm90",
    q_dtype="bf16",
    kv_dtype="fp8_e4m3",
    dims=MLADims(16),
    layout="ds656",
    page_size=64,
    q_len=2,
    features=frozenset({"lse", "window"}),
)
FITS = Capability(
    op="decode",
    kernel="k",
    archs=frozenset({"sm90"}),
    q_dtypes=frozenset({"bf16", "fp16"}),
    kv_dtypes=frozenset({"fp8_e4m3"}),
    layouts=frozenset({"ds656"}),
    num_heads=range(1, 129),
    q_lens=range(1, 5),
    page_sizes=frozenset({1, 64}),
    kv_lora_ranks=frozenset({512}),
    rope_dims=frozenset({64}),
    head_dims=frozenset({(192, 128)}),
    features=frozenset({"lse", "window", "softcap"}),
)


def test_matching_row_has_no_reason():
    assert FITS.why_not(PROBLEM) == []


RESTRICTIONS = [
    field.name
    for field in fields(Capability)
    if field.default is None and getattr(FITS, field.name) is not None
]


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_none_means_any(name: str):
    assert replace(FITS, **{name: frozenset()}).why_not(PROBLEM) != []
    assert replace(FITS, **{name: None}).why_not(PROBLEM) == []


def test_every_optional_restriction_is_tried():
    assert len(RESTRICTIONS) == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"archs": frozenset({"gfx942", "cpu"})}, "arch=sm90 (needs cpu, gfx942)"),
        ({"q_dtypes": frozenset({"fp16"})}, "q_dtype=bf16 (needs fp16)"),
        ({"kv_dtypes": frozenset({"bf16"})}, "kv_dtype=fp8_e4m3 (needs bf16)"),
        ({"layouts": frozenset({"standard"})}, "layout=ds656 (needs standard)"),
        ({"num_heads": frozenset({128, 64})}, "num_heads=16 (needs 64, 128)"),
        ({"num_heads": range(17, 129)}, "num_heads=16 (needs 17..128)"),
        ({"num_heads": range(1, 16)}, "num_heads=16 (needs 1..15)"),
        ({"q_lens": frozenset({1})}, "q_len=2 (needs 1)"),
        ({"page_sizes": frozenset({1, 16})}, "page_size=64 (needs 1, 16)"),
        ({"kv_lora_ranks": frozenset({256})}, "kv_lora_rank=512 (needs 256)"),
        ({"rope_dims": frozenset({0})}, "qk_rope_head_dim=64 (needs 0)"),
        ({"head_dims": frozenset({(128, 64)})}, "head_dims=(192, 128) (needs (128, 64))"),
        ({"same_dtypes": True}, "q_dtype=bf16 (needs kv_dtype=fp8_e4m3)"),
        ({"features": frozenset({"lse"})}, "feature window (needs lse)"),
        ({"op": "prefill"}, "op=decode (needs prefill)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_each_mismatch_has_its_reason(change: dict[str, object], reason: str):
    assert replace(FITS, **change).why_not(PROBLEM) == [reason]


def test_row_without_features_refuses_each_one():
    reasons = replace(FITS, features=frozenset()).why_not(PROBLEM)
    assert reasons == ["feature lse (needs none)", "feature window (needs none)"]


def test_value_that_includes_rope_must_be_declared():
    v4 = MLADims(16, 448, 64, 448, 512, value_includes_rope=True)
    problem = replace(PROBLEM, dims=v4)
    row = replace(FITS, kv_lora_ranks=None, head_dims=None)
    assert row.why_not(problem) == ["value_includes_rope=True (needs False)"]
    assert replace(row, value_includes_rope=True).why_not(problem) == []
    assert replace(row, value_includes_rope=True).why_not(PROBLEM) == []


def test_all_reasons_are_given_at_once():
    row = replace(FITS, archs=frozenset({"cpu"}), page_sizes=frozenset({1}), features=frozenset())
    assert len(row.why_not(PROBLEM)) == 4


@given(heads=st.integers(1, 128), low=st.integers(1, 128), width=st.integers(0, 127))
@settings(deadline=None, max_examples=40)
def test_ranges_and_sets_agree(heads: int, low: int, width: int):
    problem = replace(PROBLEM, dims=MLADims(heads))
    accepted = range(low, low + width)
    by_range = replace(FITS, num_heads=accepted).why_not(problem)
    by_set = replace(FITS, num_heads=frozenset(accepted)).why_not(problem)
    assert bool(by_range) == bool(by_set) == (not low <= heads < low + width)


def test_problem_refuses_words_nothing_could_match():
    with pytest.raises(LayoutError, match=r"op must be one of decode, .*, got 'encode'"):
        replace(PROBLEM, op="encode")
    with pytest.raises(LayoutError, match=r"features must be among lse, .*, got magic, warp"):
        replace(PROBLEM, features=frozenset({"lse", "warp", "magic"}))


def test_problem_reads_as_one_line():
    text = str(PROBLEM)
    assert "\n" not in text
    for part in ("decode on sm90", "kv=fp8_e4m3", "layout=ds656", "page_size=64", "heads=16"):
        assert part in text
    assert text.endswith("lse+window")


def test_problem_hashes_by_value():
    assert len({PROBLEM, replace(PROBLEM), replace(PROBLEM, q_len=3)}) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (range(1, 129), "1..128"),
        (range(0, 128, 64), "0, 64"),
        (range(32, 1025, 32), "32..1024 by 32"),
        (frozenset({64, 16, 128}), "16, 64, 128"),
        (frozenset({"b", "a"}), "a, b"),
        (frozenset(), "none"),
        (range(1, 1), "none"),
    ],
)
def test_values_in_words(values: frozenset[object] | range, words: str):
    assert describe_values(values) == words


def test_tables_of_words_have_meanings():
    assert len(set(OPS)) == len(OPS)
    assert all(meaning for meaning in FEATURES.values())
