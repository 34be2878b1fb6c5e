"""Writing new tokens into a paged latent cache."""

from __future__ import annotations

import torch

from mla_core import env
from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.ops import library
from mla_core.problem import Problem
from mla_core.select import select

_ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SLOT_DTYPES = (torch.int64, torch.int32)


def write_kv_cache(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: LatentCache,
    slots: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write one row per new token into the cache, quantising as its layout says.

    Parameters
    ----------
    kv_c : [num_tokens, kv_lora_rank], bf16, fp16 or fp32
        Normed latent.
    k_pe : [num_tokens, qk_rope_head_dim], like ``kv_c``
        Rotated shared key.
    cache : LatentCache
        Changed in place; bytes of other slots are left as they are.
    slots : [num_tokens], int64 or int32
        ``page * page_size + offset``; a negative slot skips its token. Slots must be distinct.
    backend : str, optional
        Use this backend or raise.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError
    """
    dims, device = cache.dims, cache.device
    op = "write_kv_cache"
    c_shape = ("num_tokens", dims.kv_lora_rank)
    check_tensor(op, "kv_c", kv_c, shape=c_shape, dtypes=_ROW_DTYPES, device=device)
    num_tokens = kv_c.shape[0]
    pe_shape = (num_tokens, dims.qk_rope_head_dim)
    check_tensor(op, "k_pe", k_pe, shape=pe_shape, dtypes=(kv_c.dtype,), device=device)
    check_tensor(op, "slots", slots, shape=(num_tokens,), dtypes=_SLOT_DTYPES, device=device)
    if torch.compiler.is_compiling():
        torch.ops.mla.write_kv_cache(kv_c, k_pe, *library.flatten_cache(cache), slots, backend)
    else:
        _run(kv_c, k_pe, cache, slots, backend)


def _run(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    cache: LatentCache,
    slots: torch.Tensor,
    backend: str | None,
) -> None:
    if slots.device.type == "cpu" or env.flag("MLA_CHECK"):
        _check_slots(slots, cache.num_slots)
    problem = Problem(
        op="write_kv_cache",
        arch=arch_of(cache.device),
        q_dtype=dtype_name(kv_c.dtype),
        kv_dtype=cache.layout.kv_dtype,
        dims=cache.dims,
        layout=cache.layout.family,
        page_size=cache.page_size,
    )
    select(problem, backend).backend.load("write_kv_cache")(kv_c, k_pe, cache, slots)


def _check_slots(slots: torch.Tensor, num_slots: int) -> None:
    if bool((slots >= num_slots).any()):
        raise LayoutError(
            f"write_kv_cache: slots must be below num_slots={num_slots}, got {int(slots.max())}"
        )


def _run_flat(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    buffers: list[torch.Tensor],
    kv_scale: torch.Tensor | None,
    layout: str,
    dims: list[int],
    page_size: int,
    slots: torch.Tensor,
    backend: str | None,
) -> None:
    cache = library.restore_cache(buffers, kv_scale, layout, dims, page_size)
    _run(kv_c, k_pe, cache, slots, backend)


def _fake(kv_c: torch.Tensor, k_pe: torch.Tensor, *arguments: object) -> None:
    del arguments
    torch._check(kv_c.shape[0] == k_pe.shape[0])


library.define(
    "write_kv_cache",
    "(Tensor kv_c, Tensor k_pe, "
    f"{library.CACHE_SCHEMA.replace('Tensor[]', 'Tensor(a!)[]', 1)}, "
    "Tensor slots, str? backend) -> ()",
    _run_flat,
    _fake,
)
