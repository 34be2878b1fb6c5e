"""Persistent decode: schedules that follow a work list, and their launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from mla_core.batch import PagedKV, indptr_of, pages_of
from mla_core.errors import UnsupportedProblemError
from mla_core.launch import launch
from mla_core.metadata import WorkList, WorkListRecipe
from mla_core.metadata.tiling import HeadTiling
from mla_core.metadata.v1_2 import overhead_blocks
from mla_core.plan import DecodePlan, PlanRequest, Schedule, tables_of
from mla_core.reduce import launch_reduce
from mla_core.rope import RopeInputs
from mla_triton import rope as fused_rope
from mla_triton import tuning
from mla_triton.arguments import kernel_constants, scale_strides, scales_of

KERNEL = "flash_decode_worklist"
#: Workers are the second dimension of the grid, which CUDA limits.
MAX_WORKERS = 65535
#: What a piece costs beyond its own tokens, in tokens: its start, and its share of the merge.
PIECE_OVERHEAD_TOKENS = 128


def make_schedule(
    request: PlanRequest, config: tuning.DecodeConfig, multiprocessors: int
) -> Schedule:
    """Return the schedule of a ``persistent`` request for a given configuration.

    Raises
    ------
    UnsupportedProblemError
        A caller's list has more workgroups than a launch grid.
    """
    if request.work_list is not None:
        return _follow(request, config)
    heads = request.problem.dims.num_heads
    recipe = _recipe(request, config, multiprocessors)
    if request.q_lens is None or request.kv_lens is None:
        because = f"list of the device's for {recipe.num_workers} workers"
        config_of_list = _config(config, recipe.num_workers, recipe.max_tile_tokens)
        workspace = _workspace(request, recipe.max_partial_rows, heads)
        return Schedule(
            kernel=KERNEL,
            num_kv_splits=recipe.num_workers,
            because=because,
            config=config_of_list,
            workspace=workspace | {"scratch": recipe.scratch},
            recipe=recipe,
        )
    work = recipe.plan_on_host(*_index_tensors(request.q_lens, request.kv_lens, recipe.page_size))
    pieces = work.reduce_indptr.diff()
    return Schedule(
        kernel=KERNEL,
        num_kv_splits=max(1, int(pieces.max())) if pieces.numel() else 1,
        because=f"list of the host's: {work.num_works} works for {recipe.num_workers} workers",
        config=_config(config, recipe.num_workers, recipe.max_tile_tokens),
        workspace=_workspace(request, work.num_partial_rows, heads),
        tables=tables_of(work),
    )


def _recipe(
    request: PlanRequest, config: tuning.DecodeConfig, multiprocessors: int
) -> WorkListRecipe:
    heads, page_size = request.problem.dims.num_heads, request.problem.page_size
    # As many whole tokens as fill a program's rows; more heads than those take several programs.
    tile_tokens = max(1, config.BLOCK_M // heads)
    tiling = HeadTiling(1, heads, tile_tokens * heads, one_tile=False)
    row_blocks = -(-min(tile_tokens, max(request.max_seqlen_q, 1)) * heads // config.BLOCK_M)
    concurrent = multiprocessors * config.programs_per_sm
    # The planner counts a piece's overhead in blocks: the blocks make it so many tokens.
    block = max(1, PIECE_OVERHEAD_TOKENS // (overhead_blocks(page_size) * page_size))
    return WorkListRecipe(
        batch_size=request.batch_size,
        max_seqlen_q=request.max_seqlen_q,
        num_workers=max(1, concurrent // row_blocks),
        tiling=tiling,
        page_size=page_size,
        kv_granularity=1 << (block.bit_length() - 1),
        is_causal=request.options.causal,
        is_cp_round_robin=request.options.cp_world_size > 1,
        max_pieces=request.num_kv_splits,
    )


def _follow(request: PlanRequest, config: tuning.DecodeConfig) -> Schedule:
    """Return the schedule of a list of the caller's, of which only the bounds are known."""
    sizes = request.work_list
    assert sizes is not None
    if sizes.num_workgroups > MAX_WORKERS:
        raise UnsupportedProblemError(
            f"triton: a work list must have at most {MAX_WORKERS} workgroups, "
            f"got {sizes.num_workgroups}"
        )
    heads = request.problem.dims.num_heads // request.work_list_fold
    tile_tokens = max(1, request.max_seqlen_q)
    return Schedule(
        kernel=KERNEL,
        num_kv_splits=max(1, min(sizes.num_workgroups, sizes.max_partials)),
        because=f"list of the caller's for {sizes.num_workgroups} workers",
        config=_config(config, sizes.num_workgroups, tile_tokens),
        workspace=_workspace(request, sizes.max_partials * tile_tokens, heads),
    )


