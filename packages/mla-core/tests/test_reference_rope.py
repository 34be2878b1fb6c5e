"""Rotation against complex multiplication, and the forms its tables come in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core.errors import LayoutError
from mla_core.reference.rope import rope, rope_tables, split_cos_sin_cache, yarn_mscale

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def complex_rope(x, positions, is_neox, base=10000.0):
    """Multiply each pair, read as a complex number, by exp(i * position * frequency)."""
    dim = x.shape[-1]
    frequency = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angle = positions.double()[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    turn = turn.reshape(len(positions), *(1,) * (x.dim() - 2), dim // 2)
    if is_neox:
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


@settings(deadline=None, max_examples=40)
@given(
    half=st.integers(1, 6),
    rest=st.integers(0, 3),
    tokens=st.integers(0, 4),
    heads=st.none() | st.integers(1, 3),
    offset=st.integers(0, 5),
    is_neox=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rope_is_complex_multiplication(half, rest, tokens, heads, offset, is_neox, seed):
    rng = torch.Generator().manual_seed(seed)
    rotary_dim = 2 * half
    shape = (tokens, rotary_dim + rest) if heads is None else (tokens, heads, rotary_dim + rest)
    x = draw(rng, *shape)
    positions = torch.randint(0, 20, (tokens,), generator=rng)
    cos, sin = rope_tables(25, rotary_dim)
    got = rope(x, positions, cos, sin, is_neox=is_neox, rotary_dim=rotary_dim, offset=offset)
    expected = complex_rope(x[..., :rotary_dim].contiguous(), positions + offset, is_neox)
    torch.testing.assert_close(got[..., :rotary_dim], expected, **CLOSE)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("is_neox", [False, True])
def test_a_rotation_may_start_anywhere_in_the_row(rng, is_neox):
    x, positions = draw(rng, 4, 3, 11), torch.tensor([3, 0, 7, 3])
    cos, sin = rope_tables(8, 6)
    got = rope(x, positions, cos, sin, is_neox=is_neox, rotary_dim=6, dim_offset=3)
    assert torch.equal(got[..., :3], x[..., :3])
    assert torch.equal(got[..., 9:], x[..., 9:])
    inner = rope(x[..., 3:9], positions, cos, sin, is_neox=is_neox)
    assert torch.equal(got[..., 3:9], inner)
    with pytest.raises(LayoutError, match=r"must be an even number in 0\.\.8, got 10"):
        rope(x, positions, *rope_tables(8, 10), is_neox=is_neox, rotary_dim=10, dim_offset=3)
    with pytest.raises(LayoutError, match=r"dim_offset must be in 0\.\.11, got 12"):
        rope(x, positions, cos, sin, is_neox=is_neox, dim_offset=12)


def test_quarter_turn_by_hand():
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    x, at = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0])
    neox = rope(x, at, cos, sin, is_neox=True)
    gptj = rope(x, at, cos, sin, is_neox=False)
    assert neox.tolist() == [[-3.0, -4.0, 1.0, 2.0]]
    assert gptj.tolist() == [[-2.0, 1.0, -4.0, 3.0]]


@pytest.mark.parametrize("is_neox", [True, False])
def test_full_tables_are_read_column_for_column(rng, is_neox):
    x, positions = draw(rng, 3, 2, 6), torch.tensor([4, 0, 2])
    cos, sin = draw(rng, 5, 6), draw(rng, 5, 6)
    got = rope(x, positions, cos, sin, is_neox=is_neox)
    pair_of = [(i, i + 3) for i in range(3)] if is_neox else [(i, i + 1) for i in (0, 2, 4)]
    for t, position in enumerate(positions.tolist()):
        for a, b in pair_of:
            c, s = cos[position], sin[position]
            expected_a = x[t, :, a] * c[a] - x[t, :, b] * s[a]
            expected_b = x[t, :, b] * c[b] + x[t, :, a] * s[b]
            torch.testing.assert_close(got[t, :, a], expected_a, **CLOSE)
            torch.testing.assert_close(got[t, :, b], expected_b, **CLOSE)


@pytest.mark.parametrize("is_neox", [True, False])
def test_full_tables_made_from_half_tables_agree(rng, is_neox):
    x, positions = draw(rng, 4, 6), torch.arange(4)
    cos, sin = rope_tables(4, 6)
    columns = [0, 1, 2, 0, 1, 2] if is_neox else [0, 0, 1, 1, 2, 2]
    half = rope(x, positions, cos, sin, is_neox=is_neox)
    full = rope(x, positions, cos[:, columns], sin[:, columns], is_neox=is_neox)
    assert torch.equal(half, full)


@pytest.mark.parametrize("is_neox", [True, False])
def test_inverse_undoes_and_scores_depend_on_distance_only(rng, is_neox):
    cos, sin = rope_tables(64, 8)
    x, y = draw(rng, 8).expand(3, 8), draw(rng, 8).expand(3, 8)
    positions = torch.tensor([3, 10, 40])
    turned = rope(x, positions, cos, sin, is_neox=is_neox)
    back = rope(turned, positions, cos, sin, is_neox=is_neox, inverse=True)
    torch.testing.assert_close(back, x, **CLOSE)
    ahead = rope(y, positions, cos, sin, is_neox=is_neox, offset=7)
    scores = (turned * ahead).sum(dim=-1)
    torch.testing.assert_close(scores, scores[:1].expand(3), **CLOSE)
    assert not torch.allclose(scores, (x * y).sum(dim=-1))


def test_offset_may_differ_by_token(rng):
    x, cos_sin = draw(rng, 3, 4), rope_tables(10, 4)
    got = rope(x, torch.tensor([1, 2, 3]), *cos_sin, is_neox=True, offset=torch.tensor([4, 0, 6]))
    assert torch.equal(got, rope(x, torch.tensor([5, 2, 9]), *cos_sin, is_neox=True))


def test_zero_width_passes_through(rng):
    x = draw(rng, 2, 3, 0)
    assert rope(x, torch.tensor([0, 1]), *rope_tables(2, 0), is_neox=True).shape == (2, 3, 0)


def test_tables_and_their_combined_form():
    cos, sin = rope_tables(4, 12, base=1e6)
    assert cos.shape == (4, 6)
    assert cos[3, 0].item() == pytest.approx(math.cos(3.0))
    assert sin[3, 1].item() == pytest.approx(math.sin(0.3))
    halves = split_cos_sin_cache(torch.cat([cos, sin], dim=-1))
    assert torch.equal(halves[0], cos)
    assert torch.equal(halves[1], sin)


def test_yarn_mscale():
    assert yarn_mscale(0.5) == 1.0
    assert yarn_mscale(1.0, 3.0) == 1.0
    assert yarn_mscale(40.0) == pytest.approx(1.3688879454113936)
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1 + 0.0707 * math.log(40.0))


def test_misfits_are_refused():
    x, at = torch.zeros(1, 4), torch.tensor([0])
    with pytest.raises(LayoutError, match=r"rotary_dim must be an even number in 0\.\.4, got 3"):
        rope(x, at, torch.zeros(1, 2), torch.zeros(1, 2), is_neox=True, rotary_dim=3)
    with pytest.raises(LayoutError, match="rotary_dim must be an even number"):
        rope(x, at, torch.zeros(1, 3), torch.zeros(1, 3), is_neox=True, rotary_dim=6)
    with pytest.raises(LayoutError, match=r"cos and sin must be \[max_position, 2 or 4\]"):
        rope(x, at, torch.zeros(1, 3), torch.zeros(1, 3), is_neox=True)
    with pytest.raises(LayoutError, match="the last dimension must be even"):
        split_cos_sin_cache(torch.zeros(2, 5))
