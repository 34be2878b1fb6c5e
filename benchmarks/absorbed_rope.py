"""How fast W_UK is absorbed while RoPE is applied and keys are written, in one launch or in more.

    python benchmarks/absorbed_rope.py                       one table, on the GPU at hand
    python benchmarks/absorbed_rope.py --tokens 1 64 --heads 128 --weights fp8 mxfp4
    python benchmarks/absorbed_rope.py --json absorbed_rope.json

Widths of DeepSeek-V3, bf16 activations and cache, NeoX pairs. Before it is timed a call is checked
against fp64 over the dequantised weights, and its rotated part and cache against the op that does
these alone. What is timed are replays of a CUDA graph with one call for each data set; the sets own
disjoint memory and together exceed the last-level cache three times, unless there would be more
than ``MAX_SETS``: then the column ``cold`` says no. In the same run:

- ``product``: the product of ``mla_fusions`` alone, with the same weights, and ``over`` the time of
  the one launch over it
- ``two``: `torch.bmm` on bf16 weights, and the op that rotates, joins and writes
- ``three``: `torch.bmm`, RoPE and the cache write in torch's own operations
- ``speedup``: the time of ``three`` over that of the one launch
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import tables
import torch

import mla_fusions
from mla_core.bench.timing import GraphClock, HostClock, summarise
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import relative_l2

P, C, R = 128, 512, 64
WEIGHTS = ("bf16", "fp8", "mxfp4", "mxfp4-wide", "nvfp4")
TOKENS = (1, 4, 16, 64)
HEADS = (16, 128)
MAX_SETS = 256
SAMPLES = 9
#: Relative L2 error that rounding the result to bf16 explains.
LIMIT = 5e-3

a8w8 = mla_fusions.batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant


COLUMNS: tuple[tables.Column, ...] = (
    ("heads", ">5", "heads"),
    ("tokens", ">6", "tokens"),
    ("weights", "<10", "weights"),
    ("bytes", ">9", "weight_bytes"),
    ("cold", ">4", "is_cold"),
    tables.ERROR,
    *tables.TIMES,
    ("product", ">8.2f", "product_us"),
    ("over", ">5.2f", "over"),
    ("two", ">8.2f", "two_us"),
    ("three", ">8.2f", "three_us"),
    ("speedup", ">7.2f", "speedup"),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    heads: int
    tokens: int
    weights: str
    weight_bytes: int
    num_sets: int
    is_cold: bool
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    product_us: float
    over: float
    two_us: float
    three_us: float
    speedup: float


class Data:
    """One data set, with weights in one form and in bf16."""

    def __init__(self, heads: int, tokens: int, weights: str, device: torch.device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator)

        self.weights = weights
        q, k = draw(tokens, heads, P + R).bfloat16(), draw(tokens, 1, C + R).bfloat16()
        self.q_nope, self.q_pe = q[..., :P].transpose(0, 1), q[..., P:]
        self.k_nope, self.k_rope = k[..., :C], k[..., C:]
        w = draw(heads, C, P) / P**0.5
        self.plain = w.bfloat16()
        match weights:
            case "bf16":
                self.w: tuple[torch.Tensor, ...] = (self.plain,)
            case "fp8":
                self.w = w.to(torch.float8_e4m3fn), torch.full((1,), 0.5, device=device)
            case "nvfp4":
                self.w = quant.quantize_nvfp4(w)
            case _:
                self.w = quant.quantize_mxfp4(w)
        self.slots = torch.randperm(4 * tokens, device=device, generator=generator)[:tokens]
        self.positions = torch.randint(0, 4096, (tokens,), device=device, generator=generator)
        angles = draw(4096, R // 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.cache = torch.zeros(4 * tokens, 1, C + R, dtype=torch.bfloat16, device=device)
        self.q_out = torch.empty(tokens, heads, C + R, dtype=torch.bfloat16, device=device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.w)

    def one(self) -> torch.Tensor:
        """Call the op that does all."""
        rest = (
            self.q_pe, self.k_nope, self.k_rope, self.cache, self.slots, self.positions,
            self.cos, self.sin,
        )  # fmt: skip
        match self.weights:
            case "bf16":
                call, named = mla_fusions.fused_bf16_bmm_rope_cat_and_cache_mla, {}
            case "fp8":
                call, named = mla_fusions.fused_fp8_bmm_rope_cat_and_cache_mla, {}
            case "nvfp4":
                call, named = mla_fusions.fused_nvfp4_bmm_rope_cat_and_cache_mla, {}
            case _:
                call = mla_fusions.fused_fp4_bmm_rope_cat_and_cache_mla
                named = {"prequant": self.weights == "mxfp4"}
        return call(self.q_nope, *self.w, *rest, is_neox=True, **named)[0]

    def product(self) -> torch.Tensor:
        """Multiply alone, into the same place."""
        x, y = self.q_nope, self.q_out[..., :C]
        match self.weights:
            case "bf16":
                return mla_fusions.batched_gemm_bf16(x, *self.w, YQ=y, transpose_bm=True)
            case "fp8":
                return a8w8(x, *self.w, YQ=y, transpose_bm=True)
            case "nvfp4":
                return mla_fusions.batched_gemm_a16wnvfp4(x, *self.w, y=y, transpose_bm=True)
        return mla_fusions.batched_gemm_a16wfp4(
            x, *self.w, y=y, transpose_bm=True, prequant=self.weights == "mxfp4"
        )

    def bmm(self) -> torch.Tensor:
        """Multiply with bf16 weights in torch."""
        return torch.bmm(self.q_nope, self.plain.transpose(1, 2))

    def two(self) -> torch.Tensor:
        """Multiply in torch; rotate, join and write in one launch."""
        latent = self.bmm().transpose(0, 1)
        return mla_fusions.fused_qk_rope_cat_and_cache_mla(
            latent, self.q_pe, self.k_nope, self.k_rope, self.cache, self.slots, self.positions,
            self.cos, self.sin, None, True, q_out=self.q_out,
        )[0]  # fmt: skip

    def three(self) -> torch.Tensor:
        """Do it all in torch's operations."""
        self.q_out[..., :C].copy_(self.bmm().transpose(0, 1))
        cos, sin = self.cos[self.positions][:, None], self.sin[self.positions][:, None]
        turned = []
        for x in (self.q_pe, self.k_rope):
            a, b = x.float().chunk(2, dim=-1)
            turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
        self.q_out[..., C:].copy_(turned[0])
        row = torch.cat([self.k_nope, turned[1].bfloat16()], dim=-1)
        self.cache.index_copy_(0, self.slots, row)
        return self.q_out

    def error(self) -> float:
        """Return the relative L2 error of the absorbed part, and assert the rest."""
        got, x, turns = self.one(), self.q_nope, {"transpose_out": True}
        written = self.cache.clone()
        match self.weights:
            case "bf16":
                expected = gemm.batched_gemm(x, *self.w, **turns)
            case "fp8":
                expected = gemm.batched_gemm_a8w8(x, *self.w, **turns)
            case "nvfp4":
                expected = gemm.batched_gemm(x, quant.dequantize_nvfp4(*self.w), **turns)
            case "mxfp4":
                expected = gemm.batched_gemm_mxfp4(x, *self.w, **turns)
            case _:
                expected = gemm.batched_gemm(x, quant.dequantize_mxfp4(*self.w), **turns)
        self.cache.zero_()
        other = self.two()
        assert torch.equal(got[..., C:], other[..., C:]), "wrong rotation; not timed"
        assert torch.equal(written, self.cache), "wrong cache; not timed"
        return relative_l2(got[..., :C], expected)


