"""How fast the inputs of a sparse indexer are made: LayerNorm, RoPE, fp8, cache write, one launch.

    python benchmarks/indexer.py                            one table, on the GPU at hand
    python benchmarks/indexer.py --tokens 1 4096 --heads 32 64 --preshuffle --json indexer.json

`indexer_qk_rope_quant_and_cache` on bf16 rows of 128, of which 64 turn, with tables of 32 bf16
columns for 8192 positions and scales that are powers of two. Slots and positions are random, pages
hold 64 tokens. Each call is checked against the fp64 reference before it is timed; timing,
``cold``, ``copy`` and ``share`` are those of `cache_writes.py`. ``bytes`` counts queries, weights
and keys twice, as they are read and as they are written, slots, positions and a row of both tables
for each token.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import tables
import torch
from cache_writes import sets_for, timed

from mla_core import LatentCache, MLADims
from mla_core.arch import arch_of
from mla_core.dtypes import fp8_of_arch, torch_dtype
from mla_core.reference import indexer, quant
from mla_core.testing.assertions import relative_l2
from mla_fusions import indexer_qk_rope_quant_and_cache

TOKENS = (1, 16, 128, 1024, 4096)
HEADS = (64,)
WIDTH, ROPE, POSITIONS, PAGE_SIZE, EPS = 128, 64, 8192, 64, 1e-6
WEIGHTS_SCALE = WIDTH**-0.5
#: Largest relative L2 error that fp8 explains.
LIMIT = 5e-2


COLUMNS: tuple[tables.Column, ...] = (
    ("tokens", ">6", "tokens"),
    ("heads", ">5", "heads"),
    *tables.BYTES,
    tables.ERROR,
    *tables.TIMES,
    tables.RATE,
    ("copy us", ">9.2f", "copy_us"),
    tables.SHARE,
)


@dataclass(frozen=True)
class Result:
    """One line of the table; ``gbps`` are bytes over the median."""

    tokens: int
    heads: int
    is_preshuffled: bool
    bytes: int
    num_sets: int
    is_cold: bool
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    gbps: float
    copy_us: float
    share: float


class Data:
    """One data set: what is read and what is written."""

    def __init__(
        self, tokens: int, heads: int, is_preshuffled: bool, device: torch.device, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator).bfloat16()

        fp8 = torch_dtype(fp8_of_arch(arch_of(device)))
        num_pages = -(-tokens // PAGE_SIZE)
        self.is_preshuffled = is_preshuffled
        self.q, self.k = draw(tokens, heads, WIDTH), draw(tokens, WIDTH)
        self.weights = draw(tokens, heads)
        self.norm = draw(WIDTH), draw(WIDTH)
        self.tables = draw(POSITIONS, ROPE // 2), draw(POSITIONS, ROPE // 2)
        self.positions = torch.randint(POSITIONS, (tokens,), device=device, generator=generator)
        slots = torch.randperm(num_pages * PAGE_SIZE, device=device, generator=generator)
        self.slots = slots[:tokens].clone()
        self.q_out = torch.empty(tokens, heads, WIDTH, device=device).to(fp8)
        self.weights_out = torch.empty(tokens, heads, device=device)
        self.pages = torch.zeros(num_pages, PAGE_SIZE, WIDTH + 4, device=device).to(fp8)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call must move."""
        read = (self.q, self.k, self.weights, self.slots, self.positions)
        moved = sum(each.numel() * each.element_size() for each in (*read, self.q_out))
        tables = 2 * self.tables[0].shape[1] * self.tables[0].element_size()
        return moved + 4 * self.weights_out.numel() + (tables + WIDTH + 4) * len(self.slots)

    def call(self) -> torch.Tensor:
        """Call the op."""
        indexer_qk_rope_quant_and_cache(
            *(self.q, self.q_out, self.weights, self.weights_out, self.k, self.pages, self.slots),
            *(*self.norm, self.positions, *self.tables, EPS, WIDTH, "ue8m0", WEIGHTS_SCALE),
            self.is_preshuffled,
        )
        return self.q_out

    def error(self) -> float:
        """Return the largest relative L2 error of what a call makes, weights with their queries."""
        self.call()
        wanted = indexer.qk_rope_quant(
            *(self.q, self.k, self.weights, *self.norm, self.positions, *self.tables),
            eps=EPS,
            weights_scale=WEIGHTS_SCALE,
            scale_format="ue8m0",
            fp8=fp8_of_arch(arch_of(self.q.device)),
        )
        flavour = "_fnuz" if wanted.q.dtype == torch.float8_e4m3fnuz else ""
        layout = ("indexer_shuffled" if self.is_preshuffled else "indexer") + flavour
        cache = LatentCache.bind(layout, MLADims(1, WIDTH, 0), PAGE_SIZE, self.pages)
        return max(
            relative_l2(
                self.q_out.double() * self.weights_out[..., None],
                wanted.q.double() * wanted.weights[..., None],
            ),
            relative_l2(
                cache.read(self.slots)[0], quant.dequantize_groups(wanted.k, wanted.k_scales)
            ),
        )


def main() -> int:
    """Print the table; return 1 when a result was wrong."""
    parser = tables.parser(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--preshuffle", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(options.tokens, options.heads)
    return tables.fill(
        COLUMNS,
        cases,
        lambda *case: measured(*case, options.preshuffle, device, ceiling),
        options.json,
    )


def measured(
    tokens: int, heads: int, is_preshuffled: bool, device: torch.device, ceiling: float
) -> Result:
    """Check one case and time it."""
    first = Data(tokens, heads, is_preshuffled, device, 0)
    error, num_bytes = first.error(), first.num_bytes
    assert error <= LIMIT, f"wrong: relative L2 error {error:.2e}; not timed"
    num_sets, is_cold = sets_for(num_bytes, device)
    seeds = range(1, num_sets)
    sets = [first, *(Data(tokens, heads, is_preshuffled, device, seed) for seed in seeds)]
    summary, copied = timed(lambda i: sets[i].call(), num_bytes, num_sets, device)
    gbps = num_bytes / summary.median * 1e-3
    return Result(
        tokens,
        heads,
        is_preshuffled,
        num_bytes,
        num_sets,
        is_cold,
        error,
        summary.median,
        summary.p10,
        summary.p90,
        gbps,
        copied.median,
        gbps / ceiling,
    )


if __name__ == "__main__":
    sys.exit(main())
