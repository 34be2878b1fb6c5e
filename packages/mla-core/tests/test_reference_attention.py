"""Absorbed attention against brute-force masks, scalar loops, materialised heads and torch SDPA."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference.attention import (
    decode,
    decode_partials,
    decode_rope,
    masked_softmax,
    visible_mask,
)
from mla_core.reference.reduce import merge_partials
from mla_core.reference.rope import rope, rope_tables

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NEG_INF = float("-inf")


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def batch(rng, q_lens, kv_lens, heads=3, rank=8, rope_dim=4):
    """Queries, latents and keys of a ragged batch."""
    qo_indptr = [sum(q_lens[:b]) for b in range(len(q_lens) + 1)]
    total_q = qo_indptr[-1]
    return (
        draw(rng, total_q, heads, rank),
        draw(rng, total_q, heads, rope_dim),
        [draw(rng, n, rank) for n in kv_lens],
        [draw(rng, n, rope_dim) for n in kv_lens],
        qo_indptr,
    )


# --- masks -------------------------------------------------------------------------------------


def test_causal_mask_is_literally_bottom_right():
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(visible_mask(3, 5), expected)


def test_more_queries_than_keys_leaves_the_first_rows_blind():
    expected = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1]], dtype=torch.bool)
    assert torch.equal(visible_mask(4, 2), expected)


def test_window_counts_the_query_position_itself():
    expected = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(visible_mask(2, 4, window=2), expected)
    assert torch.equal(visible_mask(1, 3, window=1), torch.tensor([[False, False, True]]))


def test_non_causal_sees_everything():
    assert visible_mask(3, 5, causal=False).all()


def test_context_parallel_mask_is_literally_on_global_positions():
    # 7 global tokens over 3 ranks: rank 1 holds positions 1 and 4; queries sit at 5 and 6.
    kwargs = {"cp_world_size": 3, "global_kv_len": 7}
    assert torch.equal(visible_mask(2, 2, cp_rank=1, **kwargs), torch.ones(2, 2).bool())
    # Rank 0 holds 0, 3 and 6: only the last query sees 6.
    expected = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(visible_mask(2, 3, cp_rank=0, **kwargs), expected)


@settings(deadline=None, max_examples=40)
@given(
    q_len=st.integers(0, 5),
    length=st.integers(0, 12),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 6),
    world_size=st.integers(1, 4),
    data=st.data(),
)
def test_mask_matches_brute_force(q_len, length, causal, window, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    window = window if causal else None
    held = [p for p in range(length) if p % world_size == rank]
    mask = visible_mask(
        q_len,
        len(held),
        causal=causal,
        window=window,
        cp_world_size=world_size,
        cp_rank=rank,
        global_kv_len=length,
    )
    assert mask.shape == (q_len, len(held))
    for i in range(q_len):
        for j, position in enumerate(held):
            query_position = length - (q_len - 1 - i) - 1
            seen = not causal or position <= query_position
            if window is not None:
                seen = seen and query_position - position < window
            assert bool(mask[i, j]) == seen


def test_padded_local_cache_past_the_global_length_is_hidden():
    mask = visible_mask(1, 4, causal=False, cp_world_size=2, cp_rank=1, global_kv_len=5)
    assert mask.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window must be None or >= 1"),
        ({"window": 4, "causal": False}, "window must be None or >= 1"),
        ({"cp_rank": 1}, r"cp_rank must be in 0\.\.0, got 1"),
        ({"cp_rank": -1}, "cp_rank must be in"),
        ({"cp_world_size": 2}, "global_kv_len must be given"),
    ],
)
def test_contradicting_mask_options_are_refused(options, words):
    with pytest.raises(LayoutError, match=words):
        visible_mask(2, 4, **options)


# --- softmax -----------------------------------------------------------------------------------


def test_masked_softmax_by_hand():
    scores = torch.tensor([[0.0, math.log(3.0), float("nan")]], dtype=torch.float64)
    probs, lse = masked_softmax(scores, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(probs, torch.tensor([[0.25, 0.75, 0.0]]).double())
    torch.testing.assert_close(lse, torch.tensor([math.log(4.0)]).double())


def test_a_sink_takes_its_share_once():
    scores = torch.zeros(1, 1, 2, dtype=torch.float64)
    sink = torch.tensor([math.log(2.0)])
    probs, lse = masked_softmax(scores, torch.ones(1, 1, 2, dtype=torch.bool), sink)
    torch.testing.assert_close(probs, torch.full((1, 1, 2), 0.25).double())
    torch.testing.assert_close(lse, torch.full((1, 1), math.log(4.0)).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("columns", [0, 3])
def test_blind_rows_are_zero_and_minus_infinity(columns):
    mask = torch.zeros(2, columns, dtype=torch.bool)
    probs, lse = masked_softmax(torch.full((2, columns), float("nan")), mask)
    assert torch.equal(probs, torch.zeros(2, columns))
    assert (lse == NEG_INF).all()


def test_huge_scores_do_not_overflow():
    probs, lse = masked_softmax(torch.tensor([[1e6, 1e6]]), torch.ones(1, 2, dtype=torch.bool))
    assert probs.tolist() == [[0.5, 0.5]]
    assert lse.item() == pytest.approx(1e6 + math.log(2.0))


# --- decode ------------------------------------------------------------------------------------


def loop_attention(q, keys, values, seen, scale, cap=0.0, sink=None):
    """One query row in scalar Python."""
    logits = [scale * math.fsum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    if cap:
        logits = [cap * math.tanh(x / cap) for x in logits]
    weights = [math.exp(x) if s else 0.0 for x, s in zip(logits, seen, strict=True)]
    total = math.fsum(weights) + (0.0 if sink is None else math.exp(sink))
    if total == 0.0:
        return [0.0] * len(values[0]), NEG_INF
    out = [
        math.fsum(w * value[d] for w, value in zip(weights, values, strict=True)) / total
        for d in range(len(values[0]))
    ]
    return out, math.log(total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 3},
        {"softcap": 0.7},
        {"has_sink": True},
        {"value_includes_rope": True},
        {"q_scale": 0.5, "kv_scale": 1.5},
        {"has_sink": True, "window": 2, "softcap": 2.0, "kv_scale": 0.25},
    ],
    ids=str,
)
def test_decode_matches_a_scalar_loop(rng, options):
    options = dict(options)
    q_lens, kv_lens = [2, 1, 3], [5, 1, 2]
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, q_lens, kv_lens, rank=4, rope_dim=2)
    sink = draw(rng, 3) if options.pop("has_sink", False) else None
    out, lse = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=0.6, sink=sink, **options)
    q_scale, kv_scale = options.get("q_scale", 1.0), options.get("kv_scale", 1.0)
    t = 0
    for b, q_len in enumerate(q_lens):
        rows = [
            [kv_scale * x for x in (*c, *p)]
            for c, p in zip(kv_c[b].tolist(), k_pe[b].tolist(), strict=True)
        ]
        width = 6 if options.get("value_includes_rope") else 4
        for i in range(q_len):
            last = kv_lens[b] - (q_len - 1 - i)
            seen = [j < last or options.get("causal") is False for j in range(kv_lens[b])]
            if "window" in options:
                seen = [s and j >= last - options["window"] for j, s in enumerate(seen)]
            for h in range(3):
                q = [q_scale * x for x in (*ql_nope[t, h].tolist(), *q_pe[t, h].tolist())]
                row, row_lse = loop_attention(
                    q,
                    rows,
                    [r[:width] for r in rows],
                    seen,
                    0.6,
                    options.get("softcap", 0.0),
                    None if sink is None else sink[h].item(),
                )
                torch.testing.assert_close(out[t, h], torch.tensor(row).double(), rtol=0, atol=1e-6)
                assert lse[t, h].item() == pytest.approx(row_lse, abs=1e-9)
            t += 1


@settings(deadline=None, max_examples=20)
@given(
    lens=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=3),
    heads=st.sampled_from([1, 3, 5]),
    rope_dim=st.sampled_from([0, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_absorbed_decode_equals_materialised_heads(lens, heads, rope_dim, seed):
    """Expand each head's K and V, let SDPA attend, and compare after the up-projection."""
    rng = torch.Generator().manual_seed(seed)
    nope, rank, v_dim = 6, 8, 5
    scale = (nope + rope_dim) ** -0.5
    q_lens, kv_lens = zip(*lens, strict=True)
    _, q_pe, kv_c, k_pe, qo_indptr = batch(rng, q_lens, kv_lens, heads, rank, rope_dim)
    q_nope = draw(rng, qo_indptr[-1], heads, nope)
    w_uk, w_uv = draw(rng, heads, nope, rank), draw(rng, heads, v_dim, rank)
    ql_nope = torch.stack([q_nope[:, h] @ w_uk[h] for h in range(heads)], dim=1)
    out, _ = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=scale)
    for b, (q_len, kv_len) in enumerate(lens):
        rows = slice(qo_indptr[b], qo_indptr[b + 1])
        for h in range(heads):
            key = torch.cat([kv_c[b] @ w_uk[h].T, k_pe[b]], dim=-1)
            query = torch.cat([q_nope[rows, h], q_pe[rows, h]], dim=-1)
            mask = torch.ones(q_len, kv_len).tril(kv_len - q_len).bool()
            expected = F.scaled_dot_product_attention(
                query, key, kv_c[b] @ w_uv[h].T, attn_mask=mask, scale=scale
            )
            expected = torch.where(mask.any(dim=-1, keepdim=True), expected, 0.0)
            torch.testing.assert_close(out[rows, h] @ w_uv[h].T, expected, **CLOSE)


