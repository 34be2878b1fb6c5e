"""The catalog of bad input: one way to provoke each message, and the message.

The docs print the message that `BadInput.provoke` really gets; a test holds it against
``message``. Both read this table, so a message can not change unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import mla_core
from mla_core import AttentionOptions, FusedRope, LatentCache, MLADims, PagedKV, layouts
from mla_core.dtypes import torch_dtype
from mla_core.errors import (
    BackendUnavailableError,
    LayoutError,
    MLAError,
    UnsupportedProblemError,
)
from mla_core.problem import Problem

_DIMS = MLADims(4)
_ROPE = {"options": AttentionOptions(rope=FusedRope(is_neox=False, rotary_dim=64))}


@dataclass(frozen=True, slots=True)
class BadInput:
    """One mistake: what it is, how to make it, and what must be said about it."""

    what: str
    call: Callable[[], object]
    message: str
    error: type[MLAError] = LayoutError

    def provoke(self) -> str:
        """Make the mistake and return the message of the error it raises."""
        try:
            self.call()
        except self.error as exc:
            return str(exc)
        raise AssertionError(f"{self.what}: nothing was raised")


def _i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _cache(layout: str = "bf16", **changes: Any) -> LatentCache:
    return LatentCache.allocate(layout, _DIMS, **{"num_pages": 4, "page_size": 16, **changes})


def _csr(**changes: Any) -> PagedKV:
    arrays = {
        "kv_indptr": _i32(0, 2, 3),
        "kv_page_indices": _i32(3, 1, 0),
        "kv_last_page_len": _i32(5, 16),
    }
    return PagedKV.from_csr(_cache(), **{**arrays, **changes})


def _table(**changes: Any) -> PagedKV:
    arrays = {"block_table": _i32(0, 1).view(1, 2), "seq_lens": _i32(20)}
    return PagedKV.from_block_table(_cache(), **{**arrays, **changes})


def _plan(**changes: Any) -> mla_core.DecodePlan:
    arguments = {"dims": _DIMS, "qo_indptr": _i32(0, 1, 2), "kv": _csr(), "backend": "reference"}
    return mla_core.plan_decode(**{**arguments, **changes})


def _decode(plan: dict[str, Any] | None = None, **changes: Any) -> object:
    q = torch.randn(2, 4, 576).bfloat16()
    arguments: dict[str, Any] = {
        "ql_nope": q[..., :512],
        "q_pe": q[..., 512:],
        "kv": _csr(),
        "plan": _plan(**(plan or {})),
        "sm_scale": _DIMS.sm_scale,
    }
    return mla_core.decode(**{**arguments, **changes})


def _sparse(**changes: Any) -> object:
    q = torch.randn(2, 4, 576).bfloat16()
    arguments: dict[str, Any] = {
        "ql_nope": q[..., :512],
        "q_pe": q[..., 512:],
        "cache": _cache(),
        "indices": torch.zeros(2, 8, dtype=torch.int32),
        "sm_scale": _DIMS.sm_scale,
    }
    return mla_core.sparse_decode(**{**arguments, **changes})


def _write(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "kv_c": torch.randn(3, 512),
        "k_pe": torch.randn(3, 64),
        "cache": _cache(),
        "slots": torch.arange(3),
    }
    mla_core.write_kv_cache(**{**arguments, **changes})


def _prefill(**changes: Any) -> object:
    arguments: dict[str, Any] = {
        "q": torch.randn(4, 2, 192),
        "k": torch.randn(4, 2, 192),
        "v": torch.randn(4, 2, 128),
        "cu_seqlens_q": _i32(0, 4),
        "cu_seqlens_k": _i32(0, 4),
        "sm_scale": 1.0,
    }
    return mla_core.prefill(**{**arguments, **changes})


def _problem(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "decode",
        "arch": "cpu",
        "q_dtype": "bf16",
        "kv_dtype": "bf16",
        "dims": _DIMS,
    }
    return Problem(**{**fields, **changes})


BAD_INPUTS: tuple[BadInput, ...] = (
    BadInput("no heads", lambda: MLADims(0), "MLADims: num_heads must be 1..128, got 0"),
    BadInput(
        "a latent width no model has",
        lambda: MLADims(16, kv_lora_rank=500),
        "MLADims: kv_lora_rank must be a multiple of 32 in 32..1024, got 500",
    ),
    BadInput(
        "an odd rotary width",
        lambda: MLADims(16, qk_rope_head_dim=63),
        "MLADims: qk_rope_head_dim must be an even number in 0..128, got 63",
    ),
    BadInput(
        "heads that do not divide over ranks",
        lambda: MLADims(20).tensor_parallel(8),
        "MLADims: world_size must divide num_heads=20, got 8",
    ),
    BadInput(
        "a misspelt dtype",
        lambda: torch_dtype("bfloat16"),
        "dtype: name must be one of bf16, fp16, fp32, fp64, fp8_e4m3, fp8_e4m3fnuz, fp8_e5m2, "
        "uint8, int32, int64, got 'bfloat16'",
    ),
    BadInput("an unknown layout", lambda: layouts.get("nhd"), "layout"),
    BadInput("a page size of 0", lambda: _cache(page_size=0), "page_size must be"),
    BadInput(
        "a shuffled layout with odd pages",
        lambda: _cache("shuffled_bf16", page_size=24),
        "page_size must be",
    ),
    BadInput("a per-tensor fp8 cache without its scale", lambda: _cache("fp8"), "scale must be"),
    BadInput(
        "a cache buffer of another shape",
        lambda: LatentCache.bind("bf16", _DIMS, 16, torch.zeros(4, 16, 512).bfloat16()),
        "buffers[0]",
    ),
    BadInput(
        "an index array of int64",
        lambda: _csr(kv_indptr=torch.tensor([0, 2, 3])),
        "PagedKV: kv_indptr must be int32, got torch.int64 (3,); call .to(torch.int32)",
    ),
    BadInput(
        "an index array on another device",
        lambda: _csr(kv_page_indices=_i32(3, 1, 0).to("meta")),
        "PagedKV: kv_page_indices must be on cpu like the cache, got meta",
    ),
    BadInput(
        "an index array with gaps",
        lambda: _csr(kv_last_page_len=_i32(5, 0, 16, 0)[::2]),
        "PagedKV: kv_last_page_len must be contiguous, got strides (2,); call .contiguous()",
    ),
    BadInput(
        "prefix sums that do not start at 0",
        lambda: _csr(kv_indptr=_i32(1, 2, 3)),
        "PagedKV: kv_indptr must start at 0, got 1",
    ),
    BadInput(
        "prefix sums that decrease",
        lambda: _csr(kv_indptr=_i32(0, 3, 2)),
        "PagedKV: kv_indptr must not decrease, got a smaller value at 2",
    ),
    BadInput(
        "fewer page ids than pages",
        lambda: _csr(kv_page_indices=_i32(3, 1)),
        "PagedKV: kv_page_indices must have at least kv_indptr[-1]=3 entries, got shape (2,)",
    ),
    BadInput(
        "a page id past the cache",
        lambda: _csr(kv_page_indices=_i32(3, 1, 4)),
        "PagedKV: kv_page_indices must be in -1..3, got 4 at 2",
    ),
    BadInput(
        "a last page longer than a page",
        lambda: _csr(kv_last_page_len=_i32(5, 17)),
        "PagedKV: kv_last_page_len must be in 1..16 for requests with pages and 0 for the others, "
        "got a value outside at request 1",
    ),
    BadInput(
        "lengths of another batch",
        lambda: _csr(kv_last_page_len=_i32(5)),
        "PagedKV: kv_last_page_len must be [batch_size]=(2,) to match kv_indptr (3,), got (1,)",
    ),
    BadInput(
        "a flat block table",
        lambda: _table(block_table=_i32(0, 1)),
        "PagedKV: block_table must be [batch_size, max_pages], got shape (2,)",
    ),
    BadInput(
        "a request longer than its block table row",
        lambda: _table(seq_lens=_i32(33)),
        "PagedKV: seq_lens must be in 0..32, got 33 at 0",
    ),
    BadInput(
        "query prefix sums of another batch",
        lambda: _plan(qo_indptr=_i32(0, 1)),
        "plan_decode: qo_indptr must be [batch_size + 1]=(3,) to match kv_indptr, got (2,)",
    ),
    BadInput(
        "dims that are not the cache's",
        lambda: _plan(dims=MLADims(4, kv_lora_rank=256)),
        "plan_decode: dims.kv_lora_rank must be 512 like the cache's, got 256",
    ),
    BadInput(
        "no KV splits",
        lambda: _plan(num_kv_splits=0),
        "plan_decode: num_kv_splits must be in 1..256, got 0",
    ),
    BadInput(
        "a sliding window without causal masking",
        lambda: AttentionOptions(window=8, causal=False),
        "AttentionOptions: window must be None when causal is False",
    ),
    BadInput(
        "a context-parallel rank outside its world",
        lambda: AttentionOptions(cp_world_size=4, cp_rank=4),
        "AttentionOptions: cp_rank must be in 0..cp_world_size - 1 with cp_world_size >= 1, "
        "got cp_rank=4, cp_world_size=4",
    ),
    BadInput(
        "an odd number of rotated elements",
        lambda: FusedRope(is_neox=False, rotary_dim=63),
        "FusedRope: rotary_dim must be an even number >= 2, got 63",
    ),
    BadInput(
        "a rotation wider than the rotary part",
        lambda: _plan(options=AttentionOptions(rope=FusedRope(False, 64, dim_offset=2))),
        "plan_decode: options.rope must have dim_offset + rotary_dim <= qk_rope_head_dim=64, "
        "got 2 + 64",
    ),
    BadInput(
        "a dtype no kernel takes",
        lambda: _plan(q_dtype=torch.float64),
        "reference: q_dtype=fp64 (needs bf16, fp16, fp32, fp8_e4m3, fp8_e4m3fnuz)",
        UnsupportedProblemError,
    ),
    BadInput(
        "a backend that is not installed",
        lambda: _plan(backend="nonesuch"),
        "backend 'nonesuch' is not installed",
        BackendUnavailableError,
    ),
    BadInput(
        "queries of another width",
        lambda: _decode(ql_nope=torch.randn(2, 4, 576).bfloat16()),
        "decode: ql_nope must be [total_q, 4, 512], got shape (2, 4, 576)",
    ),
    BadInput(
        "queries of another dtype",
        lambda: _decode(ql_nope=torch.randn(2, 4, 512)),
        "decode: ql_nope must be bfloat16, got torch.float32",
    ),
    BadInput(
        "queries with a strided last dimension",
        lambda: _decode(ql_nope=torch.randn(2, 512, 4).bfloat16().mT),
        "decode: ql_nope must have a contiguous last dimension, got strides (2048, 1, 4); "
        "call .contiguous()",
    ),
    BadInput(
        "more query tokens than planned",
        lambda: _decode(
            ql_nope=torch.randn(3, 4, 512).bfloat16(), q_pe=torch.randn(3, 4, 64).bfloat16()
        ),
        "decode: ql_nope must have total_q=2 rows like the plan, got shape (3, 4, 512)",
    ),
    BadInput(
        "a cache of another layout than planned",
        lambda: _decode(
            kv=PagedKV.from_csr(_cache("fp32"), _i32(0, 2, 3), _i32(3, 1, 0), _i32(5, 16))
        ),
        "decode: kv must have kv_dtype=bf16 like the plan, got fp32; plan again",
    ),
    BadInput(
        "an output of another shape",
        lambda: _decode(out=torch.empty(2, 4, 576).bfloat16()),
        "decode: out must be [2, 4, 512], got shape (2, 4, 576)",
    ),
    BadInput(
        "an attention sink that was not planned",
        lambda: _decode(sink=torch.zeros(4)),
        "decode: sink must be None to match the plan's has_sink=False, got (4,)",
    ),
    BadInput(
        "a query scale without fp8 queries",
        lambda: _decode(q_scale=torch.ones(1)),
        "decode: q_scale must be None for torch.bfloat16 queries, got a tensor",
    ),
    BadInput(
        "context parallelism without global lengths",
        lambda: _decode(plan={"options": AttentionOptions(cp_world_size=2)}),
        "decode: global_kv_lens must be given if and only if the plan has cp_world_size > 1, "
        "got None with cp_world_size=2",
    ),
    BadInput(
        "fused RoPE without positions",
        lambda: _decode(plan=_ROPE, cos_sin_cache=torch.zeros(9, 64)),
        "decode: positions must be given with options.rope, got None",
    ),
    BadInput(
        "a rotation table of another width",
        lambda: _decode(plan=_ROPE, cos_sin_cache=torch.zeros(9, 32), positions=_i32(0, 1)),
        "decode: cos_sin_cache must be [max_position, 64], got shape (9, 32)",
    ),
    BadInput(
        "a position past the rotation table",
        lambda: _decode(plan=_ROPE, cos_sin_cache=torch.zeros(9, 64), positions=_i32(0, 9)),
        "decode: positions (plus position_offset=0) must be in 0..8, the rows of cos_sin_cache, "
        "got 9 at 1",
    ),
    BadInput(
        "positions that were not planned",
        lambda: _decode(positions=_i32(0, 1)),
        "decode: positions must be None with a plan without options.rope, got (2,)",
    ),
    BadInput(
        "sparse indices of another number of tokens",
        lambda: _sparse(indices=torch.zeros(3, 8, dtype=torch.int32)),
        "sparse_decode: indices must be [2, topk], got shape (3, 8)",
    ),
    BadInput(
        "a negative soft cap",
        lambda: _sparse(softcap=-1.0),
        "sparse_decode: softcap must be >= 0, got -1.0",
    ),
    BadInput(
        "a slot past the cache",
        lambda: _write(slots=torch.tensor([0, 1, 64])),
        "write_kv_cache: slots must be below num_slots=64, got 64",
    ),
    BadInput(
        "int16 slots",
        lambda: _write(slots=_i32(0, 1, 2).short()),
        "write_kv_cache: slots must be int64 or int32, got torch.int16",
    ),
    BadInput(
        "key heads that do not divide the query heads",
        lambda: _prefill(k=torch.randn(4, 3, 192)),
        "prefill: k must have a number of heads that divides num_heads=2, got shape (4, 3, 192)",
    ),
    BadInput(
        "prefix sums that do not cover the tokens",
        lambda: _prefill(cu_seqlens_k=_i32(0, 3)),
        "prefill: cu_seqlens_k must rise from 0 to the number of tokens 4, got 0 to 3",
    ),
    BadInput(
        "an unknown op",
        lambda: _problem(op="encode"),
        "Problem: op must be one of decode, prefill, sparse_decode, write_kv_cache, got 'encode'",
    ),
    BadInput(
        "an unknown feature",
        lambda: _problem(features=frozenset({"dropout"})),
        "Problem: features must be among",
    ),
    BadInput(
        "partials of another batch",
        lambda: mla_core.reduce_partials(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5)),
        "reduce_partials: partial_lse must be",
    ),
)
