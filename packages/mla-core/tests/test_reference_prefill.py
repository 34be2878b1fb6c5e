"""Expanded attention against torch SDPA, autograd and gradcheck; the absorption identities."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference import attention
from mla_core.reference.prefill import (
    absorb_query,
    expand_latent,
    prefill,
    prefill_backward,
    project_output,
    split_kv_b_proj,
)
from mla_core.reference.reduce import merge_partials

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
NEG_INF = float("-inf")
#: Options that change the scores or the mask.
VARIANTS = [
    {},
    {"causal": False},
    {"window": 2},
    {"softcap": 0.8},
    {"softcap": 2.5, "window": 3},
]


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def indptr(lens):
    return [sum(lens[:b]) for b in range(len(lens) + 1)]


def batch(rng, q_lens, k_lens, heads=4, kv_heads=2, qk_dim=6, v_dim=3):
    """Ragged q, k, v and their prefix sums; the value width differs from the key width."""
    cu_q, cu_k = indptr(q_lens), indptr(k_lens)
    return (
        draw(rng, cu_q[-1], heads, qk_dim),
        draw(rng, cu_k[-1], kv_heads, qk_dim),
        draw(rng, cu_k[-1], kv_heads, v_dim),
        cu_q,
        cu_k,
    )


@settings(deadline=None, max_examples=30)
@given(
    lens=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (5, 1)]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_forward_matches_sdpa(lens, heads, causal, window, seed):
    rng = torch.Generator().manual_seed(seed)
    window = window if causal else None
    q_lens, k_lens = zip(*lens, strict=True)
    q, k, v, cu_q, cu_k = batch(rng, q_lens, k_lens, *heads)
    out, lse = prefill(q, k, v, cu_q, cu_k, sm_scale=0.4, causal=causal, window=window)
    for b, (q_len, k_len) in enumerate(lens):
        mask = torch.ones(q_len, k_len)
        if causal:
            mask = mask.tril(k_len - q_len)
        if window is not None:
            mask = mask.triu(k_len - q_len - window + 1)
        mask = mask.bool()
        rows, cols = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        query, key, value = (x.transpose(0, 1) for x in (q[rows], k[cols], v[cols]))
        expected = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.4, enable_gqa=True
        )
        sees = mask.any(dim=-1)
        expected = torch.where(sees[None, :, None], expected, 0.0).transpose(0, 1)
        torch.testing.assert_close(out[rows], expected, **CLOSE)
        assert torch.equal(lse[rows].isneginf(), ~sees[:, None].expand(q_len, heads[0]))


def test_lse_is_natural(rng):
    q, k, v, cu_q, cu_k = batch(rng, [2], [3], 2, 2)
    _, lse = prefill(q, k, v, cu_q, cu_k, sm_scale=0.4, causal=False)
    expected = (0.4 * torch.einsum("qhd,nhd->qhn", q, k)).exp().sum(dim=-1).log()
    torch.testing.assert_close(lse, expected, **CLOSE)


def test_softcap_squashes_scaled_scores(rng):
    q, k, v, cu_q, cu_k = batch(rng, [2], [3], 2, 2)
    out, _ = prefill(q, k, v, cu_q, cu_k, sm_scale=0.4, causal=False, softcap=0.5)
    probs = (0.5 * torch.tanh(0.4 / 0.5 * torch.einsum("qhd,nhd->hqn", q, k))).softmax(dim=-1)
    torch.testing.assert_close(out, (probs @ v.transpose(0, 1)).transpose(0, 1), **CLOSE)


def test_sink_and_scales(rng):
    q, k, v, cu_q, cu_k = batch(rng, [2], [4], 2, 2)
    sink = draw(rng, 2)
    plain, plain_lse = prefill(0.5 * q, 2.0 * k, 3.0 * v, cu_q, cu_k, sm_scale=0.4)
    out, lse = prefill(
        q, k, v, cu_q, cu_k, sm_scale=0.4, sink=sink, q_scale=0.5, k_scale=2.0, v_scale=3.0
    )
    torch.testing.assert_close(lse, (plain_lse.exp() + sink.exp()).log(), **CLOSE)
    torch.testing.assert_close(out, plain * (plain_lse - lse).exp()[..., None], **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize("has_dlse", [False, True])
def test_backward_matches_autograd(rng, options, has_sink, has_dlse):
    # The first request's first query and the whole last request see nothing.
    q_lens, k_lens = [4, 1, 0, 2], [3, 5, 2, 0]
    q, k, v, cu_q, cu_k = batch(rng, q_lens, k_lens)
    sink = draw(rng, 4) if has_sink else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = prefill(*leaves, cu_q, cu_k, sm_scale=0.5, sink=sink, **options)
    dout = draw(rng, *out.shape)
    dlse = draw(rng, *lse.shape) if has_dlse else None
    finite = ~lse.isneginf()
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse * dlse)[finite].sum()
    expected = torch.autograd.grad(loss, leaves)
    saved = [x.detach() for x in (q, k, v, out, lse)]
    grads = prefill_backward(dout, *saved, cu_q, cu_k, sm_scale=0.5, dlse=dlse, **options)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want.nan_to_num(), **CLOSE)


class _Attention(torch.autograd.Function):
    """The written-out backward as an autograd function, for gradcheck."""

    @staticmethod
    def forward(ctx, q, k, v, options):
        out, lse = prefill(q, k, v, [0, 2, 5], [0, 3, 7], **options)
        ctx.options = options
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        grads = prefill_backward(
            dout, *ctx.saved_tensors, [0, 2, 5], [0, 3, 7], dlse=dlse, **ctx.options
        )
        return *grads, None


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_backward_passes_gradcheck(rng, options):
    """Finite differences know nothing of our forward's autograd graph."""
    leaves = [draw(rng, 5, 2, 4), draw(rng, 7, 1, 4), draw(rng, 7, 1, 3)]
    for leaf in leaves:
        leaf.requires_grad_()
    options = {"sm_scale": 0.6, **options}
    assert torch.autograd.gradcheck(lambda *x: _Attention.apply(*x, options), leaves)


