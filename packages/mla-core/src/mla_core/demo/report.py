"""What the demo prints and plots at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mla_core.demo.check import LogitCheck
from mla_core.demo.sweep import SweepPoint

_MAX_FAILURES_SHOWN = 10


@dataclass(frozen=True)
class OpReport:
    """Which kernel served an op, and why."""

    op: str
    backend: str
    kernel: str
    because: str


@dataclass(frozen=True)
class Memory:
    """Cache bytes per token, all layers together."""

    latent: int
    expanded: int

    @property
    def ratio(self) -> float:
        """How many times smaller the latent cache is."""
        return self.expanded / self.latent


def print_ops(console: Console, ops: Sequence[OpReport]) -> None:
    """Print which backend and kernel ran each op."""
    table = Table(title="Which kernel ran, and why", title_justify="left")
    for heading in ("op", "backend", "kernel", "because"):
        table.add_column(heading, overflow="fold")
    for op in ops:
        table.add_row(op.op, op.backend, op.kernel, op.because)
    console.print(table)


def print_texts(console: Console, rows: Sequence[tuple[str, int, int, str, str]]) -> None:
    """Print (name, prompt tokens, generated tokens, end of prompt, generated text) per request."""
    table = Table(
        title="Requests (the weights are random, so the continuations are too)",
        title_justify="left",
    )
    table.add_column("topic", no_wrap=True)
    table.add_column("prompt", justify="right", no_wrap=True)
    table.add_column("new", justify="right", no_wrap=True)
    table.add_column("the prompt ends", no_wrap=True)
    table.add_column("and goes on", no_wrap=True)
    for name, prompt_len, num_new, before, after in rows:
        table.add_row(
            name,
            str(prompt_len),
            str(num_new),
            Text(_one_line(before)[-18:]),
            Text(_one_line(after)[:22]),
        )
    console.print(table)


def _one_line(text: str) -> str:
    """Join lines, and mark bytes that are no whole character, which random tokens often give."""
    return " ".join(text.replace("\N{REPLACEMENT CHARACTER}", "·").split())


def print_summary(
    console: Console,
    *,
    rates: tuple[float, float],
    memory: Memory,
    check: LogitCheck,
    merge: LogitCheck,
    notes: Sequence[tuple[str, str]],
) -> None:
    """Print speeds, memory and the worst differences."""
    ours, eager = rates
    table = Table(title="Summary", title_justify="left")
    for heading in ("", "mla_core", "transformers eager"):
        table.add_column(heading, overflow="fold")
    table.add_row("decode tokens/s (median)", f"{ours:.1f}", f"{eager:.1f}")
    table.add_row(
        "cache bytes/token",
        f"{memory.latent:,} (latent)",
        f"{memory.expanded:,} as expanded heads, {memory.ratio:.1f}x",
    )
    table.add_row("tokens checked", f"{check.tokens:,}", f"{check.ties} ties")
    table.add_row(
        "worst logit difference",
        f"{check.worst_absolute:.2e}",
        f"{check.worst_relative:.2e} of the spread (accepted {check.tolerance:.0e}); "
        f"{check.worst_where}",
    )
    table.add_row(
        "split + merge against unsplit",
        f"{merge.worst_absolute:.2e}",
        f"{merge.worst_relative:.2e} of the spread (accepted {merge.tolerance:.0e})",
    )
    for name, value in notes:
        table.add_row(name, value, "")
    console.print(table)
    console.print(
        "transformers keeps latents too, but expands all of them to heads at every step.",
        style="dim",
        soft_wrap=True,
    )


def print_verdict(console: Console, failures: Sequence[str]) -> None:
    """Print the first failures, or that there is none."""
    for failure in failures[:_MAX_FAILURES_SHOWN]:
        console.print(f"FAILED  {failure}", style="bold red", soft_wrap=True, markup=False)
    if len(failures) > _MAX_FAILURES_SHOWN:
        console.print(f"FAILED  and {len(failures) - _MAX_FAILURES_SHOWN} more", style="bold red")
    if not failures:
        console.print("all checks passed", style="bold green")


def plot(path: Path, points: Sequence[SweepPoint], memory: Memory, prefill: str) -> None:
    """Write the two-panel figure: cache memory and step time over context length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    contexts = [point.context for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Decode from the latent cache; prompts ran by {prefill} prefill", fontsize=9)
    for label, size, style in (
        ("expanded heads (MHA)", memory.expanded, "o--"),
        ("latent cache (mla_core)", memory.latent, "o-"),
    ):
        left.plot(contexts, [size * context / 2**20 for context in contexts], style, label=label)
    left.set(title="Cache memory of one request", ylabel="MiB")
    right.plot(contexts, [point.eager_ms for point in points], "o--", label="transformers eager")
    right.plot(contexts, [point.ours_ms for point in points], "o-", label="mla_core")
    right.set(title="One decode step of one request", ylabel="ms")
    for axes in (left, right):
        axes.set_xlabel("context length (tokens)")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [str(context) for context in contexts])
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
