"""Kernel arguments that follow from a cache's layout and widths."""

from __future__ import annotations

import math

import torch

from mla_core.cache import LatentCache


def scales_of(cache: LatentCache) -> torch.Tensor | None:
    """Return the scales a kernel reads: one for the cache, those in its pages, or none."""
    kind = cache.layout.scale_kind
    return cache.scale if kind in ("none", "per_tensor") else cache.field("kv_c_scale")


def scale_group_of(
    kv_scale: torch.Tensor | None, kv_lora_rank: int, block_d: int
) -> tuple[int, tuple[int, ...]]:
    """Return how many latent elements share a scale in the page, and its page and token strides.

    The group is 0 when there are no scales in the page. One scale per token covers the padding of
    the latent to ``block_d`` as well.
    """
    if kv_scale is None or kv_scale.ndim == 1:
        return 0, (0, 0)
    groups = kv_scale.shape[-1]
    return block_d if groups == 1 else kv_lora_rank // groups, kv_scale.stride()[:2]


def alignment_of(rows: torch.Tensor) -> int:
    """Return what page and token strides are multiples of, if less than the 16 Triton looks for."""
    divisor = math.gcd(16, *rows.stride()[:2])
    return 1 if divisor == 16 else divisor


def power_of_two(width: int) -> int:
    """Round up to a power of two that a matrix instruction's K dimension takes."""
    return max(16, 1 << (width - 1).bit_length()) if width else 16
