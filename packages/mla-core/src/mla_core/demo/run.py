"""The demo from beginning to end: progress, session, sweep and report."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mla_core.arch import arch_of
from mla_core.demo import report
from mla_core.demo.session import Options, Session
from mla_core.demo.sweep import SweepPoint, measure
from mla_core.dims import MLADims
from mla_core.dtypes import torch_dtype
from mla_core.errors import UnsupportedProblemError
from mla_core.problem import Problem
from mla_core.reduce import default_backend
from mla_core.select import select, use_backend

_PREFILLS = {
    "expanded": "expanded: prefill over keys and values of each head",
    "absorbed": "absorbed: prompts through decode",
}
_PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("worst difference {task.fields[worst]:.1e}"),
)


def run(options: Options, console: Console) -> int:
    """Run the demo; return 0, or 1 when a check failed."""
    start = time.perf_counter()
    chosen = use_backend(*options.backends) if options.backends else nullcontext()
    with chosen, torch.inference_mode():
        session = Session(options)
        console.print(
            f"{options.requests} requests at a time, {len(session.waiting)} waiting; "
            f"{session.num_pages} pages of {options.page_size} tokens, {options.dtype} on "
            f"{session.ours_model.device}, {options.prefill} prefill"
        )
        _require_prefill(session)
        with Progress(*_PROGRESS_COLUMNS, console=console) as progress:
            _serve(session, progress)
            points = _sweep(session, progress)
        memory, ops = memory_of(session), ops_of(session)
    path = options.out_dir / "latent_cache.png"
    report.plot(path, points, memory, options.prefill)
    report.print_texts(console, texts_of(session))
    report.print_ops(console, ops)
    report.print_summary(
        console,
        rates=(session.rate(session.ours_watch), session.rate(session.eager_watch)),
        memory=memory,
        check=session.check,
        merge=session.merge,
        notes=[
            ("prefill", _PREFILLS[options.prefill]),
            ("layers", "fused: mla-fusions" if options.fused else "transformers' own"),
            ("tokens generated", str(session.num_decoded)),
            ("drafts accepted, per request", " ".join(session.acceptance)),
            ("pages used again after a release", str(session.num_reused_pages)),
            ("seconds", f"{time.perf_counter() - start:.1f}"),
        ],
    )
    console.print(f"figure: {path.resolve()}", soft_wrap=True)
    failures = session.check.failures + session.merge.failures
    report.print_verdict(console, failures)
    return 1 if failures else 0


def _serve(session: Session, progress: Progress) -> None:
    """Prefill, then decode step by step; one step is split, one verifies drafts."""
    steps = session.options.steps
    task = progress.add_task("prefill", total=steps, worst=0.0)
    session.prefill(session.running)
    for step in range(steps):
        session.exchange_finished()
        if not session.running:
            break
        description = "decode"
        if step == steps // 2:
            description = "split decode and merge"
            session.decode_split()
        if step == 2 * steps // 3:
            description = "verify drafts"
            session.verify_drafts()
        else:
            session.decode(step)
        worst = session.check.worst_relative
        progress.update(task, advance=1, description=description, worst=worst)
    progress.update(task, completed=steps, description="decode")
    session.check.require("pages", session.num_reused_pages > 0, "no freed page was used again")


def _sweep(session: Session, progress: Progress) -> list[SweepPoint]:
    """Time one step at several context lengths."""
    options = session.options
    worst = session.check.worst_relative
    task = progress.add_task("step time over context", total=len(options.contexts), worst=worst)
    points = []
    for context in options.contexts:
        point = measure(
            session.ours_model,
            session.eager_model,
            context,
            page_size=options.page_size,
            layout=options.dtype,
            seed=options.seed,
            rope_in_place=options.fused,
            check=session.check,
        )
        points.append(point)
        progress.update(task, advance=1, worst=session.check.worst_relative)
    return points


def ops_of(session: Session) -> list[report.OpReport]:
    """Say which backend and kernel served each op, and why."""
    device, dtype = session.ours_model.device, session.options.dtype
    dims, cache = session.cache.dims, session.cache.caches[0]
    kv_dtype, family = cache.layout.kv_dtype, cache.layout.family
    write = Problem(
        "write_kv_cache", arch_of(device), dtype, kv_dtype, dims, family, cache.page_size
    )
    problems = [write]
    if session.options.prefill == "expanded":
        problems.append(_prefill_problem(session))
    rows = []
    if session.options.fused:
        # No op of its own: RoPE's launch writes the cache.
        problems.remove(write)
        rows.append(report.OpReport("layer", "fusions", "MLAPrologue, MLAEpilogue", "fused"))
    for problem in problems:
        choice = select(problem)
        rows.append(
            report.OpReport(
                problem.op, choice.backend.name, choice.capability.kernel, choice.because
            )
        )
    for name, plan in session.plans.items():
        because = f"{plan.choice.because}; {plan.schedule.because}" if plan.choice else ""
        rows.append(report.OpReport(name, plan.backend, plan.schedule.kernel, because))
    merge = default_backend(device)
    because = f"{merge} is the reduce of {device.type} tensors"
    rows.append(report.OpReport("reduce_partials", merge, f"{merge} reduce", because))
    return rows


def _prefill_problem(session: Session) -> Problem:
    dims, arch = session.cache.dims, arch_of(session.ours_model.device)
    expanded = MLADims(
        dims.num_heads,
        qk_rope_head_dim=0,
        qk_nope_head_dim=dims.qk_head_dim,
        v_head_dim=dims.v_head_dim,
    )
    dtype, features = session.options.dtype, frozenset({"lse"})
    return Problem("prefill", arch, dtype, dtype, expanded, "expanded", features=features)


def _require_prefill(session: Session) -> None:
    """Refuse to start without a kernel for the prompts, and say how to do without."""
    if session.options.prefill == "absorbed":
        return
    try:
        select(_prefill_problem(session))
    except UnsupportedProblemError as exc:
        raise UnsupportedProblemError(
            "demo: prefill must be absorbed where no backend has a kernel for prefill, got "
            f"expanded; pass --prefill absorbed, or name one more backend. {exc}"
        ) from exc


def memory_of(session: Session) -> report.Memory:
    """Measure our cache, and compute what expanded heads of the same model would take."""
    config, dims = session.ours_model.config, session.cache.dims
    latent = sum(
        buffer.numel() * buffer.element_size()
        for cache in session.cache.caches
        for buffer in cache.buffers
    )
    width = dims.num_heads * (dims.qk_head_dim + dims.v_head_dim)
    expanded = config.num_hidden_layers * width * torch_dtype(session.options.dtype).itemsize
    return report.Memory(latent // session.cache.caches[0].num_slots, expanded)


def texts_of(session: Session) -> list[tuple[str, int, int, str, str]]:
    """Return one row of decoded text per request."""
    rows = []
    for request in session.finished + session.running:
        before = session.tokenizer.decode(request.tokens[: request.prompt_len])
        after = session.tokenizer.decode(request.tokens[request.prompt_len :])
        rows.append((request.name, request.prompt_len, request.num_generated, before, after))
    return rows
