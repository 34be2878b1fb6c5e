"""Dense decode on NVIDIA Hopper: choose tile and schedule, then launch the kernel and the merge.

The kernels are in `mla_triton.kernels.hopper`. They take what the rows in `mla_triton.backend` say;
everything else goes to the portable kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mla_core.batch import PagedKV
from mla_core.dtypes import FP8_DTYPES
from mla_core.launch import Address, launch
from mla_core.plan import DecodePlan, PlanRequest, Schedule, bind_schedule
from mla_triton.arguments import scale_strides, scales_of
from mla_triton.splits import INVARIANT_SPLITS, RAGGED, mean_tokens

#: Cached tokens of a tile, as in the kernels.
TILE = 64
#: Rows of a wide program.
WIDE = 64
#: Rows of a program over an fp8 cache, of which two share a multiprocessor.
PACKED = 16
#: Latent elements that one of its copies takes, as in the kernel.
PACKED_CHUNK = 128
#: Shortest run of a ``batch_invariant`` plan, in tiles: the same for every batch.
INVARIANT_TILES = 4

_LOG2_E = math.log2(math.e)

# What things cost in microseconds; fitted to an H200.
_TILE = 2.0
_START = 5.0
_MERGE = 3.0
_PIECE = 0.05  # each piece of one request
_BYTES = 3.5e6  # partials written and read in a microsecond
_LINE_START = 3  # tiles, as `mla_triton.kernels.hopper.schedule.START_COST`


@dataclass(frozen=True, slots=True)
class Shares:
    """How a batch is dealt to workers, a worker being one program for each block of rows.

    Parameters
    ----------
    num_workers : int
    runs : int
        Most runs a request is cut into, each for one worker; 0 deals spans of all requests instead.
    min_tiles : int
        Shortest run.
    """

    num_workers: int
    runs: int
    min_tiles: int = 1

    @property
    def has_merge(self) -> bool:
        """Whether a request may be cut."""
        return self.runs != 1 and self.num_workers > 1

    @property
    def num_slots(self) -> int:
        """Partials that the workers may leave: one of a run, two of a span."""
        return self.num_workers * (1 if self.runs else 2)


def make_schedule(
    request: PlanRequest, multiprocessors: int, shares: Shares | None = None
) -> Schedule:
    """Return the schedule of a problem that the backend's row takes; tests may give the shares."""
    dims = request.problem.dims
    is_invariant = "batch_invariant" in request.problem.features
    num_rows = dims.num_heads * (1 if is_invariant else request.max_seqlen_q)
    is_packed = request.problem.kv_dtype in FP8_DTYPES
    tile_rows = rows_of_a_program(num_rows, is_packed)
    kind = _kind(is_packed, tile_rows)
    row_blocks = max(1, -(-dims.num_heads * request.max_seqlen_q // tile_rows))
    because = "shares were passed"
    if shares is None:
        shares, because = deal(request, kind, tile_rows, row_blocks, multiprocessors)
    notes = request.batch_size if shares.runs else shares.num_workers
    workspace: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"note": ((notes, 4), torch.int32)}
    if shares.has_merge:
        rows = (shares.num_slots, row_blocks, tile_rows)
        workspace["partial_out"] = ((*rows, dims.kv_lora_rank), torch.float32)
        workspace["partial_lse"] = (rows, torch.float32)
    return Schedule(
        kernel=f"hopper_{kind}",
        num_kv_splits=shares.runs or most_pieces(request, shares.num_workers),
        because=because,
        config={
            "M": tile_rows,
            "row_blocks": row_blocks,
            "num_workers": shares.num_workers,
            "max_runs": shares.runs,
            "min_tiles": shares.min_tiles,
        },
        workspace=workspace,
    )


def with_shares(plan: DecodePlan, shares: Shares) -> DecodePlan:
    """Return a plan of this kernel whose work is dealt otherwise, for tests."""
    schedule = make_schedule(plan.request, 0, shares)
    return bind_schedule(
        plan.request, schedule, plan.backend, plan.run, plan.qo_indptr, plan.choice
    )


def rows_of_a_program(num_rows: int, is_packed: bool) -> int:
    """Return the tile for so many query rows of a request.

    The smallest that holds them, 64 for more than 32; over fp8 caches 16, or 64 for more than 32.
    """
    if num_rows > 32:
        return WIDE
    return PACKED if is_packed else next(rows for rows in (8, 16, 32) if num_rows <= rows)


def _kind(is_packed: bool, tile_rows: int) -> str:
    if is_packed:
        return "converted" if tile_rows == WIDE else "packed"
    return "wide" if tile_rows == WIDE else "narrow"


def deal(
    request: PlanRequest, kind: str, tile_rows: int, row_blocks: int, multiprocessors: int
) -> tuple[Shares, str]:
    """Return the shares with the least estimated time, and why."""
    batch_size = max(request.batch_size, 1)
    if request.num_kv_splits is not None:
        runs = request.num_kv_splits
        return Shares(batch_size * runs, runs), "num_kv_splits was passed"
    if "batch_invariant" in request.problem.features:
        workers = batch_size * INVARIANT_SPLITS
        return Shares(workers, INVARIANT_SPLITS, INVARIANT_TILES), "fixed by batch_invariant"
    because = f"{batch_size} x {row_blocks} programs on {multiprocessors} multiprocessors"
    if kind == "packed":
        multiprocessors *= 2
        because += ", two on each"
    groups = max(1, multiprocessors // row_blocks)
    longest = max(1, -(-request.max_seqlen_k // TILE))
    mean = max(1.0, min(mean_tokens(request) / TILE, longest))
    if groups > 1 and longest > RAGGED * mean:
        return Shares(groups, 0), f"{because}, ragged"
    partial = row_blocks * tile_rows * request.problem.dims.kv_lora_rank * 8 / _BYTES

    def run_time(tiles: float, num_programs: int) -> float:
        return -(-num_programs // multiprocessors) * (math.ceil(tiles) * _TILE + _START)

    def even(runs: int) -> float:
        merge = _MERGE + partial * batch_size * runs + _PIECE * runs if runs > 1 else 0.0
        return run_time(mean / runs, batch_size * row_blocks * runs) + merge

    line = run_time((mean + _LINE_START) * batch_size / groups, groups * row_blocks) + _MERGE
    line += partial * (groups + min(groups, batch_size)) + _PIECE * most_pieces(request, groups)
    runs = min(range(1, min(longest, groups) + 1), key=even)
    if line < even(runs):
        return Shares(groups, 0), f"{because}, spans of all requests"
    return Shares(batch_size * runs, runs), because


def most_pieces(request: PlanRequest, num_workers: int) -> int:
    """Return how many spans the longest request may touch, one for each of so many workers."""
    tokens = max(1.0, mean_tokens(request) * request.batch_size)
    return min(num_workers, math.ceil(request.max_seqlen_k * num_workers / tokens) + 1)


def is_aligned(
    ql_nope: torch.Tensor, q_pe: torch.Tensor, kv: PagedKV, is_invariant: bool = False
) -> bool:
    """Whether rows start at multiples of 16 bytes and the compiler can tell.

    Asynchronous copies move 16 bytes. Of a stride, Triton learns whether it is a multiple of 16
    elements and nothing else; fp8 caches are addressed by the byte. The stride of a dimension of
    size 1 does not matter, except of queries in ``batch_invariant`` plans, where a token alone goes
    the way it goes among others.
    """
    cached = (kv.cache.field("kv_c"), kv.cache.field("k_pe"))
    is_packed = cached[0].itemsize == 1
    steps = [
        stride
        for part in (ql_nope, q_pe)
        for stride in (part.stride()[:2] if is_invariant else _row_strides(part))
    ]
    steps += [
        stride * (part.itemsize if is_packed else 1)
        for part in cached
        for stride in _row_strides(part)
    ]
    pointers = [part.data_ptr() for part in (ql_nope, q_pe, *cached)]
    return all(number % 16 == 0 for number in (*pointers, *steps))


def _row_strides(part: torch.Tensor) -> tuple[int, int]:
    """Return the strides of the first two dimensions; 0 for one of size 1, where any is legal."""
    sizes, strides = part.shape, part.stride()
    return strides[0] if sizes[0] > 1 else 0, strides[1] if sizes[1] > 1 else 0


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
) -> bool:
    """Write ``out`` and ``lse`` for every query token; see `mla_core.decode`.

    Returns
    -------
    bool
        Whether it did: not if rows are not aligned, see `is_aligned`.

    Notes
    -----
    Reads every length on the device: no sync and no allocation, so a captured graph replays with
    other lengths. Query rows past ``qo_indptr[-1]`` are left as they are.
    """
    call = _prepare(ql_nope, q_pe, kv, plan, out, lse)
    if call is None:
        return False
    if not call.num_programs:
        return True
    workspace = plan.workspace
    note = workspace["note"]
    # Without a merge nothing is written there.
    partial_out = workspace.get("partial_out", note)
    partial_lse = workspace.get("partial_lse", note)
    lse_or_unused = note if lse is None else lse
    sink_or_unused = note if sink is None else sink
    kv_scale = scales_of(kv.cache)
    launch(
        call.kernel,
        (call.num_programs,),
        out,
        lse_or_unused,
        partial_out,
        partial_lse,
        note,
        ql_nope,
        q_pe,
        kv.cache.field("kv_c"),
        kv.cache.field("k_pe"),
        note if kv_scale is None else kv_scale,
        *call.descriptors,
        plan.qo_indptr,
        kv.kv_indptr,
        kv.kv_page_indices,
        kv.kv_last_page_len,
        kv.kv_indptr if global_kv_lens is None else global_kv_lens,
        sink_or_unused,
        note if q_scale is None else q_scale,
        sm_scale * _LOG2_E,
        *call.numbers,
        **call.constants,
    )
    if call.merge_grid:
        launch(
            call.merge_kernel,
            call.merge_grid,
            out,
            lse_or_unused,
            partial_out,
            partial_lse,
            note,
            sink_or_unused,
            *call.merge_numbers,
            **call.merge_constants,
        )
    return True


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call passes besides its tensors."""

    kernel: Any
    num_programs: int
    descriptors: tuple[object, object]
    numbers: tuple[float, ...]
    constants: Mapping[str, int]
    merge_kernel: Any
    merge_grid: tuple[int, ...]
    merge_numbers: tuple[int, ...]
    merge_constants: Mapping[str, int]


def _prepare(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> _Call | None:
    """Return what a call passes, or None where rows are not aligned."""
    # Imported at the first call: Triton costs a second and may be absent.
    from mla_triton.kernels.hopper.decode import hopper_decode_kernel
    from mla_triton.kernels.hopper.merge import merge_kernel

    if not is_aligned(ql_nope, q_pe, kv, "batch_invariant" in plan.request.problem.features):
        return None
    request, options, config = plan.request, plan.options, plan.schedule.config
    kv_c, k_pe = kv.cache.field("kv_c"), kv.cache.field("k_pe")
    kv_scale = scales_of(kv.cache)
    is_packed = kv_c.itemsize == 1
    num_groups = kv_scale.shape[2] if kv_scale is not None and kv_scale.ndim > 1 else 0
    # Rows of an fp8 cache are copied as bytes, whatever is in them.
    pe_unit = k_pe.itemsize if is_packed else 1
    kv_c_desc, k_pe_desc, page_rows, pe_rows = _descriptors(kv_c, k_pe)
    tile_rows, rank = config["M"], plan.dims.kv_lora_rank
    kind = _kind(is_packed, tile_rows)
    is_empty = not request.batch_size or not request.max_seqlen_q or not out.numel()
    out_strides = out.stride()[:2]
    lse_strides = (0, 0) if lse is None else lse.stride()[:2]
    shared = {
        "M": tile_rows,
        "D": rank,
        "EVEN": config["max_runs"] > 0,
        "HAS_LSE": lse is not None,
        "HAS_SINK": "sink" in request.problem.features,
    }
    rows, unroll, warps = _merge_launch(config["max_runs"], plan.num_kv_splits)
    merge_rows = config["row_blocks"] * tile_rows // rows
    has_merge = "partial_out" in plan.workspace
    return _Call(
        kernel=hopper_decode_kernel,
        num_programs=0 if is_empty else config["num_workers"] * config["row_blocks"],
        descriptors=(kv_c_desc, k_pe_desc),
        numbers=(
            options.softcap,
            options.window or 0,
            options.cp_world_size,
            options.cp_rank,
            request.batch_size,
            plan.dims.num_heads,
            kv.cache.num_pages,
            page_rows,
            pe_rows,
            config["row_blocks"],
            config["num_workers"],
            config["max_runs"],
            config["min_tiles"],
            *out_strides,
            *lse_strides,
            *_row_strides(ql_nope),
            *_row_strides(q_pe),
            *_row_strides(kv_c),
            *(stride * pe_unit for stride in _row_strides(k_pe)),
            *scale_strides(kv_scale),
        ),
        constants=shared
        | {
            # Two programs on a multiprocessor: launched early, they would be spread unevenly.
            "launch_pdl": kind != "packed",
            "R": plan.dims.qk_rope_head_dim,
            "PAGE_SIZE": kv.page_size,
            "IS_CAUSAL": options.causal,
            "IS_CP": options.cp_world_size > 1,
            "HAS_SOFTCAP": options.softcap > 0,
            "HAS_WINDOW": options.window is not None,
            "GROUPS": num_groups,
            "HAS_KV_SCALE": kv_scale is not None and not num_groups,
            "HAS_Q_SCALE": request.problem.q_dtype in FP8_DTYPES,
        }
        | _launch(kind, tile_rows, rank),
        merge_kernel=merge_kernel,
        merge_grid=(merge_rows, plan.workspace["note"].shape[0]) if has_merge else (),
        merge_numbers=(plan.dims.num_heads, config["row_blocks"], *out_strides, *lse_strides),
        merge_constants=shared
        | {"ROWS": rows, "UNROLL": unroll, "num_warps": warps, "launch_pdl": True},
    )


def _launch(kind: str, tile_rows: int, kv_lora_rank: int) -> dict[str, int]:
    """Return stages that fit shared memory, and registers of the warp roles.

    227 KiB are one program's, 113 KiB if two share a multiprocessor.
    """
    if kind == "converted":
        stages = 2 if kv_lora_rank > 256 else 4
        return {
            "STAGES_A": stages,
            "STAGES_B": stages,
            "LOADERS": 4,
            "LOADER_REGISTERS": 120,
            "RIGHT_REGISTERS": 168,
            "num_warps": 4,
        }
    if kind == "packed":
        return {
            "STAGES_A": 2 if kv_lora_rank > 256 else 4,
            "STAGES_B": 0,
            "LOADERS": 4,
            "LOADER_REGISTERS": 72,
            "RIGHT_REGISTERS": 0,
            "num_warps": 4,
            "maxnreg": 128,
        }
    is_wide = kind == "wide"
    stages_a, stages_b = (3, 2) if tile_rows <= 8 else (2, 2)
    if kv_lora_rank <= 256 and not is_wide:
        stages_a, stages_b = 3, 3
    return {
        "STAGES_A": stages_a,
        "STAGES_B": stages_b,
        "LOADERS": 4,
        "LOADER_REGISTERS": 72 if is_wide else 120,
        "RIGHT_REGISTERS": 168 if is_wide else 0,
        "num_warps": 4,
    }


def _merge_launch(max_runs: int, most_pieces: int) -> tuple[int, int, int]:
    """Return rows of a program, pieces in flight and warps: many pieces want many loads at once.

    Of spans, few requests have as many pieces as the longest.
    """
    if most_pieces > 16:
        return 1, 64, 8
    return (1, 16, 4) if max_runs > 4 else (2, 8, 4)


def _descriptors(kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[object, object, int, int]:
    """Return tensor descriptors of both parts and their rows from page to page; none without TMA.

    TMA copies a tile out of one page, so pages hold whole tiles and lie whole rows apart.
    """
    none = None, None, 0, 0
    num_pages, page_size, rank = kv_c.shape
    if not num_pages:
        return none
    page_rows = []
    for part in (kv_c, k_pe):
        page_stride, token_stride = part.stride()[:2]
        if page_size % TILE or (num_pages > 1 and page_stride % token_stride):
            return none
        page_rows.append(page_stride // token_stride if num_pages > 1 else page_size)
    if (num_pages - 1) * max(page_rows) + page_size >= 2**31:
        return none
    is_packed = kv_c.itemsize == 1

    def describe(part: torch.Tensor, rows: int, block: int) -> object:
        unit = part.itemsize if is_packed else 1
        return _descriptor(
            part.data_ptr(),
            torch.uint8 if is_packed else part.dtype,
            (num_pages - 1) * rows + page_size,
            part.shape[2] * unit,
            part.stride(1) * unit,
            block * unit,
        )

    kv_c_block = PACKED_CHUNK if is_packed else rank // 2
    kv_c_rows, k_pe_rows = page_rows
    return (
        describe(kv_c, kv_c_rows, kv_c_block),
        describe(k_pe, k_pe_rows, k_pe.shape[2]),
        kv_c_rows,
        k_pe_rows,
    )


@functools.lru_cache(maxsize=4096)
def _descriptor(
    pointer: int, dtype: torch.dtype, num_rows: int, width: int, stride: int, block: int
) -> object:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    elements = {torch.uint8: gl.uint8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
    layout = gl.NVMMASharedLayout.get_default_for([TILE, block], elements[dtype])
    return TensorDescriptor(
        Address(pointer, dtype), [num_rows, width], [stride, 1], [TILE, block], layout
    )
