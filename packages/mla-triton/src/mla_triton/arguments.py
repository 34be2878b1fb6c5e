"""Kernel arguments that follow from a cache's layout and widths."""

from __future__ import annotations

import math
from typing import TypeGuard

import torch

from mla_core.cache import LatentCache
from mla_core.plan import AttentionOptions


def scales_of(cache: LatentCache) -> torch.Tensor | None:
    """Return the scales a kernel reads: one for the cache, those in its pages, or none."""
    kind = cache.layout.scale_kind
    return cache.scale if kind in ("none", "per_tensor") else cache.field("kv_c_scale")


def scale_strides(kv_scale: torch.Tensor | None) -> tuple[int, ...]:
    """Return page and token strides of scales in the page, zeros without such."""
    return kv_scale.stride()[:2] if _is_in_page(kv_scale) else (0, 0)


def kernel_constants(
    options: AttentionOptions,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_scale: torch.Tensor | None,
) -> dict[str, int]:
    """Return the constants of a decode kernel that follow from the cache and the options."""
    kv_lora_rank, rope = kv_c.shape[2], k_pe.shape[2]
    block_d, scale_group = power_of_two(kv_lora_rank), 0
    if _is_in_page(kv_scale):
        groups = kv_scale.shape[-1]
        # One scale per token covers the padding of the latent as well.
        scale_group = block_d if groups == 1 else kv_lora_rank // groups
    return {
        "D": kv_lora_rank,
        "R": rope,
        "BLOCK_D": block_d,
        "BLOCK_R": power_of_two(rope),
        "PAGE_SIZE": kv_c.shape[1],
        "LATENT_ALIGN": alignment_of(kv_c),
        "SCALE_GROUP": scale_group,
        "HAS_KV_SCALE": kv_scale is not None and not scale_group,
        "IS_CAUSAL": options.causal,
        "HAS_CP": options.cp_world_size > 1,
        "HAS_SOFTCAP": options.softcap > 0,
        "HAS_WINDOW": options.window is not None,
    }


def _is_in_page(kv_scale: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether scales stand beside the rows, and not one for the whole cache."""
    return kv_scale is not None and kv_scale.ndim > 1


def alignment_of(rows: torch.Tensor) -> int:
    """Return what page and token strides are multiples of, if less than the 16 Triton looks for."""
    divisor = math.gcd(16, *rows.stride()[:2])
    return 1 if divisor == 16 else divisor


def power_of_two(width: int) -> int:
    """Round up to a power of two that a matrix instruction's K dimension takes."""
    return max(16, 1 << (width - 1).bit_length()) if width else 16
