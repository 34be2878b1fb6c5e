"""Decode cases: ragged batches over hostile caches, with the expected result of the truth.

Every case draws fresh data from its seed. The cache it builds is hostile on purpose: pages are
shuffled, every byte that belongs to no live token is poison, the index buffer is over-allocated
with wild ids, and lengths cover what breaks kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from mla_core import layouts
from mla_core.batch import PagedKV, indptr_of
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.dtypes import FP8_DTYPES, torch_dtype
from mla_core.plan import AttentionOptions
from mla_core.problem import Problem
from mla_core.reference import attention
from mla_core.reference.rope import rope, rope_tables, split_cos_sin_cache
from mla_core.testing.poison import poison_

#: Page ids in the over-allocated tail of the index buffer; no kernel may follow them.
WILD_PAGE_ID = 1 << 30

#: Rows of the rotation table of cases with fused RoPE, and its dtype by seed.
MAX_POSITION = 700
_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class DecodeCase:
    """One decode problem with everything needed to build it; ``str`` is its test id."""

    name: str
    kv_lens: Sequence[int]
    q_lens: Sequence[int] = ()
    dims: MLADims = field(default_factory=lambda: MLADims(16))
    page_size: int = 16
    q_dtype: str = "bf16"
    layout: str = "bf16"
    options: AttentionOptions = field(default_factory=AttentionOptions)
    has_sink: bool = False
    num_kv_splits: int | None = None
    hidden_page: bool = False
    shared_pages: bool = False
    strided: bool = False
    seed: int = 0

    def __str__(self) -> str:
        """Name, then what differs from the default."""
        splits = "" if self.num_kv_splits is None else f"-splits{self.num_kv_splits}"
        return (
            f"{self.name}-{self.q_dtype}-{self.layout}-h{self.dims.num_heads}-p{self.page_size}"
            f"{splits}"
        )

    def problem(self, arch: str) -> Problem:
        """Return the question this case asks of a backend."""
        layout = layouts.get(self.layout)
        features = {"lse", *self.options.features} | ({"sink"} if self.has_sink else set())
        return Problem(
            op="decode",
            arch=arch,
            q_dtype=self.q_dtype,
            kv_dtype=layout.kv_dtype,
            dims=self.dims,
            layout=layout.family,
            page_size=self.page_size,
            q_len=max(self.query_lens, default=1) or 1,
            features=frozenset(features),
        )

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens of each request; one each by default."""
        return tuple(self.q_lens) or (1,) * len(self.kv_lens)

    def build(self, device: torch.device | str = "cpu") -> DecodeInputs:
        """Draw the data, fill the cache and compute the expected result."""
        return _build(self, torch.device(device))


@dataclass(frozen=True)
class DecodeInputs:
    """Tensors of one case on a device, and what the truth says about them (fp64, CPU)."""

    ql_nope: torch.Tensor
    q_pe: torch.Tensor
    kv: PagedKV
    qo_indptr: torch.Tensor
    sm_scale: float
    sink: torch.Tensor | None
    q_scale: torch.Tensor | None
    global_kv_lens: torch.Tensor | None
    expected_out: torch.Tensor
    expected_lse: torch.Tensor
    cos_sin_cache: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    expected_k_pe_tokens: torch.Tensor | None = None