def test_lse_is_natural_and_of_scaled_scores(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1], [6])
    _, lse = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=0.3)
    scores = 0.3 * (ql_nope[0] @ kv_c[0].T + q_pe[0] @ k_pe[0].T)
    torch.testing.assert_close(lse[0], scores.exp().sum(dim=-1).log(), **CLOSE)


def test_empty_request_and_blind_rows(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1, 3, 0], [0, 2, 4])
    out, lse = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=1.0)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert (lse[:2] == NEG_INF).all()
    assert out[2:].abs().min() > 0
    # The first visible row sees one token, so it returns exactly that latent.
    torch.testing.assert_close(out[2], kv_c[1][0].expand(3, -1), **CLOSE)


def test_a_sink_alone_gives_zero_and_itself(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1], [0])
    sink = draw(rng, 3)
    out, lse = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=1.0, sink=sink)
    assert (out == 0).all()
    torch.testing.assert_close(lse[0], sink, **CLOSE)


def test_absent_tokens_keep_positions_and_are_never_read(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1], [5])
    kv_c[0][2], k_pe[0][2] = float("nan"), float("nan")
    present = torch.tensor([True, True, False, True, True])
    kwargs = {"sm_scale": 0.5, "causal": True}
    out, lse = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, present=[present], window=4, **kwargs)
    kept = [1, 3, 4]
    expected, expected_lse = decode(
        ql_nope, q_pe, [kv_c[0][kept]], [k_pe[0][kept]], qo_indptr, **kwargs
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)


