"""Cache writes in plain torch."""

from __future__ import annotations

import torch

from mla_core.cache import LatentCache


def write_kv_cache(
    kv_c: torch.Tensor, k_pe: torch.Tensor, cache: LatentCache, slots: torch.Tensor
) -> None:
    """Pack rows into their slots; see `mla_core.write_kv_cache`, which has checked them."""
    cache.layout.pack(
        cache.buffers, kv_c, k_pe, slots.long(), cache.dims, cache.page_size, cache.scale
    )
