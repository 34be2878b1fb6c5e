"""Merging partial results, as a public op."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from mla_core import reduce
from mla_core.ops import library
from mla_core.reduce import LseBase


@functools.wraps(reduce.reduce_partials)
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
    """Run `mla_core.reduce.reduce_partials`, through its custom op while compiling."""
    if not torch.compiler.is_compiling():
        return reduce.reduce_partials(
            partial_out,
            partial_lse,
            out=out,
            lse=lse,
            reduce_indptr=reduce_indptr,
            partial_map=partial_map,
            sink=sink,
            lse_base=lse_base,
            out_dtype=out_dtype,
            backend=backend,
        )
    total_q = partial_out.shape[0] if reduce_indptr is None else reduce_indptr.shape[0] - 1
    shape = (total_q, *partial_out.shape[-2:])
    if out is None:
        out = partial_out.new_empty(shape, dtype=out_dtype or partial_out.dtype)
    if lse is None:
        lse = partial_lse.new_empty(shape[:2])
    torch.ops.mla.reduce_partials(
        partial_out,
        partial_lse,
        reduce_indptr,
        partial_map,
        sink,
        lse_base is LseBase.TWO,
        backend,
        out,
        lse,
    )
    return out, lse


def _run_flat(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    reduce_indptr: torch.Tensor | None,
    partial_map: torch.Tensor | None,
    sink: torch.Tensor | None,
    is_base_two: bool,
    backend: Literal["torch", "triton"] | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    reduce.reduce_partials(
        partial_out,
        partial_lse,
        out=out,
        lse=lse,
        reduce_indptr=reduce_indptr,
        partial_map=partial_map,
        sink=sink,
        lse_base=LseBase.TWO if is_base_two else LseBase.NATURAL,
        backend=backend,
    )


def _fake(partial_out: torch.Tensor, *arguments: object) -> None:
    out = arguments[-2]
    assert isinstance(out, torch.Tensor)
    torch._check(out.shape[-2:] == partial_out.shape[-2:])


library.define(
    "reduce_partials",
    "(Tensor partial_out, Tensor partial_lse, Tensor? reduce_indptr, Tensor? partial_map, "
    "Tensor? sink, bool is_base_two, str? backend, Tensor(a!) out, Tensor(b!) lse) -> ()",
    _run_flat,
    _fake,
)
