"""Which kernel of the catalog runs a request, and how the work is cut: all of it at plan time.

Tile. The smallest tile that holds the rows (query tokens times heads) of the longest request, else
the largest one; a ``batch_invariant`` plan goes by the head count alone.

Cut. A non-persistent kernel gives every request the same number of splits and reads all lengths
when it runs, so a replay may change them. A persistent kernel follows a work list made from the
lengths of the batch: it balances ragged batches, needs ``fixed_lengths``, and allows a replay to
change the contents of the cache and of ``kv_page_indices`` only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from mla_asm import emulator
from mla_asm.capabilities import capability
from mla_asm.catalog import CATALOG_NAME, CatalogRow, hsa_root, read_catalog
from mla_asm.kernargs import KV_LORA_RANK
from mla_core.batch import indptr_of, pages_of
from mla_core.errors import UnsupportedProblemError
from mla_core.metadata import DeviceProfile, WorkList, choose_num_kv_splits, plan_v1_2
from mla_core.metadata.tiling import HeadTiling
from mla_core.plan import PlanRequest, Schedule

#: Keys that the four waves of a workgroup read at once; works are cut at multiples of it.
STEP_TOKENS = 64
#: A split shorter than this costs more to merge than it saves.
MIN_SPLIT_TOKENS = 128
#: Splits of a ``batch_invariant`` plan: one number for every batch.
INVARIANT_SPLITS = 8
#: Longest over mean request from which a work list pays.
RAGGED = 1.25


def choose_row(request: PlanRequest) -> CatalogRow:
    """Return the catalog row that runs a request.

    Raises
    ------
    UnsupportedProblemError
        No row of the architecture takes the problem, or only persistent ones do and the lengths
        are not fixed.
    """
    problem = replace(request.problem, arch=target_arch(request.problem.arch))
    rows = [
        row
        for row in catalog_rows(problem.arch)
        if (request.kv_lens is not None or not row.is_persistent)
        and not capability(row).why_not(problem)
    ]
    if not rows:
        raise UnsupportedProblemError(
            f"asm: no kernel takes {problem} with lengths that "
            f"{'may change' if request.kv_lens is None else 'are fixed'}; `mla explain` lists what "
            "each kernel takes"
        )
    num_rows = problem.dims.num_heads
    if "batch_invariant" not in problem.features:
        num_rows *= problem.q_len
    wants_work_list = _is_ragged(request) and request.num_kv_splits is None

    def badness(row: CatalogRow) -> tuple[bool, int, bool]:
        too_small = row.tile_rows < num_rows
        # Of tiles that fit the smallest, of tiles that do not the largest.
        size = -row.tile_rows if too_small else row.tile_rows
        return too_small, size, row.is_persistent != wants_work_list

    return min(rows, key=badness)


def make_schedule(request: PlanRequest, row: CatalogRow) -> Schedule:
    """Return the schedule of a request on one kernel of the catalog."""
    cut = _work_list if row.is_persistent else _equal_splits
    return cut(request, row)


def find_row(arch: str, symbol: str) -> CatalogRow:
    """Return the row of a kernel.

    Raises
    ------
    UnsupportedProblemError
    """
    rows = catalog_rows(arch)
    for row in rows:
        if row.symbol == symbol:
            return row
    names = ", ".join(row.symbol for row in rows) or "none"
    raise UnsupportedProblemError(f"asm: kernel must be one of {arch}: {names}, got {symbol!r}")


@functools.cache
def catalog_rows(arch: str) -> tuple[CatalogRow, ...]:
    """Return the rows of one architecture's catalog, read once."""
    return read_catalog(hsa_root() / arch / "mla" / CATALOG_NAME)


def target_arch(arch: str) -> str:
    """Return the architecture whose kernels run: the emulated one for the CPU."""
    return (emulator.emulated_arch() or arch) if arch == "cpu" else arch


def _equal_splits(request: PlanRequest, row: CatalogRow) -> Schedule:
    num_splits, because = _num_splits(request, row)
    workspace = {}
    if num_splits > 1:
        partials = (request.total_q, num_splits, request.problem.dims.num_heads)
        workspace = _merge_buffers(request, partials)
    return Schedule(
        kernel=row.symbol,
        num_kv_splits=num_splits,
        because=_because(request, because),
        config={"tile_rows": row.tile_rows},
        workspace=workspace,
    )


