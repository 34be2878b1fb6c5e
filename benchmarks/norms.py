"""How fast both latents of a layer are normed and the query's quantised, or the key written too.

    python benchmarks/norms.py                              one table, on the GPU at hand
    python benchmarks/norms.py --tokens 1 4096 --kinds per_1x128 --residual --json norms.json
    python benchmarks/norms.py --layouts bf16 fp8_ds656     with RoPE and the cache write behind

Latents are bf16, 1536 and 512 wide, slices of one tensor [tokens, 2112] as a projection makes it.
A call is checked against the fp64 norm before it is timed. What is timed are replays of a CUDA
graph with one call for each data set; the sets own disjoint memory and together exceed the
last-level cache three times, unless there would be more than ``MAX_SETS``: then the column ``cold``
says no. ``bytes`` counts what is read and written, each once, without the weights, and ``share``
their rate over the best that this device reads or copies at. ``torch`` is the same with
`torch.nn.functional.rms_norm` and a quantiser of five operations, in the same kind of graph.

With ``--layouts`` a call is `fused_kv_norm_rope_write_kv_cache`, which also rotates 64 columns of
key and writes it with the normed latent to a cache of that layout, slots and positions being
random, pages of 64 tokens or as many as the layout needs. Then ``apart`` takes the place of
``torch``: `fused_qk_rmsnorm` into a tensor, then `fused_qk_rope_write_kv_cache` without queries.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import tables
import torch

from mla_core import LatentCache, MLADims, layouts
from mla_core.bench.timing import GraphClock, HostClock, summarise
from mla_core.reference import quant
from mla_core.reference.norm import rms_norm
from mla_core.reference.rope import rope
from mla_core.testing.assertions import relative_l2
from mla_fusions import (
    fused_kv_norm_rope_write_kv_cache,
    fused_qk_rmsnorm,
    fused_qk_rope_write_kv_cache,
)

Q, K, ROPE, EPS, POSITIONS = 1536, 512, 64, 1e-6, 8192
#: Elements of a group of each quantiser, and the largest relative L2 error that it explains.
KINDS = {"No": (0, 5e-3), "per_Token": (Q, 5e-2), "per_1x128": (128, 5e-2), "per_1x32": (32, 2e-1)}
#: Largest relative L2 error of a cached key; fp4 has three bits.
KEY_ERROR, KEY_ERROR_FP4 = 5e-2, 2e-1
TOKENS = (1, 16, 128, 1024, 4096, 16384)
MAX_SETS = 512
SAMPLES = 9


COLUMNS: tuple[tables.Column, ...] = (
    ("kind", "<10", "kind"),
    ("layout", "<16", "layout"),
    ("tokens", ">6", "tokens"),
    *tables.BYTES,
    tables.ERROR,
    *tables.TIMES,
    tables.RATE,
    tables.SHARE,
    ("torch us", ">9.2f", "torch_us"),
    ("apart us", ">9.2f", "apart_us"),
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    kind: str
    layout: str
    tokens: int
    has_residual: bool
    bytes: int
    num_sets: int
    is_cold: bool
    error: float
    median_us: float
    p10_us: float
    p90_us: float
    gbps: float
    share: float
    torch_us: float | None
    apart_us: float | None


class Data:
    """One data set: two latents, weights, and everything that is written.

    ``layout`` is "" for norms alone.
    """

    def __init__(
        self,
        kind: str,
        layout: str,
        tokens: int,
        has_residual: bool,
        device: torch.device,
        seed: int,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator).bfloat16()

        def empty(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(tokens, columns, dtype=dtype, device=device)

        both = draw(tokens, Q + K + ROPE)
        self.kind, self.q, self.k = kind, both[:, :Q], both[:, Q : Q + K]
        self.q_weight, self.k_weight = draw(Q), draw(K)
        self.residual = draw(tokens, Q) if has_residual else None
        self.kept = empty(Q, torch.bfloat16) if has_residual else None
        self.k_out = empty(K, torch.bfloat16)
        group, self.scales = KINDS[kind][0], None
        match kind:
            case "No":
                self.out = empty(Q, torch.bfloat16)
            case "per_1x32":
                self.out = empty(Q // 2, torch.uint8)
                self.scales = empty(Q // group, torch.uint8)
            case _:
                self.out = empty(Q, torch.float8_e4m3fn)
                self.scales = empty(Q // group, torch.float32)
        self.cache: LatentCache | None = None
        if not layout:
            return
        arrangement = layouts.get(layout)
        page_size = max(64, arrangement.page_multiple)
        num_pages = -(-tokens // page_size)
        scale = torch.full((1,), 0.02, device=device) if arrangement.needs_scale else None
        self.cache = LatentCache.allocate(
            arrangement, MLADims(1), num_pages, page_size, device=device, scale=scale
        )
        self.row, self.k_pe = both[:, Q:], both[:, Q + K :]
        slots = torch.randperm(num_pages * page_size, device=device, generator=generator)
        self.slots = slots[:tokens].clone()
        self.positions = torch.randint(POSITIONS, (tokens,), device=device, generator=generator)
        self.tables = draw(POSITIONS, ROPE // 2), draw(POSITIONS, ROPE // 2)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call must move."""
        tensors = [self.q, self.residual, self.kept, self.out, self.scales]
        rest = 0
        if self.cache is None:
            tensors += [self.k, self.k_out]
        else:
            tensors += [self.row, self.slots, self.positions]
            turned = sum(table.shape[1] * table.element_size() for table in self.tables)
            live = self.cache.layout.live_bytes_per_token(self.cache.dims)
            rest = (turned + live) * len(self.slots)
        return rest + sum(
            each.numel() * each.element_size() for each in tensors if each is not None
        )

    def call(self) -> torch.Tensor:
        """Norm and quantise, and rotate and write."""
        if self.cache is not None:
            is_quantised = self.scales is not None
            fused_kv_norm_rope_write_kv_cache(
                *(self.row, None, self.k_weight, self.cache, self.slots, self.positions),
                *self.tables,
                is_neox=False,
                kv_epsilon=EPS,
                q=self.q,
                q_weight=self.q_weight,
                q_out_unquantized=None if is_quantised else self.out,
                q_out_quantized=self.out if is_quantised else None,
                q_out_scale=self.scales,
                q_residual=self.residual,
                q_res_out=self.kept,
                group_size=None if self.kind == "per_Token" else KINDS[self.kind][0] or None,
            )
            return self.out
        return self.normed()

    def apart(self) -> torch.Tensor:
        """Do the same in two launches."""
        assert self.cache is not None
        self.normed()
        # No heads.
        q_nope, q_pe = self.k[:, None, :][:, :0], self.k_pe[:, None, :][:, :0]
        fused_qk_rope_write_kv_cache(
            *(q_nope, q_pe),
            *(self.k_out, self.k_pe, self.cache, self.slots, self.positions, *self.tables),
            is_neox=False,
        )
        return self.out

    def normed(self) -> torch.Tensor:
        """Norm and quantise alone."""
        fused_qk_rmsnorm(
            self.out, self.scales, self.q, self.q_weight, EPS, None, self.k_out, self.kept,
            self.k, self.k_weight, EPS, self.residual, quant_type=self.kind,
        )  # fmt: skip
        return self.out

    def in_torch(self) -> torch.Tensor:
        """Do the same in torch; not for MXFP4."""
        norm, q = torch.nn.functional.rms_norm, self.q
        if self.residual is not None:
            q = torch.add(q, self.residual, out=self.kept)
        self.k_out.copy_(norm(self.k, (K,), self.k_weight, EPS))
        y = norm(q, (Q,), self.q_weight, EPS)
        if self.scales is None:
            return self.out.copy_(y)
        groups = y.view(y.shape[0], self.scales.shape[1], -1).float()
        torch.div(groups.abs().amax(-1), 448, out=self.scales)
        return self.out.copy_((groups / self.scales[..., None]).flatten(1))

    def error(self) -> float:
        """Return the relative L2 error of the query's norm, and assert the rest."""
        expected, _ = rms_norm(self.q, self.q_weight, EPS, residual=self.residual)
        keys, _ = rms_norm(self.k, self.k_weight, EPS)
        if self.cache is None:
            assert relative_l2(self.k_out, keys) < 5e-3, "wrong keys; not timed"
        else:
            turned = rope(self.k_pe, self.positions, *self.tables, is_neox=False)
            is_fp4 = self.cache.layout.kv_dtype.startswith("fp4")
            for got, wanted in zip(self.cache.read(self.slots), (keys, turned), strict=True):
                limit = KEY_ERROR_FP4 if is_fp4 else KEY_ERROR
                assert relative_l2(got, wanted) < limit, "wrong keys; not timed"
        if self.scales is None:
            return relative_l2(self.out, expected)
        if self.kind == "per_1x32":
            return relative_l2(quant.dequantize_mxfp4(self.out, self.scales), expected)
        return relative_l2(quant.dequantize_groups(self.out, self.scales), expected)