def main() -> int:
    """Print the table; return 1 when a result was wrong."""
    parser = tables.parser(__doc__)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, choices=WEIGHTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    tables.introduce(device)
    cases = itertools.product(options.heads, options.tokens, options.weights)
    return tables.fill(COLUMNS, cases, lambda *case: measured(*case, device), options.json)


def measured(heads: int, tokens: int, weights: str, device: torch.device) -> Result:
    """Check one case and time it, its contenders on the same data."""
    first = Data(heads, tokens, weights, device, 0)
    error = first.error()
    assert error <= LIMIT, f"wrong: relative L2 error {error:.2e}; not timed"
    is_gpu, wanted = device.type == "cuda", 2
    if is_gpu:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = -(-3 * cache_bytes // first.weight_bytes)
    num_sets = max(2, min(MAX_SETS, wanted))
    sets = [first, *(Data(heads, tokens, weights, device, seed) for seed in range(1, num_sets))]

    def times(call: Callable[[Data], torch.Tensor]) -> list[float]:
        ticks = (GraphClock if is_gpu else HostClock)(lambda i: call(sets[i]), num_sets)
        return [ticks.sample() for _ in range(SAMPLES)]

    ours = summarise(times(Data.one))
    product, two, three = (
        summarise(times(call)).median for call in (Data.product, Data.two, Data.three)
    )
    return Result(
        heads,
        tokens,
        weights,
        first.weight_bytes,
        num_sets,
        is_gpu and num_sets >= wanted,
        error,
        ours.median,
        ours.p10,
        ours.p90,
        product,
        ours.median / product,
        two,
        three,
        three / ours.median,
    )


if __name__ == "__main__":
    sys.exit(main())
