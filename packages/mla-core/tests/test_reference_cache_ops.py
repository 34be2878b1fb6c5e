"""Cache writers against slot-by-slot loops and literal index formulas."""

from __future__ import annotations

import pytest
import torch

from mla_core.reference.cache_ops import (
    concat_and_cache_mla,
    dequantize_per_token,
    indexer_k_quant,
    per_token_quant,
    qk_rope_cat_and_cache_mla,
    qk_rope_concat_and_cache_mla,
    reshape_and_cache,
    reshape_and_cache_flash,
    store,
    write_rows,
)
from mla_core.reference.quant import to_fp8
from mla_core.reference.rope import rope, rope_tables
from mla_core.reference.rope_quant import (
    inverse_rope_group_quant,
    norm_rope,
    norm_rope_group_quant,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng)


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# --- slots -------------------------------------------------------------------------------------


def test_negative_slots_skip_and_the_last_writer_wins(rng):
    cache, rows = draw(rng, 5, 3), draw(rng, 4, 3)
    before = cache.clone()
    after = write_rows(cache, rows, torch.tensor([4, -1, 0, 4]))
    assert torch.equal(after, torch.stack([rows[2], *before[1:4], rows[3]]))
    assert torch.equal(cache, before)


def test_a_short_slot_mapping_leaves_the_tail_unwritten(rng):
    cache, rows = draw(rng, 3, 2), draw(rng, 3, 2)
    after = write_rows(cache, rows, torch.tensor([1]))
    assert torch.equal(after, torch.stack([cache[0], rows[0], cache[2]]))


def test_store_divides_by_the_scale_and_saturates():
    x = torch.tensor([1.0, -300.0])
    assert store(x, "fp8_e4m3", 0.5).float().tolist() == [2.0, -448.0]
    assert store(x, "fp8_e4m3fnuz").float().tolist() == [1.0, -240.0]
    assert store(x, "bf16", 0.5).float().tolist() == [1.0, -300.0]


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8_e4m3", "fp8_e4m3fnuz"])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_concat_and_cache_mla(rng, cache_dtype, heads):
    kv_c, k_pe = draw(rng, 3, *heads, 8).bfloat16(), draw(rng, 3, *heads, 4).bfloat16()
    cache = store(draw(rng, 6, *heads, 12), cache_dtype)
    scale = torch.tensor([0.25])
    after = concat_and_cache_mla(
        kv_c, k_pe, cache, torch.tensor([5, -1, 2]), cache_dtype=cache_dtype, scale=scale
    )
    for slot in range(6):
        token = {5: 0, 2: 2}.get(slot)
        if token is None:
            assert same_bits(after[slot], cache[slot])
        elif cache_dtype == "bf16":
            assert torch.equal(after[slot, ..., :8], kv_c[token])
            assert torch.equal(after[slot, ..., 8:], k_pe[token])
        else:
            row = torch.cat([kv_c[token], k_pe[token]], dim=-1).float() * 4
            assert same_bits(after[slot], to_fp8(row, cache_dtype))


