"""Fused RoPE of decode: equal to rotating first, refused input, custom ops, torch.compile."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core import AttentionOptions, FusedRope, LatentCache, LayoutError, MLADims, PagedKV
from mla_core.reference.rope import rope, rope_tables, split_cos_sin_cache
from mla_core.testing.assertions import assert_close
from mla_core.testing.cases import DecodeCase

DIMS = MLADims(4, kv_lora_rank=64, qk_rope_head_dim=32)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(fused: FusedRope | None, layout: str = "fp32", **changes):
    """Two requests of 21 and 5 tokens with 2 and 1 query tokens."""
    torch.manual_seed(0)
    cache = LatentCache.allocate(layout, DIMS, 4, 16)
    mla_core.write_kv_cache(torch.randn(64, 64), torch.randn(64, 32), cache, torch.arange(64))
    kv = PagedKV.from_block_table(cache, i32(3, 1, 0, 2).view(2, 2), i32(21, 5))
    q = torch.randn(3, 4, 96)
    plan = mla_core.plan_decode(
        DIMS,
        i32(0, 2, 3),
        kv,
        q_dtype=torch.float32,
        options=AttentionOptions(rope=fused),
        backend="reference",
    )
    arguments = {
        "ql_nope": q[..., :64],
        "q_pe": q[..., 64:],
        "kv": kv,
        "plan": plan,
        "sm_scale": 0.2,
    }
    if fused is not None:
        tables = rope_tables(50, fused.rotary_dim, dtype=torch.float32)
        arguments["cos_sin_cache"] = torch.cat(tables, dim=-1)
        arguments["positions"] = torch.tensor([19, 20, 4])
    return {**arguments, **changes}


NEWEST = torch.tensor([1 * 16 + 3, 1 * 16 + 4, 0 * 16 + 4])


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("write_back", [False, True])
@pytest.mark.parametrize(("rotary_dim", "dim_offset", "shift"), [(32, 0, 0), (14, 5, 3)])
def test_fusing_changes_nothing(is_neox, write_back, rotary_dim, dim_offset, shift):
    fused = FusedRope(is_neox, rotary_dim, dim_offset, shift, write_back)
    arguments = make(fused)
    cos, sin = split_cos_sin_cache(arguments["cos_sin_cache"])

    def rotated(x):
        return rope(
            x,
            arguments["positions"],
            cos,
            sin,
            is_neox=is_neox,
            rotary_dim=rotary_dim,
            offset=shift,
            dim_offset=dim_offset,
        ).float()

    plain = make(None, q_pe=rotated(arguments["q_pe"]))
    _, k_pe = plain["kv"].cache.read(NEWEST)
    keys = rotated(k_pe)
    plain["kv"].cache.write_rope(keys, NEWEST)
    want, want_lse = mla_core.decode(**plain, return_lse=True)

    before = arguments["kv"].cache.buffers[0].clone()
    k_pe_tokens = torch.full((3, 32), torch.nan)
    got, got_lse = mla_core.decode(**arguments, return_lse=True, k_pe_tokens=k_pe_tokens)
    assert_close(got, want, what="out")
    assert_close(got_lse, want_lse, what="lse")
    assert_close(k_pe_tokens, keys, what="k_pe_tokens")
    after = arguments["kv"].cache.buffers[0]
    if write_back:
        assert_close(after, plain["kv"].cache.buffers[0], what="cache")
    else:
        assert torch.equal(after, before)


def test_bits_do_not_depend_on_writing_back():
    fused = FusedRope(is_neox=False, rotary_dim=32)
    want = mla_core.decode(**make(fused, "bf16"))
    stored = FusedRope(is_neox=False, rotary_dim=32, write_back=True)
    assert torch.equal(mla_core.decode(**make(stored, "bf16")), want)


def test_features_follow_the_rotation():
    assert AttentionOptions(rope=FusedRope(True, 2)).features == {"rope"}
    stored = AttentionOptions(softcap=1.0, rope=FusedRope(True, 2, write_back=True))
    assert stored.features == {"softcap", "rope", "rope_write_back"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rotary_dim": 0}, "rotary_dim must be an even number >= 2, got 0"),
        ({"rotary_dim": 7}, "rotary_dim must be an even number >= 2, got 7"),
        ({"dim_offset": -1}, "dim_offset must be >= 0, got -1"),
    ],
)
def test_senseless_rotations_are_refused(values, message):
    with pytest.raises(LayoutError, match=message):
        FusedRope(**{"is_neox": True, "rotary_dim": 4, **values})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos_sin_cache": None}, "cos_sin_cache must be given with options.rope, got None"),
        ({"positions": None}, "positions must be given with options.rope, got None"),
        ({"cos_sin_cache": torch.zeros(9, 31)}, r"cos_sin_cache must be \[max_position, 32\]"),
        ({"cos_sin_cache": torch.zeros(9, 32).double()}, "cos_sin_cache must be bfloat16 or"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, r"positions must be \[3\]"),
        ({"positions": torch.zeros(3)}, "positions must be int32 or int64, got torch.float32"),
        ({"positions": torch.tensor([0, 50, 1])}, r"must be in 0..49, .* got 50 at 1"),
        ({"positions": i32(0, 1, -1)}, r"must be in 0..49, .* got -1 at 2"),
        ({"k_pe_tokens": torch.zeros(3, 31)}, r"k_pe_tokens must be \[3, 32\]"),
        ({"k_pe_tokens": torch.zeros(3, 32).double()}, "k_pe_tokens must be bfloat16 or"),
        ({"positions": i32(0, 1, 2).to("meta")}, "positions must be on cpu, got meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        mla_core.decode(**make(FusedRope(False, 32), **change))


def test_tensors_that_were_not_planned_are_refused():
    with pytest.raises(LayoutError, match=r"k_pe_tokens must be None with a plan without"):
        mla_core.decode(**make(None, k_pe_tokens=torch.zeros(3, 32)))


def test_positions_of_rows_past_the_last_request_are_not_read():
    arguments = make(FusedRope(False, 32))
    arguments["plan"].qo_indptr.copy_(i32(0, 2, 2))
    arguments["positions"][2] = 1 << 40
    k_pe_tokens = torch.full((3, 32), 7.0)
    out = torch.full((3, 4, 64), 7.0)
    mla_core.decode(**arguments, out=out, k_pe_tokens=k_pe_tokens)
    assert not out[:2].isnan().any()
    assert (k_pe_tokens[2] == 7).all()


def test_backends_without_the_feature_say_so():
    inputs = DecodeCase("plain", (5,)).build()
    problem = mla_core.plan.decode_problem(MLADims(16), inputs.kv, torch.bfloat16, 1, {"rope"})
    row = mla_core.Capability(op="decode", kernel="plain", features=frozenset({"lse"}))
    assert row.why_not(problem) == ["feature rope (needs lse)"]


@pytest.mark.parametrize("write_back", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fused_rope_compiles_in_one_graph(backend, write_back):
    fused = FusedRope(False, 14, 5, 3, write_back)

    def step(k_pe_tokens, **arguments):
        out = mla_core.decode(**arguments, k_pe_tokens=k_pe_tokens)
        # What comes after must see the cache as it was left.
        return out * 2, arguments["kv"].cache.buffers[0] + 0

    want_tokens, got_tokens = torch.zeros(3, 32), torch.zeros(3, 32)
    want = step(want_tokens, **make(fused))
    torch._dynamo.reset()
    arguments = make(fused)
    got = torch.compile(step, fullgraph=True, backend=backend)(got_tokens, **arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got_tokens, want_tokens)
    assert torch.equal(arguments["kv"].cache.buffers[0], want[1])


@pytest.mark.parametrize("write_back", [False, True])
def test_opcheck(write_back):
    fused = FusedRope(True, 32, write_back=write_back)
    arguments = make(fused)
    calls = []

    def record(graph, inputs):
        def replay(*args):
            interpreter = torch.fx.Interpreter(graph)
            original = interpreter.call_function

            def call(target, positional, keywords):
                if "mla.decode" in str(target):
                    calls.append((target, positional, keywords))
                return original(target, positional, keywords)

            interpreter.call_function = call
            return interpreter.run(*args)

        return replay

    torch._dynamo.reset()
    tokens = torch.zeros(3, 32)
    run = torch.compile(mla_core.decode, fullgraph=True, backend=record)
    run(**arguments, return_lse=True, k_pe_tokens=tokens)
    ((target, positional, keywords),) = calls
    assert ("write_back" in str(target)) == write_back
    overload = target if hasattr(target, "_schema") else target.default
    results = torch.library.opcheck(overload, positional, keywords)
    assert set(results.values()) == {"SUCCESS"}, results
