"""A picture of benchmark rows: time over context length, one panel for each kind of case."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mla_core.bench.cases import BenchCase, parse_case
from mla_core.bench.rows import Row
from mla_core.errors import BackendUnavailableError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches.

    Raises
    ------
    BackendUnavailableError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise BackendUnavailableError(
            'bench: matplotlib must be installed to draw; pip install "mla-core[plot]"'
        ) from exc
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, in a folder made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def contender_of(row: Row) -> str:
    """Return the contender's name in a legend, which says whether calls were replayed."""
    return row.backend + (" (graph)" if row.graph else "")


def draw(rows: Iterable[Row]) -> Figure:
    """Return a figure of time over context length.

    Each panel holds the rows that share op, dtypes, heads, query tokens, page size and extras.
    Colour is the contender, marker the batch size; the grey line is the time at the ceiling.

    Raises
    ------
    BackendUnavailableError
        matplotlib is not installed.
    """
    panels = _panels(rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // max(columns, 1))
    figure = new_figure(7.0 * max(columns, 1), 4.2 * max(lines, 1))
    colours: dict[str, str] = {}
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, number)
        for (contender, batch_index, batch_size), points in curves.items():
            colour = colours.setdefault(contender, f"C{len(colours)}")
            contexts = [case.context for case, _ in points]
            axes.plot(
                contexts,
                [row.median_us for _, row in points],
                color=colour,
                marker=MARKERS[batch_index % len(MARKERS)],
                label=f"{contender}, batch {batch_size}",
            )
            floor = [row.share * row.median_us for _, row in points]
            axes.plot(contexts, floor, color="0.7", linestyle=":", zorder=0)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("cached tokens per request")
        axes.set_ylabel("median time of a call, us (dotted: ceiling)")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


_Curve = tuple[str, int, int]


def _panels(rows: Iterable[Row]) -> dict[str, dict[_Curve, list[tuple[BenchCase, Row]]]]:
    """Group rows by panel title, then by (contender, index of the batch size, batch size)."""
    parsed = [(parse_case(row.case), row) for row in rows]
    batches = sorted({case.batch_size for case, _ in parsed})
    panels: dict[str, dict[_Curve, list[tuple[BenchCase, Row]]]] = {}
    for case, row in sorted(parsed, key=lambda pair: (pair[0].batch_size, pair[0].context)):
        parts = str(case).split("/")
        title = "/".join(part for part in parts if part[0] not in "bs" or not part[1:].isdigit())
        curve = (contender_of(row), batches.index(case.batch_size), case.batch_size)
        panels.setdefault(title, defaultdict(list))[curve].append((case, row))
    return panels
