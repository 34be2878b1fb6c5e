"""How fast the absorbed projections are, against the bytes of their weights.

    python benchmarks/absorbed.py                            one table, on the GPU at hand
    python benchmarks/absorbed.py --tokens 1 64 --heads 128 --weights bf16 fp8 mxfp4
    python benchmarks/absorbed.py --json absorbed.json
    python benchmarks/absorbed.py --weights mxfp4 --configs BLOCK_SIZE_N=32 num_warps=4,num_stages=3

``uk`` is W_UK of DeepSeek-V3 (128 to 512 for each head), ``uv`` its W_UV (512 to 128). Activations
are bf16 [tokens, heads, K], as a model has them, and results bf16 [tokens, heads, N]. A call is
checked against fp64 over the dequantised operands before it is timed. What is timed are replays of
a CUDA graph with one call for each data set; the sets own disjoint memory and together exceed the
last-level cache three times, unless there would be more than ``MAX_SETS``: then the column ``cold``
says no. ``bytes`` counts weights, their scales, activations and results, each once; ``weights`` the
first two. ``share`` is the rate at which those are read over the best that this device reads or
copies at in the same run. ``bmm`` is `torch.bmm` on bf16 weights, on as many data sets as that
takes, into a result of the same layout; ``speedup`` its time over ours. ``--configs`` tries other
tiles than ``mla_fusions`` chooses.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tables
import torch

from mla_core.bench.timing import GraphClock, HostClock, summarise
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import relative_l2
from mla_fusions import (
    batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant as a8w8,
)
from mla_fusions import (
    batched_gemm_a16wfp4,
    batched_gemm_a16wnvfp4,
    batched_gemm_bf16,
)

#: N and K of each projection.
SHAPES = {"uk": (512, 128), "uv": (128, 512)}
#: ``mxfp4`` quantises activations as well, ``mxfp4-wide`` does not.
WEIGHTS = ("bf16", "fp8", "mxfp4", "mxfp4-wide", "nvfp4")
TOKENS = (1, 4, 16, 64, 256, 4096)
HEADS = (16, 128)
MAX_SETS = 256
SAMPLES = 9
#: Relative L2 error that rounding the result to bf16 explains.
LIMIT = 5e-3
#: Where no other is known.
CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Result:
    """One line of the table; ``weights_gbps`` are bytes of the weights over the median."""

    shape: str
    heads: int
    tokens: int
    weights: str
    config: str
    bytes: int
    weight_bytes: int
    num_sets: int
    is_cold: bool
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    weights_gbps: float
    share: float
    bmm_us: float
    speedup: float


class Data:
    """One data set: activations, a result, and weights in one form with their scales."""

    def __init__(self, x: torch.Tensor, w: torch.Tensor, weights: str) -> None:
        self.x, self.weights = x, weights
        self.y = x.new_empty(x.shape[0], w.shape[0], w.shape[1], dtype=torch.bfloat16)
        self.scales: torch.Tensor | None = None
        match weights:
            case "bf16":
                self.w = w.bfloat16()
            case "fp8":
                self.w = w.to(torch.float8_e4m3fn)
                self.scales = torch.full((1,), 0.5, device=w.device)
            case "nvfp4":
                self.w, self.scales = quant.quantize_nvfp4(w)
            case _:
                self.w, self.scales = quant.quantize_mxfp4(w)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and their scales."""
        tensors = (self.w,) if self.scales is None else (self.w, self.scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call must move."""
        return self.weight_bytes + 2 * (self.x.numel() + self.y.numel())

    def call(self, config: Mapping[str, int] | None) -> torch.Tensor:
        """Multiply."""
        x, y, scales = self.x.transpose(0, 1), self.y, self.scales
        if scales is None:
            return batched_gemm_bf16(x, self.w, YQ=y, config=config, transpose_bm=True)
        if self.weights == "fp8":
            return a8w8(x, self.w, scales, YQ=y, config=config, transpose_bm=True)
        if self.weights == "nvfp4":
            return batched_gemm_a16wnvfp4(x, self.w, scales, y=y, config=config, transpose_bm=True)
        return batched_gemm_a16wfp4(
            x, self.w, scales, y=y, config=config, transpose_bm=True,
            prequant=self.weights == "mxfp4",
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """Return the product of what the operands stand for, [tokens, heads, N] in fp64."""
        x, scales, turns = self.x, self.scales, {"transpose_in": True, "transpose_out": True}
        if scales is None:
            return gemm.batched_gemm(x, self.w, **turns)
        if self.weights == "fp8":
            return gemm.batched_gemm_a8w8(x, self.w, 0.5, **turns)
        if self.weights == "nvfp4":
            return gemm.batched_gemm(x, quant.dequantize_nvfp4(self.w, scales), **turns)
        if self.weights == "mxfp4":
            return gemm.batched_gemm_mxfp4(x.transpose(0, 1), self.w, scales, transpose_out=True)
        return gemm.batched_gemm(x, quant.dequantize_mxfp4(self.w, scales), **turns)


def main() -> int:
    """Print the table; return 1 when a product was wrong."""
    parser = tables.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    parser.add_argument("--configs", nargs="+", default=[""], metavar="NAME=NUMBER,...")
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(
        options.shapes, options.heads, options.tokens, options.weights, options.configs
    )
    # The same for all weights.
    bmm = functools.cache(functools.partial(timed_bmm, device=device))
    return tables.fill(
        columns(options.configs),
        cases,
        lambda *case: measured(*case, device, ceiling, bmm(*case[:3])),
        options.json,
    )


def columns(configs: Sequence[str]) -> tuple[tables.Column, ...]:
    """Return the columns of the table; configurations have one if there are any."""
    width = max(map(len, configs))
    return (
        ("shape", "<5", "shape"),
        ("heads", ">5", "heads"),
        ("tokens", ">6", "tokens"),
        ("weights", "<10", "weights"),
        *((("config", f"<{max(6, width)}", "config"),) if width else ()),
        *tables.BYTES,
        tables.ERROR,
        *tables.TIMES,
        ("GB/s", ">7.0f", "weights_gbps"),
        tables.SHARE,
        ("bmm us", ">9.2f", "bmm_us"),
        ("speedup", ">7.2f", "speedup"),
    )


def draw(shape: str, heads: int, tokens: int, device: torch.device) -> Callable[[str], Data]:
    """Return what makes data sets of a case, each with numbers of its own."""
    n, k = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(tokens)

    def make(weights: str) -> Data:
        x = torch.randn(tokens, heads, k, device=device, generator=generator).bfloat16()
        w = torch.randn(heads, n, k, device=device, generator=generator) / k**0.5
        return Data(x, w, weights)

    return make


def sets_for(first: Data, device: torch.device) -> tuple[int, bool]:
    """Return how many data sets to walk over, and whether that keeps them out of the cache."""
    if device.type != "cuda":
        return 2, False
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size or CACHE_BYTES
    wanted = -(-3 * cache_bytes // first.num_bytes)
    return max(2, min(MAX_SETS, wanted)), wanted <= MAX_SETS


def clock(call: Callable[[int], object], num_sets: int, device: torch.device) -> list[float]:
    """Return samples of the time of one call."""
    ticks = (GraphClock if device.type == "cuda" else HostClock)(call, num_sets)
    return [ticks.sample() for _ in range(SAMPLES)]


def timed_bmm(shape: str, heads: int, tokens: int, device: torch.device) -> float:
    """Return the time of `torch.bmm` on bf16 weights."""
    make = draw(shape, heads, tokens, device)
    first = make("bf16")
    num_sets, _ = sets_for(first, device)
    sets = [first, *(make("bf16") for _ in range(num_sets - 1))]

    def call(i: int) -> torch.Tensor:
        data = sets[i]
        x, w, y = data.x.transpose(0, 1), data.w.transpose(1, 2), data.y.transpose(0, 1)
        return torch.bmm(x, w, out=y)

    return summarise(clock(call, num_sets, device)).median


def measured(
    shape: str,
    heads: int,
    tokens: int,
    weights: str,
    config: str,
    device: torch.device,
    ceiling: float,
    bmm_us: float,
) -> Result:
    """Check one case and time it."""
    tiles = {}
    for item in filter(None, config.split(",")):
        name, _, value = item.partition("=")
        tiles[name] = int(value)
    make = draw(shape, heads, tokens, device)
    first = make(weights)
    error = relative_l2(first.call(tiles), first.expected())
    assert error <= LIMIT, f"wrong: relative L2 error {error:.2e}; not timed"
    num_sets, is_cold = sets_for(first, device)
    sets = [first, *(make(weights) for _ in range(num_sets - 1))]
    summary = summarise(clock(lambda i: sets[i].call(tiles), num_sets, device))
    gbps = first.weight_bytes / summary.median * 1e-3
    return Result(
        shape,
        heads,
        tokens,
        weights,
        config,
        first.num_bytes,
        first.weight_bytes,
        num_sets,
        is_cold,
        error,
        summary.median,
        summary.p10,
        summary.p90,
        gbps,
        gbps / ceiling,
        bmm_us,
        bmm_us / summary.median,
    )


if __name__ == "__main__":
    sys.exit(main())
