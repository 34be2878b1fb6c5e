"""Dense decode over paged caches: plan, then launch the kernel and the merge."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

from mla_core.batch import PagedKV
from mla_core.dtypes import itemsize
from mla_core.errors import UnsupportedProblemError
from mla_core.launch import launch, repeatable
from mla_core.plan import AttentionOptions, DecodePlan, PlanRequest, Schedule, bind_schedule
from mla_core.reduce import launch_reduce
from mla_core.rope import RopeInputs
from mla_triton import hopper, tuning, worklist
from mla_triton import rope as fused_rope
from mla_triton.aot_files import install_named
from mla_triton.arguments import kernel_constants, scale_strides, scales_of
from mla_triton.backend import HOPPER_ROWS
from mla_triton.splits import INVARIANT_SPLITS, RAGGED, choose_splits, mean_tokens

#: A split shorter than this many tokens costs more to merge than it saves.
MIN_SPLIT_TOKENS = 128
#: The same for ragged batches, which are cut finer than equal ones.
RAGGED_SPLIT_TOKENS = 512
MAX_AUTOMATIC_SPLITS = 64
#: Requests are the third dimension of the grid, which CUDA limits.
MAX_BATCH_SIZE = 65535
#: Stand-in for the multiprocessors of a device in the interpreter, so that it splits too.
_INTERPRETED_MULTIPROCESSORS = 4


def plan_decode(request: PlanRequest) -> Schedule:
    """Choose tile sizes from the tuning table and the number of splits from the batch.

    Raises
    ------
    UnsupportedProblemError
        The batch is larger than a launch grid.
    """
    if request.batch_size > MAX_BATCH_SIZE:
        raise UnsupportedProblemError(
            f"triton: batch_size must be in 0..{MAX_BATCH_SIZE}, got {request.batch_size}; "
            "plan the batch in parts"
        )
    # Schedules are remembered, so this costs nothing from the second like one on.
    install_named(request.problem.arch)
    if "persistent" in request.problem.features:
        return make_schedule(request, worklist.choose_config(request))
    if not all(row.why_not(request.problem) for row in HOPPER_ROWS):
        return hopper.make_schedule(request, _multiprocessors(request.device_index))
    return make_schedule(request, tuning.choose(request))


def make_schedule(request: PlanRequest, config: tuning.DecodeConfig) -> Schedule:
    """Return the schedule of a request for a given configuration."""
    if "persistent" in request.problem.features:
        return worklist.make_schedule(request, config, _multiprocessors(request.device_index))
    num_splits, split_blocks, because = _splitting(request, config)
    dims = request.problem.dims
    workspace = {}
    if num_splits > 1:
        rows = (request.total_q, num_splits, dims.num_heads)
        workspace = {
            "partial_out": ((*rows, dims.value_dim), torch.float32),
            "partial_lse": (rows, torch.float32),
            # The merge writes a log-sum-exp whether or not the caller wants it.
            "lse": ((request.total_q, dims.num_heads), torch.float32),
        }
    return Schedule(
        kernel="flash_decode",
        num_kv_splits=num_splits,
        because=because,
        config=config.launch | {"split_blocks": split_blocks},
        workspace=workspace | fused_rope.workspace(request),
    )


def with_config(
    plan: DecodePlan, config: tuning.DecodeConfig, num_kv_splits: int | None = None
) -> DecodePlan:
    """Return a plan of this backend with another configuration, for tuning and tests.

    For eager calls: under ``torch.compile`` a call takes the tuning table's configuration again. A
    plan with a list of the device's needs `mla_core.replan` before it runs.
    """
    request = replace(plan.request, num_kv_splits=num_kv_splits)
    schedule = make_schedule(request, config)
    changed = bind_schedule(request, schedule, plan.backend, plan.run, plan.qo_indptr, plan.choice)
    # A list of the caller's is in no schedule.
    return changed if request.work_list is None else replace(changed, tables=plan.tables)


@repeatable
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
    Reads every length on the device: no sync and no allocation, so a captured graph replays with
    other lengths. Query rows past ``qo_indptr[-1]`` are left as they are, or hold leftovers.
    """
    if rope is not None:
        fused_rope.rotate_keys(kv, plan, rope, global_kv_lens)
    if plan.is_persistent:
        worklist.decode(
            ql_nope,
            q_pe,
            kv,
            plan,
            sm_scale=sm_scale,
            out=out,
            lse=lse,
            sink=sink,
            q_scale=q_scale,
            global_kv_lens=global_kv_lens,
            rope=rope,
        )
        return
    if plan.schedule.kernel.startswith("hopper"):
        is_done = hopper.decode(
            ql_nope,
            q_pe,
            kv,
            plan,
            sm_scale=sm_scale,
            out=out,
            lse=lse,
            sink=sink,
            q_scale=q_scale,
            global_kv_lens=global_kv_lens,
        )
        if is_done:
            return
        plan = replace(plan, schedule=_unaligned(plan.request))
    num_splits = plan.num_kv_splits
    cache = kv.cache
    if num_splits == 1:
        target, target_lse = out[:, None], None if lse is None else lse[:, None]
    else:
        target, target_lse = plan.workspace["partial_out"], plan.workspace["partial_lse"]
    launch_decode(
        ql_nope,
        q_pe,
        cache.field("kv_c"),
        cache.field("k_pe"),
        plan.qo_indptr,
        kv.kv_indptr,
        kv.kv_page_indices,
        kv.kv_last_page_len,
        out=target,
        lse=target_lse,
        kv_scale=scales_of(cache),
        q_scale=q_scale,
        global_kv_lens=global_kv_lens,
        sink=sink if num_splits == 1 else None,
        sm_scale=sm_scale,
        max_seqlen_q=plan.request.max_seqlen_q,
        options=plan.options,
        schedule=plan.schedule,
        rope=rope,
        new_keys=plan.workspace.get("new_keys"),
    )
    if num_splits > 1:
        launch_reduce(
            plan.workspace["partial_out"],
            plan.workspace["partial_lse"],
            out,
            plan.workspace["lse"] if lse is None else lse,
            sink=sink,
        )


