"""Dense decode: plan, then launch one kernel of the catalog and merge its partials."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mla_asm.catalog import CatalogRow
from mla_asm.kernargs import Arguments
from mla_asm.launch import launch
from mla_asm.schedule import choose_row, find_row, make_schedule, target_arch
from mla_core.batch import PagedKV
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.plan import DecodePlan, PlanRequest, Schedule, bind_schedule
from mla_core.reduce import reduce_partials, reduce_tiles

#: Requests are the third dimension of the grid, which the HIP runtime limits.
MAX_BATCH_SIZE = 65535
#: Kernels count keys in 32 bits and run a few tiles ahead of the last one; the byte offset of a
#: key's page id, with pages of one token four times the key, has 32 bits too.
MAX_SEQLEN_K = 1 << 30
#: Kernels move 16 bytes at a time.
ALIGNMENT = 16
_ITEM_BYTES = torch.bfloat16.itemsize


def plan_decode(request: PlanRequest) -> Schedule:
    """Choose a kernel of the catalog and how to cut the work; see `mla_asm.schedule`.

    Raises
    ------
    UnsupportedProblemError
        No row of the catalog runs the request, the batch is larger than a launch grid, or a request
        is longer than a kernel can count.
    """
    if request.batch_size > MAX_BATCH_SIZE:
        raise UnsupportedProblemError(
            f"asm: batch_size must be in 0..{MAX_BATCH_SIZE}, got {request.batch_size}; "
            "plan the batch in parts"
        )
    if request.max_seqlen_k > MAX_SEQLEN_K:
        raise UnsupportedProblemError(
            f"asm: max_seqlen_k must be at most {MAX_SEQLEN_K}, got {request.max_seqlen_k}; plan "
            "parts of the keys and merge them by their lse"
        )
    return make_schedule(request, choose_row(request))


def with_kernel(plan: DecodePlan, symbol: str, num_kv_splits: int | None = None) -> DecodePlan:
    """Return a plan of this backend on another kernel of the catalog, for tuning and tests.

    ``num_kv_splits`` replaces the plan's wish. For eager calls: under ``torch.compile`` a call
    takes the kernel that planning chooses.

    Raises
    ------
    UnsupportedProblemError
        The catalog has no such kernel, or it needs a plan made with ``fixed_lengths``.
    """
    request = plan.request
    if num_kv_splits is not None:
        request = replace(request, num_kv_splits=num_kv_splits)
    row = find_row(target_arch(request.problem.arch), symbol)
    schedule = make_schedule(request, row)
    return bind_schedule(request, schedule, plan.backend, plan.run, plan.qo_indptr, plan.choice)


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
    Reads every length on the device, without a sync, so a captured graph of a non-persistent kernel
    replays with other lengths. A persistent kernel follows the plan's work list: its replay may
    change only the contents of the cache and of ``kv_page_indices``. Allocates only for views that
    a kernel cannot move in pieces of 16 bytes, and for outputs of another dtype than bf16.

    Raises
    ------
    LayoutError
        The cache is not aligned to 16 bytes.
    """
    # None of them is among the features of a catalog row.
    assert sink is None
    assert q_scale is None
    assert global_kv_lens is None
    row = find_row(target_arch(plan.request.problem.arch), plan.schedule.kernel)
    grid = _grid(row, plan)
    if not ql_nope.numel() or not math.prod(grid):
        return
    target, target_lse = _writable(row, plan, out, lse)
    arguments = {
        **_inputs(_movable(ql_nope), _movable(q_pe), kv, plan, sm_scale),
        "out": target,
        "lse": target_lse,
        "out_stride_t": target.stride(0) * _ITEM_BYTES,
        "out_stride_h": target.stride(1) * _ITEM_BYTES,
    }
    launch(row, grid, arguments)
    _merge(row, plan, target, target_lse)
    if target is not out:
        out.copy_(target)
    if lse is not None and target_lse is not lse:
        assert target_lse is not None
        lse.copy_(target_lse)