def test_low_precision_inputs_are_upcast_first(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1, 1], [4, 3])
    fp8 = torch.float8_e4m3fn
    stored = ql_nope.to(fp8), q_pe.to(fp8), [x.to(fp8) for x in kv_c], [x.to(fp8) for x in k_pe]
    exact = (
        stored[0].double(),
        stored[1].double(),
        [x.double() for x in stored[2]],
        [x.double() for x in stored[3]],
    )
    out, _ = decode(*stored, qo_indptr, sm_scale=0.4)
    expected, _ = decode(*exact, qo_indptr, sm_scale=0.4)
    assert torch.equal(out, expected)
    single, _ = decode(*stored, qo_indptr, sm_scale=0.4, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qo_indptr", [[0, 1], [0, 1, 3], [1, 1, 2]])
def test_wrong_indptr_is_refused(rng, qo_indptr):
    ql_nope, q_pe, kv_c, k_pe, _ = batch(rng, [1, 1], [2, 2])
    with pytest.raises(LayoutError, match="indptr must have 3 entries from 0 to 2"):
        decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=1.0)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("window", [None, 4])
def test_context_parallel_ranks_merge_to_the_whole(rng, world_size, window):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [3, 2, 1], [11, 2, 0])
    whole = decode(ql_nope, q_pe, kv_c, k_pe, qo_indptr, sm_scale=0.5, window=window)
    outs, lses = zip(
        *(
            decode(
                ql_nope,
                q_pe,
                [x[rank::world_size] for x in kv_c],
                [x[rank::world_size] for x in k_pe],
                qo_indptr,
                sm_scale=0.5,
                window=window,
                cp_world_size=world_size,
                cp_rank=rank,
                global_kv_lens=[11, 2, 0],
            )
            for rank in range(world_size)
        ),
        strict=True,
    )
    out, lse = merge_partials(torch.stack(outs), torch.stack(lses))
    torch.testing.assert_close(out, whole[0], **CLOSE)
    torch.testing.assert_close(lse, whole[1], **CLOSE)


