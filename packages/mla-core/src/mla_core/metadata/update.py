"""Carry a schedule over to the next decode step, without planning again.

While the batch stays the same, a step adds one token to every request and takes back the tokens a
verify step rejected. The cuts can stay where they are: only the last piece of each request grows
or shrinks, and everything moves with the new prefix sums. All of it is plain tensor arithmetic on
the buffers' device, so it needs no host sync and can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from mla_core.errors import LayoutError
from mla_core.metadata import worklist as columns
from mla_core.metadata.profile import DeviceProfile
from mla_core.metadata.tiling import head_tiling
from mla_core.metadata.worklist import WorkList

_OP = "decode_update"


def decode_update(
    work: WorkList,
    kv_indptr: torch.Tensor,
    *,
    num_heads: int,
    profile: DeviceProfile,
    max_seqlen_qo: int = 1,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
    num_reject_tokens: torch.Tensor | None = None,
) -> None:
    """Rewrite a `plan_v1_2` schedule in place for one query token per request.

    Parameters
    ----------
    work : WorkList
        Of the last step, with page size 1 and one query tile per request and head group; may be
        padded as by `WorkList.copy_into`. Works of several query rows become works of one.
    kv_indptr : [batch_size + 1], int32, on the device of ``work``
        Prefix sums of the lengths *after* the update.
    num_heads, profile, max_seqlen_qo, q_dtype, kv_dtype
        As in the plan; they tell how heads were folded.
    num_reject_tokens : [batch_size], int32, optional
        Each request grew by ``1 - num_reject_tokens[b]`` tokens; default: by 1.

    Raises
    ------
    LayoutError
        A tensor has the wrong dtype, shape or device.

    Notes
    -----
    A request that shrinks below a cut keeps its pieces; those past the end become empty.
    """
    device = work.work_info.device
    _check_tensor("kv_indptr", kv_indptr, device)
    batch_size = kv_indptr.numel() - 1
    growth = torch.ones(max(batch_size, 1), dtype=torch.int32, device=device)
    if num_reject_tokens is not None:
        _check_tensor("num_reject_tokens", num_reject_tokens, device)
        if num_reject_tokens.numel() != batch_size:
            raise LayoutError(
                f"{_OP}: num_reject_tokens must be [batch_size]=({batch_size},), got "
                f"{tuple(num_reject_tokens.shape)}"
            )
        growth = 1 - num_reject_tokens
    if batch_size < 1 or work.num_works == 0:
        return
    fold = head_tiling(_OP, num_heads, max_seqlen_qo, q_dtype, kv_dtype, profile).fold

    info = work.work_info
    exists = torch.arange(work.num_works, device=device) < work.work_indptr[-1]
    nth, is_last = _pieces(work, info[:, columns.PARTIAL_QO_LOC])
    group = info[:, columns.BATCH_IDX]
    request = torch.where(exists, group // fold, 0)
    new_len = kv_indptr.diff()[request]
    old_len = new_len - growth[request]
    length = info[:, columns.KV_END] - info[:, columns.KV_START]
    end = old_len - info[:, columns.KV_OFFSET]
    begin = torch.minimum(end - length, new_len)
    end = torch.where(is_last, new_len, torch.minimum(end, new_len))
    updated = torch.stack(
        [
            group,
            nth,
            group,
            group + 1,
            kv_indptr[request] + begin,
            kv_indptr[request] + end,
            new_len - end,
            info[:, columns.HEAD_RANGE],
        ],
        dim=1,
    )
    info.copy_(torch.where(exists[:, None], updated, info))

    tile = torch.arange(work.reduce_final_map.shape[0], device=device, dtype=torch.int32)
    is_cut = work.reduce_indptr.diff() > 0
    rows = torch.stack([tile, tile + 1], dim=1)
    work.reduce_final_map.copy_(torch.where(is_cut[:, None], rows, 0))
    entry = torch.arange(work.reduce_partial_map.numel(), device=device, dtype=torch.int32)
    work.reduce_partial_map.copy_(torch.where(entry < work.reduce_indptr[-1], entry, 0))


def _pieces(work: WorkList, partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each work's place in ``reduce_partial_map`` (-1: whole) and if it ends its tile."""
    rows = work.reduce_partial_map
    num_entries = rows.numel()
    entry = torch.arange(num_entries, device=rows.device)
    # Unused entries after the last partial would break the order the search relies on.
    rows = torch.where(entry < work.reduce_indptr[-1], rows, torch.iinfo(torch.int32).max)
    nth = torch.searchsorted(rows, partial.contiguous()).int()
    ends_tile = torch.zeros(num_entries + 1, dtype=torch.bool, device=rows.device)
    last = work.reduce_indptr[1:].long() - 1
    last = torch.where(work.reduce_indptr.diff() > 0, last, num_entries)
    ends_tile.scatter_(0, last, True)  # indexed assignment would copy the scalar from the host
    is_whole = partial < 0
    return torch.where(is_whole, -1, nth), is_whole | ends_tile[nth.long()]


def _check_tensor(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.ndim != 1 or tensor.dtype != torch.int32 or tensor.device != device:
        raise LayoutError(
            f"{_OP}: {name} must be 1-D int32 on {device} like the work list, got "
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
