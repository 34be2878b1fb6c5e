"""Split-K reduce: merge the partial results of one query token over disjoint ranges of keys.

A partial is normalised by its own denominator and carries its log-sum-exp. With ``m`` the largest
``lse`` of a token's partials,

    w_s = exp(lse_s - m);  out = sum_s w_s * partial_out_s / sum_s w_s;  lse = m + log(sum_s w_s)

in fp32 and always in split order, so the bits of a token depend on its own partials alone. A
partial with ``lse = -inf`` is empty, and its ``partial_out`` is never read. Without any partial
``out`` is 0 and ``lse`` is -inf. A sink is one more weight, ``exp(sink - m)``, with a zero value.
"""

from __future__ import annotations

import enum
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from mla_core import env
from mla_core.checks import check_tensor
from mla_core.errors import BackendUnavailableError, LayoutError
from mla_core.launch import launch

_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NEG_INF = float("-inf")


class LseBase(enum.Enum):
    """Base of the logarithms in ``partial_lse`` and in the returned ``lse``."""

    NATURAL = "natural"
    TWO = "two"


@dataclass(frozen=True, slots=True)
class Merge:
    """A checked reduce, as both implementations take it.

    ``reduce_indptr`` is ``None`` for the dense form. ``final_map`` gives each group of partials up
    to ``group_rows`` output rows; without it a group is one query token. With ``fold`` above 1,
    output rows are folded ones and ``qo_indptr`` takes them apart.
    """

    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    reduce_indptr: torch.Tensor | None
    partial_map: torch.Tensor | None
    final_map: torch.Tensor | None
    group_rows: int
    sink: torch.Tensor | None
    lse_base: LseBase
    fold: int = 1
    qo_indptr: torch.Tensor | None = None

    @property
    def num_groups(self) -> int:
        """Groups of partials that merge into the same output rows."""
        if self.reduce_indptr is None:
            return self.partial_out.shape[0]
        return self.reduce_indptr.numel() - 1


