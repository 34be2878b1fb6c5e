"""Say which kernel would serve a problem, and every reason against the others."""

from __future__ import annotations

import argparse

from mla_core import layouts
from mla_core.cli.backends import local_arch
from mla_core.cli.console import make_console, print_table
from mla_core.dims import MODELS, MLADims
from mla_core.errors import LayoutError
from mla_core.problem import FEATURES, OPS, Problem
from mla_core.select import explain

_EXPANDED = "expanded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--op", choices=OPS, default="decode")
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="deepseek-v3", metavar="NAME",
        help=f"dims of a released model: {', '.join(sorted(MODELS))} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--heads", type=int, help="local query heads (default: the model's)")
    parser.add_argument("--q-dtype", default="bf16", help="bf16, fp16, fp32, fp8_e4m3 ...")
    parser.add_argument(
        "--layout", metavar="NAME",
        help=f"cache layout: {', '.join(layouts.names())}; default: the plain one of the query "
        f"dtype; prefill takes none, its keys and values are {_EXPANDED}",
    )  # fmt: skip
    parser.add_argument("--kv-dtype", help="ask for the standard layout of this dtype")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--q-len", type=int, default=1, help="query tokens of one request")
    parser.add_argument("--arch", help="cpu, sm90, gfx942 ... (default: this machine's)")
    parser.add_argument(
        "--features", default="", help=f"comma-separated: {', '.join(FEATURES)}; decode adds lse"
    )
    parser.add_argument("--backend", help="as if passed to the op: this backend or none")


def run(options: argparse.Namespace) -> int:
    """Print the verdicts; 0 if a kernel was found, else 1."""
    problem = _problem(options)
    explanation = explain(problem, options.backend)
    chosen = explanation.chosen
    rows = []
    for verdict in explanation.verdicts:
        answer = "yes" if not verdict.reasons else "no"
        if chosen is not None and verdict.backend == chosen.backend.name:
            answer = "chosen"
        rows.append((verdict.backend, answer, verdict.kernel or "", "\n".join(verdict.reasons)))
    console = make_console()
    columns = ("backend", "verdict", "kernel", "reasons against")
    print_table(console, str(problem), columns, rows, whole=columns[:3])
    if chosen is None:
        console.print(f"no kernel: {explanation.failure}", markup=False, soft_wrap=True)
        return 1
    console.print(
        f"{chosen.backend.name} runs {chosen.capability.kernel}: {chosen.because}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _problem(options: argparse.Namespace) -> Problem:
    dims = MODELS[options.model]
    if options.heads is not None:
        dims = dims.with_heads(options.heads)
    features = {name.strip() for name in options.features.split(",") if name.strip()}
    if options.op == "prefill":
        return _prefill_problem(options, dims, features)
    # Planning a decode always asks for the lse, so the explanation does too.
    features |= {"lse"} if options.op == "decode" else set()
    layout = _layout(options)
    layout.check_dims(dims)
    layout.check_page_size(options.page_size)
    return Problem(
        op=options.op,
        arch=options.arch or local_arch(),
        q_dtype=options.q_dtype,
        kv_dtype=layout.kv_dtype,
        dims=dims,
        layout=layout.family,
        page_size=options.page_size,
        q_len=options.q_len,
        features=frozenset(features),
    )


def _layout(options: argparse.Namespace) -> layouts.Layout:
    if options.layout is not None:
        layout = layouts.get(options.layout)
        if options.kv_dtype not in (None, layout.kv_dtype):
            raise LayoutError(
                f"explain: --kv-dtype must be {layout.kv_dtype} with --layout {layout}, "
                f"got {options.kv_dtype}; leave it out"
            )
        return layout
    wanted = options.kv_dtype or options.q_dtype
    for layout in layouts.ALL.values():
        if layout.family == "standard" and layout.kv_dtype == wanted:
            return layout
    raise LayoutError(
        f"explain: --kv-dtype must have a standard layout, got {wanted}; name a --layout"
    )


def _prefill_problem(options: argparse.Namespace, dims: MLADims, features: set[str]) -> Problem:
    """Ask as `mla_core.prefill` does: expanded heads, the whole query width as one."""
    if options.layout not in (None, _EXPANDED):
        raise LayoutError(
            f"explain: --layout must be left out for prefill, got {options.layout!r}; its keys and "
            f"values are {_EXPANDED}"
        )
    expanded = MLADims(
        num_heads=dims.num_heads,
        qk_rope_head_dim=0,
        qk_nope_head_dim=dims.qk_head_dim,
        v_head_dim=dims.v_head_dim,
    )
    return Problem(
        op="prefill",
        arch=options.arch or local_arch(),
        q_dtype=options.q_dtype,
        kv_dtype=options.kv_dtype or options.q_dtype,
        dims=expanded,
        layout=_EXPANDED,
        features=frozenset(features | {"lse"}),
    )
