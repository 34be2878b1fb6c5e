"""The work list: what each persistent workgroup computes, and which partials are merged.

One *work* is one piece of the cached tokens for one tile of query rows. Workgroup ``c`` runs the
works ``work_indptr[c]:work_indptr[c + 1]`` in order. A tile whose cache range was cut into pieces
has them merged afterwards; every other tile's only work writes the final output itself.

A tile that sees no token still has one work, with ``kv_start == kv_end``: its kernel writes
``out = 0`` and ``lse = -inf``, and nothing is left unwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import torch

from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.metadata.sizes import WorkListSizes

#: Columns of ``work_info``.
BATCH_IDX: Final = 0  # request; group of heads ``b * fold + g`` when heads are folded
PARTIAL_QO_LOC: Final = 1  # first row in the partial buffers, -1 to write the final output
QO_START: Final = 2  # query rows [start, end)
QO_END: Final = 3
KV_START: Final = 4  # entries [start, end) of kv_page_indices
KV_END: Final = 5
KV_OFFSET: Final = 6  # tokens of the request after KV_END
HEAD_RANGE: Final = 7  # prefill: first query head | (one past the last << 16); else 0
WORK_FIELDS: Final = 8


@dataclass(frozen=True, slots=True)
class WorkList:
    """A schedule over persistent workgroups. All tensors are int32.

    Parameters
    ----------
    work_indptr : [num_workgroups + 1]
        Range of works of each workgroup.
    work_info : [num_works, 8]
        One row per work; the columns are the constants of this module.
    reduce_indptr : [num_tiles + 1]
        Range of partials of each query tile; empty for a tile in one piece.
    reduce_final_map : [num_tiles, 2]
        Query rows of each tile that was cut, 0 elsewhere.
    reduce_partial_map : [num_partials]
        First partial row of each piece.
    """

    work_indptr: torch.Tensor
    work_info: torch.Tensor
    reduce_indptr: torch.Tensor
    reduce_final_map: torch.Tensor
    reduce_partial_map: torch.Tensor

    @property
    def num_works(self) -> int:
        """Works over all workgroups."""
        return self.work_info.shape[0]

    @property
    def num_partial_rows(self) -> int:
        """Rows the partial buffers must have."""
        rows = self.work_info[:, PARTIAL_QO_LOC]
        ends = rows + self.work_info[:, QO_END] - self.work_info[:, QO_START]
        ends = ends[rows >= 0]
        return int(ends.max()) if ends.numel() else 0

    @property
    def sizes(self) -> WorkListSizes:
        """Lengths of the buffers, used or not."""
        return WorkListSizes(
            num_workgroups=self.work_indptr.numel() - 1,
            max_works=self.work_info.shape[0],
            max_tiles=self.reduce_final_map.shape[0],
            max_partials=self.reduce_partial_map.numel(),
        )

    def check_buffers(self, op: str, device: torch.device) -> None:
        """Check shapes, dtypes and devices, not contents.

        Raises
        ------
        LayoutError
        """
        num_tiles = max(self.reduce_indptr.numel() - 1, 0)
        wanted: dict[str, tuple[int | str, ...]] = {
            "work_indptr": ("num_workgroups + 1",),
            "work_info": ("num_works", WORK_FIELDS),
            "reduce_indptr": ("num_tiles + 1",),
            "reduce_final_map": (num_tiles, 2),
            "reduce_partial_map": ("num_partials",),
        }
        for name, shape in wanted.items():
            buffer = getattr(self, name)
            check_tensor(op, name, buffer, shape=shape, dtypes=(torch.int32,), device=device)
            if not buffer.is_contiguous():
                raise LayoutError(
                    f"{op}: {name} must be contiguous, got strides {buffer.stride()}; "
                    "call .contiguous()"
                )
        for name in ("work_indptr", "reduce_indptr"):
            if not getattr(self, name).numel():
                raise LayoutError(f"{op}: {name} must have at least one entry, got shape (0,)")

    @classmethod
    def empty(cls, sizes: WorkListSizes, device: torch.device | str = "cpu") -> WorkList:
        """Allocate buffers that hold any schedule within ``sizes``, filled with zeros."""
        return cls(
            **{
                name: torch.zeros(shape, dtype=torch.int32, device=device)
                for name, shape in sizes.shapes.items()
            }
        )

    def copy_into(self, buffers: WorkList) -> None:
        """Write this schedule into larger buffers on any device, as a captured graph needs them.

        ``work_indptr`` and ``reduce_indptr`` are continued with their last value, so that further
        workgroups and tiles are idle; every other unused entry becomes 0.

        Raises
        ------
        LayoutError
            A buffer is not contiguous int32 or too small.
        """
        for field in fields(self):
            source: torch.Tensor = getattr(self, field.name)
            target: torch.Tensor = getattr(buffers, field.name)
            check_buffer("WorkList.copy_into", field.name, target, tuple(source.shape))
            used = source.shape[0]
            target[:used].copy_(source)
            target[used:].fill_(int(source[-1]) if field.name.endswith("indptr") else 0)

    def validate(self) -> None:
        """Check what any consumer relies on; for tests and for schedules made elsewhere.

        Raises
        ------
        LayoutError
            A range runs backwards or out of bounds, two pieces share partial rows, or a piece is
            merged never or twice.
        """
        _check_indptr("work_indptr", self.work_indptr, self.num_works)
        _check_indptr("reduce_indptr", self.reduce_indptr, self.reduce_partial_map.numel())
        info = self.work_info
        for begin, end in ((QO_START, QO_END), (KV_START, KV_END)):
            if bool(((info[:, begin] > info[:, end]) | (info[:, begin] < 0)).any()):
                raise LayoutError(
                    f"WorkList: work_info columns {begin} and {end} must be a range, got a "
                    "negative or reversed one"
                )
        split = info[info[:, PARTIAL_QO_LOC] >= 0]
        # Head groups of one KV range share a partial row: the buffers have a head dimension.
        pieces = split[:, [PARTIAL_QO_LOC, QO_START, QO_END]]
        rows, begins, ends = torch.unique(pieces, dim=0).unbind(1)
        if bool((rows[1:] < (rows + ends - begins)[:-1]).any()):
            raise LayoutError("WorkList: partial rows must not overlap, got two pieces that do")
        counts = self.reduce_indptr.diff().long()
        merged_map = self.reduce_final_map.repeat_interleave(counts, dim=0)
        merged = torch.cat([self.reduce_partial_map[:, None], merged_map], dim=1)
        merged = merged[merged[:, 0].argsort()]
        if not torch.equal(merged, torch.stack([rows, begins, ends], dim=1)):
            raise LayoutError(
                "WorkList: reduce maps must list each piece of a cut tile once, got "
                f"{merged.shape[0]} entries for {rows.numel()} pieces"
            )


def check_follows(
    op: str,
    work: WorkList,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    page_size: int,
    fold: int = 1,
) -> None:
    """Check that a list was made for these lengths (reads all of it on the host).

    Parameters
    ----------
    work : WorkList
        Of dense attention, in any order, from any planner; may be padded.
    qo_indptr, kv_indptr : [batch_size + 1], int32
    kv_lens : [batch_size], int32
    page_size : int
    fold : int
        Groups of heads that the list calls requests.

    Raises
    ------
    LayoutError
        A work names rows or keys that the batch does not have, or some are left out.
    """
    num_works = int(work.work_indptr.max()) if work.work_indptr.numel() else 0
    if num_works > work.num_works or int(work.work_indptr[:1].sum()) != 0:
        raise LayoutError(
            f"{op}: work_indptr must rise from 0 to at most {work.num_works}, the works there are, "
            f"got up to {num_works}"
        )
    info = work.work_info[:num_works].long().cpu()
    q_start, q_len = qo_indptr[:-1].long().cpu(), qo_indptr.diff().long().cpu()
    first, pages, lens = kv_indptr[:-1].long().cpu(), kv_indptr.diff().long().cpu(), kv_lens.cpu()
    batch_size = q_len.numel()
    group = info[:, BATCH_IDX]
    if bool(((group < 0) | (group >= batch_size * fold)).any()):
        raise LayoutError(
            f"{op}: batch_idx of a work must be in 0..{batch_size * fold - 1}, got one outside; "
            "make the list again for this batch"
        )
    request = group // fold
    rows = q_start[request] * fold + (group % fold) * q_len[request]
    begin, end = info[:, QO_START] - rows, info[:, QO_END] - rows
    if bool(((begin < 0) | (end > q_len[request]) | (begin > end)).any()):
        raise LayoutError(
            f"{op}: query rows of a work must be those of its request, got others; make the list "
            "again for this batch"
        )
    kv_begin, kv_end = info[:, KV_START] - first[request], info[:, KV_END] - first[request]
    # What follows a piece tells how long its planner took the request to be.
    left = (lens[request] - kv_end * page_size).clamp(min=0)
    is_current = (kv_begin >= 0) & (kv_begin <= kv_end) & (kv_end <= pages[request])
    if not bool((is_current & (left == info[:, KV_OFFSET])).all()):
        raise LayoutError(
            f"{op}: a work list must be made for the lengths it is used with, got one for others; "
            "plan it again after lengths change"
        )
    # Works may leave out what a causal mask hides.
    num_rows = q_len * fold
    row_ends = num_rows.cumsum(0)
    row_request = torch.arange(batch_size).repeat_interleave(num_rows)
    nth = (torch.arange(row_request.numel()) - (row_ends - num_rows)[row_request]) % q_len[
        row_request
    ]
    needed = lens[row_request] - (q_len[row_request] - 1 - nth)
    covered = torch.zeros(row_request.numel() + 1, dtype=torch.int64)
    works = torch.zeros_like(covered)
    for row, sign in ((info[:, QO_START], 1), (info[:, QO_END], -1)):
        covered.index_add_(0, row, sign * (kv_end - kv_begin))
        works.index_add_(0, row, torch.full_like(row, sign))
    is_short = covered.cumsum(0)[:-1] * page_size < needed
    is_left_out = (works.cumsum(0)[:-1] == 0) & (lens[row_request] > 0)
    if bool((is_short | is_left_out).any()):
        raise LayoutError(
            f"{op}: works must cover every query row of a request with keys, and every key that it "
            "sees, got one that is left out"
        )


def check_buffer(op: str, name: str, buffer: torch.Tensor, needed: tuple[int, ...]) -> None:
    """Check that a caller's buffer can hold ``needed`` int32 rows.

    Raises
    ------
    LayoutError
    """
    if buffer.dtype != torch.int32 or not buffer.is_contiguous():
        raise LayoutError(
            f"{op}: {name} must be contiguous int32, got {buffer.dtype} with strides "
            f"{buffer.stride()}"
        )
    fits = buffer.ndim == len(needed) and buffer.shape[1:] == torch.Size(needed[1:])
    if not fits or buffer.shape[0] < needed[0]:
        raise LayoutError(
            f"{op}: {name} must be at least {needed}, got {tuple(buffer.shape)}; allocate it with "
            "the sizes of the largest batch"
        )


def _check_indptr(name: str, indptr: torch.Tensor, total: int) -> None:
    ends_right = indptr.numel() >= 1 and int(indptr[0]) == 0 and int(indptr[-1]) == total
    if not ends_right or bool((indptr.diff() < 0).any()):
        raise LayoutError(f"WorkList: {name} must rise from 0 to {total}, got another sequence")
