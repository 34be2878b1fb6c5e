"""Compile decode kernels ahead of time, for GPUs that need not be here.

Writes code objects (cubin for sm90, hsaco for gfx942 and gfx950) and manifest.json, which lists
each kernel with its signature, constants, registers, shared memory, spills and SHA-256. With
MLA_AOT_DIR set to the folder, a process with the same Triton launches these without compiling.

    mla aot --out kernels                                  DeepSeek-V3, one token, page 64
    mla aot --out kernels --arch gfx942 --heads 16 --layout fp8_ds656_fnuz --q-len 1 2
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

from mla_core import layouts
from mla_core.cli.console import make_console, print_table
from mla_core.compiling import TARGETS
from mla_core.dims import MODELS
from mla_core.errors import LayoutError
from mla_core.plan import AttentionOptions
from mla_triton import aot

_FEATURES = ("non_causal", "softcap", "window", "sink", "lse", "batch_invariant", "persistent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--out", type=Path, help="folder to write; without it only the table shows")
    parser.add_argument(
        "--arch", nargs="+", choices=tuple(TARGETS), default=list(TARGETS), metavar="ARCH",
        help=f"among {', '.join(TARGETS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="deepseek-v3", metavar="NAME",
        help=f"dims of a released model: {', '.join(sorted(MODELS))} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=int, nargs="+", metavar="N", help="query heads of a rank (default: all)"
    )
    parser.add_argument("--q-dtype", default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--layout", nargs="+", default=["bf16"], metavar="NAME",
        help=f"cache layouts: {', '.join(layouts.names())} (default: bf16)",
    )  # fmt: skip
    parser.add_argument("--page-size", type=int, nargs="+", default=[64], metavar="N")
    parser.add_argument("--q-len", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument(
        "--features", default="", help=f"comma-separated, all at once: {', '.join(_FEATURES)}"
    )


def run(options: argparse.Namespace) -> int:
    """Compile, write and report; 1 if a kernel spills or passes a limit of its chip."""
    built = aot.build(_cases(options))
    columns = ("arch", "kernel", "registers", "shared", "local", "spills", "serves")
    rows = [
        (
            kernel.arch,
            kernel.name.rpartition(":")[2],
            str(kernel.resources.registers),
            str(kernel.resources.shared_bytes),
            str(kernel.resources.local_bytes),
            str(kernel.resources.spills + kernel.resources.scalar_spills),
            "\n".join(kernel.cases),
        )
        for kernel in built
    ]
    console = make_console()
    print_table(
        console, f"{len(built)} kernels", columns, rows, numbers=columns[2:6], whole=columns[:2]
    )
    if options.out is not None:
        console.print(f"wrote {aot.save(built, options.out)}", markup=False, soft_wrap=True)
    return 1 if any(kernel.resources.excess(kernel.arch) for kernel in built) else 0


def _cases(options: argparse.Namespace) -> Iterator[aot.DecodeCase]:
    """Yield each asked shape with every kernel that its batches may need."""
    asked = {name.strip() for name in options.features.split(",") if name.strip()}
    if unknown := sorted(asked - set(_FEATURES)):
        raise LayoutError(
            f"aot: --features must be among {', '.join(_FEATURES)}, got {', '.join(unknown)}"
        )
    dims = MODELS[options.model]
    attention = AttentionOptions(
        causal="non_causal" not in asked,
        # Values are arguments of the kernel: any stands for all.
        window=1024 if "window" in asked else None,
        softcap=30.0 if "softcap" in asked else 0.0,
    )
    for arch, heads, layout, page_size, q_len in itertools.product(
        options.arch,
        options.heads or [dims.num_heads],
        options.layout,
        options.page_size,
        options.q_len,
    ):
        # One split writes the result itself, more are merged, by kernels for few and many rows and
        # splits; AMD's compiler tells caches from 2 GiB on from smaller ones.
        many = -(-1024 // (heads * q_len))
        schedules: list[tuple[int | None, int]] = [(1, 2), (2, 1), (2, many)]
        if arch == "sm90":
            schedules += [(8, 1), (32, 1), (None, 4)]
        sizes = (False, True) if arch.startswith("gfx") else (False,)
        for (num_kv_splits, batch_size), is_large in itertools.product(schedules, sizes):
            yield aot.DecodeCase(
                arch=arch,
                dims=dims.with_heads(heads),
                q_dtype=options.q_dtype,
                layout=layout,
                page_size=page_size,
                q_len=q_len,
                batch_size=batch_size,
                options=attention,
                has_sink="sink" in asked,
                return_lse="lse" in asked,
                batch_invariant="batch_invariant" in asked,
                num_kv_splits=num_kv_splits,
                is_persistent="persistent" in asked,
                is_ragged=num_kv_splits is None,
                is_large=is_large,
            )
