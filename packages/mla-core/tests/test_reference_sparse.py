"""Sparse attention against dense attention over the gathered slots."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.reference.attention import decode
from mla_core.reference.reduce import merge_partials
from mla_core.reference.sparse import sparse_attention

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NAN, NEG_INF = float("nan"), float("-inf")


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def inputs(rng, total_q, slots, heads=3, rank=6, rope_dim=4):
    return (
        draw(rng, total_q, heads, rank),
        draw(rng, total_q, heads, rope_dim),
        draw(rng, slots, rank),
        draw(rng, slots, rope_dim),
    )


@settings(deadline=None, max_examples=40)
@given(
    top_k=st.integers(0, 7),
    slots=st.integers(0, 6),
    has_length=st.booleans(),
    has_sink=st.booleans(),
    rope_dim=st.sampled_from([0, 4]),
    options=st.sampled_from(
        [{}, {"softcap": 0.6}, {"value_includes_rope": True}, {"q_scale": 2.0, "kv_scale": 0.5}]
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_dense_attention_over_valid_slots(
    top_k, slots, has_length, has_sink, rope_dim, options, seed
):
    rng = torch.Generator().manual_seed(seed)
    ql_nope, q_pe, kv_c, k_pe = inputs(rng, 4, slots, rope_dim=rope_dim)
    # Padding, duplicates and indices one past the end all occur.
    indices = torch.randint(-2, slots + 2, (4, top_k), generator=rng)
    lengths = torch.randint(0, 9, (4,), generator=rng) if has_length else None
    sink = draw(rng, 3) if has_sink else None
    out, max_logits, lse = sparse_attention(
        ql_nope, q_pe, kv_c, k_pe, indices, sm_scale=0.5, topk_length=lengths, sink=sink, **options
    )
    picked = []
    for t, row in enumerate(indices.tolist()):
        row = row[: lengths[t]] if has_length else row
        picked.append([slot for slot in row if 0 <= slot < slots])
    expected, expected_lse = decode(
        ql_nope,
        q_pe,
        [kv_c[slots] for slots in picked],
        [k_pe[slots] for slots in picked],
        range(5),
        sm_scale=0.5,
        sink=sink,
        **options,
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    scale = 0.5 * options.get("q_scale", 1.0) * options.get("kv_scale", 1.0)
    cap = options.get("softcap", 0.0)
    for t, chosen in enumerate(picked):
        if not chosen:
            assert (max_logits[t] == NEG_INF).all()
            continue
        scores = scale * (ql_nope[t] @ kv_c[chosen].T + q_pe[t] @ k_pe[chosen].T)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        torch.testing.assert_close(max_logits[t], scores.amax(dim=-1), **CLOSE)


def test_stray_rows_are_never_read(rng):
    ql_nope, q_pe, kv_c, k_pe = inputs(rng, 1, 5)
    clean = sparse_attention(
        ql_nope, q_pe, kv_c[[1, 3]], k_pe[[1, 3]], torch.tensor([[0, 1]]), sm_scale=0.5
    )
    for slot in (0, 2, 4):
        kv_c[slot], k_pe[slot] = NAN, NAN
    indices = torch.tensor([[-1, 1, 5, 3, 1 << 40, -7, 0]])
    dirty = sparse_attention(
        ql_nope, q_pe, kv_c, k_pe, indices, sm_scale=0.5, topk_length=torch.tensor([6])
    )
    for got, want in zip(dirty, clean, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_duplicates_count_twice(rng):
    ql_nope, q_pe, kv_c, k_pe = inputs(rng, 1, 2)
    out, _, lse = sparse_attention(
        ql_nope, q_pe, kv_c, k_pe, torch.tensor([[0, 1, 0]]), sm_scale=0.5
    )
    weights = (0.5 * (ql_nope[0] @ kv_c.T + q_pe[0] @ k_pe.T)).exp() * torch.tensor([2.0, 1.0])
    total = weights.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(lse[0], total.squeeze(-1).log(), **CLOSE)
    torch.testing.assert_close(out[0], weights / total @ kv_c, **CLOSE)


def test_all_padding_is_zero_and_minus_infinity(rng):
    out, max_logits, lse = sparse_attention(
        *inputs(rng, 2, 3), torch.full((2, 4), -1), sm_scale=0.5
    )
    assert (out == 0).all()
    assert (max_logits == NEG_INF).all()
    assert (lse == NEG_INF).all()


def test_max_logits_ignores_the_sink(rng):
    args = (*inputs(rng, 2, 3), torch.tensor([[0, 1], [2, -1]]))
    plain = sparse_attention(*args, sm_scale=0.5)
    sunk = sparse_attention(*args, sm_scale=0.5, sink=torch.full((3,), 50.0))
    assert torch.equal(plain[1], sunk[1])
    assert (sunk[2] > 49).all()


def test_two_caches_are_one_concatenated_cache(rng):
    ql_nope, q_pe, kv_c, k_pe = inputs(rng, 2, 7)
    first, second = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[3, 0], [2, 1]])
    whole = sparse_attention(
        ql_nope, q_pe, kv_c, k_pe, torch.cat([first, second + 3], dim=1), sm_scale=0.5
    )
    parts = [
        sparse_attention(ql_nope, q_pe, kv_c[:3], k_pe[:3], first, sm_scale=0.5),
        sparse_attention(ql_nope, q_pe, kv_c[3:], k_pe[3:], second, sm_scale=0.5),
    ]
    out, lse = merge_partials(
        torch.stack([part[0] for part in parts]), torch.stack([part[2] for part in parts])
    )
    torch.testing.assert_close(out, whole[0], **CLOSE)
    torch.testing.assert_close(lse, whole[2], **CLOSE)
