"""`mla_decode_fwd`: absorbed decode with the call of ``aiter.mla``."""

from __future__ import annotations

from dataclasses import replace

import torch

from mla_core.batch import PagedKV, check_query_lens
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dropin.aiter.arguments import (
    bind_cache,
    dims_of,
    paged_batch,
    query_scale,
)
from mla_core.dropin.aiter.metadata import planning_profile
from mla_core.errors import LayoutError
from mla_core.metadata import WorkList
from mla_core.metadata.tiling import head_tiling
from mla_core.ops import decode, sparse_decode
from mla_core.plan import AttentionOptions, DecodePlan, decode_problem, plan_decode
from mla_core.problem import Problem
from mla_core.select import select

_OP = "mla_decode_fwd"


def mla_decode_fwd(
    q: torch.Tensor,
    kv_buffer: torch.Tensor,
    o: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    max_seqlen_q: int,
    page_size: int = 1,
    nhead_kv: int = 1,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
    num_kv_splits_indptr: torch.Tensor | None = None,
    work_meta_data: torch.Tensor | None = None,
    work_indptr: torch.Tensor | None = None,
    work_info_set: torch.Tensor | None = None,
    reduce_indptr: torch.Tensor | None = None,
    reduce_final_map: torch.Tensor | None = None,
    reduce_partial_map: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    kv_scale: torch.Tensor | None = None,
    intra_batch_mode: bool = False,
    return_logits: bool = False,
    return_lse: bool = False,
    g_kv_indptr: torch.Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend query tokens to a paged latent cache and write the result into ``o``.

    Parameters
    ----------
    q : [T, H, D], bf16, fp16, fp32 or fp8, last dim contiguous
        Absorbed and rotated queries, latent part first.
    kv_buffer : [num_page, page_size, 1, D], or uint8 [num_page, page_size * 656]
        The second form holds three segments per page: fp8 latents, fp32 scales per 128, bf16 ropes.
    o : [T, H, C], bf16, fp16 or fp32
        Receives the output; C is the width of the latent.
    qo_indptr, kv_indptr : [B + 1], int32
        Prefix sums of query tokens, and of KV pages.
    kv_indices : [>= kv_indptr[B]], int32
        Physical pages; -1 hides a page. Or a [T, topk] table of slots for sparse attention (pages
        of one token): token ``t`` attends to the first ``min(kv_len, topk)`` entries of row ``t``,
        -1 being padding. The table must be 2-D: a flat one looks like a list of pages.
    kv_last_page_lens : [B], int32
        Tokens in each last page; not read when ``page_size`` is 1, or for empty requests.
    max_seqlen_q : int
        Most query tokens of a request; fewer are fine.
    nhead_kv : int
        Must be 1.
    sm_scale : float, optional
        Default: ``D ** -0.5``, which is not what DeepSeek models use.
    logit_cap : float
        Above 0: scores become ``logit_cap * tanh(score / logit_cap)``.
    num_kv_splits : int, optional
        Wish for the number of splits; without a work list only.
    num_kv_splits_indptr : [B + 1], int32, optional
    work_meta_data, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map
        A work list of `get_mla_metadata_v1`, whole or not at all, made for the same heads, dtypes
        and ``max_seqlen_q``, and on the same device; see Notes.
    q_scale, kv_scale : fp32 with one element, optional
        Dequantisation factors of fp8 tensors, both required with fp8 queries. Factors given for
        tensors of other dtypes have no effect.
    intra_batch_mode, return_logits : bool
        No effect: there is neither a mode to choose nor a folded layout to undo.
    return_lse : bool
    g_kv_indptr : [B + 1], int32, optional
        Prefix sums of the tokens of all context parallel ranks. This rank holds every
        ``cp_world_size``-th token, starting with ``cp_rank``; pages of one token only.
    causal : bool
        Bottom-right aligned; without it every query token sees the whole context.

    Returns
    -------
    logits : view of ``o``
        [T, S, H, C] with S the number of splits, or [T, 1, H, C] with a work list.
    final_lse : [T, H], fp32, natural log, or None without ``return_lse``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter. ``logits`` is a view of ``o`` in the dtype of ``o``: no scratch of
    partials is kept, and each of the S slots shows the merged row, so that any weighted mean over
    them is the result. The work list is followed where the chosen backend has a kernel for it,
    which is so with ``triton``: works and partials are then as aiter's, rows of folded heads
    included (``q_start * f + g * q_len + i`` for token ``i`` of group ``g`` of ``f``), and requests
    without KV are written whether or not they have a work. Elsewhere, and with a top-k table, the
    list is checked for shape alone, because the backend schedules itself. The addresses in
    ``work_meta_data`` are not read. A soft cap is supported. The log-sum-exp is valid on every
    path, and -inf (with an output of 0) where nothing is visible.
    """
    del intra_batch_mode, return_logits
    dims = dims_of(_OP, q, o)
    if nhead_kv != 1:
        raise LayoutError(f"{_OP}: nhead_kv must be 1, got {nhead_kv}; MLA has one latent head")
    work_list = None
    if work_meta_data is not None:
        work_list = _work_list(
            q.device,
            work_meta_data,
            work_indptr,
            work_info_set,
            reduce_indptr,
            reduce_final_map,
            reduce_partial_map,
        )
    cache = bind_cache(_OP, kv_buffer, dims, page_size, kv_scale)
    q_scale = query_scale(_OP, q, q_scale, kv_scale)
    scale = q.shape[2] ** -0.5 if sm_scale is None else sm_scale
    lse = o.new_full(o.shape[:2], float("-inf"), dtype=torch.float32) if return_lse else None
    batch_size = max(qo_indptr.numel() - 1, 0)
    global_kv_lens = _global_kv_lens(g_kv_indptr, batch_size, page_size, cp_world_size, q.device)

    if kv_indices.ndim == 2:
        if cp_world_size > 1:
            raise LayoutError(
                f"{_OP}: cp_world_size must be 1 with a top-k table, got {cp_world_size}"
            )
        _attend_table(
            q, cache, o, qo_indptr, kv_indptr, kv_indices, scale, max(logit_cap, 0.0), q_scale, lse
        )
        return o.unsqueeze(1), lse

    if work_list is not None and q.shape[0] > batch_size * max_seqlen_q:
        raise LayoutError(
            f"{_OP}: q must have at most B * max_seqlen_q={batch_size * max_seqlen_q} rows with a "
            f"work list, got {q.shape[0]}; a top-k table is passed as kv_indices [T, topk]"
        )
    check_query_lens(_OP, qo_indptr, q.shape[0], max_seqlen_q)
    if num_kv_splits_indptr is not None:
        shape, int32 = (batch_size + 1,), (torch.int32,)
        check_tensor(
            _OP,
            "num_kv_splits_indptr",
            num_kv_splits_indptr,
            shape=shape,
            dtypes=int32,
            device=q.device,
        )
    kv = paged_batch(cache, kv_indptr, kv_indices, kv_last_page_lens)
    options = AttentionOptions(
        # One query token sees everything either way, and causal kernels are the common ones.
        causal=causal or max_seqlen_q <= 1,
        softcap=max(logit_cap, 0.0),
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
    )
    plan = attend(
        q,
        kv,
        o,
        lse,
        dims,
        qo_indptr,
        max_seqlen_q,
        sm_scale=scale,
        options=options,
        num_kv_splits=None if work_list is not None else num_kv_splits,
        work_list=work_list,
        q_scale=q_scale,
        global_kv_lens=global_kv_lens,
    )
    num_splits = 1 if work_list is not None else num_kv_splits or plan.num_kv_splits
    return o.unsqueeze(1).expand(-1, num_splits, -1, -1), lse


def attend(
    q: torch.Tensor,
    kv: PagedKV,
    o: torch.Tensor,
    lse: torch.Tensor | None,
    dims: MLADims,
    qo_indptr: torch.Tensor,
    max_seqlen_q: int,
    *,
    sm_scale: float,
    options: AttentionOptions,
    num_kv_splits: int | None = None,
    work_list: WorkList | None = None,
    q_scale: torch.Tensor | None = None,
    global_kv_lens: torch.Tensor | None = None,
) -> DecodePlan:
    """Plan without reading the device, run, and return the plan.

    A work list is followed where the backend that would be chosen without it has a kernel for it.
    """
    # As in aiter, the length of the index buffer stands for the context length: it only guides
    # the number of splits.
    pages_each = -(-kv.kv_page_indices.numel() // max(kv.batch_size, 1))
    backend, fold = None, 1
    if work_list is not None:
        problem = decode_problem(dims, kv, q.dtype, max_seqlen_q, {"lse", *options.features})
        backend = _follower(problem)
        if backend is None:
            work_list = None
        else:
            profile = planning_profile()
            kinds = problem.q_dtype, problem.kv_dtype
            fold = head_tiling(_OP, dims.num_heads, max_seqlen_q, *kinds, profile).fold
    plan = plan_decode(
        dims,
        qo_indptr,
        kv,
        q_dtype=q.dtype,
        options=options,
        num_kv_splits=num_kv_splits,
        total_q=q.shape[0],
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=pages_each * kv.page_size,
        work_list=work_list,
        work_list_fold=fold,
        backend=backend,
    )
    decode(
        q[..., : dims.kv_lora_rank],
        q[..., dims.kv_lora_rank :],
        kv,
        plan,
        sm_scale=sm_scale,
        out=o,
        lse=lse,
        q_scale=q_scale,
        global_kv_lens=global_kv_lens,
    )
    return plan


def _follower(problem: Problem) -> str | None:
    """Return the backend that serves a problem if it follows work lists, else None."""
    backend = select(problem).backend
    asked = replace(problem, features=problem.features | {"persistent"})
    return backend.name if any(not row.why_not(asked) for row in backend.capabilities) else None


def _attend_table(
    q: torch.Tensor,
    cache: LatentCache,
    o: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    table: torch.Tensor,
    sm_scale: float,
    softcap: float,
    q_scale: torch.Tensor | None,
    lse: torch.Tensor | None,
) -> None:
    """Sparse attention over a [T, topk] table of slots."""
    total_q, rank = q.shape[0], cache.dims.kv_lora_rank
    if cache.page_size != 1:
        raise LayoutError(
            f"{_OP}: page_size must be 1 with a top-k table, got {cache.page_size}; "
            "a table holds token slots"
        )
    if table.shape[0] != total_q:
        raise LayoutError(
            f"{_OP}: kv_indices must be [T={total_q}, topk] when it is a table, "
            f"got {tuple(table.shape)}"
        )
    int32, device = (torch.int32,), q.device
    indptr_shape = (qo_indptr.numel(),)
    check_tensor(_OP, "qo_indptr", qo_indptr, shape=("B + 1",), dtypes=int32, device=device)
    check_tensor(_OP, "kv_indptr", kv_indptr, shape=indptr_shape, dtypes=int32, device=device)
    token = torch.arange(total_q, dtype=torch.int32, device=device)
    # Rows past the last request belong to none; a zero behind the end gives them no keys.
    request = torch.searchsorted(qo_indptr[1:], token, right=True)
    kv_lens = torch.cat((kv_indptr.diff(), kv_indptr.new_zeros(1)))
    sparse_decode(
        q[..., :rank],
        q[..., rank:],
        cache,
        table,
        sm_scale=sm_scale,
        topk_length=kv_lens[request].clamp(max=table.shape[1]),
        softcap=softcap,
        q_scale=q_scale,
        out=o,
        lse=lse,
    )


def _global_kv_lens(
    g_kv_indptr: torch.Tensor | None,
    batch_size: int,
    page_size: int,
    cp_world_size: int,
    device: torch.device,
) -> torch.Tensor | None:
    """Return the context lengths over all ranks, or None without context parallelism."""
    if g_kv_indptr is None:
        if cp_world_size != 1:
            raise LayoutError(
                f"{_OP}: g_kv_indptr must be given with cp_world_size={cp_world_size}, got None"
            )
        return None
    if page_size != 1:
        raise LayoutError(
            f"{_OP}: page_size must be 1 with g_kv_indptr, got {page_size}; "
            "ranks hold single tokens"
        )
    shape, int32 = (batch_size + 1,), (torch.int32,)
    check_tensor(_OP, "g_kv_indptr", g_kv_indptr, shape=shape, dtypes=int32, device=device)
    return g_kv_indptr.diff() if cp_world_size > 1 else None


def _work_list(
    device: torch.device,
    work_meta_data: torch.Tensor,
    work_indptr: torch.Tensor | None,
    work_info_set: torch.Tensor | None,
    reduce_indptr: torch.Tensor | None,
    reduce_final_map: torch.Tensor | None,
    reduce_partial_map: torch.Tensor | None,
) -> WorkList:
    int32 = torch.int32
    tensors: list[torch.Tensor] = []
    for name, tensor, shape, dtype in (
        ("work_meta_data", work_meta_data, (2,), torch.uint64),
        ("work_indptr", work_indptr, ("n + 1",), int32),
        ("work_info_set", work_info_set, ("num_works", 8), int32),
        ("reduce_indptr", reduce_indptr, ("num_tiles + 1",), int32),
        ("reduce_final_map", reduce_final_map, ("num_tiles", 2), int32),
        ("reduce_partial_map", reduce_partial_map, ("num_partials",), int32),
    ):
        if tensor is None:
            raise LayoutError(
                f"{_OP}: {name} must be given with work_meta_data, got None; "
                "pass the whole work list, or none of it"
            )
        check_tensor(_OP, name, tensor, shape=shape, dtypes=(dtype,), device=device)
        tensors.append(tensor)
    return WorkList(*tensors[1:])
