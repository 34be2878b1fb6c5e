"""Attention to keys that every query sees, through torch's fused CPU kernel.

Most cached tokens of a decode batch are seen by all its query rows. For them no mask is needed,
and the rows can stay in their own dtype: `attend_fused` takes those, and `attend` continues with
the few that are left.
"""

from __future__ import annotations

import torch

from mla_core.batch import PagedKV
from mla_core.plan import AttentionOptions, PlanRequest

#: Most query rows attended at once: the results of all parts are kept until they are merged.
MAX_QUERY_ROWS = 1024

#: Most cached rows of one share: few enough to stay in a core's cache, and enough of them that
#: merging costs nothing.
SHARE_ROWS = 2048

_FLOATS = frozenset({"bf16", "fp16", "fp32"})


def applies(request: PlanRequest) -> bool:
    """Whether a problem has plain rows on the CPU in the dtype of the queries, and no soft cap."""
    problem = request.problem
    return (
        problem.arch == "cpu"
        and problem.layout == "standard"
        and problem.q_dtype == problem.kv_dtype
        and problem.q_dtype in _FLOATS
        and not request.options.softcap
        # A private operator: a release without it takes the plain path.
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def common_slots(
    distance: int, slots: torch.Tensor, options: AttentionOptions, num_rotated: int = 0
) -> torch.Tensor:
    """Return the leading slots of a request that its query tokens all see; none if in doubt.

    ``distance`` is the number of query tokens behind the first; ``num_rotated`` of the newest keys
    are not in the cache as the queries see them. The number of slots is a multiple of torch's
    threads, so that `attend_fused` can share them out.
    """
    is_plain = options.window is None and options.cp_world_size == 1
    if not is_plain or bool((slots < 0).any()):
        return slots[:0]
    hidden = max(distance if options.causal else 0, num_rotated)
    count = max(slots.numel() - hidden, 0)
    return slots[: count - count % torch.get_num_threads()]


def attend_fused(
    queries: torch.Tensor, kv: PagedKV, slots: torch.Tensor, *, sm_scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to cached rows that every query sees.

    Parameters
    ----------
    queries : [M, D], dtype of the cache
    slots : [N], int64
        From `common_slots`.

    Returns
    -------
    out : [M, value_dim], fp32, normalised
    lse : [M], fp32, natural log; -inf without slots

    Notes
    -----
    The kernel runs one thread per batch entry, so the rows go in as one equal share per thread.
    It wants keys and values of one width: the columns behind ``value_dim`` are computed and
    dropped. Its public wrapper, ``scaled_dot_product_attention``, returns no lse. Some releases
    lose a NaN of a row that is seen; ``MLA_CHECK=1`` finds it.
    """
    shares = torch.get_num_threads()
    num_rows, width = queries.shape
    if not slots.numel():
        out = queries.new_zeros((num_rows, value_dim), dtype=torch.float32)
        return out, queries.new_full((num_rows,), float("-inf"), dtype=torch.float32)
    query = queries.expand(shares, 1, num_rows, width)
    outs, lses = [], []
    for part in slots.split(shares * SHARE_ROWS):
        rows = _plain_rows(kv, part).view(shares, 1, -1, width)
        part_out, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, rows, rows, scale=sm_scale
        )
        outs.append(part_out[:, 0, :, :value_dim])
        lses.append(part_lse[:, 0])
    every_lse = torch.cat(lses)
    lse = torch.logsumexp(every_lse, dim=0)
    weights = torch.exp(every_lse - lse)[..., None]
    return (torch.cat(outs) * weights).sum(0), lse


def _plain_rows(kv: PagedKV, slots: torch.Tensor) -> torch.Tensor:
    """Gather rows [N, latent_dim] of a standard cache as they are stored."""
    pages = kv.cache.rows()
    if pages.is_contiguous():
        return pages.flatten(0, 1).index_select(0, slots)
    return pages[slots // kv.page_size, slots % kv.page_size]
