"""Reading cached rows as fp32, whatever the layout."""

from __future__ import annotations

import torch

from mla_core.cache import LatentCache


def read_rows(cache: LatentCache, slots: torch.Tensor) -> torch.Tensor:
    """Gather rows ``kv_c ‖ k_pe`` as fp32.

    Parameters
    ----------
    slots : [N], int64
        Physical slots; a negative one gives a row of zeros.

    Returns
    -------
    rows : [N, latent_dim], fp32
    """
    kv_c, k_pe = cache.read(slots, torch.float32)
    return torch.cat((kv_c, k_pe), dim=1)


def query_rows(
    ql_nope: torch.Tensor, q_pe: torch.Tensor, scale: float, q_scale: torch.Tensor | None
) -> torch.Tensor:
    """Join, upcast and scale the two query halves: [T, H, latent_dim] fp32."""
    queries = torch.cat((ql_nope.float(), q_pe.float()), dim=-1)
    queries *= scale
    return queries if q_scale is None else queries * q_scale.float()