def reduce_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    reduce_indptr: torch.Tensor | None = None,
    partial_map: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    lse_base: LseBase = LseBase.NATURAL,
    out_dtype: torch.dtype | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge normalised partials into one output row and log-sum-exp per query token and head.

    Parameters
    ----------
    partial_out : [total_q, num_splits, num_heads, value_dim], fp32, bf16 or fp16
        With ``reduce_indptr``: [num_partials, num_heads, value_dim].
    partial_lse : partial_out's shape without value_dim, fp32
        -inf marks an empty partial.
    out : [total_q, num_heads, value_dim], fp32, bf16 or fp16, optional
    lse : [total_q, num_heads], fp32, optional
    reduce_indptr : [total_q + 1], int32, optional
        Token ``t`` owns the partials ``reduce_indptr[t]:reduce_indptr[t + 1]``, possibly none.
    partial_map : [>= reduce_indptr[-1]], int32, optional
        Row of each partial; rows below 0 or not below num_partials are left out.
    sink : [num_heads], fp32, optional
        Extra logit with a zero value, always in natural units.
    lse_base : LseBase
    out_dtype : torch.dtype, optional
        Dtype of ``out`` when it is not given; default: that of ``partial_out``.
    backend : "torch" or "triton", optional
        Default: Triton for CUDA tensors where it is installed, else torch.

    Returns
    -------
    out, lse

    Raises
    ------
    LayoutError
        A tensor has the wrong shape, dtype, device or stride; the message names it.
    BackendUnavailableError
        ``backend="triton"`` cannot run here.

    Notes
    -----
    All strides are honoured; the last dimension of ``partial_out`` and ``out`` must be contiguous.
    With ``out`` and ``lse`` given, Triton neither allocates nor syncs. Torch reads the largest
    number of partials on the host when ``reduce_indptr`` is given.
    """
    op = "reduce_partials"
    if reduce_indptr is None and partial_map is not None:
        raise LayoutError(
            f"{op}: partial_map must be None without reduce_indptr, got shape "
            f"{tuple(partial_map.shape)}"
        )
    _check_partials(op, partial_out, partial_lse, is_dense=reduce_indptr is None)
    _check_index(op, "reduce_indptr", reduce_indptr, partial_out.device)
    _check_index(op, "partial_map", partial_map, partial_out.device)
    if reduce_indptr is None:
        total_q = partial_out.shape[0]
    else:
        _check_range(op, reduce_indptr, partial_out if partial_map is None else partial_map)
        total_q = reduce_indptr.numel() - 1
    shape = (total_q, *partial_out.shape[-2:])
    if out is None:
        out = partial_out.new_empty(shape, dtype=out_dtype or partial_out.dtype)
    elif out_dtype not in (None, out.dtype):
        raise LayoutError(f"{op}: out_dtype must be {out.dtype} like out, got {out_dtype}")
    if lse is None:
        lse = partial_lse.new_empty(shape[:2])
    _check_outputs(op, out, lse, sink, shape, partial_out.device)
    merge = Merge(
        partial_out, partial_lse, out, lse, reduce_indptr, partial_map, None, 1, sink, lse_base
    )
    _implementation(op, backend, out.device)(merge)
    return out, lse


def reduce_tiles(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    reduce_indptr: torch.Tensor,
    final_map: torch.Tensor,
    partial_map: torch.Tensor,
    *,
    max_tile_rows: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None = None,
    lse_base: LseBase = LseBase.NATURAL,
    fold: int = 1,
    qo_indptr: torch.Tensor | None = None,
    backend: Literal["torch", "triton"] | None = None,
) -> None:
    """Merge the partials of a persistent work list, tile by tile, into ``out`` and ``lse``.

    Parameters
    ----------
    partial_out : [num_partials, num_heads, value_dim], fp32, bf16 or fp16
    partial_lse : [num_partials, num_heads], fp32
    reduce_indptr : [num_tiles + 1], int32
        Tile ``t`` owns the entries ``reduce_indptr[t]:reduce_indptr[t + 1]`` of ``partial_map``.
    final_map : [num_tiles, 2], int32
        First and one past the last query row of each tile.
    partial_map : [>= reduce_indptr[-1]], int32
        Partial row of the tile's first query row; the tile's next rows follow it. A tile whose
        first entry is below 0 counts as one without partials.
    max_tile_rows : int
        Bound on the rows of a tile.
    out, lse : [total_q, num_heads, value_dim], [total_q, num_heads] fp32
        Rows of tiles without partials, and rows in no tile, keep their values: the attention
        kernel wrote them itself. A tile with a single partial is written like any other.
    fold : int
        Groups into which the list divides heads, each with query rows of its own: token ``i`` of
        group ``g`` of a request is row ``q_start * fold + g * q_len + i``. Partials then have
        ``num_heads // fold`` heads; ``out``, ``lse`` and ``sink`` have all of them.
    qo_indptr : [batch_size + 1], int32, optional
        Prefix sums of query tokens; required with ``fold`` above 1.

    Raises
    ------
    LayoutError, BackendUnavailableError
        As `reduce_partials`.
    """
    op = "reduce_tiles"
    if fold < 1 or (fold > 1 and qo_indptr is None):
        raise LayoutError(
            f"{op}: fold must be >= 1, and above 1 come with qo_indptr, got {fold} with "
            f"qo_indptr={'None' if qo_indptr is None else tuple(qo_indptr.shape)}"
        )
    _check_partials(op, partial_out, partial_lse, is_dense=False)
    _check_index(op, "reduce_indptr", reduce_indptr, partial_out.device)
    _check_index(op, "partial_map", partial_map, partial_out.device)
    _check_index(op, "qo_indptr", qo_indptr, partial_out.device)
    _check_range(op, reduce_indptr, partial_map)
    shape = (reduce_indptr.numel() - 1, 2)
    int32 = (torch.int32,)
    check_tensor(op, "final_map", final_map, shape=shape, dtypes=int32, device=partial_out.device)
    if not final_map.is_contiguous():
        raise LayoutError(
            f"{op}: final_map must be contiguous, got strides {final_map.stride()}; "
            "call .contiguous()"
        )
    if max_tile_rows < 1:
        raise LayoutError(f"{op}: max_tile_rows must be >= 1, got {max_tile_rows}")
    num_heads, value_dim = partial_out.shape[-2] * fold, partial_out.shape[-1]
    out_shape = (out.shape[0] if out.ndim else 0, num_heads, value_dim)
    _check_outputs(op, out, lse, sink, out_shape, partial_out.device)
    merge = Merge(
        partial_out,
        partial_lse,
        out,
        lse,
        reduce_indptr,
        partial_map,
        final_map,
        max_tile_rows,
        sink,
        lse_base,
        fold,
        qo_indptr if fold > 1 else None,
    )
    _implementation(op, backend, out.device)(merge)


def _check_partials(
    op: str, partial_out: torch.Tensor, partial_lse: torch.Tensor, *, is_dense: bool
) -> None:
    rows = ("total_q", "num_splits") if is_dense else ("num_partials",)
    device = partial_out.device
    check_tensor(
        op,
        "partial_out",
        partial_out,
        shape=(*rows, "num_heads", "value_dim"),
        dtypes=_OUT_DTYPES,
        device=device,
    )
    if partial_lse.dtype != torch.float32 or partial_lse.shape != partial_out.shape[:-1]:
        raise LayoutError(
            f"{op}: partial_lse must be {list(partial_out.shape[:-1])} float32 like partial_out, "
            f"got {list(partial_lse.shape)} {partial_lse.dtype}"
        )
    if partial_lse.device != device:
        raise LayoutError(f"{op}: partial_lse must be on {device}, got {partial_lse.device}")


def _check_index(op: str, name: str, index: torch.Tensor | None, device: torch.device) -> None:
    if index is not None:
        check_tensor(op, name, index, shape=("n",), dtypes=(torch.int32,), device=device)


def _check_range(op: str, reduce_indptr: torch.Tensor, entries: torch.Tensor) -> None:
    """Check the ranges, their values only where that needs no device sync."""
    if reduce_indptr.numel() < 1:
        raise LayoutError(f"{op}: reduce_indptr must be [total_q + 1] or [num_tiles + 1], got (0,)")
    if reduce_indptr.device.type != "cpu" and not env.flag("MLA_CHECK"):
        return
    if int(reduce_indptr[0]) < 0 or int(reduce_indptr[-1]) > entries.shape[0]:
        raise LayoutError(
            f"{op}: reduce_indptr must lie in 0..{entries.shape[0]}, the number of partials or "
            f"entries of partial_map, got {int(reduce_indptr[0])} to {int(reduce_indptr[-1])} "
            f"in shape {tuple(reduce_indptr.shape)}"
        )


def _check_outputs(
    op: str,
    out: torch.Tensor,
    lse: torch.Tensor,
    sink: torch.Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    check_tensor(op, "out", out, shape=shape, dtypes=_OUT_DTYPES, device=device)
    if lse.dtype != torch.float32 or lse.shape != shape[:2] or lse.device != device:
        raise LayoutError(
            f"{op}: lse must be {list(shape[:2])} float32 on {device}, "
            f"got {list(lse.shape)} {lse.dtype} on {lse.device}"
        )
    if sink is not None:
        fp32 = (torch.float32,)
        check_tensor(op, "sink", sink, shape=shape[1:2], dtypes=fp32, device=device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def default_backend(device: torch.device) -> Literal["torch", "triton"]:
    """Return the implementation that runs when the caller names none."""
    return "triton" if device.type == "cuda" and _has_triton() else "torch"


def _implementation(op: str, backend: str | None, device: torch.device) -> Callable[[Merge], None]:
    backend = backend or default_backend(device)
    if backend == "torch":
        return _merge_torch
    if backend != "triton":
        raise LayoutError(f'{op}: backend must be "torch", "triton" or None, got {backend!r}')
    if not _has_triton():
        raise BackendUnavailableError(
            f'{op}: backend "triton" needs triton; pip install "mla-core[triton]"'
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise BackendUnavailableError(
            f'{op}: backend "triton" must get CUDA tensors, got {device}; use backend="torch", or '
            "TRITON_INTERPRET=1 in tests"
        )
    return _merge_triton


def _merge_torch(merge: Merge) -> None:
    """Merge on any device: one vectorised step per split, in split order."""
    is_two = merge.lse_base is LseBase.TWO
    exp, log = (torch.exp2, torch.log2) if is_two else (torch.exp, torch.log)
    count, rows, out_rows = _partial_rows(merge)
    if merge.reduce_indptr is None:
        partials = [(merge.partial_out[:, s], merge.partial_lse[:, s]) for s in range(count)]
    else:
        partials = [_gather(merge, rows[:, s]) for s in range(count)]
    shape = (merge.num_groups * merge.group_rows, *merge.partial_out.shape[-2:])
    m = merge.out.new_full(shape[:2], _NEG_INF, dtype=torch.float32)
    head_group = None
    if merge.fold > 1:
        assert out_rows is not None
        out_rows, head_group = _unfold(merge, out_rows)
    if merge.sink is not None:
        sink = merge.sink * math.log2(math.e) if is_two else merge.sink
        sinks = sink.unflatten(0, (merge.fold, shape[1]))
        m = sink = sinks[0].expand(shape[:2]) if head_group is None else sinks[head_group]
    for _, lse in partials:
        m = torch.maximum(m, lse)
    m_safe = torch.where(m == _NEG_INF, 0.0, m)
    acc = merge.out.new_zeros(shape, dtype=torch.float32)
    denom = torch.zeros_like(m_safe)
    for x, lse in partials:
        weight = exp(lse - m_safe)
        is_empty = (lse == _NEG_INF)[..., None]
        acc += weight[..., None] * torch.where(is_empty, 0.0, x.float())
        denom += weight
    if merge.sink is not None:
        denom += exp(sink - m_safe)
    acc /= torch.where(denom == 0, 1.0, denom)[..., None]
    lse = m_safe + log(denom)
    if out_rows is None:
        merge.out.copy_(acc)
        merge.lse.copy_(lse)
    else:
        written = out_rows >= 0
        targets = merge.out, merge.lse
        index: tuple[torch.Tensor, ...] = (out_rows[written],)
        if head_group is not None:
            targets = tuple(t.unflatten(1, (merge.fold, shape[1])) for t in targets)
            index = (*index, head_group[written])
        targets[0][index] = acc[written].to(merge.out.dtype)
        targets[1][index] = lse[written]


def _unfold(merge: Merge, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return query token (-1 where there is none) and group of heads of folded query rows."""
    assert merge.qo_indptr is not None
    ends = merge.qo_indptr[1:].long() * merge.fold
    request = torch.searchsorted(ends, rows.clamp(min=0), right=True)
    exists = (rows >= 0) & (request < ends.numel())
    request = torch.where(exists, request, 0)
    q_start = merge.qo_indptr.long()[request]
    q_len = merge.qo_indptr.diff().long()[request].clamp(min=1) if ends.numel() else q_start + 1
    nth = torch.where(exists, rows - q_start * merge.fold, 0)
    token = q_start + nth % q_len
    return torch.where(exists, token, -1), torch.where(exists, nth // q_len, 0)


def _partial_rows(merge: Merge) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """Return the most partials of a group, their rows (-1: none) and the output rows (-1: none)."""
    if merge.reduce_indptr is None:
        return merge.partial_out.shape[1], merge.partial_lse.new_empty(0), None
    begin, counts = merge.reduce_indptr[:-1].long(), merge.reduce_indptr.diff()
    count = int(counts.max()) if counts.numel() else 0
    split = torch.arange(count, device=begin.device)
    exists = split < counts[:, None]
    rows = torch.where(exists, begin[:, None] + split, -1)  # [groups, count]
    if merge.partial_map is not None and rows.numel():
        rows = torch.where(exists, merge.partial_map.long()[rows.clamp(min=0)], -1)
    if merge.final_map is None:
        return count, rows, None
    local = torch.arange(merge.group_rows, device=begin.device)
    rows = torch.where(rows[:, None] >= 0, rows[:, None] + local[:, None], -1)  # [groups, row, s]
    out_rows = merge.final_map[:, :1].long() + local  # [groups, group_rows]
    is_split = (rows[:, 0, 0] >= 0) if count else counts > 0
    is_written = (out_rows < merge.final_map[:, 1:]) & is_split[:, None]
    return count, rows.flatten(0, 1), torch.where(is_written, out_rows, -1).flatten()


def _gather(merge: Merge, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the partials at ``rows``; a row that does not exist comes back empty."""
    num_partials = merge.partial_out.shape[0]
    exists = (rows >= 0) & (rows < num_partials)
    if not num_partials:
        shape = (rows.numel(), *merge.partial_out.shape[1:])
        empty = merge.partial_out.new_zeros(shape)
        return empty, merge.partial_lse.new_full(shape[:2], _NEG_INF)
    index = torch.where(exists, rows, 0)
    lse = torch.where(exists[:, None], merge.partial_lse[index], _NEG_INF)
    return merge.partial_out[index], lse


def _merge_triton(merge: Merge) -> None:
    launch_reduce(
        merge.partial_out,
        merge.partial_lse,
        merge.out,
        merge.lse,
        reduce_indptr=merge.reduce_indptr,
        partial_map=merge.partial_map,
        final_map=merge.final_map,
        group_rows=merge.group_rows,
        sink=merge.sink,
        is_base_two=merge.lse_base is LseBase.TWO,
        fold=merge.fold,
        qo_indptr=merge.qo_indptr,
    )


def launch_reduce(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    reduce_indptr: torch.Tensor | None = None,
    partial_map: torch.Tensor | None = None,
    final_map: torch.Tensor | None = None,
    group_rows: int = 1,
    sink: torch.Tensor | None = None,
    is_base_two: bool = False,
    fold: int = 1,
    qo_indptr: torch.Tensor | None = None,
) -> None:
    """Launch the merge over tensors as `reduce_partials` or `reduce_tiles` has checked them.

    For backends that made the partials themselves and call this once a step. Neither allocates nor
    syncs.
    """
    from mla_core.kernels.reduce import reduce_partials_kernel

    is_dense = reduce_indptr is None
    num_heads, value_dim = partial_out.shape[-2:]
    num_groups = partial_out.shape[0] if reduce_indptr is None else reduce_indptr.numel() - 1
    num_programs = num_groups * group_rows * num_heads
    if not num_programs or not value_dim:
        return
    out_strides, lse_strides = partial_out.stride()[:-1], partial_lse.stride()
    # Few rows: cut each into column blocks, or most of the chip would idle.
    block_d = 1 << (value_dim - 1).bit_length()
    if num_programs < 1024:
        block_d = min(block_d, 128)
    batch_size = 0 if qo_indptr is None else qo_indptr.numel() - 1
    # Unused pointers get a tensor that is never read.
    launch(
        reduce_partials_kernel,
        (num_programs, -(-value_dim // block_d)),
        out,
        lse,
        partial_out,
        partial_lse,
        lse if reduce_indptr is None else reduce_indptr,
        lse if partial_map is None else partial_map,
        lse if final_map is None else final_map,
        lse if sink is None else sink,
        lse if qo_indptr is None else qo_indptr,
        batch_size,
        batch_size.bit_length(),
        num_heads,
        partial_out.shape[1] if is_dense else 0,
        partial_out.shape[1 if is_dense else 0],
        *out.stride()[:2],
        *lse.stride(),
        *(out_strides if is_dense else (0, *out_strides)),
        *(lse_strides if is_dense else (0, *lse_strides)),
        D=value_dim,
        BLOCK_D=block_d,
        BLOCK_S=8,
        GROUP_ROWS=group_rows,
        IS_DENSE=is_dense,
        HAS_MAP=partial_map is not None,
        HAS_FINAL_MAP=final_map is not None,
        HAS_SINK=sink is not None,
        IS_BASE_TWO=is_base_two,
        FOLD=fold,
        num_warps=max(1, min(4, block_d // 128)),
    )
