"""The demo's command line: ``mla demo`` and ``python -m mla_core.demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mla_core import demo
from mla_core.errors import MLAError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with command-line arguments; return its exit status (2 for bad ones)."""
    parser = argparse.ArgumentParser(
        prog="mla demo",
        description="Decode real text with a small DeepSeek-V3-shaped model from a paged latent "
        "cache, checking every step against transformers' eager attention.",
    )
    parser.add_argument("--steps", type=int, default=60, help="decode steps")
    parser.add_argument("--requests", type=int, default=6, help="requests served at a time")
    parser.add_argument("--out-dir", default="demo-output", help="where the figure goes")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--backend", help="backends tried in this order, such as triton,reference")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--page-size", type=int, default=16, help="tokens per cache page")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="small", choices=("small", "tiny"))
    parser.add_argument(
        "--prefill",
        default="expanded",
        choices=("expanded", "absorbed"),
        help="prompts run over keys and values of each head, or through decode (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="attention layers run through mla-fusions; needs --prefill absorbed, and on a CPU "
        "TRITON_INTERPRET=1",
    )
    options = parser.parse_args(arguments)
    try:
        return demo.main(**vars(options))
    except MLAError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
