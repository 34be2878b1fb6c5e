"""How fast rows are written into a latent cache, against the bytes that must move.

    python benchmarks/cache_writes.py                       one table, on the GPU at hand
    python benchmarks/cache_writes.py --tokens 1 4096 --layouts bf16 fp8_ds656
    python benchmarks/cache_writes.py --backends fusions,reference --json writes.json
    python benchmarks/cache_writes.py --tokens 4096 --schedules 4,4 8,4 8,8 16,8

Rows are bf16 and random, slots random and distinct, pages hold 64 tokens, or as many as the layout
needs. A call is checked byte for byte against the layout's own `pack` before it is timed. What is
timed are replays of a CUDA graph with one call for each data set; the sets own disjoint memory and
together exceed the last-level cache three times, unless there would be more than ``MAX_SETS``:
then the column ``cold`` says no. ``bytes`` counts the rows and slots read and the live bytes of
the cache written, each once. ``copy`` is a copy of as many bytes by torch, timed in the same way,
and ``share`` the rate of the call over that of a copy of 1 GiB. ``--schedules`` tries tokens of a
program and warps that ``mla_fusions`` would not choose.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import tables
import torch

from mla_core import LatentCache, MLADims, layouts, write_kv_cache
from mla_core.bench.timing import GraphClock, HostClock, Summary, summarise
from mla_core.dtypes import torch_dtype
from mla_fusions import rows

LAYOUTS = (
    *("bf16", "fp8", "fp8_seg656", "fp8_seg644", "fp8_ds656", "fp8_seg576", "fp8_ds32"),
    *("v4_nm", "v4_584", "shuffled_bf16", "shuffled_fp8", "nvfp4_shuffled", "indexer"),
)
TOKENS = (1, 16, 128, 1024, 4096, 16384, 65536)
MAX_SETS = 512
SAMPLES = 9
#: Where no other is known.
CACHE_BYTES = 32 << 20


COLUMNS: tuple[tables.Column, ...] = (
    ("layout", "<18", "layout"),
    ("tokens", ">6", "tokens"),
    ("backend", "<10", "backend"),
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
    tokens: int
    backend: str
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
    """One data set: a cache, and rows with their slots."""

    cache: LatentCache
    kv_c: torch.Tensor
    k_pe: torch.Tensor
    slots: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes that a call must move."""
        live = self.cache.layout.live_bytes_per_token(self.cache.dims) * len(self.slots)
        return live + sum(each.numel() * each.element_size() for each in self.inputs)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a call reads."""
        return self.kv_c, self.k_pe, self.slots

    def write(self, backend: str) -> torch.Tensor:
        """Call the op."""
        write_kv_cache(self.kv_c, self.k_pe, self.cache, self.slots, backend=backend)
        return self.cache.buffers[0]


def main() -> int:
    """Print the table; return 1 when a call wrote something else than the reference."""
    parser = tables.parser(__doc__)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=layouts.names())
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--backends", default="fusions")
    parser.add_argument(
        "--schedules", nargs="+", default=[""], metavar="BLOCK_T,NUM_WARPS", help="both powers of 2"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(
        options.layouts, options.tokens, options.backends.split(","), options.schedules
    )
    return tables.fill(COLUMNS, cases, lambda *case: measured(*case, device, ceiling), options.json)


@contextmanager
def scheduled(owner: object, schedule: str) -> Iterator[None]:
    """Have what asks an owner's ``schedule`` launch with other numbers, in a block."""
    if not schedule:
        yield
        return
    numbers = tuple(map(int, schedule.split(",")))
    with mock.patch.object(owner, "schedule", return_value=numbers):
        yield


def measured(
    layout: str, tokens: int, backend: str, schedule: str, device: torch.device, ceiling: float
) -> Result:
    """Check one case and time it."""
    first = next(data_sets(layout, tokens, device, 1))
    num_bytes = first.num_bytes
    num_sets, is_cold = sets_for(num_bytes, device)
    with scheduled(rows.Rows, schedule):
        check(first, backend)
        sets = list(data_sets(layout, tokens, device, num_sets))
        summary, copied = timed(lambda i: sets[i].write(backend), num_bytes, num_sets, device)
    gbps = num_bytes / summary.median * 1e-3
    return Result(
        layout,
        tokens,
        backend,
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


def sets_for(num_bytes: int, device: torch.device) -> tuple[int, bool]:
    """Return how many data sets of so many bytes to walk over, and whether they leave the cache."""
    cache_bytes = CACHE_BYTES
    if device.type == "cuda":
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-3 * cache_bytes // num_bytes)
    num_sets = max(2, min(MAX_SETS, wanted)) if device.type == "cuda" else 2
    return num_sets, num_sets >= wanted


def timed(
    call: Callable[[int], torch.Tensor], num_bytes: int, num_sets: int, device: torch.device
) -> tuple[Summary, Summary]:
    """Time a call for each data set, and a copy of as many bytes, in turns."""
    copies = [
        torch.ones(max(1, num_bytes // 2), dtype=torch.uint8, device=device)
        for _ in range(2 * num_sets)
    ]

    def copy(i: int) -> torch.Tensor:
        return copies[2 * i].copy_(copies[2 * i + 1])

    kind = GraphClock if device.type == "cuda" else HostClock
    clock, rival = kind(call, num_sets), kind(copy, num_sets)
    times, rivals = [], []
    for _ in range(SAMPLES):
        times.append(clock.sample())
        rivals.append(rival.sample())
    return summarise(times), summarise(rivals)


def data_sets(layout: str, tokens: int, device: torch.device, number: int) -> Iterator[Data]:
    """Yield data sets that share no memory."""
    kind = layouts.get(layout)
    rank, rope = kind.only or (512, 64)
    dims = MLADims(16, rank, rope, value_includes_rope=layout.startswith("v4"))
    page_size = max(64, kind.page_multiple)
    num_pages = -(-tokens // page_size)
    scale = torch.full((1,), 0.02, device=device) if kind.needs_scale else None
    generator = torch.Generator(device).manual_seed(tokens)
    for _ in range(number):
        cache = LatentCache.allocate(
            kind, dims, num_pages, page_size, device=device, scale=scale, fill=0xA5
        )
        both = torch.randn(tokens, rank + rope, device=device, generator=generator).bfloat16()
        slots = torch.randperm(num_pages * page_size, device=device, generator=generator)
        # As a model has them: the rotary part stands behind the latent, which is normed apart.
        yield Data(cache, both[:, :rank].contiguous(), both[:, rank:], slots[:tokens].clone())


def check(data: Data, backend: str) -> None:
    """Compare all memory of the cache with what the layout's own `pack` writes on the host."""
    data.write(backend)
    compare(data.cache, data.kv_c, data.k_pe, data.slots)


def compare(
    cache: LatentCache, kv_c: torch.Tensor, k_pe: torch.Tensor, slots: torch.Tensor
) -> None:
    """Compare all memory of a cache with what these rows make of it."""
    scale = None if cache.scale is None else cache.scale.cpu()
    wanted = LatentCache.allocate(
        cache.layout, cache.dims, cache.num_pages, cache.page_size, scale=scale, fill=0xA5
    )
    wanted.write(kv_c.cpu(), k_pe.cpu(), slots.cpu())
    for ours, theirs in zip(cache.buffers, wanted.buffers, strict=True):
        as_bytes = [each.cpu().view(torch_dtype("uint8")) for each in (ours, theirs)]
        differing = int((as_bytes[0] != as_bytes[1]).sum())
        assert not differing, f"wrote {differing} other bytes than the reference; not timed"


if __name__ == "__main__":
    sys.exit(main())
