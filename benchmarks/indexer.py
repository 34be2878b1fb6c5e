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

import argparse
import itertools
import json
import sys
from dataclasses import asdict, dataclass

import torch
from cache_writes import sets_for, timed

from mla_core import LatentCache, MLADims
from mla_core.arch import arch_of
from mla_core.bench.ceilings import measure
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--preshuffle", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file to write the results to, one list")
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = measure(device, "bf16", megabytes=None if device.type == "cuda" else 16).gbps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {name}, {ceiling:.0f} GB/s at most")
    print(
        f"{'tokens':>6} {'heads':>5} {'bytes':>11} {'cold':>4} {'error':>8} {'us':>9} {'p10':>9} "
        f"{'p90':>9} {'GB/s':>7} {'copy us':>9} {'share':>6}"
    )
    results, is_right = [], True
    for tokens, heads in itertools.product(options.tokens, options.heads):
        try:
            result = measured(tokens, heads, options.preshuffle, device, ceiling)
        except AssertionError as exc:
            print(f"{tokens:>6} {heads:>5} {exc}")
            is_right = False
            continue
        results.append(result)
        print(
            f"{tokens:>6} {heads:>5} {result.bytes:>11} {'yes' if result.is_cold else 'no':>4} "
            f"{result.error:>8.1e} {result.median_us:>9.2f} {result.p10_us:>9.2f} "
            f"{result.p90_us:>9.2f} {result.gbps:>7.0f} {result.copy_us:>9.2f} "
            f"{result.share:>6.1%}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(result) for result in results], file, indent=1)
    return 0 if is_right else 1


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