def _build(case: DecodeCase, device: torch.device) -> DecodeInputs:
    generator = torch.Generator().manual_seed(case.seed)
    dims, page_size = case.dims, case.page_size
    batch_size = len(case.kv_lens)
    pages_needed = [-(-length // page_size) for length in case.kv_lens]
    total_pages = sum(pages_needed)
    num_pages = total_pages + 3
    page_ids = torch.randperm(num_pages, generator=generator)[:total_pages].to(torch.int32)
    if case.shared_pages and batch_size > 1 and min(pages_needed[:2]) > 0:
        page_ids[pages_needed[0]] = page_ids[0]
    kv_indptr = indptr_of(torch.tensor(pages_needed, dtype=torch.int32))
    tail = torch.full((5,), WILD_PAGE_ID, dtype=torch.int32)
    # A wild tail is legal, but the value check of the CPU must not see it as live.
    kv_page_indices = torch.cat((page_ids, tail))
    kv_last_page_len = torch.tensor(
        [
            length - max(pages - 1, 0) * page_size
            for length, pages in zip(case.kv_lens, pages_needed, strict=True)
        ],
        dtype=torch.int32,
    )
    layout = layouts.get(case.layout)
    scale = torch.tensor([0.02]) if layout.scale_kind == "per_tensor" else None
    cache = LatentCache.allocate(layout, dims, num_pages, page_size, scale=scale)
    for buffer in cache.buffers:
        poison_(buffer)
    kv = PagedKV.from_csr(cache, kv_indptr, kv_page_indices, kv_last_page_len)
    slots = kv.token_slots()
    live = slots[slots >= 0].unique()
    kv_c = torch.randn(live.numel(), dims.kv_lora_rank, generator=generator)
    k_pe = torch.randn(live.numel(), dims.qk_rope_head_dim, generator=generator)
    cache.write(kv_c, k_pe, live)
    if case.hidden_page:
        kv_page_indices[0] = -1
    if case.strided:
        cache = _with_padded_pages(cache)
    kv = PagedKV.from_csr(cache, kv_indptr, kv_page_indices, kv_last_page_len)

    q_lens = case.query_lens
    qo_indptr = indptr_of(torch.tensor(q_lens, dtype=torch.int32))
    total_q = sum(q_lens)
    q = torch.randn(total_q, dims.num_heads, dims.latent_dim, generator=generator)
    q_scale = None
    if case.q_dtype in FP8_DTYPES:
        q_scale = torch.tensor([0.03])
        q = q / q_scale
    q = q.to(torch_dtype(case.q_dtype))
    ql_nope, q_pe = q[..., : dims.kv_lora_rank], q[..., dims.kv_lora_rank :]
    sink = torch.randn(dims.num_heads, generator=generator) if case.has_sink else None
    global_kv_lens = None
    options = case.options
    if options.cp_world_size > 1:
        # The newest token of request b lies on a rank 0..W-1 steps after this one.
        world_size, rank = options.cp_world_size, options.cp_rank
        global_kv_lens = torch.tensor(
            [
                (length - 1) * world_size + rank + 1 + b % world_size if length else rank
                for b, length in enumerate(case.kv_lens)
            ],
            dtype=torch.int32,
        )
    fused = options.rope
    cos_sin_cache, positions = None, None
    if fused is not None:
        tables = rope_tables(MAX_POSITION, fused.rotary_dim, dtype=torch.float32)
        cos_sin_cache = torch.cat(tables, dim=-1).to(_TABLE_DTYPES[case.seed % 3])
        # Positions of no order at all: each token must find its own.
        low, high = -fused.position_offset, MAX_POSITION - fused.position_offset
        positions = torch.randint(low, high, (total_q,), generator=generator)
        positions = positions if case.seed % 2 else positions.int()
    expected_out, expected_lse, expected_k_pe_tokens = _expected(
        case, kv, ql_nope, q_pe, qo_indptr, sink, q_scale, global_kv_lens, cos_sin_cache, positions
    )
    moved = replace(cache, buffers=tuple(buffer.to(device) for buffer in cache.buffers))
    if cache.scale is not None:
        moved = replace(moved, scale=cache.scale.to(device))

    def to(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return DecodeInputs(
        ql_nope=ql_nope.to(device),
        q_pe=q_pe.to(device),
        kv=PagedKV(
            moved, kv_indptr.to(device), kv_page_indices.to(device), kv_last_page_len.to(device)
        ),
        qo_indptr=qo_indptr.to(device),
        sm_scale=dims.sm_scale,
        sink=to(sink),
        q_scale=to(q_scale),
        global_kv_lens=to(global_kv_lens),
        expected_out=expected_out,
        expected_lse=expected_lse,
        cos_sin_cache=to(cos_sin_cache),
        positions=to(positions),
        expected_k_pe_tokens=expected_k_pe_tokens,
    )


def _expected(
    case: DecodeCase,
    kv: PagedKV,
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    qo_indptr: torch.Tensor,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    global_kv_lens: torch.Tensor | None,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the truth on what the cache really holds, after its own rounding."""
    slots = kv.token_slots()
    latents, keys, present = [], [], []
    for b, length in enumerate(case.kv_lens):
        kv_c, k_pe = kv.cache.read(slots[b, :length], torch.float32)
        latents.append(kv_c)
        keys.append(k_pe)
        present.append(slots[b, :length] >= 0)
    k_pe_tokens = None
    if cos_sin_cache is not None and positions is not None:
        q_pe, k_pe_tokens = _rotate(
            case, kv, q_pe, keys, present, global_kv_lens, cos_sin_cache, positions
        )
    out, lse = attention.decode(
        ql_nope,
        q_pe,
        latents,
        keys,
        qo_indptr,
        sm_scale=case.dims.sm_scale,
        causal=case.options.causal,
        window=case.options.window,
        softcap=case.options.softcap,
        sink=sink,
        q_scale=1.0 if q_scale is None else q_scale,
        cp_world_size=case.options.cp_world_size,
        cp_rank=case.options.cp_rank,
        global_kv_lens=global_kv_lens,
        value_includes_rope=case.dims.value_includes_rope,
        present=present,
    )
    return out, lse, k_pe_tokens


def _rotate(
    case: DecodeCase,
    kv: PagedKV,
    q_pe: torch.Tensor,
    keys: list[torch.Tensor],
    present: list[torch.Tensor],
    global_kv_lens: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated queries and ``k_pe_tokens``, and rotate the newest of ``keys`` in place."""
    options, fused = case.options, case.options.rope
    assert fused is not None
    cos, sin = split_cos_sin_cache(cos_sin_cache)

    def rotated(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return rope(
            x,
            positions[tokens],
            cos,
            sin,
            is_neox=fused.is_neox,
            rotary_dim=fused.rotary_dim,
            offset=fused.position_offset,
            dim_offset=fused.dim_offset,
        )

    k_pe_tokens = torch.zeros((q_pe.shape[0], q_pe.shape[2]), dtype=torch.float64)
    q_begin = 0
    for b, q_len in enumerate(case.query_lens):
        length = len(keys[b]) if global_kv_lens is None else int(global_kv_lens[b])
        for j in range(len(keys[b])):
            i = j * options.cp_world_size + options.cp_rank - (length - q_len)
            if i >= 0 and bool(present[b][j]):
                token = torch.tensor([q_begin + i])
                keys[b][j] = kv.cache.round_rope(rotated(keys[b][j][None], token))[0]
                k_pe_tokens[token] = keys[b][j].double()
        q_begin += q_len
    rounded = torch.bfloat16 if case.q_dtype in FP8_DTYPES else q_pe.dtype
    return rotated(q_pe, torch.arange(q_pe.shape[0])).to(rounded), k_pe_tokens


def _with_padded_pages(cache: LatentCache) -> LatentCache:
    """Return the same pages with a poisoned gap behind each, as an engine's shared pool has."""
    padded = []
    for buffer in cache.buffers:
        pages = buffer.flatten(1)
        wide = poison_(torch.empty(pages.shape[0], pages.shape[1] + 64, dtype=buffer.dtype))
        wide[:, : pages.shape[1]] = pages
        strides = (wide.stride(0), *buffer.stride()[1:])
        padded.append(wide.as_strided(buffer.shape, strides))
    return replace(cache, buffers=tuple(padded))
