"""Checks that the attention ops share."""

from __future__ import annotations

import torch

from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import FP8_DTYPES, dtype_name
from mla_core.errors import LayoutError
from mla_core.plan import output_dtype

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_queries(
    op: str,
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    dims: MLADims,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check the two query halves against dims and each other."""
    heads, dtypes = dims.num_heads, (dtype,)
    nope_shape = ("total_q", heads, dims.kv_lora_rank)
    check_tensor(op, "ql_nope", ql_nope, shape=nope_shape, dtypes=dtypes, device=device)
    pe_shape = (ql_nope.shape[0], heads, dims.qk_rope_head_dim)
    check_tensor(op, "q_pe", q_pe, shape=pe_shape, dtypes=dtypes, device=device)


def check_sink(op: str, sink: torch.Tensor | None, num_heads: int, device: torch.device) -> None:
    """Check an attention sink, if any."""
    if sink is not None:
        fp32 = (torch.float32,)
        check_tensor(op, "sink", sink, shape=(num_heads,), dtypes=fp32, device=device)


def check_q_scale(op: str, q: torch.Tensor, q_scale: torch.Tensor | None) -> None:
    """Require a query scale for fp8 queries and refuse one for others."""
    is_fp8 = dtype_name(q.dtype) in FP8_DTYPES
    if is_fp8 and q_scale is None:
        raise LayoutError(f"{op}: q_scale must be given for {q.dtype} queries, got None")
    if q_scale is not None:
        if not is_fp8:
            raise LayoutError(f"{op}: q_scale must be None for {q.dtype} queries, got a tensor")
        fp32 = (torch.float32,)
        check_tensor(op, "q_scale", q_scale, shape=(1,), dtypes=fp32, device=q.device)


def outputs(
    op: str,
    like: torch.Tensor,
    shape: tuple[int, int, int],
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check the given outputs and allocate the missing ones."""
    if out is not None:
        check_tensor(op, "out", out, shape=shape, dtypes=OUT_DTYPES, device=like.device)
    if lse is not None:
        fp32 = (torch.float32,)
        check_tensor(op, "lse", lse, shape=shape[:2], dtypes=fp32, device=like.device)
    return missing_outputs(like, shape, out, lse, return_lse)


def missing_outputs(
    like: torch.Tensor,
    shape: tuple[int, int, int],
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Allocate the outputs that were not given."""
    if out is None:
        out = torch.empty(shape, dtype=output_dtype(like.dtype), device=like.device)
    if lse is None and return_lse:
        lse = torch.empty(shape[:2], dtype=torch.float32, device=like.device)
    return out, lse
