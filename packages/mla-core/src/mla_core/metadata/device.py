"""Plan on the device that runs the schedule: `plan_v1_2` without a host sync.

Lengths stay on the device and outputs go to buffers of fixed size, so planning can be captured in
a CUDA graph and replayed after lengths changed. The result is that of the host planner, copied into
the same buffers, bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from mla_core.errors import BackendUnavailableError, LayoutError
from mla_core.launch import launch
from mla_core.metadata.profile import DeviceProfile, ceil_div
from mla_core.metadata.ragged import check_index_tensors, check_one_kv_head, check_units
from mla_core.metadata.sizes import decode_sizes
from mla_core.metadata.tiling import HeadTiling, head_tiling
from mla_core.metadata.v1_2 import overhead_blocks
from mla_core.metadata.worklist import WorkList, check_buffer

_OP = "plan_v1_2_device"
_BLOCK = 128


#: First Triton whose AMD code of the planner is right. LLVM in 3.7 lets lane 0 walk the loop of
#: `deal_kernel` apart from the other lanes, whose sums then lack it; the emulator shows both.
FIRST_AMD_TRITON = (3, 9)


def plan_v1_2_device(
    buffers: WorkList,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    num_heads: int,
    max_seqlen_qo: int,
    profile: DeviceProfile,
    num_heads_k: int = 1,
    is_causal: bool = True,
    page_size: int = 1,
    kv_granularity: int = 16,
    uni_seqlen_qo: int = -1,
    topk: int = -1,
    max_split_per_batch: int = -1,
    is_cp_round_robin: bool = False,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    tiling: HeadTiling | None = None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Plan a decode step on the device of the index tensors.

    Parameters
    ----------
    buffers : WorkList
        Outputs, for example ``WorkList.empty(decode_sizes(...), device)``. Unused entries are
        defined as by `WorkList.copy_into`.
    qo_indptr, kv_indptr, kv_last_page_len
        As in `plan_v1_2`, on the device of ``buffers``. Their contents are trusted.
    max_seqlen_qo : int
        Most query tokens of a request, or of one token list each (``topk``): what buffers are
        sized for.
    tiling : HeadTiling, optional
        As in `plan_v1_2`; ``buffers`` then need the sizes that `decode_sizes` gives for it.
    scratch : [>= scratch_size(batch_size, num_workgroups)], int64, optional
        Give it and nothing is allocated. ``num_workgroups`` is that of `decode_sizes`.

    The other parameters are those of `plan_v1_2`.

    Raises
    ------
    LayoutError
        An argument is not what it must be, or a buffer is too small for the largest schedule.
    UnsupportedProblemError
        As `plan_v1_2`.
    BackendUnavailableError
        Triton is not installed, or is older than 3.9 on an AMD GPU.
    """
    check_one_kv_head(_OP, num_heads_k)
    check_units(_OP, page_size=page_size, kv_granularity=kv_granularity)
    check_index_tensors(_OP, qo_indptr, kv_indptr, kv_last_page_len)
    is_sparse = topk >= 0
    batch_size = kv_last_page_len.numel()
    sizes = decode_sizes(
        batch_size,
        max_seqlen_qo,
        num_heads,
        profile=profile,
        q_dtype=q_dtype,
        kv_dtype=kv_dtype,
        is_sparse=is_sparse,
        tiling=tiling,
    )
    for name, shape in sizes.shapes.items():
        check_buffer(_OP, name, getattr(buffers, name), shape)
    device = buffers.work_info.device
    if scratch is None:
        needed = scratch_size(batch_size, sizes.num_workgroups)
        scratch = torch.empty(needed, dtype=torch.int64, device=device)
    _check_devices(device, qo_indptr, kv_indptr, kv_last_page_len, scratch)
    parts = _scratch_parts(batch_size, sizes.num_workgroups)
    if scratch.dtype != torch.int64 or scratch.ndim != 1 or scratch.numel() < sum(parts):
        raise LayoutError(
            f"{_OP}: scratch must be [{sum(parts)}] int64 or longer, got {tuple(scratch.shape)} "
            f"{scratch.dtype}"
        )
    cost_before, tiles_before, cut_tile, cut_page, cut_row, cut_entry, counts = scratch[
        : sum(parts)
    ].split(parts)
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError(
            f'{_OP}: triton must be installed, got none; pip install "mla-core[triton]"'
        )
    _refuse_miscompiled(buffers.work_indptr.device)
    from mla_core.kernels.plan import deal_kernel, fill_kernel, request_prefix_kernel

    tiling = tiling or head_tiling(
        _OP, num_heads, 1 if is_sparse else max_seqlen_qo, q_dtype, kv_dtype, profile
    )
    shape_args = {
        "HEADS": tiling.num_heads,
        "FOLD": tiling.fold,
        "PACKED_ROWS": tiling.packed_rows,
        "ONE_TILE": tiling.one_tile,
        "IS_SPARSE": is_sparse,
        "BLOCK": _BLOCK,
    }
    overhead = overhead_blocks(page_size)
    max_pages = ceil_div(topk, page_size) if is_sparse else 0
    launch(
        request_prefix_kernel,
        (1,),
        cost_before,
        tiles_before,
        qo_indptr,
        kv_indptr,
        batch_size,
        uni_seqlen_qo,
        max_pages,
        kv_granularity,
        overhead,
        **shape_args,
    )
    launch(
        deal_kernel,
        (1,),
        buffers.work_indptr,
        cut_tile,
        cut_page,
        cut_row,
        cut_entry,
        counts,
        cost_before,
        tiles_before,
        qo_indptr,
        kv_indptr,
        batch_size,
        sizes.num_workgroups,
        max_split_per_batch,
        uni_seqlen_qo,
        max_pages,
        kv_granularity,
        overhead,
        PAGE_SIZE=page_size,
        **shape_args,
        num_warps=1,
    )
    lengths = [getattr(buffers, name).shape[0] for name in sizes.shapes]
    launch(
        fill_kernel,
        (ceil_div(max(lengths), _BLOCK),),
        buffers.work_indptr,
        buffers.work_info,
        buffers.reduce_indptr,
        buffers.reduce_final_map,
        buffers.reduce_partial_map,
        cut_tile,
        cut_page,
        cut_row,
        cut_entry,
        counts,
        tiles_before,
        qo_indptr,
        kv_indptr,
        kv_last_page_len,
        batch_size,
        sizes.num_workgroups,
        *lengths,
        uni_seqlen_qo,
        max_pages,
        max(batch_size, sizes.num_workgroups).bit_length(),
        PAGE_SIZE=page_size,
        **shape_args,
        TRIMS=is_causal and not is_cp_round_robin and page_size == 1 and not is_sparse,
    )


