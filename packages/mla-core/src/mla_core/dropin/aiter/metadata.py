"""Work lists for persistent kernels, with the calls of ``aiter``'s metadata functions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.metadata import (
    DeviceProfile,
    WorkList,
    WorkListSizes,
    decode_sizes,
    decode_update,
    plan_prefill,
    plan_v1_0,
    plan_v1_1,
    plan_v1_2,
    prefill_sizes,
)
from mla_core.metadata.device import plan_v1_2_device

#: Shape and dtype of a buffer; a 1-D shape is its length, as in aiter.
BufferInfo = tuple[int | tuple[int, int], torch.dtype]
SixBuffers = tuple[BufferInfo, BufferInfo, BufferInfo, BufferInfo, BufferInfo, BufferInfo]

_PROFILE: ContextVar[DeviceProfile | None] = ContextVar("mla_core_aiter_profile", default=None)


@contextmanager
def planning_for(profile: DeviceProfile) -> Iterator[None]:
    """Plan for this machine inside a ``with`` block, instead of the current device.

    aiter asks the driver; this lets a host without the device, or a test, make the same lists.
    """
    token = _PROFILE.set(profile)
    try:
        yield
    finally:
        _PROFILE.reset(token)


def get_mla_metadata_info_v1(
    batch_size: int,
    max_seqlen_qo: int,
    num_head_qo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    is_sparse: bool,
    fast_mode: bool = True,
    num_kv_splits: int = 32,
    intra_batch_mode: bool = False,
    max_split_per_batch: int = -1,
) -> SixBuffers:
    """Return shape and dtype of the six buffers that `get_mla_metadata_v1` fills.

    Parameters
    ----------
    batch_size, max_seqlen_qo, num_head_qo : int
        Most requests, most query tokens of one, query heads.
    q_dtype, kv_dtype : torch.dtype
    is_sparse : bool
        Every query token attends to a top-k list of its own.
    fast_mode, intra_batch_mode, max_split_per_batch
        As given to `get_mla_metadata_v1`.
    num_kv_splits : int
        Most pieces per tile; with ``intra_batch_mode`` only.

    Returns
    -------
    work_metadata_ptrs : (2, uint64)
    work_indptr : (max_splits + 1, int32)
    work_info_set : ((max_work, 8), int32)
    reduce_indptr : (tile_cnt + 1, int32)
    reduce_final_map : ((tile_cnt, 2), int32)
    reduce_partial_map : (max_split_tiles, int32)

    Raises
    ------
    LayoutError

    Notes
    -----
    Mind the order: `get_mla_metadata_v1` takes ``work_info_set`` before ``work_indptr``. Any head
    count that can be planned is accepted, not only multiples of 8.
    """
    sizes = decode_sizes(
        batch_size,
        max_seqlen_qo,
        num_head_qo,
        profile=planning_profile(),
        q_dtype=dtype_name(q_dtype),
        kv_dtype=dtype_name(kv_dtype),
        is_sparse=is_sparse,
        fast_mode=fast_mode,
        num_kv_splits=num_kv_splits,
        intra_batch_mode=intra_batch_mode,
        max_split_per_batch=max_split_per_batch,
    )
    return _info(sizes)


def get_mla_metadata_v1(
    seqlens_qo_indptr: torch.Tensor,
    seqlens_kv_indptr: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    is_causal: bool,
    work_metadata_ptrs: torch.Tensor,
    work_info_set: torch.Tensor,
    work_indptr: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor,
    reduce_partial_map: torch.Tensor,
    page_size: int = 1,
    kv_granularity: int = 16,
    max_seqlen_qo: int = -1,
    uni_seqlen_qo: int = -1,
    fast_mode: bool = True,
    topk: int = -1,
    max_split_per_batch: int = -1,
    intra_batch_mode: bool = False,
    is_cp_round_robin: bool = False,
    mla_version: int = 0,
    dtype_q_nope: torch.dtype | None = None,
    dtype_q_rope: torch.dtype | None = None,
    dtype_kv_nope: torch.dtype | None = None,
    dtype_kv_rope: torch.dtype | None = None,
    dtype_q: torch.dtype | None = None,
    dtype_kv: torch.dtype | None = None,
) -> None:
    """Fill the six buffers with a schedule of a decode step.

    Parameters
    ----------
    seqlens_qo_indptr, seqlens_kv_indptr : [B + 1], int32
        Prefix sums of query tokens, and of KV pages.
    kv_last_page_lens : [B], int32
        Tokens in each last page; not read when ``page_size`` is 1.
    num_heads_per_head_k, num_heads_k : int
        Query heads per KV head, and KV heads, which must be 1.
    is_causal : bool
    work_metadata_ptrs : [2], uint64
        Receives the addresses of ``work_indptr`` and ``work_info_set``.
    work_info_set, work_indptr, reduce_indptr, reduce_final_map, reduce_partial_map : int32
        At least of the sizes that `get_mla_metadata_info_v1` returns.
    page_size, kv_granularity : int
        Tokens per page, any number here; pages per block, a power of two.
    max_seqlen_qo, uni_seqlen_qo : int
        Most query tokens of a request; the number that all have. Negative for unknown.
    fast_mode, intra_batch_mode : bool
        Balanced sweep; else equal splits with ``intra_batch_mode``, or longest request first.
    topk : int
        At least 0 for sparse attention over lists of this many entries; with ``fast_mode`` only.
    max_split_per_batch : int
        Bound on the pieces of a request, below 0 for none. The third mode has no such bound.
    is_cp_round_robin : bool
        The cache holds every W-th token of each request.
    mla_version : int
        0 (DeepSeek-V3.2) or 1 (V4); both are scheduled alike.
    dtype_q_nope, dtype_kv_nope : torch.dtype, optional
        Default: ``dtype_q`` and ``dtype_kv``, else bf16. They must be those of the decode call.
    dtype_q_rope, dtype_kv_rope : torch.dtype, optional
        No effect on a schedule.
    dtype_q, dtype_kv : torch.dtype, optional

    Raises
    ------
    LayoutError
        An argument is out of range or a buffer is too small; the message names it.
    UnsupportedProblemError
        The device's persistent kernels do not take this number of heads.

    Notes
    -----
    On a GPU with Triton, the dense ``fast_mode`` with a known ``max_seqlen_qo`` plans on the
    device, without a host sync and inside a captured CUDA graph too. Everything else is planned on
    the host, for which tensors on a GPU are waited for.

    Differences from aiter. Entries past the end of a schedule are defined: the indptr arrays repeat
    their last value, everything else is 0. Requests without KV get a work with an empty range, so
    that their output is written.
    """
    op = "get_mla_metadata_v1"
    del dtype_q_rope, dtype_kv_rope
    if mla_version not in (0, 1):
        raise LayoutError(f"{op}: mla_version must be 0 or 1, got {mla_version}")
    if topk >= 0 and not fast_mode:
        raise LayoutError(f"{op}: topk must be negative without fast_mode, got {topk}")
    if num_heads_k != 1:
        raise LayoutError(f"{op}: num_heads_k must be 1, got {num_heads_k}; MLA has one KV head")
    buffers = WorkList(
        work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map
    )
    _check_pointers(op, work_metadata_ptrs)
    q_dtype = dtype_name(dtype_q_nope or dtype_q or torch.bfloat16)
    kv_dtype = dtype_name(dtype_kv_nope or dtype_kv or torch.bfloat16)
    _write_pointers(work_metadata_ptrs, buffers)
    if fast_mode and topk < 0 and max_seqlen_qo >= 1 and _plans_on_device(seqlens_qo_indptr):
        plan_v1_2_device(
            buffers,
            seqlens_qo_indptr,
            seqlens_kv_indptr,
            kv_last_page_lens,
            num_heads=num_heads_per_head_k,
            max_seqlen_qo=max_seqlen_qo,
            profile=planning_profile(),
            is_causal=is_causal,
            page_size=page_size,
            kv_granularity=kv_granularity,
            uni_seqlen_qo=uni_seqlen_qo,
            max_split_per_batch=max_split_per_batch,
            is_cp_round_robin=is_cp_round_robin,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
        )
        return
    indices = (seqlens_qo_indptr.cpu(), seqlens_kv_indptr.cpu(), kv_last_page_lens.cpu())
    if fast_mode:
        work = plan_v1_2(
            *indices,
            num_heads=num_heads_per_head_k,
            profile=planning_profile(),
            is_causal=is_causal,
            page_size=page_size,
            kv_granularity=kv_granularity,
            max_seqlen_qo=max_seqlen_qo,
            # Token lists are counted by qo_indptr, whatever the call says of one list.
            uni_seqlen_qo=uni_seqlen_qo if topk < 0 else -1,
            topk=topk,
            max_split_per_batch=max_split_per_batch,
            is_cp_round_robin=is_cp_round_robin,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
        )
    elif intra_batch_mode:
        work = plan_v1_0(
            *indices,
            num_heads=num_heads_per_head_k,
            profile=planning_profile(),
            is_causal=is_causal and not is_cp_round_robin,
            page_size=page_size,
            kv_granularity=kv_granularity,
            max_seqlen_qo=max_seqlen_qo,
            uni_seqlen_qo=uni_seqlen_qo,
            max_split_per_batch=max_split_per_batch,
            # The buffers were sized for so many pieces of each tile.
            num_kv_splits=max(1, reduce_partial_map.numel() // max(1, reduce_final_map.shape[0])),
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
        )
    else:
        work = plan_v1_1(
            *indices,
            num_heads=num_heads_per_head_k,
            profile=planning_profile(),
            is_causal=is_causal and not is_cp_round_robin,
            page_size=page_size,
            kv_granularity=kv_granularity,
            max_seqlen_qo=max_seqlen_qo,
            uni_seqlen_qo=uni_seqlen_qo,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
        )
    work.copy_into(buffers)


def get_ps_metadata_info_v1(
    batch_size: int, num_head_k: int, max_qlen: int, qlen_granularity: int = 256
) -> SixBuffers:
    """Return shape and dtype of the six buffers of `get_ps_metadata_v1`.

    The order is that of `get_mla_metadata_info_v1`.

    Parameters
    ----------
    batch_size, num_head_k, max_qlen : int
        Most requests, KV heads, most query tokens of a request.
    qlen_granularity : int
        Query tokens of a tile.

    Raises
    ------
    LayoutError
    """
    sizes = prefill_sizes(
        batch_size,
        num_head_k,
        max_qlen,
        profile=planning_profile(),
        qlen_granularity=qlen_granularity,
    )
    return _info(sizes)


def get_ps_metadata_v1(
    seqlens_qo_indptr: torch.Tensor,
    pages_kv_indptr: torch.Tensor,
    context_lens: torch.Tensor,
    gqa_ratio: int,
    num_heads_k: int,
    work_metadata_ptrs: torch.Tensor,
    work_indptr: torch.Tensor,
    work_info: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor,
    reduce_partial_map: torch.Tensor,
    qhead_granularity: int = 1,
    qlen_granularity: int = 256,
    kvlen_granularity: int = 16,
    block_size: int = 16,
    is_causal: bool = True,
) -> None:
    """Fill the six buffers with a schedule of a prefill.

    Parameters
    ----------
    seqlens_qo_indptr, pages_kv_indptr : [B + 1], int32
        Prefix sums of query tokens, and of KV pages.
    context_lens : [B], int32
        KV tokens of each request.
    gqa_ratio, num_heads_k : int
        Query heads per KV head, and KV heads.
    work_metadata_ptrs : [2], uint64
        Left alone, as aiter's host planner leaves it.
    work_indptr, work_info, reduce_indptr, reduce_final_map, reduce_partial_map : int32
        At least of the sizes that `get_ps_metadata_info_v1` returns. Mind the order, which is not
        that of `get_mla_metadata_v1`.
    qhead_granularity : int
        Query heads of one work; must be ``gqa_ratio``.
    qlen_granularity, kvlen_granularity : int
        Query tokens of a tile, and KV tokens of a block; the latter a multiple of ``block_size``.
    block_size : int
        Tokens per page.
    is_causal : bool

    Raises
    ------
    LayoutError
        An argument is out of range or a buffer is too small; the message names it.
    """
    _check_pointers("get_ps_metadata_v1", work_metadata_ptrs)
    work = plan_prefill(
        seqlens_qo_indptr.cpu(),
        pages_kv_indptr.cpu(),
        context_lens.cpu(),
        profile=planning_profile(),
        gqa_ratio=gqa_ratio,
        num_heads_k=num_heads_k,
        qhead_granularity=qhead_granularity,
        qlen_granularity=qlen_granularity,
        kvlen_granularity=kvlen_granularity,
        page_size=block_size,
        is_causal=is_causal,
    )
    work.copy_into(
        WorkList(work_indptr, work_info, reduce_indptr, reduce_final_map, reduce_partial_map)
    )


def decode_update_mla_metadata_v1(
    seqlens_qo_indptr: torch.Tensor,
    seqlens_kv_indptr: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    is_causal: bool,
    work_metadata_ptrs: torch.Tensor,
    work_info_set: torch.Tensor,
    work_indptr: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor,
    reduce_partial_map: torch.Tensor,
    page_size: int = 1,
    kv_granularity: int = 16,
    max_seqlen_qo: int = 1,
    dtype_q: torch.dtype = torch.bfloat16,
    dtype_kv: torch.dtype = torch.bfloat16,
    num_reject_tokens: torch.Tensor | None = None,
) -> None:
    """Carry the schedule in the buffers over to the next step of the same batch, in place.

    Each request has grown by ``1 - num_reject_tokens[b]`` tokens, and has one query token now.

    Parameters
    ----------
    seqlens_qo_indptr, seqlens_kv_indptr : [B + 1], int32
        The second holds the lengths *after* the update.
    kv_last_page_lens : [B], int32
        Not read: pages hold one token.
    num_heads_per_head_k, num_heads_k, max_seqlen_qo, dtype_q, dtype_kv
        As given to `get_mla_metadata_v1` when the schedule was made.
    is_causal : bool
        No effect: a single query token sees everything.
    work_metadata_ptrs, work_info_set, work_indptr, reduce_indptr, reduce_final_map
        And ``reduce_partial_map``: filled by `get_mla_metadata_v1` with ``fast_mode``.
    page_size : int
        Must be 1.
    kv_granularity : int
        At least 16.
    num_reject_tokens : [B], int32, optional
        Tokens of the last step that a verifier rejected.

    Raises
    ------
    LayoutError

    Notes
    -----
    No host sync. A piece that a shrinking request leaves behind becomes empty.
    """
    op = "decode_update_mla_metadata_v1"
    del kv_last_page_lens, is_causal
    for name, value, ok, wanted in (
        ("page_size", page_size, page_size == 1, "1"),
        ("num_heads_k", num_heads_k, num_heads_k == 1, "1"),
        ("kv_granularity", kv_granularity, kv_granularity >= 16, ">= 16"),
    ):
        if not ok:
            raise LayoutError(f"{op}: {name} must be {wanted}, got {value}")
    if seqlens_qo_indptr.shape != seqlens_kv_indptr.shape:
        raise LayoutError(
            f"{op}: seqlens_qo_indptr must be [B + 1] like seqlens_kv_indptr "
            f"{tuple(seqlens_kv_indptr.shape)}, got {tuple(seqlens_qo_indptr.shape)}"
        )
    _check_pointers(op, work_metadata_ptrs)
    buffers = WorkList(
        work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map
    )
    decode_update(
        buffers,
        seqlens_kv_indptr,
        num_heads=num_heads_per_head_k,
        profile=planning_profile(),
        max_seqlen_qo=max_seqlen_qo,
        q_dtype=dtype_name(dtype_q),
        kv_dtype=dtype_name(dtype_kv),
        num_reject_tokens=num_reject_tokens,
    )
    _write_pointers(work_metadata_ptrs, buffers)


def _plans_on_device(index: torch.Tensor) -> bool:
    return index.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def planning_profile() -> DeviceProfile:
    """Return the machine that lists are made for: that of `planning_for`, else this one."""
    chosen = _PROFILE.get()
    if chosen is not None:
        return chosen
    if not torch.cuda.is_available():
        return DeviceProfile("cpu", torch.get_num_threads())
    device = torch.device("cuda", torch.cuda.current_device())
    num_cu = torch.cuda.get_device_properties(device).multi_processor_count
    return DeviceProfile(arch_of(device), num_cu)


def _info(sizes: WorkListSizes) -> SixBuffers:
    int32 = torch.int32
    return (
        (2, torch.uint64),
        (sizes.num_workgroups + 1, int32),
        ((sizes.max_works, 8), int32),
        (sizes.max_tiles + 1, int32),
        ((sizes.max_tiles, 2), int32),
        (sizes.max_partials, int32),
    )


def _check_pointers(op: str, pointers: torch.Tensor) -> None:
    dtypes = (torch.uint64,)
    check_tensor(
        op, "work_metadata_ptrs", pointers, shape=(2,), dtypes=dtypes, device=pointers.device
    )


def _write_pointers(pointers: torch.Tensor, buffers: WorkList) -> None:
    # Filled as int64, in place: a copy from the host could not be captured in a graph.
    as_int64 = pointers.view(torch.int64)
    for i, buffer in enumerate((buffers.work_indptr, buffers.work_info)):
        as_int64[i].fill_(buffer.data_ptr())
