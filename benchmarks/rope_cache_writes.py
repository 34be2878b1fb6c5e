"""How fast queries and keys are rotated and keys written, in one launch, against a copy.

    python benchmarks/rope_cache_writes.py                  one table, on the GPU at hand
    python benchmarks/rope_cache_writes.py --tokens 1 128 4096 --heads 16 128 --layouts bf16
    python benchmarks/rope_cache_writes.py --queries fp8 --layouts fp8 --json rope.json
    python benchmarks/rope_cache_writes.py --tokens 4096 --schedules 4,2 8,4 8,8 16,8

`fused_qk_rope_write_kv_cache` on bf16 rows of DeepSeek-V3's widths (512 and 64), with tables of 32
bf16 columns for 8192 positions; ``--sliced`` takes rotary parts of queries as slices of rows of 192
elements, and those of keys as slices of rows of 576, as a model has them. Slots and positions
are random, pages hold 64 tokens, or as many as the layout needs. A call is checked byte for byte,
queries and cache, before it is timed; timing, ``cold``, ``copy`` and ``share`` are those of
`cache_writes.py`. ``bytes`` counts queries twice, keys and the live bytes of the cache, slots,
positions and a row of both tables for each token. ``--schedules`` tries heads of a program and
warps that ``mla_fusions`` would not choose.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tables
import torch
from cache_writes import compare, sets_for, timed

from mla_core import LatentCache, MLADims, layouts
from mla_core.arch import arch_of
from mla_core.dtypes import fp8_of_arch, torch_dtype
from mla_core.reference.cache_ops import store
from mla_core.reference.rope import rope
from mla_fusions import fused_qk_rope_write_kv_cache

LAYOUTS = ("bf16", "fp8", "fp8_ds656")
TOKENS = (1, 16, 128, 1024, 4096)
HEADS = (16, 128)
RANK, ROPE, NOPE, POSITIONS = 512, 64, 128, 8192


COLUMNS: tuple[tables.Column, ...] = (
    ("layout", "<16", "layout"),
    ("q", "<4", "queries"),
    ("tokens", ">6", "tokens"),
    ("heads", ">5", "heads"),
    ("schedule", ">8", "schedule"),
    *tables.BYTES,
    *tables.TIMES,
    tables.RATE,
    ("copy us", ">9.2f", "copy_us"),
    tables.SHARE,
)


@dataclass(frozen=True)
class Result:
    """One line of the table; ``gbps`` are bytes over the median."""

    layout: str
    queries: str
    tokens: int
    heads: int
    is_neox: bool
    is_sliced: bool
    schedule: str
    bytes: int
    num_sets: int
    is_cold: bool
    median_us: float
    p10_us: float
    p90_us: float
    gbps: float
    copy_us: float
    share: float


@dataclass(frozen=True)
class Data:
    """One data set."""

    q_nope: torch.Tensor
    q_pe: torch.Tensor
    kv_c: torch.Tensor
    k_pe: torch.Tensor
    cache: LatentCache
    slots: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    q_out: torch.Tensor
    q_scale: torch.Tensor | None
    is_neox: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that a call must move."""
        rows = (self.q_nope, self.q_pe, self.kv_c, self.k_pe, self.slots, self.positions)
        moved = sum(each.numel() * each.element_size() for each in (*rows, self.q_out))
        tables = 2 * self.cos.shape[1] * self.cos.element_size()
        live = self.cache.layout.live_bytes_per_token(self.cache.dims)
        return moved + (tables + live) * len(self.slots)

    def write(self) -> torch.Tensor:
        """Call the op."""
        return fused_qk_rope_write_kv_cache(
            self.q_nope,
            self.q_pe,
            self.kv_c,
            self.k_pe,
            self.cache,
            self.slots,
            self.positions,
            self.cos,
            self.sin,
            is_neox=self.is_neox,
            q_out=self.q_out,
            q_scale=self.q_scale,
        )

    def check(self) -> None:
        """Compare queries and cache with the reference, rotated in fp32 on the host."""
        self.write()
        host = [each.cpu() for each in (self.positions, self.cos, self.sin)]
        turned = [
            rope(x.cpu(), *host, is_neox=self.is_neox, dtype=torch.float32)
            for x in (self.q_pe, self.k_pe)
        ]
        query = torch.cat([self.q_nope.cpu().float(), turned[0]], -1)
        if self.q_scale is None:
            wanted = query.to(self.q_out.dtype)
        else:
            wanted = store(query, fp8_of_arch(arch_of(self.q_out.device)), self.q_scale.cpu())
        as_bytes = [each.cpu().view(torch.uint8) for each in (self.q_out, wanted)]
        assert torch.equal(*as_bytes), "made other queries than the reference; not timed"
        compare(self.cache, self.kv_c.float(), turned[1], self.slots)