# --- rotation, concatenation, cache ------------------------------------------------------------


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("is_nope_first", [True, False])
@pytest.mark.parametrize("compute_all_q_rope", [True, False])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp8_e4m3", "fp8_e4m3")])
def test_qk_rope_concat_and_cache(rng, is_neox, is_nope_first, compute_all_q_rope, dtypes):
    q_dtype, cache_dtype = dtypes
    q_nope, q_pe, kv_c, k_pe = (
        draw(rng, 3, 2, 8),
        draw(rng, 3, 2, 4),
        draw(rng, 3, 8),
        draw(rng, 3, 4),
    )
    cos, sin = rope_tables(10, 4)
    # Positions outside the table are clamped to its ends.
    positions, slots = torch.tensor([-5, 7, 99]), torch.tensor([1, -1, 0])
    cache = store(draw(rng, 3, 12), cache_dtype)
    q_before = store(draw(rng, 3, 2, 16), q_dtype)
    q_out, after = qk_rope_concat_and_cache_mla(
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        cache,
        q_before,
        slots,
        positions,
        cos,
        sin,
        is_neox=is_neox,
        cache_dtype=cache_dtype,
        q_dtype=q_dtype,
        k_scale=0.5,
        q_scale=0.25,
        **({} if is_nope_first else {"is_nope_first": False}),
        **({"compute_all_q_rope": True} if compute_all_q_rope else {}),
    )

    def row(nope, pe, token, dtype, scale):
        at = torch.tensor([[0, 7, 9][token]])
        parts = [nope[token].double(), rope(pe[token][None], at, cos, sin, is_neox=is_neox)[0]]
        joined = torch.cat(parts if is_nope_first else parts[::-1], dim=-1)
        return joined.bfloat16() if dtype == "bf16" else to_fp8(joined.float() / scale, dtype)

    for token in range(3):
        assert same_bits(q_out[token, :, 12:], q_before[token, :, 12:])
        if token == 1 and not compute_all_q_rope:
            assert same_bits(q_out[token], q_before[token])
        else:
            assert same_bits(q_out[token, :, :12], row(q_nope, q_pe, token, q_dtype, 0.25))
    for slot, token in {0: 2, 1: 0}.items():
        assert same_bits(after[slot], row(kv_c, k_pe, token, cache_dtype, 0.5))
    assert same_bits(after[2], cache[2])


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("num_decode_tokens", [0, 2])
@pytest.mark.parametrize("is_full_table", [True, False])
def test_qk_rope_cat_and_cache(rng, is_neox, num_decode_tokens, is_full_table):
    q_nope, q_pe = draw(rng, 2, 4, 6), draw(rng, 2, 4, 4)
    k_nope, k_pe = draw(rng, 5, 2, 6), draw(rng, 5, 2, 4)
    cos, sin = rope_tables(10, 8 if is_full_table else 4)
    positions, slots = torch.tensor([3, 8, 1]), torch.tensor([6, -1, 0, 3])
    cache = store(draw(rng, 8, 2, 10), "fp8_e4m3")
    got = qk_rope_cat_and_cache_mla(
        q_nope,
        q_pe,
        k_nope,
        k_pe,
        cache,
        slots,
        positions,
        cos,
        sin,
        is_neox=is_neox,
        cache_dtype="fp8_e4m3",
        k_scale=0.5,
        num_decode_tokens=num_decode_tokens,
    )
    turned_q = rope(q_pe, positions[:2], cos, sin, is_neox=is_neox)
    turned_k = rope(k_pe[:2], positions[:2], cos, sin, is_neox=is_neox)
    keys = torch.cat([turned_k, k_pe[2:].double()])
    torch.testing.assert_close(got.q_out, torch.cat([q_nope.double(), turned_q], -1), **CLOSE)
    torch.testing.assert_close(got.decode_q_pe, turned_q[:num_decode_tokens], **CLOSE)
    torch.testing.assert_close(got.k_pe, keys, **CLOSE)
    assert got.q_nope_zeros.shape == (num_decode_tokens, 4, 6)
    assert (got.q_nope_zeros == 0).all()
    rows = to_fp8(torch.cat([k_nope.double(), keys], dim=-1).float() * 2)
    for slot in range(8):
        token = {6: 0, 0: 2, 3: 3}.get(slot)
        assert same_bits(got.cache[slot], cache[slot] if token is None else rows[token])


# --- per-head caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8_e4m3"])
def test_reshape_and_cache_flash(rng, cache_dtype):
    key, value = draw(rng, 3, 2, 8), draw(rng, 3, 2, 4)
    k_cache, v_cache = store(draw(rng, 3, 4, 2, 8), "bf16"), store(draw(rng, 3, 4, 2, 4), "bf16")
    k_cache, v_cache = store(k_cache, cache_dtype), store(v_cache, cache_dtype)
    k_after, v_after = reshape_and_cache_flash(
        key,
        value,
        k_cache,
        v_cache,
        torch.tensor([9, -1, 2]),
        cache_dtype=cache_dtype,
        k_scale=0.5,
        v_scale=0.25,
    )
    for cache, after, x, scale in [(k_cache, k_after, key, 0.5), (v_cache, v_after, value, 0.25)]:
        expected = cache.clone()
        expected[2, 1], expected[0, 2] = store(x, cache_dtype, scale)[[0, 2]]
        assert same_bits(after, expected)