def main() -> int:
    """Print the table; return 1 when a result was wrong."""
    parser = tables.parser(__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    named = ["", *(name for name in layouts.names() if layouts.get(name).only is None)]
    parser.add_argument("--layouts", nargs="+", default=[""], choices=named, metavar="LAYOUT")
    parser.add_argument("--residual", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    ceiling = tables.introduce(device)
    cases = itertools.product(options.kinds, options.layouts, options.tokens)
    return tables.fill(
        COLUMNS,
        cases,
        lambda *case: measured(*case, options.residual, device, ceiling),
        options.json,
    )


def measured(
    kind: str,
    layout: str,
    tokens: int,
    has_residual: bool,
    device: torch.device,
    ceiling: float,
) -> Result:
    """Check one case and time it."""
    is_gpu = device.type == "cuda"
    first = Data(kind, layout, tokens, has_residual, device, 0)
    first.call()
    error, num_bytes = first.error(), first.num_bytes
    assert error <= KINDS[kind][1], f"wrong: relative L2 error {error:.2e}; not timed"
    wanted = 2
    if is_gpu:
        wanted = -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // num_bytes)
    num_sets = max(2, min(MAX_SETS, wanted))
    seeds = range(1, num_sets)
    sets = [first, *(Data(kind, layout, tokens, has_residual, device, seed) for seed in seeds)]

    def clock(call: Callable[[int], object]) -> list[float]:
        ticks = (GraphClock if is_gpu else HostClock)(call, num_sets)
        return [ticks.sample() for _ in range(SAMPLES)]

    summary = summarise(clock(lambda i: sets[i].call()))
    rival = apart = None
    if layout:
        apart = summarise(clock(lambda i: sets[i].apart())).median
    elif kind != "per_1x32":
        rival = summarise(clock(lambda i: sets[i].in_torch())).median
    gbps = num_bytes / summary.median * 1e-3
    return Result(
        kind,
        layout,
        tokens,
        has_residual,
        num_bytes,
        num_sets,
        is_gpu and num_sets >= wanted,
        error,
        summary.median,
        summary.p10,
        summary.p90,
        gbps,
        gbps / ceiling,
        rival,
        apart,
    )


if __name__ == "__main__":
    sys.exit(main())