# --- partials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kv_splits", [1, 2, 3, 7])
def test_partials_merge_to_the_whole(rng, num_kv_splits):
    inputs = batch(rng, [2, 1, 1], [19, 4, 0])
    options = {"sm_scale": 0.5, "softcap": 1.5, "window": 6}
    whole = decode(*inputs, **options)
    partial_out, partial_lse = decode_partials(*inputs, num_kv_splits=num_kv_splits, **options)
    assert partial_out.shape == (num_kv_splits, *whole[0].shape)
    out, lse = merge_partials(partial_out, partial_lse)
    torch.testing.assert_close(out, whole[0], **CLOSE)
    torch.testing.assert_close(lse, whole[1], **CLOSE)


def test_each_partial_is_attention_over_its_own_piece(rng):
    ql_nope, q_pe, kv_c, k_pe, qo_indptr = batch(rng, [1], [5])
    partial_out, partial_lse = decode_partials(
        ql_nope, q_pe, kv_c, k_pe, qo_indptr, num_kv_splits=4, sm_scale=0.5
    )
    # Pieces of ceil(5 / 4) = 2 tokens: 2, 2, 1 and none.
    for split, piece in enumerate([slice(0, 2), slice(2, 4), slice(4, 5)]):
        out, lse = decode(
            ql_nope, q_pe, [kv_c[0][piece]], [k_pe[0][piece]], qo_indptr, sm_scale=0.5
        )
        torch.testing.assert_close(partial_out[split], out, **CLOSE)
        torch.testing.assert_close(partial_lse[split], lse, **CLOSE)
    assert (partial_lse[3] == NEG_INF).all()
    assert (partial_out[3] == 0).all()


# --- decode with rotation ----------------------------------------------------------------------


@pytest.mark.parametrize("is_neox", [True, False])
def test_decode_rope_rotates_the_query_and_the_newest_key_only(rng, is_neox):
    rank, rope_dim, rotary_dim = 8, 6, 4
    kv_lens, positions = [5, 1], torch.tensor([4, 9])
    query = draw(rng, 2, 3, rank + rope_dim)
    latents = [draw(rng, n, rank + rope_dim) for n in kv_lens]
    cos, sin = rope_tables(12, rotary_dim)
    out, lse, k_pe_tokens = decode_rope(
        query,
        latents,
        torch.cat([cos, sin], dim=-1),
        positions,
        kv_lora_rank=rank,
        sm_scale=0.4,
        is_neox=is_neox,
    )
    turned = [rows.clone() for rows in latents]
    for b, rows in enumerate(turned):
        tail = rows[-1:, rank:]
        rows[-1:, rank:] = rope(
            tail, positions[b : b + 1], cos, sin, is_neox=is_neox, rotary_dim=rotary_dim
        )
        torch.testing.assert_close(k_pe_tokens[b], rows[-1, rank:], **CLOSE)
        assert not torch.allclose(rows[-1, rank:], latents[b][-1, rank:])
    q_pe = rope(query[..., rank:], positions, cos, sin, is_neox=is_neox, rotary_dim=rotary_dim)
    expected, expected_lse = decode(
        query[..., :rank],
        q_pe,
        [rows[:, :rank] for rows in turned],
        [rows[:, rank:] for rows in turned],
        [0, 1, 2],
        sm_scale=0.4,
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