@pytest.mark.parametrize("is_value_shuffled", [False, True])
def test_reshape_and_cache_index_formulas(rng, is_value_shuffled):
    """Key element d of offset o is at (d // x) * bs * x + o * x + d % x, and so on."""
    pages, heads, dim, page_size, x = 2, 2, 16, 16, 8
    key, value = draw(rng, 3, heads, dim).bfloat16(), draw(rng, 3, heads, dim).bfloat16()
    slots = torch.tensor([19, -1, 0])
    k_cache = torch.full((pages, heads, dim // x, page_size, x), 9.0).bfloat16()
    v_shape = (page_size // x, dim, x) if is_value_shuffled else (dim, page_size)
    v_cache = torch.full((pages, heads, *v_shape), 9.0).bfloat16()
    k_after, v_after = reshape_and_cache(
        key,
        value,
        k_cache,
        v_cache,
        slots,
        cache_dtype="bf16",
        **({"is_value_shuffled": True} if is_value_shuffled else {}),
    )
    flat_k, flat_v = k_after.reshape(pages, heads, -1), v_after.reshape(pages, heads, -1)
    for token, (page, o) in {0: (1, 3), 2: (0, 0)}.items():
        for d in range(dim):
            k_at = (d // x) * page_size * x + o * x + d % x
            v_at = (o // x) * dim * x + d * x + o % x if is_value_shuffled else d * page_size + o
            assert torch.equal(flat_k[page, :, k_at], key[token, :, d])
            assert torch.equal(flat_v[page, :, v_at], value[token, :, d])
    assert (k_after != 9.0).sum() <= 2 * heads * dim
    assert (v_after != 9.0).sum() <= 2 * heads * dim
    assert (k_cache == 9.0).all()


# --- quantising writers ------------------------------------------------------------------------


def test_per_token_quant_has_one_scale_for_each_head_of_each_token(rng):
    x = draw(rng, 3, 2, 8) * torch.tensor([1.0, 1e2, 1e-2])[:, None, None]
    x[:, 1] *= 1e3
    stored, scales = per_token_quant(x)
    torch.testing.assert_close(scales, x.abs().amax(dim=-1) / 448)
    assert (stored.float().abs().amax(dim=-1) == 448).all()
    back = dequantize_per_token(stored, scales)
    # Half a step of three mantissa bits, relative to the largest element.
    assert ((back - x).abs() <= x.abs().amax(-1, keepdim=True) / 16).all()


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_indexer_k_quant(rng, scale_format):
    k = draw(rng, 4, 256)
    k[1] = 0.0
    stored, scales = indexer_k_quant(k, scale_format=scale_format)
    for token in range(4):
        for group, part in enumerate(k[token].split(128)):
            scale = part.abs().max().clamp(min=1e-4) / 448
            if scale_format == "ue8m0":
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            assert scales[token, group] == scale
            assert same_bits(stored[token].split(128)[group], to_fp8(part / scale))


def test_norm_rope_normalises_then_turns_the_tail(rng):
    x, weight = draw(rng, 3, 2, 12).double(), draw(rng, 12).double()
    cos, sin = rope_tables(10, 4)
    positions = torch.tensor([2, 0, 9])
    got = norm_rope(x, weight, positions, cos, sin, eps=0.1)
    normed = x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(got[..., :8], normed[..., :8], **CLOSE)
    tail = rope(normed[..., 8:], positions, cos, sin, is_neox=False)
    torch.testing.assert_close(got[..., 8:], tail, **CLOSE)
    ones = norm_rope(x, torch.ones(12), positions, cos, sin, eps=0.1)
    assert torch.equal(norm_rope(x, None, positions, cos, sin, eps=0.1), ones)


def test_norm_rope_group_quant(rng):
    x, weight = draw(rng, 3, 512), draw(rng, 512)
    cos, sin = rope_tables(10, 64)
    args = (x, weight, torch.tensor([2, 0, 9]), cos, sin)
    nope, scales, pe = norm_rope_group_quant(*args, eps=1e-6)
    rows = norm_rope(*args, eps=1e-6)
    assert torch.equal(pe, rows[:, 448:].bfloat16())
    for token in range(3):
        for group, part in enumerate(rows[token, :448].float().split(64)):
            scale = 2.0 ** torch.ceil(torch.log2((part.abs().max() / 448).clamp(min=1e-4)))
            assert scales[token, group] == scale
            assert same_bits(nope[token].split(64)[group], to_fp8(part / scale))


@pytest.mark.parametrize("is_neox", [True, False])
def test_inverse_rope_group_quant_turns_back(rng, is_neox):
    cos, sin = rope_tables(10, 8)
    positions = torch.tensor([5, 9])
    plain = draw(rng, 2, 4, 64).double()
    turned = plain.clone()
    turned[..., 56:] = rope(plain[..., 56:], positions, cos, sin, is_neox=is_neox)
    stored, scales = inverse_rope_group_quant(
        turned, positions, cos, sin, num_groups=2, **({"is_neox": True} if is_neox else {})
    )
    assert stored.shape == (2, 2, 128)
    assert scales.shape == (2, 2, 1)
    back = (stored.double() * scales.double()).view(2, 4, 64)
    # Scales are rounded up to powers of two, so a step is at most 1/8 of the largest element.
    assert ((back - plain).abs() <= plain.abs().amax() / 8).all()
    assert not torch.allclose(back[..., 56:], turned[..., 56:], atol=0.3)
