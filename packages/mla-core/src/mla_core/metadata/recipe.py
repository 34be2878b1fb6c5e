"""A recipe for work lists: what stays the same while the lengths of a batch change.

A plan keeps one. The host or the device planner follows it, to the same list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.metadata.device import plan_v1_2_device, scratch_size
from mla_core.metadata.profile import DeviceProfile
from mla_core.metadata.sizes import WorkListSizes, decode_sizes
from mla_core.metadata.tiling import HeadTiling
from mla_core.metadata.v1_2 import plan_v1_2
from mla_core.metadata.worklist import WorkList


@dataclass(frozen=True, slots=True)
class WorkListRecipe:
    """The arguments of `plan_v1_2` that do not depend on lengths, for one kernel.

    Parameters
    ----------
    batch_size, max_seqlen_q : int
        Requests, and most query tokens of one.
    num_workers : int
        Workgroups to deal the work out to.
    tiling : HeadTiling
        How the kernel tiles query rows.
    page_size, kv_granularity : int
        Tokens per page, any number; pages per block, a power of two.
    is_causal, is_cp_round_robin : bool
    max_pieces : int, optional
        Aim at no more pieces of a request than this.
    """

    batch_size: int
    max_seqlen_q: int
    num_workers: int
    tiling: HeadTiling
    page_size: int
    kv_granularity: int
    is_causal: bool = True
    is_cp_round_robin: bool = False
    max_pieces: int | None = None

    @property
    def sizes(self) -> WorkListSizes:
        """Bounds of the list for any lengths."""
        return decode_sizes(
            self.batch_size,
            max(self.max_seqlen_q, 1),
            self.tiling.num_heads * self.tiling.fold,
            profile=self._profile,
            tiling=self.tiling,
        )

    @property
    def max_tile_tokens(self) -> int:
        """Most query tokens of a work."""
        return max(1, self.tiling.max_tile_tokens(self.max_seqlen_q))

    @property
    def max_partial_rows(self) -> int:
        """Rows that partial buffers need for any lengths."""
        return self.sizes.max_partials * self.max_tile_tokens

    @property
    def scratch(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the scratch of `plan_on_device`."""
        return (scratch_size(self.batch_size, self.num_workers),), torch.int64

    def plan_on_host(
        self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor
    ) -> WorkList:
        """Return the list for these lengths: int32 tensors on the CPU, as `plan_v1_2` takes them.

        Raises
        ------
        LayoutError
        """
        return plan_v1_2(
            qo_indptr,
            kv_indptr,
            kv_last_page_len,
            num_heads=self.tiling.num_heads * self.tiling.fold,
            profile=self._profile,
            is_causal=self.is_causal,
            page_size=self.page_size,
            kv_granularity=self.kv_granularity,
            max_seqlen_qo=max(self.max_seqlen_q, 1),
            max_split_per_batch=self._max_split_per_batch,
            is_cp_round_robin=self.is_cp_round_robin,
            tiling=self.tiling,
        )

    def plan_on_device(
        self,
        buffers: WorkList,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        scratch: torch.Tensor,
    ) -> None:
        """Write the list for these lengths into ``buffers`` without reading them on the host.

        Raises
        ------
        LayoutError, BackendUnavailableError
            As `plan_v1_2_device`.
        """
        plan_v1_2_device(
            buffers,
            qo_indptr,
            kv_indptr,
            kv_last_page_len,
            num_heads=self.tiling.num_heads * self.tiling.fold,
            max_seqlen_qo=max(self.max_seqlen_q, 1),
            profile=self._profile,
            is_causal=self.is_causal,
            page_size=self.page_size,
            kv_granularity=self.kv_granularity,
            max_split_per_batch=self._max_split_per_batch,
            is_cp_round_robin=self.is_cp_round_robin,
            tiling=self.tiling,
            scratch=scratch,
        )

    @property
    def _profile(self) -> DeviceProfile:
        # With a tiling given, planners ask a profile for nothing but its size.
        return DeviceProfile("any", self.num_workers)

    @property
    def _max_split_per_batch(self) -> int:
        return -1 if self.max_pieces is None else self.max_pieces
