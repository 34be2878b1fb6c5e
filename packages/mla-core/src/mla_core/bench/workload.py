"""The data of one benchmark case: queries, a paged cache with several data sets, and the truth.

The data sets own disjoint, shuffled pages of one cache. Together they exceed the last-level cache
several times, so a tour over them finds nothing warm. Values are full-range normal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_core.batch import PagedKV, indptr_of, pages_of
from mla_core.bench.cases import BenchCase
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.dtypes import FP8_DTYPES, torch_dtype
from mla_core.layouts import get
from mla_core.plan import output_dtype
from mla_core.reference import attention
from mla_core.testing.assertions import relative_l2

#: A tour over the data sets reads this many times the last-level cache.
_COLD_FACTOR = 3
#: Assumed last-level cache of a CPU, which torch cannot tell.
_HOST_CACHE_BYTES = 64 * 2**20
_MAX_SETS = {"cpu": 8, "cuda": 192}
#: Tokens written to the cache at once, to bound the memory of unpacked rows.
_WRITE_CHUNK = 2**16
_KV_SCALE, _Q_SCALE = 0.02, 0.03


@dataclass(frozen=True, slots=True)
class DecodeWorkload:
    """Everything a contender of ``decode`` may look at.

    Parameters
    ----------
    case : BenchCase
    q : [total_q, num_heads, latent_dim]
        ``ql_nope ‖ q_pe``; the two properties are views of it.
    q_scale : [1], fp32, or None
    qo_indptr : [batch_size + 1], int32
    kvs : tuple of PagedKV
        One per data set, all with the same lengths.
    kv_lens : tuple of int
    expected : tuple of [total_q, num_heads, value_dim], fp64
        The truth of each data set.
    """

    case: BenchCase
    q: torch.Tensor
    q_scale: torch.Tensor | None
    qo_indptr: torch.Tensor
    kvs: tuple[PagedKV, ...]
    kv_lens: tuple[int, ...]
    expected: tuple[torch.Tensor, ...]

    @property
    def dims(self) -> MLADims:
        """Model dimensions."""
        return self.case.dims

    @property
    def device(self) -> torch.device:
        """Where the data is."""
        return self.q.device

    @property
    def ql_nope(self) -> torch.Tensor:
        """Absorbed query part."""
        return self.q[..., : self.dims.kv_lora_rank]

    @property
    def q_pe(self) -> torch.Tensor:
        """Rotary query part."""
        return self.q[..., self.dims.kv_lora_rank :]

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype contenders write."""
        return output_dtype(self.q.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes one call must move: live cache rows, queries and outputs, each once."""
        per_token = get(self.case.layout).live_bytes_per_token(self.dims)
        total_q, num_heads, _ = self.q.shape
        out_bytes = total_q * num_heads * self.dims.value_dim * self.out_dtype.itemsize
        return sum(self.kv_lens) * per_token + self.q.nbytes + out_bytes

    @property
    def num_flops(self) -> int:
        """Operations of both products over the visible keys."""
        q_len = self.case.q_len
        hidden = q_len * (q_len - 1) // 2
        visible = sum(q_len * length - hidden for length in self.kv_lens)
        return 2 * self.dims.num_heads * (self.dims.latent_dim + self.dims.value_dim) * visible

    def error(self, outs: list[torch.Tensor]) -> float:
        """Return the worst relative L2 distance of the outputs of all data sets; NaN stays NaN."""
        errors = [relative_l2(out, truth) for out, truth in zip(outs, self.expected, strict=True)]
        return float(torch.tensor(errors, dtype=torch.float64).max())


def build_decode(case: BenchCase, device: torch.device, *, seed: int) -> DecodeWorkload:
    """Draw the data of a decode case and compute the truth.

    Raises
    ------
    LayoutError
        The layout cannot hold the dims or page size of the case.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dims, layout = case.dims, get(case.layout)
    kv_lens = torch.tensor(case.kv_lens(), dtype=torch.int32)
    num_pages = pages_of(kv_lens, case.page_size)
    pages_per_set = int(num_pages.sum())
    num_sets = _num_sets(int(kv_lens.sum()) * layout.live_bytes_per_token(dims), device)

    scale = torch.tensor([_KV_SCALE], device=device) if layout.needs_scale else None
    cache = LatentCache.allocate(
        layout, dims, num_sets * pages_per_set, case.page_size, device=device, scale=scale
    )
    for slots in torch.arange(cache.num_slots, device=device).split(_WRITE_CHUNK):
        rows = torch.randn(slots.numel(), dims.latent_dim, generator=generator, device=device)
        cache.write(rows[:, : dims.kv_lora_rank], rows[:, dims.kv_lora_rank :], slots)

    page_ids = torch.randperm(cache.num_pages, generator=generator, device=device)
    kv_indptr = indptr_of(num_pages).to(device)
    last_page_len = (kv_lens - (num_pages - 1) * case.page_size).to(device)
    kvs = tuple(
        PagedKV.from_csr(cache, kv_indptr, pages.to(torch.int32), last_page_len)
        for pages in page_ids.split(pages_per_set)
    )
    q_shape = (case.batch_size * case.q_len, dims.num_heads, dims.latent_dim)
    q = torch.randn(q_shape, generator=generator, device=device)
    q_scale = None
    if case.q_dtype in FP8_DTYPES:
        q_scale = torch.tensor([_Q_SCALE], device=device)
        q = q / q_scale
    q = q.to(torch_dtype(case.q_dtype))
    qo_indptr = torch.arange(case.batch_size + 1, dtype=torch.int32, device=device) * case.q_len
    lens = tuple(kv_lens.tolist())
    expected = tuple(_truth(case, q, q_scale, kv, lens) for kv in kvs)
    return DecodeWorkload(case, q, q_scale, qo_indptr, kvs, lens, expected)


def _num_sets(set_bytes: int, device: torch.device) -> int:
    cache_bytes = _HOST_CACHE_BYTES
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-_COLD_FACTOR * cache_bytes // set_bytes)
    return max(1, min(wanted, _MAX_SETS[device.type]))


def _truth(
    case: BenchCase,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: PagedKV,
    kv_lens: tuple[int, ...],
) -> torch.Tensor:
    """Attend request by request, which bounds the memory of fp64 rows."""
    rank, q_len = case.dims.kv_lora_rank, case.q_len
    slots = kv.token_slots(max(kv_lens))
    outs = []
    for b, length in enumerate(kv_lens):
        kv_c, k_pe = kv.cache.read(slots[b, :length], torch.float32)
        queries = q[b * q_len : (b + 1) * q_len]
        out, _ = attention.decode(
            queries[..., :rank],
            queries[..., rank:],
            [kv_c],
            [k_pe],
            [0, q_len],
            sm_scale=case.dims.sm_scale,
            q_scale=1.0 if q_scale is None else q_scale,
        )
        outs.append(out)
    return torch.cat(outs)
