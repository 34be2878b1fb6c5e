"""Sparse decode: each query token attends to its own list of cached tokens."""

from __future__ import annotations

import torch

from mla_core import env
from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_live_rows, check_tensor, visible_slots
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.ops import library
from mla_core.ops.arguments import check_q_scale, check_queries, check_sink, outputs
from mla_core.problem import Problem
from mla_core.select import select


def sparse_decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    *,
    sm_scale: float,
    topk_length: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    softcap: float = 0.0,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend each query token to its own list of cached tokens (DeepSeek sparse attention).

    Parameters
    ----------
    ql_nope, q_pe, sm_scale, sink, q_scale, out, lse, return_lse
        As in `mla_core.decode`.
    cache : LatentCache
    indices : [total_q, topk], int32
        Physical slots, ``page * page_size + offset``. Entries below 0 or not below
        ``cache.num_slots`` are masked; an entry that occurs twice counts twice. No causal mask:
        the selector is responsible.
    topk_length : [total_q], int32, optional
        Only the first ``topk_length[t]`` entries of row ``t`` are read.
    softcap : float
        0 for none.
    backend : str, optional
        Use this backend or raise.

    Returns
    -------
    out, lse
        As in `mla_core.decode`.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Source: DeepSeek-V3.2 technical report (2025), section 2.
    """
    num_heads = _check(ql_nope, q_pe, cache, indices, topk_length, sink, q_scale, softcap)
    out_shape = (ql_nope.shape[0], num_heads, cache.dims.value_dim)
    out, lse = outputs("sparse_decode", ql_nope, out_shape, out, lse, return_lse)
    arguments = (indices, topk_length, sink, q_scale, sm_scale, softcap, backend, out, lse)
    if torch.compiler.is_compiling():
        torch.ops.mla.sparse_decode(ql_nope, q_pe, *library.flatten_cache(cache), *arguments)
    else:
        _run(ql_nope, q_pe, cache, *arguments)
    return out if lse is None else (out, lse)


def _check(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    softcap: float,
) -> int:
    """Check everything but the outputs; return the number of heads."""
    op, device, int32 = "sparse_decode", cache.device, (torch.int32,)
    if ql_nope.ndim != 3:
        raise LayoutError(
            f"{op}: ql_nope must be [total_q, num_heads, kv_lora_rank], "
            f"got shape {tuple(ql_nope.shape)}"
        )
    total_q, num_heads, _ = ql_nope.shape
    dims = cache.dims.with_heads(num_heads)
    check_queries(op, ql_nope, q_pe, dims, ql_nope.dtype, device)
    check_tensor(op, "indices", indices, shape=(total_q, "topk"), dtypes=int32, device=device)
    if topk_length is not None:
        shape = (total_q,)
        check_tensor(op, "topk_length", topk_length, shape=shape, dtypes=int32, device=device)
    check_sink(op, sink, num_heads, device)
    check_q_scale(op, ql_nope, q_scale)
    if softcap < 0:
        raise LayoutError(f"{op}: softcap must be >= 0, got {softcap}")
    return num_heads


def _run(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    sm_scale: float,
    softcap: float,
    backend: str | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Select a backend and call it."""
    asked = {
        "lse": lse is not None,
        "softcap": softcap > 0,
        "sink": sink is not None,
        "topk_length": topk_length is not None,
    }
    problem = Problem(
        op="sparse_decode",
        arch=arch_of(cache.device),
        q_dtype=dtype_name(ql_nope.dtype),
        kv_dtype=cache.layout.kv_dtype,
        dims=cache.dims.with_heads(ql_nope.shape[1]),
        layout=cache.layout.family,
        page_size=cache.page_size,
        features=frozenset(name for name, wanted in asked.items() if wanted),
    )
    run = select(problem, backend).backend.load("sparse_decode")
    if env.flag("MLA_CHECK"):
        slots = visible_slots(indices, cache.num_slots, topk_length)
        check_live_rows("sparse_decode", cache, slots.flatten())
    run(
        ql_nope,
        q_pe,
        cache,
        indices,
        sm_scale=sm_scale,
        out=out,
        lse=lse,
        topk_length=topk_length,
        sink=sink,
        q_scale=q_scale,
        softcap=softcap,
    )


def _run_flat(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    buffers: list[torch.Tensor],
    kv_scale: torch.Tensor | None,
    layout: str,
    dims: list[int],
    page_size: int,
    *arguments: object,
) -> None:
    cache = library.restore_cache(buffers, kv_scale, layout, dims, page_size)
    _run(ql_nope, q_pe, cache, *arguments)  # type: ignore[arg-type]


def _fake(ql_nope: torch.Tensor, *arguments: object) -> None:
    out = arguments[-2]
    assert isinstance(out, torch.Tensor)
    torch._check(out.shape[:2] == ql_nope.shape[:2])


library.define(
    "sparse_decode",
    f"(Tensor ql_nope, Tensor q_pe, {library.CACHE_SCHEMA}, Tensor indices, Tensor? topk_length, "
    "Tensor? sink, Tensor? q_scale, float sm_scale, float softcap, str? backend, "
    "Tensor(a!) out, Tensor(b!)? lse) -> ()",
    _run_flat,
    _fake,
)
