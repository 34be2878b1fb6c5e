"""Cache writes: the op of the ``fusions`` backend."""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_fusions import rows


def write_kv_cache(
    kv_c: torch.Tensor, k_pe: torch.Tensor, cache: LatentCache, slots: torch.Tensor
) -> None:
    """Write rows to their slots in one launch; see `mla_core.write_kv_cache`, which checked them.

    Slots past the end of the cache skip their token, as negative ones do.
    """
    layout, dims, page_size = cache.layout, cache.dims, cache.page_size
    spec = rows.of_layout(layout, dims, page_size, arch_of(cache.device))
    b = None if spec.b is None else rows.target_of(cache, "k_pe", k_pe)
    rows.write(spec, rows.target_of(cache, "kv_c", kv_c), b, slots, cache.num_slots)
