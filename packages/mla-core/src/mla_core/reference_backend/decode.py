"""Dense decode in plain torch: one online softmax per request."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mla_core.batch import PagedKV
from mla_core.plan import AttentionOptions, DecodePlan, PlanRequest, Schedule
from mla_core.reference_backend import fused
from mla_core.reference_backend.attend import MAX_QUERY_ROWS, TILE, attend
from mla_core.reference_backend.rope import NewestKeys, newest_keys, rotate_queries
from mla_core.reference_backend.rows import query_rows, read_rows
from mla_core.rope import RopeInputs

_KERNEL = "torch_online_softmax"


def plan_decode(request: PlanRequest) -> Schedule:
    """Take requests one after another, nothing split; on the CPU with torch's fused kernel."""
    return Schedule(
        kernel=_KERNEL,
        because="one pass per request, no split",
        config={"TILE": TILE, "FUSED": int(fused.applies(request))},
    )


@torch.no_grad()
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
    rope: RopeInputs | None = None,
) -> None:
    """Write ``out`` and ``lse`` for every query token; see `mla_core.decode`.

    Notes
    -----
    Reads lengths on the host, so on a GPU it waits for the device and cannot be captured.
    """
    num_heads, value_dim = plan.dims.num_heads, plan.dims.value_dim
    fused_rope = plan.options.rope
    if rope is not None and fused_rope is not None:
        q_pe = rotate_queries(q_pe, fused_rope, rope)
    queries = query_rows(ql_nope, q_pe, sm_scale, q_scale)
    slots = kv.token_slots()
    kv_lens = kv.seq_lens.tolist()
    global_lens = kv_lens if global_kv_lens is None else global_kv_lens.tolist()
    q_bounds = plan.qo_indptr.tolist()
    is_fused = bool(plan.schedule.config["FUSED"])
    max_query_rows = fused.MAX_QUERY_ROWS if is_fused else MAX_QUERY_ROWS
    tokens_at_once = max(1, max_query_rows // num_heads)
    written: list[NewestKeys] = []
    plain_queries = torch.cat((ql_nope, q_pe), dim=-1) if is_fused else None
    for b, kv_len in enumerate(kv_lens):
        q_begin, q_end = q_bounds[b], q_bounds[b + 1]
        newest = None
        if rope is not None:
            newest = newest_keys(
                kv, slots[b, :kv_len], q_begin, q_end, global_lens[b], plan.options, rope
            )
            written.append(newest)
        for first in range(q_begin, q_end, tokens_at_once):
            last = min(first + tokens_at_once, q_end)
            distance = torch.arange(q_end - 1 - first, q_end - 1 - last, -1, device=out.device)
            request_slots = slots[b, :kv_len]
            num_common, result = 0, None
            if plain_queries is not None:
                # The fused kernel reads the cache, where the newest keys are not rotated.
                common = fused.common_slots(
                    q_end - 1 - first,
                    request_slots,
                    plan.options,
                    0 if newest is None else kv_len - newest.first,
                )
                num_common = common.numel()
                result = fused.attend_fused(
                    plain_queries[first:last].flatten(0, 1),
                    kv,
                    common,
                    sm_scale=sm_scale,
                    value_dim=value_dim,
                )
            if result is None or num_common < kv_len or sink is not None:
                rest = _tiles(
                    kv,
                    request_slots,
                    num_common,
                    global_lens[b],
                    distance,
                    num_heads,
                    plan.options,
                    newest,
                )
                result = attend(
                    queries[first:last].flatten(0, 1),
                    rest,
                    value_dim=value_dim,
                    softcap=plan.options.softcap,
                    sink=None if sink is None else sink.float().repeat(last - first),
                    start=result,
                )
            block_out, block_lse = result
            out[first:last] = block_out.view(last - first, num_heads, value_dim).to(out.dtype)
            if lse is not None:
                lse[first:last] = block_lse.view(last - first, num_heads)
    if fused_rope is not None and fused_rope.write_back and written:
        kv.cache.write_rope(
            torch.cat([newest.rotated for newest in written]),
            torch.cat([newest.slots for newest in written]),
        )


def _tiles(
    kv: PagedKV,
    slots: torch.Tensor,
    first_key: int,
    global_len: int,
    distance: torch.Tensor,
    num_heads: int,
    options: AttentionOptions,
    newest: NewestKeys | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield rows from ``first_key`` on with their visibility.

    ``distance`` counts the query tokens behind each query.
    """
    hides_some = bool((slots < 0).any())
    position = torch.arange(slots.numel(), device=slots.device)
    position = position * options.cp_world_size + options.cp_rank
    query_position = global_len - 1 - distance
    needs_limit = options.causal and (distance.numel() > 1 or options.cp_world_size > 1)
    for begin in range(first_key, slots.numel(), TILE):
        tile_slots = slots[begin : begin + TILE]
        keys = position[begin : begin + TILE]
        visible = None
        if needs_limit or options.window is not None or hides_some:
            visible = (tile_slots >= 0).expand(distance.numel(), -1)
            if options.causal:
                visible = visible & (keys <= query_position[:, None])
            if options.window is not None:
                visible = visible & (keys > query_position[:, None] - options.window)
            # A row that no query sees may hold NaN, which a weight of 0 would let through.
            tile_slots = torch.where(visible.any(dim=0), tile_slots, -1)
            visible = visible.repeat_interleave(num_heads, dim=0)
        rows = read_rows(kv.cache, tile_slots)
        if newest is not None:
            newest.overlay(rows, begin, tile_slots >= 0)
        yield rows, visible
