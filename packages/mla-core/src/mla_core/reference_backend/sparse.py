"""Sparse decode in plain torch: each query token attends to its own list of slots."""

from __future__ import annotations

import torch

from mla_core.cache import LatentCache
from mla_core.checks import visible_slots
from mla_core.reference_backend.attend import TILE, attend
from mla_core.reference_backend.rows import query_rows, read_rows


@torch.no_grad()
def sparse_decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> None:
    """Write ``out`` and ``lse`` for every query token; see `mla_core.sparse_decode`."""
    queries = query_rows(ql_nope, q_pe, sm_scale, q_scale)
    slots = visible_slots(indices, cache.num_slots, topk_length)
    sink_rows = None if sink is None else sink.float()
    for t in range(queries.shape[0]):
        # Without indices `split` still gives one tile, an empty one.
        chunks = slots[t].split(TILE) if slots.shape[1] else ()
        tiles = ((read_rows(cache, tile), (tile >= 0)[None]) for tile in chunks)
        row_out, row_lse = attend(
            queries[t], tiles, value_dim=cache.dims.value_dim, softcap=softcap, sink=sink_rows
        )
        out[t] = row_out.to(out.dtype)
        if lse is not None:
            lse[t] = row_lse
