"""Step time over context length: the same decode step through our cache and through eager's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

import mla_core
from mla_core.demo.check import LogitCheck
from mla_core.demo.pages import PagePool, Request
from mla_core.demo.server import PagedServer
from mla_core.integrations.transformers import PagedLatentCache, dims_of

_REPEATS = 3


@dataclass(frozen=True)
class SweepPoint:
    """Milliseconds of one decode step of one request at one context length."""

    context: int
    ours_ms: float
    eager_ms: float


def measure(
    ours: PreTrainedModel,
    eager: PreTrainedModel,
    context: int,
    *,
    page_size: int,
    layout: str,
    seed: int,
    check: LogitCheck,
    rope_in_place: bool = False,
) -> SweepPoint:
    """Time one step after ``context`` cached tokens; the logits of both are checked as well.

    The cached latents are random, normed as a model's are, and the same on both sides.

    Parameters
    ----------
    rope_in_place : bool
        Whether our model leaves rotated pairs side by side; transformers moves the first of each
        into the first half.
    """
    config, device, dtype = ours.config, ours.device, ours.dtype
    dims = dims_of(config)
    generator = torch.Generator().manual_seed(seed + context)
    num_pages = -(-(context + 1) // page_size)
    cache = PagedLatentCache.allocate(
        config,
        num_pages=num_pages,
        page_size=page_size,
        layout=layout,
        q_dtype=dtype,
        device=device,
    )
    server = PagedServer(ours, cache, PagePool(num_pages, seed))
    request = Request("sweep", context, 1, [0] * context, num_cached=context)
    request.resize(context + 1, page_size, server.pool)
    page = torch.tensor(request.pages)[:, None] * page_size
    slots = (page + torch.arange(page_size)).flatten()[:context].to(device)
    history = []
    for layer in cache.caches:
        rows = torch.randn(context, dims.latent_dim, generator=generator).to(device, dtype)
        kv_c, k_pe = rows.split((dims.kv_lora_rank, dims.qk_rope_head_dim), dim=-1)
        pairs = k_pe.unflatten(-1, (2, -1)).mT.flatten(-2) if rope_in_place else k_pe
        mla_core.write_kv_cache(kv_c, pairs, layer, slots)
        history.append((kv_c[None, None], k_pe[None, None]))

    def step_ours() -> torch.Tensor:
        request.num_cached = context
        return server.feed([request], [[1]])[0]

    def fresh_cache() -> DynamicCache:
        filled = DynamicCache(config=eager.config)
        for index, (kv_c, k_pe) in enumerate(history):
            filled.update(kv_c, k_pe, index)
        return filled

    tokens = torch.tensor([[1]], device=device)
    position = torch.tensor([[context]], device=device)

    def step_eager(filled: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = eager(
            input_ids=tokens, position_ids=position, past_key_values=filled, use_cache=True
        ).logits[0]
        return logits

    ours_ms, ours_logits = _best(lambda: step_ours, device)
    eager_ms, eager_logits = _best(lambda: _bind(step_eager, fresh_cache()), device)
    check.compare(f"sweep at {context} tokens", ours_logits, eager_logits)
    return SweepPoint(context, ours_ms, eager_ms)


def _bind(
    step: Callable[[DynamicCache], torch.Tensor], filled: DynamicCache
) -> Callable[[], torch.Tensor]:
    return lambda: step(filled)


def _best(
    prepare: Callable[[], Callable[[], torch.Tensor]], device: torch.device
) -> tuple[float, torch.Tensor]:
    """Return the shortest of a few runs in milliseconds, after one to warm up, and the result."""
    result = prepare()()
    times = []
    for _ in range(_REPEATS):
        step = prepare()
        _synchronise(device)
        start = time.perf_counter()
        result = step()
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
