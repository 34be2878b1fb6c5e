"""Sweep the Triton decode kernel's configurations on the GPU at hand.

    python tools/tune_decode.py                       every case
    python tools/tune_decode.py --cases h16/q1/b128/s8192 --out tuned.jsonl

Each configuration is checked against fp32 attention on the same data before it is timed. Times are
CUDA-graph replays of the whole call (kernel and merge) over disjoint page sets larger than the L2
cache. Prints one line for each configuration, best last, and appends JSON lines to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.ops import decode
from mla_core.plan import DecodePlan, plan_decode
from mla_core.testing.assertions import relative_l2
from mla_triton.decode import with_config
from mla_triton.tuning import DecodeConfig

CASES = (
    "h16/q1/b128/s8192",
    "h16/q1/b64/s4096",
    "h16/q1/b16/s4096",
    "h16/q1/b1/s1024",
    "h16/q4/b128/s4096",
    "h32/q1/b64/s4096",
    "h64/q1/b128/s4096",
    "h128/q1/b128/s8192",
    "h128/q1/b64/s4096",
    "h128/q1/b16/s4096",
    "h128/q1/b1/s4096",
)
ROTATED_BYTES = 160 * 2**20
PAGE_SIZE = 64


def configurations(num_rows: int) -> Iterator[DecodeConfig]:
    """Yield what is worth trying for a number of query rows."""
    block_m = min(64, max(16, 1 << (num_rows - 1).bit_length()))
    tried = {
        16: ((64, 4, 2, 2), (64, 4, 3, 1), (64, 8, 2, 2), (32, 4, 3, 3), (32, 4, 4, 2)),
        32: ((64, 4, 2, 2), (64, 8, 3, 1), (32, 4, 3, 2), (32, 4, 4, 2)),
        64: ((64, 8, 2, 1), (32, 8, 3, 1), (32, 8, 4, 1), (64, 4, 2, 1)),
    }
    for block_n, warps, stages, programs_per_sm in tried[block_m]:
        yield DecodeConfig(block_m, block_n, warps, stages, programs_per_sm)


class Case:
    """One shape with its data and page sets."""

    def __init__(self, name: str) -> None:
        heads, q_len, batch, context = (int(part[1:]) for part in name.split("/"))
        self.name, self.q_len, self.batch, self.context = name, q_len, batch, context
        self.dims = MLADims(heads)
        pages = -(-context // PAGE_SIZE)
        kv_bytes = batch * context * self.dims.latent_dim * 2
        self.num_sets = max(1, min(64, ROTATED_BYTES // kv_bytes))
        num_pages = batch * pages * self.num_sets
        cache = LatentCache.allocate("bf16", self.dims, num_pages, PAGE_SIZE, device="cuda")
        cache.rows().normal_()
        tables = torch.randperm(num_pages, device="cuda").int().view(self.num_sets, batch, pages)
        lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.kv = [PagedKV.from_block_table(cache, table, lens) for table in tables]
        self.qo_indptr = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * q_len
        shape = (batch * q_len, heads, self.dims.latent_dim)
        self.q = torch.randn(shape, device="cuda").bfloat16()
        self.out = torch.empty(shape[0], heads, self.dims.value_dim, device="cuda").bfloat16()
        self.kv_bytes = kv_bytes
        self.flops = 2 * batch * q_len * heads * (self.dims.latent_dim + 512) * context
        self.plan = plan_decode(self.dims, self.qo_indptr, self.kv[0], backend="triton")
        self.expected = self.attend_fp32()

    def attend_fp32(self) -> torch.Tensor:
        """Attend in fp32 with plain matmuls, one request at a time."""
        out = torch.empty_like(self.out, dtype=torch.float32)
        slots = self.kv[0].token_slots()
        visible = torch.ones(self.q_len, self.context, dtype=torch.bool, device="cuda").tril(
            self.context - self.q_len
        )
        for b in range(self.batch):
            rows = self.kv[0].cache.rows().flatten(0, 1)[slots[b]].float()
            tokens = slice(b * self.q_len, (b + 1) * self.q_len)
            scores = torch.einsum("qhd,kd->hqk", self.q[tokens].float(), rows) * self.dims.sm_scale
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            out[tokens] = torch.einsum("hqk,kd->qhd", weights, rows[:, :512])
        return out

    def run(self, plan: DecodePlan, kv: PagedKV) -> None:
        """Decode one step."""
        rank = self.dims.kv_lora_rank
        q_nope, q_pe = self.q[..., :rank], self.q[..., rank:]
        decode(q_nope, q_pe, kv, plan, sm_scale=self.dims.sm_scale, out=self.out)

    def measure(self, plan: DecodePlan, samples: int) -> tuple[float, float]:
        """Return the median time of a step in microseconds and the relative L2 error."""
        self.out.fill_(float("nan"))
        self.run(plan, self.kv[0])
        error = relative_l2(self.out, self.expected)
        if not error < 1e-2:
            raise AssertionError(f"wrong result, relative L2 error {error:.3g}")
        graph = torch.cuda.CUDAGraph()
        repeats = max(1, 16 // self.num_sets)
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for kv in self.kv:
                    self.run(plan, kv)
        graph.replay()
        times = []
        for _ in range(samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / (repeats * self.num_sets))
        return float(torch.tensor(times).median()), error


def sweep(name: str, samples: int, splits: list[int]) -> list[dict[str, object]]:
    """Measure every configuration of a case; failures are printed, not hidden."""
    from triton.runtime.errors import OutOfResources

    case = Case(name)
    rows: list[dict[str, object]] = []
    for config in configurations(case.dims.num_heads * case.q_len):
        automatic = with_config(case.plan, config).num_kv_splits
        for num_kv_splits in sorted({automatic, *splits}):
            label = f"{name} {config.launch} splits={num_kv_splits}"
            plan = with_config(case.plan, config, num_kv_splits)
            try:
                microseconds, error = case.measure(plan, samples)
            except (OutOfResources, AssertionError) as exc:
                print(f"{label}: {str(exc).splitlines()[0]}", flush=True)
                continue
            rows.append(
                {
                    "case": f"decode/bf16/{name}/p{PAGE_SIZE}",
                    "device": torch.cuda.get_device_name(),
                    "num_kv_splits": num_kv_splits,
                    "is_automatic": num_kv_splits == automatic,
                    **asdict(config),
                    "median_us": round(microseconds, 2),
                    "gbps": round(case.kv_bytes / microseconds / 1e3, 1),
                    "tflops": round(case.flops / microseconds / 1e6, 1),
                    "error": error,
                }
            )
    rows.sort(key=lambda row: -float(str(row["median_us"])))
    return rows


def main() -> int:
    """Sweep the asked cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--splits", nargs="*", type=int, default=[], help="also try these")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_decode: needs a GPU", file=sys.stderr)
        return 1
    for name in arguments.cases:
        for row in sweep(name, arguments.samples, arguments.splits):
            print(json.dumps(row), flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