def _num_splits(request: PlanRequest, row: CatalogRow) -> tuple[int, str]:
    problem = request.problem
    if request.num_kv_splits is not None:
        return request.num_kv_splits, "num_kv_splits was passed"
    if "batch_invariant" in problem.features:
        return INVARIANT_SPLITS, "fixed by batch_invariant"
    batch_size = max(1, request.batch_size)
    row_blocks = -(-problem.q_len * problem.dims.num_heads // row.tile_rows)
    # The index buffer may be over-allocated: it bounds the tokens only from above.
    tokens = min(request.total_pages * problem.page_size, batch_size * request.max_seqlen_k)
    profile = _profile(request)
    splits = choose_num_kv_splits(
        batch_size,
        tokens,
        num_heads=problem.dims.num_heads,
        q_len=problem.q_len,
        q_dtype=problem.q_dtype,
        profile=profile,
        tile_groups=row_blocks,
    )
    splits = max(1, min(splits, request.max_seqlen_k // MIN_SPLIT_TOKENS))
    return splits, f"{batch_size * row_blocks} workgroups on {profile.num_cu} compute units"


def _work_list(request: PlanRequest, row: CatalogRow) -> Schedule:
    work = plan_work(request, row.tile_rows, _profile(request))
    workspace = {}
    if num_rows := work.num_partial_rows:
        workspace = _merge_buffers(request, (num_rows, request.problem.dims.num_heads))
    num_workers = work.work_indptr.numel() - 1
    pieces = work.reduce_indptr.diff()
    return Schedule(
        kernel=row.symbol,
        num_kv_splits=max(1, int(pieces.max())) if pieces.numel() else 1,
        because=_because(request, f"{work.num_works} works on {num_workers} workgroups"),
        config={
            "tile_rows": row.tile_rows,
            "num_workers": num_workers,
            "max_tile_rows": _longest(work.work_info[:, 3] - work.work_info[:, 2]),
        },
        workspace=workspace,
        tables={field.name: getattr(work, field.name) for field in fields(WorkList)},
    )


def plan_work(request: PlanRequest, tile_rows: int, profile: DeviceProfile) -> WorkList:
    """Deal the batch of a request out to one workgroup per compute unit.

    Raises
    ------
    UnsupportedProblemError
        The lengths are not known on the host.
    """
    if request.q_lens is None or request.kv_lens is None:
        raise UnsupportedProblemError(
            "asm: a persistent kernel must know the lengths of the batch, got a plan for changing "
            "ones; pass fixed_lengths=True to plan_decode"
        )
    problem = request.problem
    page_size, num_heads = problem.page_size, problem.dims.num_heads
    lens = _int32(request.kv_lens)
    pages = pages_of(lens, page_size)
    return plan_v1_2(
        indptr_of(_int32(request.q_lens)),
        indptr_of(pages),
        lens - (pages - 1).clamp(min=0) * page_size,
        num_heads=num_heads,
        profile=profile,
        is_causal=request.options.causal,
        page_size=page_size,
        kv_granularity=max(1, STEP_TOKENS // page_size),
        max_seqlen_qo=max(1, request.max_seqlen_q),
        max_split_per_batch=-1 if request.num_kv_splits is None else request.num_kv_splits,
        tiling=HeadTiling(fold=1, num_heads=num_heads, packed_rows=tile_rows, one_tile=False),
    )


def _merge_buffers(
    request: PlanRequest, rows: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        "partial_out": ((*rows, KV_LORA_RANK), torch.float32),
        "partial_lse": (rows, torch.float32),
        # The merge writes a log-sum-exp whether or not the caller wants it.
        "lse": ((request.total_q, request.problem.dims.num_heads), torch.float32),
    }


def _profile(request: PlanRequest) -> DeviceProfile:
    arch = target_arch(request.problem.arch)
    if request.device_index < 0:
        return DeviceProfile(arch, emulator.NUM_CU)
    properties = torch.cuda.get_device_properties(request.device_index)
    return DeviceProfile(arch, properties.multi_processor_count)


def _is_ragged(request: PlanRequest) -> bool:
    lens = request.kv_lens
    return bool(lens) and max(lens) * len(lens) > RAGGED * sum(lens)  # type: ignore[arg-type]


def _because(request: PlanRequest, reason: str) -> str:
    return f"{reason}; emulated on the CPU, slowly" if request.problem.arch == "cpu" else reason


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _longest(lengths: torch.Tensor) -> int:
    return max(1, int(lengths.max())) if lengths.numel() else 1