def main() -> int:
    """Print the table; return 1 when a call wrote something else than the reference."""
    parser = tables.parser(__doc__)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=layouts.names())
    parser.add_argument("--queries", nargs="+", default=["bf16"], choices=("bf16", "fp8"))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--neox", action="store_true", help="pair halves, not neighbours")
    parser.add_argument("--sliced", action="store_true", help="slices of wider projections")
    parser.add_argument(
        "--schedules", nargs="+", default=[""], metavar="BLOCK_H,NUM_WARPS", help="both powers of 2"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(
        options.layouts, options.queries, options.tokens, options.heads, options.schedules
    )

    def run(*case: Any) -> Result:
        return measured(*case, options.neox, options.sliced, device, ceiling)

    return tables.fill(COLUMNS, cases, run, options.json)


def measured(
    layout: str,
    queries: str,
    tokens: int,
    heads: int,
    schedule: str,
    is_neox: bool,
    is_sliced: bool,
    device: torch.device,
    ceiling: float,
) -> Result:
    """Check one case and time it."""
    case = (layout, queries, tokens, heads, is_neox, is_sliced, device)
    first = next(data_sets(*case, 1))
    first.check()
    num_bytes = first.num_bytes
    num_sets, is_cold = sets_for(num_bytes, device)
    sets = list(data_sets(*case, num_sets))
    summary, copied = timed(lambda i: sets[i].write(), num_bytes, num_sets, device)
    gbps = num_bytes / summary.median * 1e-3
    return Result(
        layout,
        queries,
        tokens,
        heads,
        is_neox,
        is_sliced,
        schedule,
        num_bytes,
        num_sets,
        is_cold,
        summary.median,
        summary.p10,
        summary.p90,
        gbps,
        copied.median,
        gbps / ceiling,
    )


def data_sets(
    layout: str,
    queries: str,
    tokens: int,
    heads: int,
    is_neox: bool,
    is_sliced: bool,
    device: torch.device,
    number: int,
) -> Iterator[Data]:
    """Yield data sets that share no memory but the tables."""
    kind, dims = layouts.get(layout), MLADims(heads, RANK, ROPE)
    page_size = max(64, kind.page_multiple)
    num_pages = -(-tokens // page_size)
    scale = torch.full((1,), 0.02, device=device) if kind.needs_scale else None
    generator = torch.Generator(device).manual_seed(tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    cos, sin = draw(POSITIONS, ROPE // 2), draw(POSITIONS, ROPE // 2)
    dtype = torch.bfloat16 if queries == "bf16" else torch_dtype(fp8_of_arch(arch_of(device)))
    for _ in range(number):
        cache = LatentCache.allocate(
            kind, dims, num_pages, page_size, device=device, scale=scale, fill=0xA5
        )
        slots = torch.randperm(num_pages * page_size, device=device, generator=generator)
        positions = torch.randint(POSITIONS, (tokens,), device=device, generator=generator)
        projected = draw(tokens, heads, NOPE + ROPE)[..., NOPE:] if is_sliced else None
        both = draw(tokens, RANK + ROPE)
        k_pe = both[:, RANK:]
        yield Data(
            draw(tokens, heads, RANK),
            draw(tokens, heads, ROPE) if projected is None else projected,
            both[:, :RANK].contiguous(),
            k_pe if is_sliced else k_pe.contiguous(),
            cache,
            slots[:tokens].clone(),
            positions,
            cos,
            sin,
            torch.empty(tokens, heads, RANK + ROPE, device=device).to(dtype),
            None if queries == "bf16" else torch.full((1,), 0.02, device=device),
            is_neox,
        )


if __name__ == "__main__":
    sys.exit(main())
