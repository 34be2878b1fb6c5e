"""The planners' view of a ragged batch: checked lengths on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.batch import check_indptr
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata.profile import is_power_of_two


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lengths of a batch, int64 on the CPU.

    Parameters
    ----------
    q_start, q_len : [batch_size]
        First query row of each request and its query tokens.
    kv_start, kv_pages : [batch_size]
        First entry of ``kv_page_indices`` of each request and its pages.
    kv_last_page_len : [batch_size]
        Tokens in the last page; all 1 for a page size of 1.
    page_size, kv_granularity : int
        Tokens per page; pages per block, the unit in which work is dealt out.
    """

    q_start: torch.Tensor
    q_len: torch.Tensor
    kv_start: torch.Tensor
    kv_pages: torch.Tensor
    kv_last_page_len: torch.Tensor
    page_size: int
    kv_granularity: int

    @property
    def batch_size(self) -> int:
        """Number of requests."""
        return self.q_len.numel()


def ragged(
    op: str,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    page_size: int,
    kv_granularity: int,
    uni_seqlen_qo: int = -1,
) -> Ragged:
    """Check the index tensors of a batch and take them apart.

    Raises
    ------
    LayoutError
        A tensor or a granularity is not what planners take; the message names it.
    """
    check_units(op, page_size=page_size, kv_granularity=kv_granularity)
    check_host_tensors(op, qo_indptr, kv_indptr, kv_last_page_len)
    kv, qo = kv_indptr.long(), qo_indptr.long()
    kv_start, kv_pages = kv[:-1], kv.diff()
    last = torch.ones_like(kv_start)
    if page_size > 1:
        last = kv_last_page_len.long()
        wrong = (last < 1) | (last > page_size)
        if bool((wrong & (kv_pages > 0)).any()):
            raise LayoutError(
                f"{op}: kv_last_page_len must be in 1..page_size={page_size} for each request "
                "with pages, got one outside"
            )
    q_start, q_len = qo[:-1], qo.diff()
    if uni_seqlen_qo >= 1:
        q_len = torch.full_like(q_len, uni_seqlen_qo)
        q_start = torch.arange(q_len.numel()) * uni_seqlen_qo
    return Ragged(q_start, q_len, kv_start, kv_pages, last, page_size, kv_granularity)


def check_units(op: str, *, page_size: int, kv_granularity: int) -> None:
    """Check the units of a schedule.

    Raises
    ------
    LayoutError
    """
    if page_size < 1:
        raise LayoutError(f"{op}: page_size must be >= 1, got {page_size}")
    if not is_power_of_two(kv_granularity):
        raise LayoutError(f"{op}: kv_granularity must be a power of two, got {kv_granularity}")


def check_one_kv_head(op: str, num_heads_k: int) -> None:
    """Latent attention has one key, shared by all query heads.

    Raises
    ------
    UnsupportedProblemError
    """
    if num_heads_k != 1:
        raise UnsupportedProblemError(
            f"{op}: num_heads_k must be 1, got {num_heads_k}; the latent is shared by all heads"
        )


def check_host_tensors(
    op: str,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    lengths: torch.Tensor,
    lengths_name: str = "kv_last_page_len",
) -> None:
    """Check the index tensors of a host planner, and that the prefix sums are some.

    Raises
    ------
    LayoutError
    """
    check_index_tensors(op, qo_indptr, kv_indptr, lengths, lengths_name)
    named = (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr), (lengths_name, lengths))
    for name, tensor in named:
        if tensor.device.type != "cpu":
            raise LayoutError(
                f"{op}: {name} must be on the CPU, got {tensor.device}; pass a host copy, or plan "
                "on the device with plan_v1_2_device"
            )
    for name, indptr in named[:2]:
        check_indptr(op, name, indptr)


def check_index_tensors(
    op: str,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    lengths: torch.Tensor,
    lengths_name: str = "kv_last_page_len",
) -> None:
    """Check rank, dtype, contiguity and length of the index tensors, without reading them.

    Raises
    ------
    LayoutError
    """
    for name, tensor in (
        ("qo_indptr", qo_indptr),
        ("kv_indptr", kv_indptr),
        (lengths_name, lengths),
    ):
        if tensor.ndim != 1 or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise LayoutError(
                f"{op}: {name} must be a contiguous 1-D int32 tensor, got "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )
    if qo_indptr.numel() < 1 or kv_indptr.numel() != qo_indptr.numel():
        raise LayoutError(
            f"{op}: qo_indptr and kv_indptr must both be [batch_size + 1], got "
            f"{tuple(qo_indptr.shape)} and {tuple(kv_indptr.shape)}"
        )
    if lengths.numel() != kv_indptr.numel() - 1:
        raise LayoutError(
            f"{op}: {lengths_name} must be [batch_size]=({kv_indptr.numel() - 1},), got "
            f"{tuple(lengths.shape)}"
        )
