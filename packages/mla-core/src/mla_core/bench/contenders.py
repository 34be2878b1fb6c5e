"""Who competes: every backend of the registry, plain torch, and whoever implements `Contender`.

A contender sees a workload and returns two callables. ``step`` is what a caller pays per decode
step, planning included, and is timed eagerly; ``replay`` leaves out the planning on the host and is
what a CUDA graph captures. Both take the number of the data set and return the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from mla_core import decode, plan_decode, registry, replan
from mla_core.batch import PagedKV
from mla_core.bench.timing import Call
from mla_core.bench.workload import DecodeWorkload
from mla_core.dtypes import FP8_DTYPES
from mla_core.errors import BackendUnavailableError, UnsupportedProblemError
from mla_core.plan import DecodePlan
from mla_core.testing.poison import poison_


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contender made ready for one workload."""

    kernel: str
    step: Call
    replay: Call


class Contender(Protocol):
    """One column of the benchmark. An adapter for another library is one of these."""

    @property
    def name(self) -> str:
        """Value of the column ``backend``."""
        ...

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """Allocate, convert and compile; raise an `MLAError` with the reason if it cannot."""
        ...


@dataclass(frozen=True, slots=True)
class BackendContender:
    """A backend of the registry, called through `mla_core.plan_decode` and `mla_core.decode`.

    ``name`` is that of the backend, or ``<backend>+list`` for a persistent plan whose work list the
    device makes in each step, for the one layer that is timed.
    """

    name: str

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """Plan once; outputs start as NaN, so that an unwritten element fails the check."""
        dims, case = workload.dims, workload.case
        backend, has_list, _ = self.name.partition("+list")
        shape = (workload.q.shape[0], dims.num_heads, dims.value_dim)
        outs = [
            poison_(torch.empty(shape, dtype=workload.out_dtype, device=workload.device))
            for _ in workload.kvs
        ]

        def plan(kv: PagedKV) -> DecodePlan:
            # Bounds are given, as an engine does, so planning reads nothing from the device.
            return plan_decode(
                dims,
                workload.qo_indptr,
                kv,
                q_dtype=workload.q.dtype,
                total_q=workload.q.shape[0],
                max_seqlen_q=case.q_len,
                max_seqlen_k=max(workload.kv_lens),
                persistent=bool(has_list),
                backend=backend,
            )

        def replay(i: int) -> torch.Tensor:
            if has_list:
                replan(once, workload.kvs[i])
            return run(i, once)

        def run(i: int, planned: DecodePlan) -> torch.Tensor:
            decode(
                workload.ql_nope,
                workload.q_pe,
                workload.kvs[i],
                planned,
                sm_scale=dims.sm_scale,
                out=outs[i],
                q_scale=workload.q_scale,
            )
            return outs[i]

        once = plan(workload.kvs[0])
        config = "".join(f" {key}={value}" for key, value in once.schedule.config.items())
        return Prepared(
            kernel=f"{once.schedule.kernel} num_kv_splits={once.num_kv_splits}{config}",
            step=lambda i: run(i, plan(workload.kvs[i])),
            replay=replay,
        )


class TorchBmm:
    """Plain torch over the whole batch: gather padded rows, two batched products, a softmax."""

    name = "torch_bmm"

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """Build the mask of the batch once."""
        _refuse_fp8_queries(self.name, workload)
        case, dims = workload.case, workload.dims
        max_len = max(workload.kv_lens)
        q = workload.q.reshape(case.batch_size, case.q_len * dims.num_heads, dims.latent_dim)
        masks = [_visible(workload, b, max_len) for b in range(case.batch_size)]
        hidden = ~torch.stack(masks)
        needs_mask = bool(hidden.any())

        def call(i: int) -> torch.Tensor:
            kv = workload.kvs[i]
            slots = kv.token_slots(max_len).clamp(min=0)
            rows = _gather(kv, slots.flatten(), q.dtype).view(*slots.shape, -1)
            scores = torch.bmm(q, rows.transpose(1, 2)).float() * dims.sm_scale
            if needs_mask:
                scores = scores.masked_fill_(hidden, float("-inf"))
            probs = scores.softmax(dim=-1).to(q.dtype)
            out = torch.bmm(probs, rows[..., : dims.value_dim])
            return out.view(-1, dims.num_heads, dims.value_dim)

        return Prepared("gather, bmm, softmax, bmm", call, call)


