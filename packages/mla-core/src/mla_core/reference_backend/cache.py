"""Cache writes in plain torch."""

from __future__ import annotations

import torch

from mla_core.cache import LatentCache


def write_kv_cache(
    kv_c: torch.Tensor, k_pe: torch.Tensor, cache: LatentCache, slots: torch.Tensor
) -> None:
    """Pack rows into their slots; see `mla_core.write_kv_cache`."""
    cache.write(kv_c, k_pe, slots)
