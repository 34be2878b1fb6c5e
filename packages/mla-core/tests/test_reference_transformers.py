"""The truth against the DeepSeek implementations of Hugging Face transformers.

Their attention expands every head's keys and values and rotates in its own element order; ours
stays absorbed. Both start from the same hidden states and weights.
"""

from __future__ import annotations

import pytest
import torch

from mla_core.reference import attention
from mla_core.reference.norm import rms_norm
from mla_core.reference.prefill import absorb_query, project_output, split_kv_b_proj
from mla_core.reference.rope import rope, rope_tables, yarn_mscale

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="module")
def deepseek_v3():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    return modeling_deepseek_v3


def test_half_split_rotation_is_theirs(rng, deepseek_v3):
    q, k = draw(rng, 1, 3, 5, 8), draw(rng, 1, 1, 5, 8)
    cos, sin = rope_tables(9, 8)
    positions = torch.tensor([3, 1, 8, 0, 4])
    both = [torch.cat([table, table], dim=-1)[positions][None] for table in (cos, sin)]
    theirs = deepseek_v3.apply_rotary_pos_emb(q, k, *both)
    for x, expected in zip((q, k), theirs, strict=True):
        ours = rope(x[0].transpose(0, 1), positions, cos, sin, is_neox=True)
        torch.testing.assert_close(ours.transpose(0, 1), expected[0], **CLOSE)


def test_adjacent_rotation_is_theirs_up_to_element_order(rng, deepseek_v3):
    """Their interleaved form returns the even elements of all pairs, then the odd ones."""
    q, k = draw(rng, 1, 3, 5, 8), draw(rng, 1, 1, 5, 8)
    cos, sin = rope_tables(9, 8)
    positions = torch.tensor([3, 1, 8, 0, 4])
    both = [torch.cat([table, table], dim=-1)[positions][None] for table in (cos, sin)]
    theirs = deepseek_v3.apply_rotary_pos_emb_interleave(q, k, *both)
    for x, expected in zip((q, k), theirs, strict=True):
        ours = rope(x[0].transpose(0, 1), positions, cos, sin, is_neox=False).transpose(0, 1)
        ours = torch.cat([ours[..., 0::2], ours[..., 1::2]], dim=-1)
        torch.testing.assert_close(ours, expected[0], **CLOSE)


def test_adjacent_rotation_is_the_complex_product_of_v2(rng):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    q, k = draw(rng, 1, 3, 5, 8).float(), draw(rng, 1, 1, 5, 8).float()
    cos, sin = rope_tables(5, 8, dtype=torch.float32)
    theirs = apply_rotary_emb(q, k, torch.complex(cos, sin)[None])
    for x, expected in zip((q, k), theirs, strict=True):
        ours = rope(x[0].transpose(0, 1), torch.arange(5), cos, sin, is_neox=False)
        torch.testing.assert_close(ours.transpose(0, 1).float(), expected[0], **CLOSE)


def test_rms_norm_is_theirs(rng, deepseek_v3):
    norm = deepseek_v3.DeepseekV3RMSNorm(16, eps=0.1)
    with torch.no_grad():
        norm.weight.copy_(draw(rng, 16))
    x = draw(rng, 3, 16).float()
    ours, _ = rms_norm(x, norm.weight.detach(), 0.1)
    torch.testing.assert_close(ours.float(), norm(x).detach(), **CLOSE)


@pytest.mark.parametrize(("factor", "mscale"), [(0.5, 1.0), (1.0, 1.0), (40.0, 0.707), (4.0, 2.0)])
def test_yarn_mscale_is_theirs(deepseek_v3, factor, mscale):
    assert yarn_mscale(factor, mscale) == deepseek_v3.yarn_get_mscale(factor, mscale)


@pytest.mark.parametrize("rope_interleave", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("yarn_factor", [None, 4.0])
@pytest.mark.parametrize("num_new", [1, 3, 7])
def test_absorbed_attention_equals_their_eager_layer(
    rng, deepseek_v3, rope_interleave, q_lora_rank, yarn_factor, num_new
):
    """Decode the last tokens of a sequence; their layer attends to all of it at once."""
    from transformers import DeepseekV3Config

    heads, rank, nope, rope_dim, v_dim, length, theta = 3, 16, 8, 4, 6, 7, 100.0
    parameters = {"rope_type": "default", "rope_theta": theta}
    if yarn_factor is not None:
        parameters |= {"rope_type": "yarn", "factor": yarn_factor, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rank,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope_dim,
        v_head_dim=v_dim,
        rope_interleave=rope_interleave,
        rope_parameters=parameters,
        attn_implementation="eager",
    )
    layer = deepseek_v3.DeepseekV3Attention(config, 0).double().eval()
    hidden = draw(rng, 1, length, 24)
    positions = torch.arange(length)
    cos, sin = rope_tables(length, rope_dim, base=theta)
    both = tuple(torch.cat([table, table], dim=-1)[None] for table in (cos, sin))
    blind = torch.ones(length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        # Norm weights are ones at birth, which would hide a forgotten one.
        for name, weight in layer.named_parameters():
            if "layernorm" in name:
                weight.copy_(draw(rng, *weight.shape))
        expected, _ = layer(
            hidden, both, torch.zeros(1, 1, length, length).double().masked_fill(blind, -1e30)
        )
        if q_lora_rank is None:
            q = layer.q_proj(hidden[0])
        else:
            low, _ = rms_norm(
                layer.q_a_proj(hidden[0]),
                layer.q_a_layernorm.weight,
                layer.q_a_layernorm.variance_epsilon,
            )
            q = layer.q_b_proj(low)
        q = q.view(length, heads, nope + rope_dim)
        latent, k_pe = layer.kv_a_proj_with_mqa(hidden[0]).split([rank, rope_dim], dim=-1)
        kv_c, _ = rms_norm(
            latent, layer.kv_a_layernorm.weight, layer.kv_a_layernorm.variance_epsilon
        )
        w_uk, w_uv = split_kv_b_proj(layer.kv_b_proj.weight, heads, nope, v_dim)
        q_pe, k_pe = (
            rope(x, positions, cos, sin, is_neox=not rope_interleave) for x in (q[..., nope:], k_pe)
        )
        sm_scale = (nope + rope_dim) ** -0.5
        if yarn_factor is not None:
            sm_scale *= yarn_mscale(yarn_factor) ** 2
        out, _ = attention.decode(
            absorb_query(q[-num_new:, :, :nope], w_uk),
            q_pe[-num_new:],
            [kv_c],
            [k_pe],
            [0, num_new],
            sm_scale=sm_scale,
        )
        ours = layer.o_proj(project_output(out, w_uv).flatten(1))
    # Their softmax runs in fp32 whatever the inputs are.
    torch.testing.assert_close(ours, expected[0, -num_new:], rtol=1e-4, atol=1e-5)