def _grid(row: CatalogRow, plan: DecodePlan) -> tuple[int, int, int]:
    if row.is_persistent:
        has_work = plan.tables["work_info"].shape[0] > 0
        return (plan.schedule.config["num_workers"] if has_work else 0), 1, 1
    request = plan.request
    num_rows = request.max_seqlen_q * request.problem.dims.num_heads
    return -(-num_rows // row.tile_rows), plan.num_kv_splits, request.batch_size


def _writable(
    row: CatalogRow, plan: DecodePlan, out: torch.Tensor, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return outputs that the kernel can write: the caller's own wherever possible."""
    if plan.workspace and lse is None:
        lse = plan.workspace["lse"]
    if plan.workspace and not row.is_persistent:
        return out, lse  # the merge writes them all, whatever their dtype and strides
    if out.dtype != torch.bfloat16 or not _is_movable(out):
        out = torch.empty(out.shape, dtype=torch.bfloat16, device=out.device)
    if lse is not None and not lse.is_contiguous():
        lse = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    return out, lse


def _inputs(
    ql_nope: torch.Tensor, q_pe: torch.Tensor, kv: PagedKV, plan: DecodePlan, sm_scale: float
) -> Arguments:
    rows = kv.cache.rows()
    if not _is_movable(rows):
        raise LayoutError(
            f"asm: kv must start and step from page to page at multiples of {ALIGNMENT} bytes, got "
            f"strides {rows.stride()} of {_ITEM_BYTES} bytes; allocate it so"
        )
    return {
        "partial_out": plan.workspace.get("partial_out"),
        "partial_lse": plan.workspace.get("partial_lse"),
        "ql_nope": ql_nope,
        "q_pe": q_pe,
        "kv": rows,
        "qo_indptr": plan.qo_indptr,
        "kv_indptr": kv.kv_indptr,
        "kv_page_indices": kv.kv_page_indices,
        "kv_last_page_len": kv.kv_last_page_len,
        "work_indptr": plan.tables.get("work_indptr"),
        "work_info": plan.tables.get("work_info"),
        "page_stride": rows.stride(0) * _ITEM_BYTES,
        "token_stride": rows.stride(1) * _ITEM_BYTES,
        "sm_scale_log2": sm_scale * math.log2(math.e),
        "num_heads": ql_nope.shape[1],
        "log2_page_size": kv.page_size.bit_length() - 1,
        "num_splits": plan.num_kv_splits,
        "num_cache_pages": kv.cache.num_pages,
        "is_causal": int(plan.options.causal),
        "ql_nope_stride_t": ql_nope.stride(0) * _ITEM_BYTES,
        "ql_nope_stride_h": ql_nope.stride(1) * _ITEM_BYTES,
        "q_pe_stride_t": q_pe.stride(0) * _ITEM_BYTES,
        "q_pe_stride_h": q_pe.stride(1) * _ITEM_BYTES,
        "reserved": 0,
    }


def _merge(row: CatalogRow, plan: DecodePlan, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    if not plan.workspace:
        return
    assert lse is not None, "a plan with partials has a log-sum-exp of its own"
    partial_out, partial_lse = plan.workspace["partial_out"], plan.workspace["partial_lse"]
    if not row.is_persistent:
        reduce_partials(partial_out, partial_lse, out=out, lse=lse)
        return
    reduce_tiles(
        partial_out,
        partial_lse,
        plan.tables["reduce_indptr"],
        plan.tables["reduce_final_map"],
        plan.tables["reduce_partial_map"],
        max_tile_rows=plan.schedule.config["max_tile_rows"],
        out=out,
        lse=lse,
    )


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a dense copy where 16 bytes at a time cannot be moved."""
    return tensor if _is_movable(tensor) else tensor.contiguous()


def _is_movable(tensor: torch.Tensor) -> bool:
    size = tensor.element_size()
    steps = (
        stride * size
        for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if length > 1
    )
    is_aligned = all(step % ALIGNMENT == 0 for step in (tensor.data_ptr(), *steps))
    return is_aligned and tensor.stride(-1) == 1
