"""Ragged prefill attention over expanded keys and values, differentiable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mla_core import env
from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.ops import library
from mla_core.ops.arguments import OUT_DTYPES
from mla_core.plan import AttentionOptions
from mla_core.problem import Problem
from mla_core.select import select


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    sm_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend ragged queries to expanded per-head keys and values (192/128 for DeepSeek-V3).

    Differentiable with respect to ``q``, ``k`` and ``v``; the lse is not.

    Parameters
    ----------
    q : [total_q, num_heads, qk_head_dim], bf16, fp16 or fp32
        ``q_nope ‖ q_pe``, rotated.
    k : [total_k, num_kv_heads, qk_head_dim], like ``q``
    v : [total_k, num_kv_heads, v_head_dim], like ``q``
        ``num_kv_heads`` divides ``num_heads``; its width may differ from that of ``k``.
    cu_seqlens_q, cu_seqlens_k : [batch_size + 1], int32
        Prefix sums of tokens, starting at 0.
    sm_scale : float
    causal : bool
        Bottom-right aligned: query ``i`` of ``q_len`` sees ``j <= kv_len - q_len + i``.
    window : int, optional
        A query at position ``p`` sees only ``p - window < j <= p``.
    softcap : float
        0 for none.
    backend : str, optional
        Use this backend or raise.

    Returns
    -------
    out : [total_q, num_heads, v_head_dim], dtype of ``q``
    lse : [total_q, num_heads], fp32, natural log; only with ``return_lse``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    AttentionOptions(causal, window, softcap)
    out, lse = torch.ops.mla.prefill(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sm_scale, causal, window or 0, softcap, backend
    )
    return (out, lse) if return_lse else out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> None:
    op, device, dtypes = "prefill", q.device, (q.dtype,)
    check_tensor(
        op,
        "q",
        q,
        shape=("total_q", "num_heads", "qk_head_dim"),
        dtypes=OUT_DTYPES,
        device=device,
    )
    num_heads, qk_head_dim = q.shape[1:]
    k_shape = ("total_k", "num_kv_heads", qk_head_dim)
    check_tensor(op, "k", k, shape=k_shape, dtypes=dtypes, device=device)
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise LayoutError(
            f"{op}: k must have a number of heads that divides num_heads={num_heads}, "
            f"got shape {tuple(k.shape)}"
        )
    v_shape = (k.shape[0], k.shape[1], "v_head_dim")
    check_tensor(op, "v", v, shape=v_shape, dtypes=dtypes, device=device)
    int32 = (torch.int32,)
    any_size, same_size = ("batch_size + 1",), cu_seqlens_q.shape
    check_tensor(op, "cu_seqlens_q", cu_seqlens_q, shape=any_size, dtypes=int32, device=device)
    check_tensor(op, "cu_seqlens_k", cu_seqlens_k, shape=same_size, dtypes=int32, device=device)


def _check_values(op: str, name: str, cu_seqlens: torch.Tensor, total: int) -> None:
    if not cu_seqlens.numel():
        raise LayoutError(f"{op}: {name} must be [batch_size + 1], got shape (0,)")
    ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
    if ends != (0, total) or bool((cu_seqlens.diff() < 0).any()):
        raise LayoutError(
            f"{op}: {name} must rise from 0 to the number of tokens {total}, "
            f"got {ends[0]} to {ends[1]}"
        )


def _problem(q: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> Problem:
    # Prefill never sees the latent, so the whole query width counts as `nope`.
    dims = MLADims(
        num_heads=q.shape[1],
        qk_rope_head_dim=0,
        qk_nope_head_dim=q.shape[2],
        v_head_dim=v.shape[2],
    )
    dtype = dtype_name(q.dtype)
    return Problem(
        op="prefill",
        arch=arch_of(q.device),
        q_dtype=dtype,
        kv_dtype=dtype,
        dims=dims,
        layout="expanded",
        features=options.features | {"lse"},
    )


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sm_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cpu" or env.flag("MLA_CHECK"):
        _check_values("prefill", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        _check_values("prefill", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    options = AttentionOptions(causal, window or None, softcap)
    out, lse = _fake(q, k, v)
    select(_problem(q, v, options), backend).backend.load("prefill")(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        sm_scale=sm_scale,
        options=options,
        out=out,
        lse=lse,
    )
    return out, lse


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: object
) -> tuple[torch.Tensor, torch.Tensor]:
    del k, arguments
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[0], q.shape[1]), dtype=torch.float32)


def _run_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    sm_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = AttentionOptions(causal, window or None, softcap)
    problem = _problem(q, v, options)
    problem = replace(problem, features=problem.features | {"backward"})
    run = select(problem, backend).backend.load("prefill_backward")
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = run(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sm_scale=sm_scale,
        options=options,
    )
    return grads


def _fake_backward(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad_out, arguments
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    del grad_lse
    grads = torch.ops.mla.prefill_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, *(None for _ in ctx.settings))


_OPTIONS_SCHEMA = "float sm_scale, bool causal, int window, float softcap, str? backend"
library.define(
    "prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"{_OPTIONS_SCHEMA}) -> (Tensor out, Tensor lse)",
    _run,
    _fake,
)
library.define(
    "prefill_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    f"Tensor cu_seqlens_k, {_OPTIONS_SCHEMA}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _run_backward,
    _fake_backward,
)
torch.library.register_autograd(
    "mla::prefill", _backward, setup_context=_setup_context, lib=library.LIBRARY
)
