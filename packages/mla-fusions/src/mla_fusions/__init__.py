"""Operations around MLA attention in Triton: cache writes with and without RoPE, products, norms.

Installing the package is enough: `mla_core` finds it through its entry point. Importing it loads no
Triton. `torch.compile` calls the ops as they are, between the graphs of what is around them.
"""

from mla_fusions.__about__ import __version__
from mla_fusions.absorbed import (
    batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant,
    batched_gemm_a16wfp4,
    batched_gemm_a16wnvfp4,
    batched_gemm_afp4wfp4,
    batched_gemm_afp4wfp4_pre_quant,
    batched_gemm_bf16,
)
from mla_fusions.absorbed_rope import (
    fused_bf16_bmm_rope_cat_and_cache_mla,
    fused_fp4_bmm_rope_cat_and_cache_mla,
    fused_fp8_bmm_rope_cat_and_cache_mla,
    fused_nvfp4_bmm_rope_cat_and_cache_mla,
)
from mla_fusions.head_writers import (
    reshape_and_cache,
    reshape_and_cache_flash,
    reshape_and_cache_with_block_quant,
    reshape_and_cache_with_block_quant_for_asm_pa,
    reshape_and_cache_with_pertoken_quant,
)
from mla_fusions.indexer_writers import (
    indexer_k_quant_and_cache,
    indexer_qk_rope_quant_and_cache,
)
from mla_fusions.joined import fused_qk_cat, fused_qk_rope_cat
from mla_fusions.key_writers import cat_and_cache_mla
from mla_fusions.latent_writers import concat_and_cache_mla, concat_and_cache_mla_seg
from mla_fusions.layer import MLAEpilogue, MLAPrologue
from mla_fusions.norm_writers import (
    fused_kv_norm_rope_group_quant,
    fused_kv_norm_rope_write_kv_cache,
)
from mla_fusions.norms import (
    fused_qk_rmsnorm,
    fused_qk_rmsnorm_group_quant,
    fused_qk_rmsnorm_per_token_quant,
)
from mla_fusions.rope_head_writers import (
    fused_qk_rope_cosine_cache_llama,
    fused_qk_rope_reshape_and_cache,
)
from mla_fusions.rope_writers import (
    fused_qk_rope_cat_and_cache_mla,
    fused_qk_rope_concat_and_cache_mla,
    fused_qk_rope_concat_and_cache_mla_seg,
    fused_qk_rope_write_kv_cache,
)

__all__ = [
    "MLAEpilogue",
    "MLAPrologue",
    "__version__",
    "batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant",
    "batched_gemm_a16wfp4",
    "batched_gemm_a16wnvfp4",
    "batched_gemm_afp4wfp4",
    "batched_gemm_afp4wfp4_pre_quant",
    "batched_gemm_bf16",
    "cat_and_cache_mla",
    "concat_and_cache_mla",
    "concat_and_cache_mla_seg",
    "fused_bf16_bmm_rope_cat_and_cache_mla",
    "fused_fp4_bmm_rope_cat_and_cache_mla",
    "fused_fp8_bmm_rope_cat_and_cache_mla",
    "fused_kv_norm_rope_group_quant",
    "fused_kv_norm_rope_write_kv_cache",
    "fused_nvfp4_bmm_rope_cat_and_cache_mla",
    "fused_qk_cat",
    "fused_qk_rmsnorm",
    "fused_qk_rmsnorm_group_quant",
    "fused_qk_rmsnorm_per_token_quant",
    "fused_qk_rope_cat",
    "fused_qk_rope_cat_and_cache_mla",
    "fused_qk_rope_concat_and_cache_mla",
    "fused_qk_rope_concat_and_cache_mla_seg",
    "fused_qk_rope_cosine_cache_llama",
    "fused_qk_rope_reshape_and_cache",
    "fused_qk_rope_write_kv_cache",
    "indexer_k_quant_and_cache",
    "indexer_qk_rope_quant_and_cache",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "reshape_and_cache_with_block_quant",
    "reshape_and_cache_with_block_quant_for_asm_pa",
    "reshape_and_cache_with_pertoken_quant",
]
