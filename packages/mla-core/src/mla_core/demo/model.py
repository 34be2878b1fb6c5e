"""A small model of DeepSeek-V3's architecture, in transformers' own implementation."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, set_seed

from mla_core import registry
from mla_core.integrations.transformers import enable


@dataclass(frozen=True)
class Size:
    """What distinguishes one demo model from another; the rest is fixed in `config_of`."""

    num_layers: int
    hidden_size: int
    num_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    vocab_size: int


#: ``small`` has DeepSeek-V3's own attention widths; ``tiny`` is for tests.
SIZES = {
    "small": Size(4, 512, 16, 512, 64, 128, 128, 1024),
    "tiny": Size(2, 128, 4, 64, 16, 32, 32, 320),
}


_NUM_EXPERTS = 8


def config_of(size: Size, dtype: torch.dtype) -> DeepseekV3Config:
    """Return transformers' configuration of a size.

    In bf16 every token visits every expert: rounding tips near ties of the router over, and such a
    jump in the logits would say nothing about attention.
    """
    return DeepseekV3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        moe_intermediate_size=size.hidden_size // 2,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        kv_lora_rank=size.kv_lora_rank,
        q_lora_rank=size.hidden_size // 2,
        qk_rope_head_dim=size.qk_rope_head_dim,
        qk_nope_head_dim=size.qk_nope_head_dim,
        v_head_dim=size.v_head_dim,
        n_routed_experts=_NUM_EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2 if dtype == torch.float32 else _NUM_EXPERTS,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=32768,
        # Large enough that attention weights differ clearly from token to token; with the usual
        # 0.02 a small random model attends almost uniformly, and errors would hide.
        initializer_range=0.06,
        attn_implementation="eager",
    )


def build_pair(
    size: Size, seed: int, device: str, dtype: torch.dtype, *, fused: bool = False
) -> tuple[DeepseekV3ForCausalLM, DeepseekV3ForCausalLM]:
    """Return two models with one set of random weights: ours attends through mla_core.

    Parameters
    ----------
    fused : bool
        Whether what surrounds attention in ours runs through mla-fusions.

    Returns
    -------
    ours, eager : DeepseekV3ForCausalLM
    """
    set_seed(seed)
    config = config_of(size, dtype)
    eager = DeepseekV3ForCausalLM(config).to(device=device, dtype=dtype).eval()
    ours = DeepseekV3ForCausalLM(copy.deepcopy(config)).to(device=device, dtype=dtype).eval()
    ours.load_state_dict(eager.state_dict(), assign=True)
    prepare = registry.record("fusions").require().integration("transformers") if fused else enable
    prepare(ours)
    return ours, eager