def test_shared_key_heads_receive_the_sum(rng):
    q, k, v, cu_q, cu_k = batch(rng, [3], [3], heads=4, kv_heads=2)
    dout = draw(rng, 3, 4, 3)

    def gradients(k, v):
        out, lse = prefill(q, k, v, cu_q, cu_k, sm_scale=0.5)
        return prefill_backward(dout, q, k, v, out, lse, cu_q, cu_k, sm_scale=0.5)

    dq, dk, dv = gradients(k, v)
    wide_dq, wide_dk, wide_dv = gradients(k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(dq, wide_dq, **CLOSE)
    torch.testing.assert_close(dk, wide_dk[:, 0::2] + wide_dk[:, 1::2], **CLOSE)
    torch.testing.assert_close(dv, wide_dv[:, 0::2] + wide_dv[:, 1::2], **CLOSE)


def test_chunked_prefill_merges_prefix_and_new_tokens(rng):
    """Non-causal over the prefix, causal over the new tokens, merged by lse."""
    prefix, new = 5, 3
    q, k, v, cu_q, cu_k = batch(rng, [new], [prefix + new])
    whole = prefill(q, k, v, cu_q, cu_k, sm_scale=0.5)
    old = prefill(q, k[:prefix], v[:prefix], cu_q, [0, prefix], sm_scale=0.5, causal=False)
    recent = prefill(q, k[prefix:], v[prefix:], cu_q, [0, new], sm_scale=0.5)
    merged = merge_partials(*(torch.stack(pair) for pair in zip(old, recent, strict=True)))
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


@settings(deadline=None, max_examples=15)
@given(
    lens=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=3),
    rope_dim=st.sampled_from([0, 2, 4]),
    window=st.none() | st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_absorbed_equals_expanded(lens, rope_dim, window, seed):
    rng = torch.Generator().manual_seed(seed)
    heads, nope, rank, v_dim = 3, 5, 7, 4
    q_lens, k_lens = zip(*lens, strict=True)
    cu_q, cu_k = indptr(q_lens), indptr(k_lens)
    q_nope, q_pe = draw(rng, cu_q[-1], heads, nope), draw(rng, cu_q[-1], heads, rope_dim)
    kv_c, k_pe = draw(rng, cu_k[-1], rank), draw(rng, cu_k[-1], rope_dim)
    w_uk, w_uv = split_kv_b_proj(draw(rng, heads * (nope + v_dim), rank), heads, nope, v_dim)
    k, v = expand_latent(kv_c, k_pe, w_uk, w_uv)
    options = {"sm_scale": 0.3, "window": window, "softcap": 3.0}
    expanded, expanded_lse = prefill(torch.cat([q_nope, q_pe], dim=-1), k, v, cu_q, cu_k, **options)
    absorbed, absorbed_lse = attention.decode(
        absorb_query(q_nope, w_uk),
        q_pe,
        kv_c.split(k_lens),
        k_pe.split(k_lens),
        cu_q,
        **options,
    )
    torch.testing.assert_close(project_output(absorbed, w_uv), expanded, **CLOSE)
    torch.testing.assert_close(absorbed_lse, expanded_lse, **CLOSE)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_of_the_absorbed_form_are_those_of_the_expanded(rng, options):
    """Autograd through absorb, attend and project, against the explicit backward."""
    heads, nope, rope_dim, rank, v_dim = 3, 5, 2, 7, 4
    cu_q, cu_k = indptr((2, 3)), indptr((4, 3))
    leaves = [
        draw(rng, 5, heads, nope),
        draw(rng, 5, heads, rope_dim),
        draw(rng, 7, rank),
        draw(rng, 7, rope_dim),
        draw(rng, heads * (nope + v_dim), rank),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    q_nope, q_pe, kv_c, k_pe, kv_b_proj = leaves
    w_uk, w_uv = split_kv_b_proj(kv_b_proj, heads, nope, v_dim)
    dout = draw(rng, 5, heads, v_dim)
    options = {"sm_scale": 0.4, **options}

    latents, _ = attention.decode(
        absorb_query(q_nope, w_uk), q_pe, kv_c.split((4, 3)), k_pe.split((4, 3)), cu_q, **options
    )
    absorbed = torch.autograd.grad(project_output(latents, w_uv), leaves, dout, retain_graph=True)

    q = torch.cat([q_nope, q_pe], dim=-1)
    k, v = expand_latent(kv_c, k_pe, w_uk, w_uv)
    with torch.no_grad():
        out, lse = prefill(q, k, v, cu_q, cu_k, **options)
        upstream = prefill_backward(dout, q, k, v, out, lse, cu_q, cu_k, **options)
    expanded = torch.autograd.grad((q, k, v), leaves, upstream)
    for got, want in zip(absorbed, expanded, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_kv_b_proj_rows_go_head_by_head_keys_first(rng):
    heads, nope, v_dim, rank = 2, 3, 2, 4
    weight, latent = draw(rng, heads * (nope + v_dim), rank), draw(rng, rank)
    w_uk, w_uv = split_kv_b_proj(weight, heads, nope, v_dim)
    projected = (weight @ latent).view(heads, nope + v_dim)
    k, v = expand_latent(latent[None], torch.zeros(1, 0), w_uk, w_uv)
    torch.testing.assert_close(k[0], projected[:, :nope], **CLOSE)
    torch.testing.assert_close(v[0], projected[:, nope:], **CLOSE)


def test_uneven_heads_and_batches_are_refused(rng):
    q, k, v, cu_q, cu_k = batch(rng, [2], [2], heads=3, kv_heads=2)
    with pytest.raises(LayoutError, match="num_heads must be a multiple of num_kv_heads=2, got 3"):
        prefill(q, k, v, cu_q, cu_k, sm_scale=1.0)
    with pytest.raises(LayoutError, match="cu_seqlens_k must have 2 entries"):
        prefill(q[:, :2], k, v, cu_q, [0, 1, 2], sm_scale=1.0)
