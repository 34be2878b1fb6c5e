"""Ragged batches over paged caches: `PagedKV` and the conversions between index forms.

The one form kernels read is CSR: request ``b`` owns the pages
``kv_page_indices[kv_indptr[b]:kv_indptr[b + 1]]``, every one full except the last, which holds
``kv_last_page_len[b]`` tokens. Block tables and prefix sums of tokens are converted to it, on the
device and without a host sync.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core import env
from mla_core.cache import LatentCache
from mla_core.errors import LayoutError


@dataclass(frozen=True, slots=True)
class PagedKV:
    """Requests over the pages of one cache, in CSR form.

    Make one with `from_csr` or `from_block_table`, which check it once; the constructor itself
    trusts its arguments.

    Parameters
    ----------
    cache : LatentCache
    kv_indptr : [batch_size + 1], int32
        Prefix sums of **pages** per request; starts at 0.
    kv_page_indices : [>= kv_indptr[-1]], int32
        Physical page ids. May be over-allocated; entries past ``kv_indptr[-1]`` are never read.
        A page may occur any number of times; an id of -1 hides the page's tokens.
    kv_last_page_len : [batch_size], int32
        Tokens in each request's last page, 1..page_size; 0 for a request without pages.
    """

    cache: LatentCache
    kv_indptr: torch.Tensor
    kv_page_indices: torch.Tensor
    kv_last_page_len: torch.Tensor

    @classmethod
    def from_csr(
        cls,
        cache: LatentCache,
        kv_indptr: torch.Tensor,
        kv_page_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
    ) -> PagedKV:
        """Check CSR index arrays and bind them to a cache.

        Values are checked where that needs no device sync (CPU tensors), and everywhere under
        ``MLA_CHECK=1``.

        Raises
        ------
        LayoutError
            An array has the wrong dtype, rank, length, device or content; the message names it.
        """
        device = cache.device
        _index_array("PagedKV", "kv_indptr", kv_indptr, device)
        _index_array("PagedKV", "kv_page_indices", kv_page_indices, device)
        _index_array("PagedKV", "kv_last_page_len", kv_last_page_len, device)
        if kv_indptr.numel() < 1:
            raise LayoutError(
                "PagedKV: kv_indptr must be [batch_size + 1] with at least one entry, "
                "got shape (0,)"
            )
        batch_size = kv_indptr.numel() - 1
        if kv_last_page_len.numel() != batch_size:
            raise LayoutError(
                f"PagedKV: kv_last_page_len must be [batch_size]=({batch_size},) to match "
                f"kv_indptr {tuple(kv_indptr.shape)}, got {tuple(kv_last_page_len.shape)}"
            )
        kv = cls(cache, kv_indptr, kv_page_indices, kv_last_page_len)
        if device.type == "cpu" or env.flag("MLA_CHECK"):
            kv.check_values()
        return kv

    @classmethod
    def from_block_table(
        cls, cache: LatentCache, block_table: torch.Tensor, seq_lens: torch.Tensor
    ) -> PagedKV:
        """Build CSR arrays from a block table and token counts, without a host sync.

        Parameters
        ----------
        block_table : [batch_size, max_pages], int32
            Page ids of each request; entries past its last page may hold anything.
        seq_lens : [batch_size], int32
            Cached tokens of each request, 0 allowed.

        Notes
        -----
        ``kv_page_indices`` has ``block_table.numel()`` entries; the unused tail is -1.
        """
        device = cache.device
        _index_array("PagedKV", "block_table", block_table, device, ndim=2)
        _index_array("PagedKV", "seq_lens", seq_lens, device)
        batch_size, max_pages = block_table.shape
        if seq_lens.numel() != batch_size:
            raise LayoutError(
                f"PagedKV: seq_lens must be [batch_size]=({batch_size},) to match block_table "
                f"{tuple(block_table.shape)}, got {tuple(seq_lens.shape)}"
            )
        page_size = cache.page_size
        if device.type == "cpu" or env.flag("MLA_CHECK"):
            _within("PagedKV", "seq_lens", seq_lens, 0, max_pages * page_size)
        num_pages = pages_of(seq_lens, page_size)
        kv_indptr = indptr_of(num_pages)
        column = torch.arange(max_pages, device=device)
        is_used = column < num_pages[:, None]
        # Unused cells all land on one spare entry behind the end, which the slice drops.
        target = torch.where(is_used, kv_indptr[:-1, None] + column, block_table.numel())
        flat = block_table.new_full((block_table.numel() + 1,), -1)
        flat.scatter_(0, target.flatten().long(), block_table.flatten())
        last_page_len = seq_lens - (num_pages - 1).clamp(min=0) * page_size
        return cls.from_csr(cache, kv_indptr, flat[: block_table.numel()], last_page_len)

    @classmethod
    def from_cu_seqlens(cls, cache: LatentCache, cu_seqlens_k: torch.Tensor) -> PagedKV:
        """View a cache whose tokens lie one request after another, each starting on a new page.

        Parameters
        ----------
        cu_seqlens_k : [batch_size + 1], int32
            Prefix sums of tokens; starts at 0. With page_size 1 request ``b`` owns exactly the
            slots ``cu_seqlens_k[b]:cu_seqlens_k[b + 1]``.
        """
        _index_array("PagedKV", "cu_seqlens_k", cu_seqlens_k, cache.device)
        seq_lens = cu_seqlens_k.diff()
        if cache.device.type == "cpu" or env.flag("MLA_CHECK"):
            check_indptr("PagedKV", "cu_seqlens_k", cu_seqlens_k)
        num_pages = pages_of(seq_lens, cache.page_size)
        kv_indptr = indptr_of(num_pages)
        pages = torch.arange(cache.num_pages, dtype=torch.int32, device=cache.device)
        last_page_len = seq_lens - (num_pages - 1).clamp(min=0) * cache.page_size
        return cls.from_csr(cache, kv_indptr, pages, last_page_len)

    def check_values(self) -> None:
        """Check the content of the index arrays (reads them on the host).

        Raises
        ------
        LayoutError
            ``kv_indptr`` does not start at 0, decreases, or points past ``kv_page_indices``; a page
            id is not below ``num_pages``; a last page length is outside 1..page_size.
        """
        check_indptr("PagedKV", "kv_indptr", self.kv_indptr)
        total_pages = int(self.kv_indptr[-1])
        if total_pages > self.kv_page_indices.numel():
            raise LayoutError(
                f"PagedKV: kv_page_indices must have at least kv_indptr[-1]={total_pages} entries, "
                f"got shape {tuple(self.kv_page_indices.shape)}"
            )
        used = self.kv_page_indices[:total_pages]
        _within("PagedKV", "kv_page_indices", used, -1, self.cache.num_pages - 1)
        has_pages = self.kv_indptr.diff() > 0
        low = has_pages.to(self.kv_last_page_len.dtype)
        high = low * self.cache.page_size
        bad = (self.kv_last_page_len < low) | (self.kv_last_page_len > high)
        if bool(bad.any()):
            where = int(bad.int().argmax())
            raise LayoutError(
                f"PagedKV: kv_last_page_len must be in 1..{self.cache.page_size} for requests with "
                f"pages and 0 for the others, got a value outside at request {where}"
            )

    @property
    def batch_size(self) -> int:
        """Number of requests, empty ones included."""
        return self.kv_indptr.numel() - 1

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.cache.page_size

    @property
    def seq_lens(self) -> torch.Tensor:
        """Cached tokens of each request, [batch_size] int32 on the device."""
        num_pages = self.kv_indptr.diff()
        full = (num_pages - 1).clamp(min=0) * self.page_size
        return full + torch.where(num_pages > 0, self.kv_last_page_len, 0)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Prefix sums of cached tokens, [batch_size + 1] int32 on the device."""
        return indptr_of(self.seq_lens)

    def block_table(self, max_pages: int | None = None, fill: int = -1) -> torch.Tensor:
        """Return the dense [batch_size, max_pages] int32 table of page ids, padded with ``fill``.

        Without ``max_pages`` the longest request decides, which reads its length on the host.
        """
        num_pages = self.kv_indptr.diff()
        if max_pages is None:
            max_pages = int(num_pages.max()) if num_pages.numel() else 0
        column = torch.arange(max_pages, device=self.cache.device)
        is_used = column < num_pages[:, None]
        position = torch.where(is_used, self.kv_indptr[:-1, None] + column, 0)
        if not self.kv_page_indices.numel():
            return position.new_full(position.shape, fill, dtype=torch.int32)
        return torch.where(is_used, self.kv_page_indices[position.long()], fill).to(torch.int32)

    def token_slots(self, max_len: int | None = None) -> torch.Tensor:
        """Return the physical slot of every token, [batch_size, max_len] int64, -1 where hidden.

        ``slot = page * page_size + offset``. A token is hidden when it lies past its request's
        length or on a page with an id below 0 or not below ``num_pages``.
        """
        if max_len is None:
            lens = self.seq_lens
            max_len = int(lens.max()) if lens.numel() else 0
        max_pages = -(-max_len // self.page_size)
        pages = self.block_table(max_pages).long()
        offset = torch.arange(self.page_size, device=self.cache.device)
        slots = (pages[:, :, None] * self.page_size + offset).flatten(1)[:, :max_len]
        position = torch.arange(max_len, device=self.cache.device)
        page_ok = (pages >= 0) & (pages < self.cache.num_pages)
        visible = page_ok.repeat_interleave(self.page_size, dim=1)[:, :max_len]
        return torch.where(visible & (position < self.seq_lens[:, None]), slots, -1)


def pages_of(seq_lens: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return ``ceil(seq_lens / page_size)`` in the dtype of ``seq_lens``."""
    return torch.div(seq_lens + page_size - 1, page_size, rounding_mode="floor")


def indptr_of(counts: torch.Tensor) -> torch.Tensor:
    """Return the int32 prefix sums ``[0, c0, c0 + c1, ...]`` of [n] counts, on their device."""
    indptr = counts.new_zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=indptr[1:])
    return indptr


def check_qo_indptr(
    op: str, qo_indptr: torch.Tensor, batch_size: int, device: torch.device
) -> None:
    """Check the prefix sums of query tokens against a batch.

    Raises
    ------
    LayoutError
        Wrong dtype, rank, length, device or (on the CPU) content.
    """
    _index_array(op, "qo_indptr", qo_indptr, device)
    if qo_indptr.numel() != batch_size + 1:
        raise LayoutError(
            f"{op}: qo_indptr must be [batch_size + 1]=({batch_size + 1},) to match kv_indptr, "
            f"got {tuple(qo_indptr.shape)}"
        )
    if device.type == "cpu" or env.flag("MLA_CHECK"):
        check_indptr(op, "qo_indptr", qo_indptr)


def check_query_lens(op: str, qo_indptr: torch.Tensor, total_q: int, max_seqlen_q: int) -> None:
    """Check what kernels rely on, where reading it needs no device sync.

    Raises
    ------
    LayoutError
        A request has more than ``max_seqlen_q`` query tokens, or all have more than q has rows.
    """
    if max_seqlen_q < 0:
        raise LayoutError(f"{op}: max_seqlen_q must be >= 0, got {max_seqlen_q}")
    on_host = qo_indptr.device.type == "cpu" or env.flag("MLA_CHECK")
    if not on_host or qo_indptr.ndim != 1 or qo_indptr.numel() < 1:
        return
    if int(qo_indptr[-1]) > total_q:
        raise LayoutError(
            f"{op}: qo_indptr must end at no more than the {total_q} rows of q, "
            f"got {int(qo_indptr[-1])}"
        )
    longest = int(qo_indptr.diff().max()) if qo_indptr.numel() > 1 else 0
    if longest > max_seqlen_q:
        raise LayoutError(
            f"{op}: max_seqlen_q must be at least the most query tokens of a request, {longest}, "
            f"got {max_seqlen_q}"
        )


def _index_array(
    op: str, name: str, tensor: torch.Tensor, device: torch.device, ndim: int = 1
) -> None:
    shape = "[batch_size, max_pages]" if ndim == 2 else "1-D"
    if tensor.ndim != ndim:
        raise LayoutError(f"{op}: {name} must be {shape}, got shape {tuple(tensor.shape)}")
    if tensor.dtype != torch.int32:
        raise LayoutError(
            f"{op}: {name} must be int32, got {tensor.dtype} {tuple(tensor.shape)}; "
            "call .to(torch.int32)"
        )
    if tensor.device != device:
        raise LayoutError(f"{op}: {name} must be on {device} like the cache, got {tensor.device}")
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{op}: {name} must be contiguous, got strides {tensor.stride()}; call .contiguous()"
        )


def check_indptr(op: str, name: str, indptr: torch.Tensor) -> None:
    """Check the values of prefix sums: they start at 0 and never decrease (reads them).

    Raises
    ------
    LayoutError
    """
    if not indptr.numel():
        raise LayoutError(f"{op}: {name} must have at least one entry, got shape (0,)")
    if int(indptr[0]) != 0:
        raise LayoutError(
            f"{op}: {name} must start at 0, got {int(indptr[0])} in shape {tuple(indptr.shape)}"
        )
    if bool((indptr.diff() < 0).any()):
        where = int((indptr.diff() < 0).int().argmax())
        raise LayoutError(
            f"{op}: {name} must not decrease, got a smaller value at {where + 1} "
            f"in shape {tuple(indptr.shape)}"
        )


def _within(op: str, name: str, tensor: torch.Tensor, low: int, high: int) -> None:
    bad = (tensor < low) | (tensor > high)
    if bool(bad.any()):
        where = int(bad.flatten().int().argmax())
        raise LayoutError(
            f"{op}: {name} must be in {low}..{high}, got {int(tensor.flatten()[where])} at {where} "
            f"in shape {tuple(tensor.shape)}"
        )