@functools.lru_cache(maxsize=256)
def _unaligned(request: PlanRequest) -> Schedule:
    """Return the portable kernel's schedule that needs no workspace.

    Planning does not see where rows start; those of a plan for Hopper that start at odd bytes are
    found out when they are used.
    """
    return make_schedule(replace(request, num_kv_splits=1), tuning.choose(request))


def launch_decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_page_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    kv_scale: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    global_kv_lens: torch.Tensor | None = None,
    sink: torch.Tensor | None,
    sm_scale: float,
    max_seqlen_q: int,
    options: AttentionOptions,
    schedule: Schedule,
    rope: RopeInputs | None = None,
    new_keys: torch.Tensor | None = None,
) -> None:
    """Launch the decode kernel over plain tensors; the caller has checked them.

    Parameters
    ----------
    kv_c, k_pe : [num_pages, page_size, kv_lora_rank], [num_pages, page_size, rope]
        Any page and token strides; views of one packed cache or separate buffers.
    out : [total_q, num_kv_splits, num_heads, kv_lora_rank]
        The result when there is one split, else fp32 partials.
    lse : [total_q, num_kv_splits, num_heads], fp32, or None
    kv_scale : [1] or [num_pages, page_size, groups], fp32, or uint8 for E8M0, or None
        One factor for ``kv_c`` and ``k_pe``, or one for each group of a token's latent.
    q_scale : [1], fp32, or None
    global_kv_lens : [batch_size], int32, or None
        For context parallelism, as ``options`` says.
    rope : RopeInputs, or None
        For the rotation of ``options``: the kernel rotates the queries.
    new_keys : [total_q, rope], dtype of ``k_pe``, or None
        Rotated keys of the query tokens, where ``k_pe`` does not hold them; see
        `mla_triton.rope.rotate_keys`.
    """
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_triton.kernels.decode import decode_kernel

    num_heads, num_pages = ql_nope.shape[1], kv_c.shape[0]
    batch_size = qo_indptr.numel() - 1
    num_rows = max_seqlen_q * num_heads
    if not batch_size or not num_rows or not out.numel():
        return
    config = schedule.config
    grid = (-(-num_rows // config["BLOCK_M"]), schedule.num_kv_splits, batch_size)
    unused = kv_indptr
    launch(
        decode_kernel,
        grid,
        out,
        unused if lse is None else lse,
        ql_nope,
        q_pe,
        kv_c,
        k_pe,
        unused if kv_scale is None else kv_scale,
        unused if q_scale is None else q_scale,
        qo_indptr,
        kv_indptr,
        kv_page_indices,
        kv_last_page_len,
        unused if global_kv_lens is None else global_kv_lens,
        unused if sink is None else sink,
        sm_scale * math.log2(math.e),
        options.softcap,
        options.window or 0,
        options.cp_world_size,
        options.cp_rank,
        num_heads,
        num_pages,
        *out.stride()[:3],
        *((0, 0, 0) if lse is None else lse.stride()),
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
        **config,
    )


def _splitting(request: PlanRequest, config: tuning.DecodeConfig) -> tuple[int, int, str]:
    """Return the most splits of a request, the blocks of a split, and why."""
    shortest = max(1, MIN_SPLIT_TOKENS // config.BLOCK_N)
    if request.num_kv_splits is not None:
        return request.num_kv_splits, shortest, "num_kv_splits was passed"
    if "batch_invariant" in request.problem.features:
        return INVARIANT_SPLITS, shortest, "fixed by batch_invariant"
    dims = request.problem.dims
    row_blocks = -(-request.max_seqlen_q * dims.num_heads // config.BLOCK_M)
    num_programs = max(1, request.batch_size * row_blocks)
    multiprocessors = _multiprocessors(request.device_index)
    # A loop step moves BLOCK_N cached rows, a split of a row moves 4 bytes there and back.
    row_bytes = dims.latent_dim * itemsize(request.problem.kv_dtype)
    step_bytes = multiprocessors * config.BLOCK_N * row_bytes
    partial_bytes = request.total_q * dims.num_heads * dims.value_dim * 8
    max_steps = -(-request.max_seqlen_k // config.BLOCK_N)
    mean_steps = min(mean_tokens(request) / config.BLOCK_N, max_steps)
    splits = choose_splits(
        num_programs=num_programs,
        mean_steps=mean_steps,
        concurrent_programs=multiprocessors * config.programs_per_sm,
        merge_cost=partial_bytes / step_bytes,
        max_splits=min(MAX_AUTOMATIC_SPLITS, request.max_seqlen_k // MIN_SPLIT_TOKENS),
    )
    because = f"{num_programs} programs on {multiprocessors} multiprocessors"
    if max_steps > RAGGED * mean_steps:
        # Splits of one length, not of one number, or the longest request would run on alone; and
        # half as long, so that the pieces pack.
        least = max(1, RAGGED_SPLIT_TOKENS // config.BLOCK_N)
        split_blocks = max(least, math.ceil(mean_steps / (2 * splits)))
        splits = min(MAX_AUTOMATIC_SPLITS, -(-max_steps // split_blocks))
        return splits, split_blocks, f"{because}, ragged"
    return splits, shortest, because


def _multiprocessors(device_index: int) -> int:
    if device_index < 0:
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device_index).multi_processor_count
