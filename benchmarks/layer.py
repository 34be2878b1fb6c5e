"""How fast a layer gets into attention and out of it, fused and in torch.

    python benchmarks/layer.py                               one table, on the GPU at hand
    python benchmarks/layer.py --parts between --tokens 1 64 256 512 1024 --heads 128
    python benchmarks/layer.py --weights plain fp8 mxfp4 --json layer.json

Widths of DeepSeek-V3 in bf16, pages of 64 tokens, half-split pairs; 128 heads are a whole model's,
16 those of one GPU out of eight. The parts:

- ``prologue``: hidden states to absorbed queries and a written cache, with `MLAPrologue`
- ``between``: the same without its two products in cuBLAS, whose results are there already
- ``epilogue``: attention's latents to the input of ``o_proj``, with `MLAEpilogue`

``torch`` is what transformers' modules do, norm by norm and rotation by rotation, with `torch.bmm`
for W_UK and W_UV in bf16 and the same products in cuBLAS, the first two joined as the prologue
joins them. ``one`` absorbs W_UK, rotates and writes in one launch, ``two`` in two; ``us`` is the
time of the one that a prologue takes by itself, and ``speedup`` that of ``torch`` over it.
``--weights`` says how W_UK and W_UV are stored; ``torch`` has bf16 always.

Every contender is checked against fp64 before it is timed. What is timed are replays of a CUDA
graph with one call for each data set; the sets own disjoint memory, weights too, and together
exceed the last-level cache three times, unless there would be more than `cache_writes.MAX_SETS`:
then the column ``cold`` says no. ``bytes`` counts weights, what goes into a part and what comes
out, each once; ``share`` is their rate over the best that this device reads or copies at in the
same run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import tables
import torch
from cache_writes import sets_for
from torch.nn import functional

from mla_core import LatentCache, MLADims
from mla_core.bench.timing import GraphClock, HostClock, Summary, summarise
from mla_core.reference.norm import rms_norm
from mla_core.testing.assertions import relative_l2
from mla_fusions import MLAEpilogue, MLAPrologue, layer

HIDDEN, Q_RANK, RANK, ROPE, NOPE, VALUE = 7168, 1536, 512, 64, 128, 128
EPS, POSITIONS, PAGE_SIZE = 1e-6, 8192, 64
PARTS = ("prologue", "between", "epilogue")
#: Weights, and the largest relative L2 error that storing them so explains.
WEIGHTS = {"plain": 1.5e-2, "fp8": 8e-2, "mxfp4": 2e-1, "nvfp4": 2e-1}
BITS = {"plain": 16, "fp8": 8, "mxfp4": 4.25, "nvfp4": 4.5}
HEADS = (16, 128)
TOKENS = (1, 16, 64, 256, 4096)
#: Hidden states of the part that does not multiply them.
NARROW = 64
#: Tokens of a call that are checked.
CHECKED = 64
SAMPLES = 9


COLUMNS: tuple[tables.Column, ...] = (
    ("part", "<8", "part"),
    ("heads", ">5", "heads"),
    ("tokens", ">6", "tokens"),
    ("weights", "<7", "weights"),
    *tables.BYTES,
    tables.ERROR,
    *tables.TIMES,
    tables.RATE,
    tables.SHARE,
    ("one", ">8.2f", "one_us"),
    ("two", ">8.2f", "two_us"),
    ("torch", ">8.2f", "torch_us"),
    ("speedup", ">7.2f", "speedup"),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    part: str
    heads: int
    tokens: int
    weights: str
    bytes: int
    num_sets: int
    is_cold: bool
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    gbps: float
    share: float
    one_us: float | None
    two_us: float | None
    torch_us: float
    speedup: float


class Data:
    """One data set: a layer's weights, inputs, and everything that is written."""

    def __init__(
        self, part: str, heads: int, tokens: int, weights: str, device: torch.device, seed: int
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.randn(shape, device=device, generator=generator)
            return values.mul_(scale).bfloat16()

        self.part, self.heads, self.tokens, self.weights = part, heads, tokens, weights
        self.dims = MLADims(heads, RANK, ROPE, NOPE, VALUE)
        self.kv_b = draw(heads * (NOPE + VALUE), RANK, scale=RANK**-0.5)
        if part == "epilogue":
            self.latents = draw(tokens, heads, RANK)
            self.epilogue = MLAEpilogue(self.dims, kv_b_proj=self.kv_b, weights=weights)
            return
        hidden = HIDDEN if part == "prologue" else NARROW
        self.x = draw(tokens, hidden)
        self.first = draw(Q_RANK + RANK + ROPE, hidden, scale=hidden**-0.5)
        self.q_norm, self.kv_norm = draw(Q_RANK), draw(RANK)
        self.q_b = draw(heads * (NOPE + ROPE), Q_RANK, scale=Q_RANK**-0.5)
        self.prologue = MLAPrologue(
            self.dims,
            kv_a_proj_with_mqa=self.first[Q_RANK:],
            kv_a_layernorm=self.kv_norm,
            kv_b_proj=self.kv_b,
            q_a_proj=self.first[:Q_RANK],
            q_a_layernorm=self.q_norm,
            q_b_proj=self.q_b,
            q_eps=EPS,
            kv_eps=EPS,
            is_neox=True,
            weights=weights,
        )
        num_pages = -(-tokens // PAGE_SIZE)
        self.cache = LatentCache.allocate("bf16", self.dims, num_pages, PAGE_SIZE, device=device)
        slots = torch.randperm(num_pages * PAGE_SIZE, device=device, generator=generator)
        self.slots = slots[:tokens].clone()
        self.positions = torch.randint(POSITIONS, (tokens,), device=device, generator=generator)
        angles = torch.randn(POSITIONS, ROPE // 2, device=device, generator=generator)
        self.cos, self.sin = angles.cos(), angles.sin()
        # transformers has a column for each element, in the dtype of the model.
        self.wide = [torch.cat((table, table), -1).bfloat16() for table in (self.cos, self.sin)]
        self.q_out = torch.empty(tokens, heads, RANK + ROPE, dtype=torch.bfloat16, device=device)
        self.products: dict[int, torch.Tensor] = {}
        if part == "between":
            self.prepare()

    def prepare(self) -> None:
        """Keep what the products in cuBLAS make, by its width."""
        first = functional.linear(self.x, self.first)
        normed = torch_norm(first[:, :Q_RANK], self.q_norm)
        q = functional.linear(normed, self.q_b)
        self.products = {product.shape[1]: product for product in (first, q)}
        assert len(self.products) == 2, "both products have one width"

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply, or return the product that is there."""
        if self.products:
            return self.products[weight.shape[0]]
        return functional.linear(x, weight, bias)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, of what goes in and of what comes out."""
        absorbed = int(self.heads * RANK * BITS[self.weights] / 8)
        tokens, heads = self.tokens, self.heads
        if self.part == "epilogue":
            return absorbed * VALUE + 2 * tokens * heads * (RANK + VALUE)
        # Slots, positions, rows of both tables, rows of the cache, queries.
        either = absorbed * NOPE + tokens * (16 + 4 * ROPE + 2 * (heads + 1) * (RANK + ROPE))
        if self.part == "between":
            return either + 2 * tokens * (self.first.shape[0] + Q_RANK + heads * (NOPE + ROPE))
        return either + 2 * (self.first.numel() + self.q_b.numel() + self.x.numel())

    def fused(self, max_joined_tokens: int = layer.MAX_JOINED_TOKENS) -> torch.Tensor:
        """Run the part in our launches."""
        if self.part == "epilogue":
            return self.epilogue(self.latents)
        self.prologue.max_joined_tokens = max_joined_tokens
        with mock.patch.object(layer, "functional", self):
            return self.prologue(
                self.x, self.cache, self.slots, self.positions, self.cos, self.sin, q_out=self.q_out
            )

    def one(self) -> torch.Tensor:
        """Absorb, rotate and write in one launch."""
        return self.fused(self.tokens)

    def two(self) -> torch.Tensor:
        """Absorb in one launch; rotate and write in another."""
        return self.fused(0)

    def in_torch(self) -> torch.Tensor:
        """Run the part as transformers' modules would."""
        heads = self.kv_b.unflatten(0, (self.heads, -1))
        if self.part == "epilogue":
            values = torch.bmm(self.latents.transpose(0, 1), heads[:, NOPE:].transpose(1, 2))
            return values.transpose(0, 1).reshape(self.tokens, -1)
        first = self.linear(self.x, self.first)
        q_first, kv_c, k_pe = first.split((Q_RANK, RANK, ROPE), -1)
        q = self.linear(torch_norm(q_first, self.q_norm), self.q_b)
        q_nope, q_pe = q.view(self.tokens, self.heads, -1).split((NOPE, ROPE), -1)
        cos, sin = (table[self.positions] for table in self.wide)
        row = torch.cat((torch_norm(kv_c, self.kv_norm), torch_rotated(k_pe, cos, sin)), -1)
        self.cache.rows().view(-1, RANK + ROPE).index_copy_(0, self.slots, row)
        latent = torch.bmm(q_nope.transpose(0, 1), heads[:, :NOPE]).transpose(0, 1)
        return torch.cat((latent, torch_rotated(q_pe, cos[:, None], sin[:, None])), -1)

    def expected(self) -> list[torch.Tensor]:
        """Return what the first tokens' results are in fp64: queries and rows, or values."""
        n, heads = min(self.tokens, CHECKED), self.kv_b.double().unflatten(0, (self.heads, -1))
        if self.part == "epilogue":
            return [torch.einsum("thc,hvc->thv", self.latents[:n].double(), heads[:, NOPE:])]
        first = self.x[:n].double() @ self.first.double().T
        normed = rms_norm(first[:, :Q_RANK], self.q_norm, EPS)[0].double()
        kv_c = rms_norm(first[:, Q_RANK:-ROPE], self.kv_norm, EPS)[0].double()
        q = (normed @ self.q_b.double().T).view(n, self.heads, -1)
        cos, sin = (table[self.positions[:n]].double() for table in (self.cos, self.sin))
        latent = torch.einsum("thp,hpc->thc", q[..., :NOPE], heads[:, :NOPE])
        q_pe = rotated(q[..., NOPE:], cos[:, None], sin[:, None])
        k_pe = rotated(first[:, -ROPE:], cos, sin)
        return [torch.cat((latent, q_pe), -1), torch.cat((kv_c, k_pe), -1)]

    def error(self, call: Callable[[Data], torch.Tensor]) -> float:
        """Return the largest relative L2 error of a contender's results."""
        results = [call(self)[:CHECKED]]
        if self.part != "epilogue":
            rows = self.cache.rows().view(-1, RANK + ROPE)
            results.append(rows[self.slots[:CHECKED]])
            rows.zero_()
        if self.part == "between":
            # The norm of the latents was in place.
            self.prepare()
        pairs = zip(results, self.expected(), strict=True)
        return max(relative_l2(ours.reshape(theirs.shape), theirs) for ours, theirs in pairs)


def torch_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Norm as DeepseekV3RMSNorm does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def torch_rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as transformers' ``apply_rotary_pos_emb`` does."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate half-split pairs with a column for each."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def main() -> int:
    """Print the table; return 1 when a result was wrong."""
    parser = tables.parser(__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--heads", nargs="+", type=int, default=HEADS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--weights", nargs="+", default=["plain", "fp8"], choices=list(WEIGHTS))
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(options.parts, options.heads, options.tokens, options.weights)
    return tables.fill(COLUMNS, cases, lambda *case: measured(*case, device, ceiling), options.json)


def measured(
    part: str, heads: int, tokens: int, weights: str, device: torch.device, ceiling: float
) -> Result:
    """Check one case and time it, its contenders on the same data and in turns."""
    calls: dict[str, Callable[[Data], torch.Tensor]] = {"fused": Data.fused, "torch": Data.in_torch}
    if part != "epilogue":
        calls = {"one": Data.one, "two": Data.two, "torch": Data.in_torch}
    first = Data(part, heads, tokens, weights, device, 0)
    errors = {}
    for name, call in calls.items():
        errors[name] = first.error(call)
        limit = WEIGHTS["plain" if name == "torch" else weights]
        assert errors[name] <= limit, (
            f"{name} is wrong: relative L2 error {errors[name]:.2e}; not timed"
        )
    num_sets, is_cold = sets_for(first.num_bytes, device)
    seeds = range(1, num_sets)
    sets = [first, *(Data(part, heads, tokens, weights, device, seed) for seed in seeds)]
    clock = GraphClock if device.type == "cuda" else HostClock
    clocks = {
        name: clock(lambda i, call=call: call(sets[i]), num_sets) for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SAMPLES):
        for name, ticks in clocks.items():
            samples[name].append(ticks.sample())
    times: dict[str, Summary] = {name: summarise(each) for name, each in samples.items()}
    chosen = "fused"
    if part != "epilogue":
        # As the prologue would choose by itself.
        chosen = "one" if tokens <= layer.MAX_JOINED_TOKENS else "two"
    ours = times[chosen]
    gbps = first.num_bytes / ours.median * 1e-3
    medians = {name: summary.median for name, summary in times.items()}
    return Result(
        part,
        heads,
        tokens,
        weights,
        first.num_bytes,
        num_sets,
        is_cold,
        errors[chosen],
        ours.median,
        ours.p10,
        ours.p90,
        gbps,
        gbps / ceiling,
        medians.get("one"),
        medians.get("two"),
        medians["torch"],
        medians["torch"] / ours.median,
    )


if __name__ == "__main__":
    sys.exit(main())
