"""Split decode: attend to two halves of each context separately, then merge."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

import mla_core
from mla_core import LatentCache, PagedKV
from mla_core.batch import indptr_of
from mla_core.errors import LayoutError
from mla_core.integrations.transformers import Step


@dataclass(frozen=True)
class SplitStep(Step):
    """A decode step in two halves, as two devices that share a long context would run it.

    Parameters
    ----------
    halves : two PagedKV
        The first pages of each request, possibly none, and its other pages.
    """

    halves: tuple[PagedKV, PagedKV] | None = None

    @classmethod
    def halve(cls, step: Step) -> SplitStep:
        """Split the pages of every request of a one-token decode step in the middle.

        Raises
        ------
        LayoutError
            The step is a prefill, or a request has several new tokens, of which some would have to
            see a part of the second half only.
        """
        if step.plan is None or step.plan.request.max_seqlen_q != 1:
            raise LayoutError("SplitStep: step must decode one token per request, got more")
        kv = step.kv
        num_pages = kv.kv_indptr.diff()
        in_first = torch.div(num_pages, 2, rounding_mode="floor")
        first_last_len = torch.where(in_first > 0, kv.page_size, 0).to(torch.int32)
        total = int(kv.kv_indptr[-1])
        nth = torch.arange(total, device=num_pages.device)
        request = torch.repeat_interleave(num_pages)
        is_first = nth - kv.kv_indptr[request] < in_first[request]
        pages = kv.kv_page_indices[:total]
        first = PagedKV.from_csr(kv.cache, indptr_of(in_first), pages[is_first], first_last_len)
        second = PagedKV.from_csr(
            kv.cache, indptr_of(num_pages - in_first), pages[~is_first], kv.kv_last_page_len
        )
        copied = {item.name: getattr(step, item.name) for item in fields(Step)}
        return cls(**copied, halves=(first, second))

    def attend(
        self, cache: LatentCache, ql_nope: torch.Tensor, q_pe: torch.Tensor, sm_scale: float
    ) -> torch.Tensor:
        """Decode both halves with their log-sum-exps and merge them."""
        assert self.plan is not None
        assert self.halves is not None
        outs, lses = [], []
        for half in self.halves:
            kv = replace(half, cache=cache)
            out, lse = mla_core.decode(
                ql_nope, q_pe, kv, self.plan, sm_scale=sm_scale, return_lse=True
            )
            outs.append(out)
            lses.append(lse)
        merged, _ = mla_core.reduce_partials(torch.stack(outs, dim=1), torch.stack(lses, dim=1))
        return merged
