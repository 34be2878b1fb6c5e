"""Dense decode in plain torch: one online softmax per request."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mla_core.batch import PagedKV
from mla_core.plan import AttentionOptions, DecodePlan, PlanRequest, Schedule
from mla_core.reference_backend.attend import MAX_QUERY_ROWS, TILE, attend
from mla_core.reference_backend.rows import query_rows, read_rows

_SCHEDULE = Schedule(
    kernel="torch_online_softmax",
    because="one pass per request, no split",
    config={"TILE": TILE},
)


def plan_decode(request: PlanRequest) -> Schedule:
    """Every problem gets the same schedule: requests one after another, nothing split."""
    del request
    return _SCHEDULE


def decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    *,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sink: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    global_kv_lens: torch.Tensor | None = None,
) -> None:
    """Write ``out`` and ``lse`` for every query token; see `mla_core.decode`.

    Notes
    -----
    Reads lengths on the host, so on a GPU it waits for the device and cannot be captured.
    """
    num_heads, value_dim = plan.dims.num_heads, plan.dims.value_dim
    queries = query_rows(ql_nope, q_pe, sm_scale, q_scale)
    slots = kv.token_slots()
    kv_lens = kv.seq_lens.tolist()
    global_lens = kv_lens if global_kv_lens is None else global_kv_lens.tolist()
    q_bounds = plan.qo_indptr.tolist()
    tokens_at_once = max(1, MAX_QUERY_ROWS // num_heads)
    for b, kv_len in enumerate(kv_lens):
        q_begin, q_end = q_bounds[b], q_bounds[b + 1]
        for first in range(q_begin, q_end, tokens_at_once):
            last = min(first + tokens_at_once, q_end)
            # Key positions each query token may see: below `limit`, not below `start`.
            distance = torch.arange(q_end - 1 - first, q_end - 1 - last, -1, device=out.device)
            block_out, block_lse = attend(
                queries[first:last].flatten(0, 1),
                _tiles(kv, slots[b, :kv_len], global_lens[b], distance, num_heads, plan.options),
                value_dim=value_dim,
                softcap=plan.options.softcap,
                sink=None if sink is None else sink.float().repeat(last - first),
            )
            out[first:last] = block_out.view(last - first, num_heads, value_dim).to(out.dtype)
            if lse is not None:
                lse[first:last] = block_lse.view(last - first, num_heads)


def _tiles(
    kv: PagedKV,
    slots: torch.Tensor,
    global_len: int,
    distance: torch.Tensor,
    num_heads: int,
    options: AttentionOptions,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield rows with their visibility; ``distance`` counts query tokens behind each query."""
    hides_some = bool((slots < 0).any())
    position = torch.arange(slots.numel(), device=slots.device)
    position = position * options.cp_world_size + options.cp_rank
    query_position = global_len - 1 - distance
    needs_limit = options.causal and (distance.numel() > 1 or options.cp_world_size > 1)
    for begin in range(0, slots.numel(), TILE):
        tile_slots = slots[begin : begin + TILE]
        keys = position[begin : begin + TILE]
        visible = None
        if needs_limit or options.window is not None or hides_some:
            visible = (tile_slots >= 0).expand(distance.numel(), -1)
            if options.causal:
                visible = visible & (keys <= query_position[:, None])
            if options.window is not None:
                visible = visible & (keys > query_position[:, None] - options.window)
            visible = visible.repeat_interleave(num_heads, dim=0)
        yield read_rows(kv.cache, tile_slots), visible