def choose_config(request: PlanRequest) -> tuning.DecodeConfig:
    """Return the configuration for the rows of a tile, which has a group of the heads alone."""
    problem = request.problem
    if request.work_list_fold > 1:
        heads = problem.dims.num_heads // request.work_list_fold
        problem = replace(problem, dims=problem.dims.with_heads(heads))
    return tuning.choose(replace(request, problem=problem))


def decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    *,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    global_kv_lens: torch.Tensor | None,
    rope: RopeInputs | None,
) -> None:
    """Run a persistent plan: the works of its list, then the merge of tiles that were cut."""
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_triton.kernels.decode_worklist import decode_worklist_kernel

    work = WorkList(**plan.tables)
    num_workers = work.work_indptr.numel() - 1
    if not kv.batch_size or not num_workers or not out.numel():
        return
    options, dims = plan.options, plan.dims
    fold = plan.request.work_list_fold
    heads = dims.num_heads // fold
    config = dict(plan.schedule.config)
    del config["num_workers"]
    tile_tokens = config.pop("max_tile_tokens")
    kv_c, k_pe, kv_scale = kv.cache.field("kv_c"), kv.cache.field("k_pe"), scales_of(kv.cache)
    new_keys = plan.workspace.get("new_keys")
    partial_out = plan.workspace.get("partial_out")
    partial_lse = plan.workspace.get("partial_lse")
    if partial_out is not None and lse is None:
        lse = plan.workspace["lse"]
    unused = kv.kv_indptr
    launch(
        decode_worklist_kernel,
        (-(-tile_tokens * heads // config["BLOCK_M"]), num_workers),
        out,
        unused if lse is None else lse,
        out if partial_out is None else partial_out,
        unused if partial_lse is None else partial_lse,
        ql_nope,
        q_pe,
        kv_c,
        k_pe,
        unused if kv_scale is None else kv_scale,
        unused if q_scale is None else q_scale,
        plan.qo_indptr,
        kv.kv_indptr,
        kv.kv_page_indices,
        kv.kv_last_page_len,
        unused if global_kv_lens is None else global_kv_lens,
        work.work_indptr,
        work.work_info,
        unused if sink is None else sink,
        sm_scale * math.log2(math.e),
        options.softcap,
        options.window or 0,
        options.cp_world_size,
        options.cp_rank,
        heads,
        kv.cache.num_pages,
        kv.batch_size,
        work.num_works,
        0 if partial_out is None else partial_out.shape[0],
        tile_tokens,
        *out.stride()[:2],
        *((0, 0) if lse is None else lse.stride()),
        *((0, 0) if partial_out is None else partial_out.stride()[:2]),
        0 if partial_lse is None else partial_lse.stride(0),
        *ql_nope.stride()[:2],
        *q_pe.stride()[:2],
        *kv_c.stride()[:2],
        *k_pe.stride()[:2],
        *scale_strides(kv_scale),
        *fused_rope.kernel_arguments(options, rope, new_keys, unused),
        HAS_Q_SCALE=q_scale is not None,
        HAS_LSE=lse is not None,
        HAS_SINK=sink is not None,
        **kernel_constants(options, kv_c, k_pe, kv_scale),
        **fused_rope.kernel_constants(options, k_pe, new_keys),
        FOLD=fold,
        # Other planners may leave out requests without keys; ours give each a work.
        FILLS_EMPTY=plan.request.work_list is not None,
        **config,
    )
    if partial_out is None:
        return
    assert partial_lse is not None
    assert lse is not None
    launch_reduce(
        partial_out,
        partial_lse,
        out,
        lse,
        reduce_indptr=work.reduce_indptr,
        partial_map=work.reduce_partial_map,
        final_map=work.reduce_final_map,
        group_rows=tile_tokens,
        sink=sink,
        fold=fold,
        qo_indptr=plan.qo_indptr if fold > 1 else None,
    )


def _config(config: tuning.DecodeConfig, num_workers: int, tile_tokens: int) -> dict[str, int]:
    return config.launch | {"num_workers": num_workers, "max_tile_tokens": tile_tokens}


def _workspace(
    request: PlanRequest, num_rows: int, heads: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    keys = fused_rope.workspace(request)
    if not num_rows:
        return keys
    dims = request.problem.dims
    return keys | {
        "partial_out": ((num_rows, heads, dims.value_dim), torch.float32),
        "partial_lse": ((num_rows, heads), torch.float32),
        # The merge writes a log-sum-exp whether or not the caller wants it.
        "lse": ((request.total_q, dims.num_heads), torch.float32),
    }


def _index_tensors(
    q_lens: Sequence[int], kv_lens: Sequence[int], page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    pages = pages_of(lens, page_size)
    last_page_len = lens - (pages - 1).clamp(min=0) * page_size
    return indptr_of(torch.tensor(q_lens, dtype=torch.int32)), indptr_of(pages), last_page_len
