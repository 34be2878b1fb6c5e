"""Measure tile sizes for decode and turn the best into rows of a tuning table.

A row speaks of a bucket, not of the shape that was measured: numbers of query rows, requests and
cached tokens are rounded up to powers of two, and the row holds down to the next lower one, so no
length makes anybody tune again. Each configuration is checked against the truth before it is timed;
data is cold and clocks are those of `mla_core.bench`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mla_core import layouts
from mla_core.arch import arch_of
from mla_core.bench import Event, Settings, rows
from mla_core.bench import run as measure
from mla_core.bench.cases import BenchCase
from mla_core.bench.contenders import Prepared
from mla_core.bench.workload import DecodeWorkload
from mla_core.ops import decode
from mla_core.plan import DecodePlan, plan_decode
from mla_core.testing.poison import poison_
from mla_triton import tuning
from mla_triton.decode import with_config
from mla_triton.tuning import DecodeConfig

#: Pages below this are another bucket: their tokens are fetched one by one.
_WHOLE_PAGES = 16


def round_up(case: BenchCase) -> BenchCase:
    """Return the case at the upper corner of its bucket, which is the one to measure.

    Heads and query tokens stay, since only their product has a bucket.
    """
    return replace(
        case, batch_size=_power_of_two(case.batch_size), context=_power_of_two(case.context)
    )


def bucket(case: BenchCase) -> dict[str, object]:
    """Return the ``when`` of a row for all shapes in the bucket of a case."""
    is_paged = case.page_size >= _WHOLE_PAGES
    layout = layouts.get(case.layout)
    return {
        "q_dtype": case.q_dtype,
        "kv_dtype": layout.kv_dtype,
        "layout": layout.family,
        "kv_lora_rank": case.dims.kv_lora_rank,
        "page_size": {"min": _WHOLE_PAGES} if is_paged else {"max": _WHOLE_PAGES - 1},
        "num_rows": _range(case.num_heads * case.q_len),
        "batch_size": _range(case.batch_size),
        "kv_len": _range(case.context),
    }


def candidates(arch: str, case: BenchCase) -> list[DecodeConfig]:
    """Return what is worth trying on an architecture: the table's choice, and its neighbours."""
    num_rows = case.num_heads * case.q_len
    widest = min(64, max(16, _power_of_two(num_rows)))
    if arch.startswith("gfx"):
        # More rows do not fit the registers, and more stages not the shared memory.
        tiles = [(16, n, warps, 1, 1) for n in (16, 32, 64) for warps in (4, 8)]
    elif arch == "cpu":
        tiles = [(m, 64, 1, 1, 1) for m in (16, 64)]
    else:
        tiles = [
            (m, n, warps, stages, programs)
            for m in {widest, max(16, widest // 2)}
            for n in (32, 64)
            for warps in (4, 8)
            for stages in (2, 3)
            for programs in (1, 2)
        ]
    return [DecodeConfig(*tile) for tile in sorted(tiles)]


@dataclass(frozen=True, slots=True)
class TileContender:
    """The portable decode kernel with one configuration, as `mla_core.bench` measures it."""

    config: DecodeConfig

    @property
    def name(self) -> str:
        """Tile, warps, stages and programs: ``16x64/4/2/1``."""
        c = self.config
        return f"{c.BLOCK_M}x{c.BLOCK_N}/{c.num_warps}/{c.num_stages}/{c.programs_per_sm}"

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """Plan once; outputs start as NaN, so that an unwritten element fails the check."""
        plan = self._plan(workload)
        shape = (workload.q.shape[0], workload.dims.num_heads, workload.dims.value_dim)
        outs = [
            poison_(torch.empty(shape, dtype=workload.out_dtype, device=workload.device))
            for _ in workload.kvs
        ]

        def call(i: int) -> torch.Tensor:
            decode(
                workload.ql_nope,
                workload.q_pe,
                workload.kvs[i],
                plan,
                sm_scale=workload.dims.sm_scale,
                out=outs[i],
                q_scale=workload.q_scale,
            )
            return outs[i]

        splits = f"num_kv_splits={plan.num_kv_splits}"
        return Prepared(kernel=f"{plan.schedule.kernel} {splits}", step=call, replay=call)

    def _plan(self, workload: DecodeWorkload) -> DecodePlan:
        plan = plan_decode(
            workload.dims,
            workload.qo_indptr,
            workload.kvs[0],
            q_dtype=workload.q.dtype,
            total_q=workload.q.shape[0],
            max_seqlen_q=workload.case.q_len,
            max_seqlen_k=max(workload.kv_lens),
            backend="triton",
        )
        return with_config(plan, self.config)


def tune(
    cases: Iterable[BenchCase], configs: Sequence[DecodeConfig] | None, settings: Settings
) -> Iterator[Event | dict[str, object]]:
    """Measure each case; yield an event for each configuration, then the row for the bucket.

    No row comes of a case in which no configuration could be timed. On a GPU, replays of a graph
    decide, since there the host's time does not count.
    """
    arch = arch_of(settings.device)
    for case in distinct(cases):
        tried = [TileContender(config) for config in configs or candidates(arch, case)]
        timed: list[tuple[float, str]] = []
        for event in measure([case], tried, settings):
            yield event
            if event.row is not None and event.graph == settings.graph:
                timed.append((event.row.median_us, event.contender))
        if not timed:
            continue
        timed.sort()
        best = next(one.config for one in tried if one.name == timed[0][1])
        yield {"when": bucket(case)} | asdict(best) | {"source": _source(case, timed, settings)}


def distinct(cases: Iterable[BenchCase]) -> list[BenchCase]:
    """Round cases up, and keep one for each bucket."""
    found = {json.dumps(bucket(case)): round_up(case) for case in cases}
    return list(found.values())


def write(new: Sequence[Mapping[str, object]], path: Path) -> None:
    """Put rows in front of a table, in the place of rows with the same conditions."""
    listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    old = listed["rows"] if isinstance(listed, dict) else listed
    conditions = [row["when"] for row in new]
    kept = [row for row in old if row["when"] not in conditions]
    text = ",\n".join(f"  {json.dumps(row)}" for row in [*new, *kept])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{text}\n]\n", encoding="utf-8")
    # What was written must be readable, and is what the next plan of this process takes.
    tuning.read.cache_clear()
    tuning.read(path)


def _source(case: BenchCase, timed: Sequence[tuple[float, str]], settings: Settings) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in rows.versions().items())
    place = f"{rows.device_name(settings.device)}, {rows.now()}, {versions}"
    shown = ", ".join(f"{name} {microseconds:.1f} us" for microseconds, name in timed[:3])
    return f"{case} on {place}: {shown}"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _range(number: int) -> dict[str, int]:
    """Return the numbers that round up to the same power of two."""
    most = _power_of_two(number)
    return {"min": most // 2 + 1, "max": most}
