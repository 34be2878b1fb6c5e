"""`mla_prefill_fwd` (absorbed) and `mla_prefill_ps_fwd` (expanded), with the calls of ``aiter``."""

from __future__ import annotations

import torch

from mla_core.batch import check_query_lens
from mla_core.checks import check_tensor
from mla_core.dropin.aiter.arguments import (
    as_scale,
    bind_cache,
    dims_of,
    paged_batch,
)
from mla_core.dropin.aiter.decode import attend
from mla_core.dtypes import FP8_DTYPES, dtype_name
from mla_core.errors import LayoutError
from mla_core.ops import prefill
from mla_core.ops.arguments import OUT_DTYPES
from mla_core.plan import AttentionOptions

_PS_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, *OUT_DTYPES)


def mla_prefill_fwd(
    q: torch.Tensor,
    kv_buffer: torch.Tensor,
    o: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    max_seqlen_q: int,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the query tokens of a prompt to the latent cache, causally; write ``o``.

    Parameters
    ----------
    q : [T, H, D], bf16, fp16 or fp32, last dim contiguous
        Absorbed and rotated queries, latent part first.
    kv_buffer : [num_page, page_size, 1, D], like ``q``
        The page size is that of its shape.
    o : [T, H, C], bf16, fp16 or fp32
        Receives the output.
    qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q
        As in `mla_decode_fwd`.
    sm_scale : float, optional
        Default: ``D ** -0.5``.
    logit_cap : float
        Above 0: soft cap of the scores.
    num_kv_splits : int, optional
        No effect.

    Returns
    -------
    logits : [T, H, C], ``o`` itself
    attn_lse : [T, 1, H, 1], fp32, natural log

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    aiter has kernels for bf16 with 16 or 128 heads; here the selected backend decides.
    """
    op = "mla_prefill_fwd"
    del num_kv_splits
    dims = dims_of(op, q, o)
    if kv_buffer.dtype != q.dtype or dtype_name(q.dtype) in FP8_DTYPES or kv_buffer.ndim != 4:
        raise LayoutError(
            f"{op}: kv_buffer must be [num_page, page_size, 1, {dims.latent_dim}] of q's dtype, "
            f"bf16, fp16 or fp32, got {tuple(kv_buffer.shape)} {kv_buffer.dtype} with q {q.dtype}; "
            "mla_decode_fwd reads fp8 caches"
        )
    check_query_lens(op, qo_indptr, q.shape[0], max_seqlen_q)
    cache = bind_cache(op, kv_buffer, dims, kv_buffer.shape[1], None)
    kv = paged_batch(cache, kv_indptr, kv_indices, kv_last_page_lens)
    lse = o.new_full(o.shape[:2], float("-inf"), dtype=torch.float32)
    attend(
        q,
        kv,
        o,
        lse,
        dims,
        qo_indptr,
        max_seqlen_q,
        sm_scale=q.shape[2] ** -0.5 if sm_scale is None else sm_scale,
        options=AttentionOptions(softcap=max(logit_cap, 0.0)),
    )
    return o, lse[:, None, :, None]


def mla_prefill_ps_fwd(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    output: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_page_indices: torch.Tensor,
    work_indptr: torch.Tensor | None,
    work_info_set: torch.Tensor | None,
    max_seqlen_q: int,
    is_causal: bool,
    reduce_indptr: torch.Tensor | None = None,
    reduce_final_map: torch.Tensor | None = None,
    reduce_partial_map: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend ragged queries to expanded keys and values gathered by token; write ``output``.

    Parameters
    ----------
    Q : [T, H, DQ], fp8, bf16, fp16 or fp32
        192 wide for DeepSeek-V3, rotated.
    K : [num_tokens, Hkv, DQ], dtype of ``Q``
    V : [num_tokens, Hkv, DV], dtype of ``Q``
        128 wide for DeepSeek-V3. Hkv divides H.
    output : [T, H, DV], bf16, fp16 or fp32
        Receives the result.
    qo_indptr, kv_indptr : [B + 1], int32
        Prefix sums of query and key tokens (pages of one token).
    kv_page_indices : [>= kv_indptr[B]], int32
        Rows of K and V, request after request.
    work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map : optional
        A work list: checked for shape, otherwise advisory, since backends schedule themselves.
    max_seqlen_q : int
        Most query tokens of a request.
    is_causal : bool
        Bottom-right aligned.
    softmax_scale : float, optional
        Default: ``DV ** -0.5``, as in aiter; DeepSeek models need ``DQ ** -0.5``.
    q_scale, k_scale, v_scale : fp32 with one element, optional
        Dequantisation factors; 1 when absent.

    Returns
    -------
    output : [T, H, DV], the argument
    lse : [T, H], fp32, natural log

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter. The second value is the merged log-sum-exp of every row, where aiter
    returns its buffer of partial ones; unsplit rows have theirs too. Query and key head counts may
    differ, other dtypes and widths work. Like aiter's planner, this reads lengths on the host, so
    it cannot be captured in a CUDA graph.
    """
    op = "mla_prefill_ps_fwd"
    _check_ps(op, Q, K, V, output)
    _check_work_tensors(
        op,
        Q.device,
        ("work_indptr", work_indptr, ("n + 1",)),
        ("work_info_set", work_info_set, ("num_works", 8)),
        ("reduce_indptr", reduce_indptr, ("num_tiles + 1",)),
        ("reduce_final_map", reduce_final_map, ("num_tiles", 2)),
        ("reduce_partial_map", reduce_partial_map, ("num_partials",)),
    )
    int32, device = (torch.int32,), Q.device
    check_tensor(op, "qo_indptr", qo_indptr, shape=("B + 1",), dtypes=int32, device=device)
    indptr_shape = (qo_indptr.numel(),)
    check_tensor(op, "kv_indptr", kv_indptr, shape=indptr_shape, dtypes=int32, device=device)
    check_tensor(
        op, "kv_page_indices", kv_page_indices, shape=("num_kv",), dtypes=int32, device=device
    )
    check_query_lens(op, qo_indptr, Q.shape[0], max_seqlen_q)
    total_k = int(kv_indptr[-1])
    rows = kv_page_indices[:total_k].long()
    if rows.numel() < total_k:
        raise LayoutError(
            f"{op}: kv_page_indices must have at least kv_indptr[-1]={total_k} entries, "
            f"got shape {tuple(kv_page_indices.shape)}"
        )
    if bool(((rows < 0) | (rows >= K.shape[0])).any()):
        raise LayoutError(
            f"{op}: kv_page_indices must be rows of K in 0..{K.shape[0] - 1}, got one outside"
        )
    scale = float(V.shape[2] ** -0.5) if softmax_scale is None else softmax_scale
    factors = [
        1.0 if factor is None else float(as_scale(op, name, factor, device))
        for name, factor in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale))
    ]
    # fp8 numbers are bf16 numbers, so widening is exact and the factors move out of the products.
    wide = torch.bfloat16 if dtype_name(Q.dtype) in FP8_DTYPES else Q.dtype
    out, lse = prefill(
        Q.to(wide),
        K[rows].to(wide),
        V[rows].to(wide),
        qo_indptr,
        kv_indptr,
        sm_scale=scale * factors[0] * factors[1],
        causal=is_causal,
        return_lse=True,
    )
    output.copy_(out if factors[2] == 1.0 else out.float() * factors[2])
    return output, lse


def _check_ps(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
) -> None:
    device, dtypes = q.device, (q.dtype,)
    q_shape = ("T", "H", "DQ")
    check_tensor(op, "Q", q, shape=q_shape, dtypes=_PS_DTYPES, device=device)
    k_shape = ("num_tokens", "Hkv", q.shape[2])
    check_tensor(op, "K", k, shape=k_shape, dtypes=dtypes, device=device)
    v_shape = (*k.shape[:2], "DV")
    check_tensor(op, "V", v, shape=v_shape, dtypes=dtypes, device=device)
    out_shape = (*q.shape[:2], v.shape[2])
    check_tensor(op, "output", output, shape=out_shape, dtypes=OUT_DTYPES, device=device)


def _check_work_tensors(
    op: str,
    device: torch.device,
    *tensors: tuple[str, torch.Tensor | None, tuple[int | str, ...]],
) -> None:
    for name, tensor, shape in tensors:
        if tensor is not None:
            check_tensor(op, name, tensor, shape=shape, dtypes=(torch.int32,), device=device)