def scratch_size(batch_size: int, num_workgroups: int) -> int:
    """Length of the int64 ``scratch`` of `plan_v1_2_device`."""
    return sum(_scratch_parts(batch_size, num_workgroups))


def _scratch_parts(batch_size: int, num_workgroups: int) -> list[int]:
    """Prefix sums over requests, four numbers per cut, three counts."""
    return [batch_size + 1] * 2 + [num_workgroups] * 4 + [3]


def _check_devices(device: torch.device, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.device != device:
            raise LayoutError(
                f"{_OP}: index tensors and scratch must be on {device} like the buffers, got one "
                f"on {tensor.device}"
            )


def _refuse_miscompiled(device: torch.device) -> None:
    """Refuse AMD GPUs with a Triton that compiles the planner to wrong code."""
    if device.type == "cpu" or torch.version.hip is None:
        return
    # ROCm builds of torch bring Triton as a distribution of another name.
    found = importlib.import_module("triton").__version__
    if tuple(int(part) for part in found.split(".")[:2]) < FIRST_AMD_TRITON:
        raise BackendUnavailableError(
            f"{_OP}: triton must be {'.'.join(map(str, FIRST_AMD_TRITON))} or later on AMD GPUs, "
            f"got {found}, which compiles the planner wrongly; plan on the host: plan_v1_2, or "
            "plan_decode with fixed_lengths=True"
        )