class SdpaLoop:
    """One `scaled_dot_product_attention` per request over its gathered rows, heads as queries."""

    name = "sdpa_loop"

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """Build the mask of each request once."""
        _refuse_fp8_queries(self.name, workload)
        case, dims = workload.case, workload.dims
        q = workload.q.reshape(case.batch_size, 1, 1, -1, dims.latent_dim)
        masks: list[torch.Tensor | None] = [None] * case.batch_size
        if case.q_len > 1:
            masks = [_visible(workload, b, n) for b, n in enumerate(workload.kv_lens)]
        # The CPU has a fused kernel for equal widths only. Attending to whole rows and dropping
        # the rotary columns of the result uses it, and is several times faster than the rest.
        value_width = dims.latent_dim if workload.device.type == "cpu" else dims.value_dim

        def call(i: int) -> torch.Tensor:
            kv = workload.kvs[i]
            slots = kv.token_slots(max(workload.kv_lens))
            outs = []
            for b, length in enumerate(workload.kv_lens):
                rows = _gather(kv, slots[b, :length], q.dtype)[None, None]
                attended = F.scaled_dot_product_attention(
                    q[b], rows, rows[..., :value_width], attn_mask=masks[b], scale=dims.sm_scale
                )
                outs.append(attended[0, 0, :, : dims.value_dim])
            return torch.cat(outs).view(-1, dims.num_heads, dims.value_dim)

        return Prepared("gather, scaled_dot_product_attention per request", call, call)


_BASELINES: dict[str, Contender] = {
    baseline.name: baseline for baseline in (TorchBmm(), SdpaLoop())
}


def names() -> tuple[str, ...]:
    """Return the contenders that exist here: usable backends that decode, then the baselines."""
    backends = [
        record.name
        for record in registry.records()
        if record.backend is not None and "decode" in record.backend.ops
    ]
    return (*backends, *_BASELINES)


def find(chosen: Sequence[str]) -> list[Contender]:
    """Return contenders by name: those of `names`, a backend's ``<name>+list``, an adapter.

    ``module:attribute`` imports an adapter.

    Raises
    ------
    BackendUnavailableError
        A name is unknown, or its adapter cannot be imported.
    """
    return [_find(name) for name in chosen]


def _find(name: str) -> Contender:
    if name in _BASELINES:
        return _BASELINES[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        registry.record(name.removesuffix("+list")).require()
        return BackendContender(name)
    try:
        return cast(Contender, getattr(importlib.import_module(module_name), attribute))
    except (ImportError, AttributeError) as exc:
        raise BackendUnavailableError(f"contender {name!r}: cannot be imported: {exc}") from exc


def _refuse_fp8_queries(name: str, workload: DecodeWorkload) -> None:
    if workload.case.q_dtype in FP8_DTYPES:
        raise UnsupportedProblemError(f"{name}: q_dtype must not be {workload.case.q_dtype}")


def _gather(kv: PagedKV, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows ``kv_c ‖ k_pe`` [T, latent_dim], the shortest way the layout allows."""
    cache = kv.cache
    if cache.layout.family == "standard" and cache.buffers[0].dtype == dtype:
        return cache.rows().flatten(0, 1).index_select(0, slots)
    return torch.cat(cache.read(slots, dtype), dim=1)


def _visible(workload: DecodeWorkload, b: int, width: int) -> torch.Tensor:
    """Return [q_len * num_heads, width]: which keys the query rows of request ``b`` see."""
    case = workload.case
    query = torch.arange(case.q_len, device=workload.device)
    limit = workload.kv_lens[b] - (case.q_len - 1 - query)
    visible = torch.arange(width, device=workload.device) < limit[:, None]
    return visible.repeat_interleave(case.num_heads, dim=0)
