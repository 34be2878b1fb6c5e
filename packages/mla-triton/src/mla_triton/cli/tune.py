"""Measure tile sizes of the decode kernel on this GPU and write a tuning table.

Every configuration is checked against the truth before it is timed. Shapes are rounded up to
buckets of powers of two, and the rows written hold for whole buckets; they come before the packaged
rows in every later plan that takes this kernel. Widths are those of DeepSeek-V3. On Hopper, kernels
without a table serve most caches (``mla explain`` names them): tune what they leave, such as fp32,
fused RoPE and work lists.

    mla tune                                         a sweep of batches and lengths at 16 heads
    mla tune --heads 128 --batch 64 --context 8192 --layout fp8_ds656
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

from mla_core import layouts
from mla_core.arch import arch_of
from mla_core.bench import Event, Settings
from mla_core.bench.cases import BenchCase
from mla_core.errors import BackendUnavailableError, LayoutError
from mla_triton import tune, tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    many = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--heads", default=[16], **many)  # type: ignore[arg-type]
    parser.add_argument("--q-len", default=[1], **many)  # type: ignore[arg-type]
    parser.add_argument("--batch", default=[1, 16, 128], **many)  # type: ignore[arg-type]
    parser.add_argument("--context", default=[1024, 8192], **many)  # type: ignore[arg-type]
    parser.add_argument("--page-size", default=[64], **many)  # type: ignore[arg-type]
    parser.add_argument("--q-dtype", default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--layout", help=f"cache layout: {', '.join(layouts.names())} (default: the query dtype)"
    )
    parser.add_argument(
        "--tiles", nargs="+", metavar="MxN/WARPS/STAGES/PROGRAMS",
        help="configurations to try, such as 16x64/4/2/1 (default: those worth it on this chip)",
    )  # fmt: skip
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=30, help="most samples of a configuration")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to sample each")
    parser.add_argument("--out", type=Path, help="folder of tables (default: the one plans read)")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be measured")


def run(options: argparse.Namespace) -> int:
    """Measure and write; 1 if some bucket got no row."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError(f"tune: --device {options.device}: torch sees no GPU here")
    configs = [_config(text) for text in options.tiles] if options.tiles else None
    cases = tune.distinct(_cases(options))
    arch = arch_of(device)
    path = (options.out or tuning.user_directory()) / arch / "decode.json"
    if options.dry_run:
        for case in cases:
            tried = [tune.TileContender(each) for each in configs or tune.candidates(arch, case)]
            print(f"{case}: {', '.join(one.name for one in tried)}")
        print(f"{len(cases)} buckets would go to {path}")
        return 0
    settings = Settings(
        device=device,
        graph=device.type == "cuda",
        max_samples=options.samples,
        min_samples=min(5, options.samples),
        seconds=options.seconds,
    )
    found: list[dict[str, object]] = []
    for step in tune.tune(cases, configs, settings):
        if isinstance(step, Event):
            _print(step)
            continue
        found.append(step)
        # After each bucket: a sweep that is broken off keeps what it has.
        tune.write([step], path)
        print(f"  {step['source']}")
    print(f"{len(found)} of {len(cases)} buckets written to {path}")
    return 0 if len(found) == len(cases) else 1


def _cases(options: argparse.Namespace) -> list[BenchCase]:
    return [
        BenchCase(
            "decode",
            options.q_dtype,
            options.layout or options.q_dtype,
            heads,
            q_len,
            batch_size,
            context,
            page_size,
        )
        for heads, q_len, batch_size, context, page_size in itertools.product(
            options.heads, options.q_len, options.batch, options.context, options.page_size
        )
    ]


def _config(text: str) -> tuning.DecodeConfig:
    """Read what `TileContender.name` writes."""
    parts = text.replace("x", "/", 1).split("/")
    if len(parts) != 5 or not all(part.isdecimal() for part in parts):
        raise LayoutError(f"tune: --tiles must be MxN/WARPS/STAGES/PROGRAMS, got {text!r}")
    return tuning.DecodeConfig(*map(int, parts))


def _print(event: Event) -> None:
    mode = " (graph)" if event.graph else ""
    result = f"{event.row.median_us:.1f} us" if event.row is not None else event.detail
    print(f"{event.case} {event.contender}{mode}: {event.outcome} {result}", file=sys.stderr)
