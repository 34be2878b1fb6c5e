"""A roofline of benchmark rows: achieved TFLOP/s over arithmetic intensity, under the ceilings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mla_core.bench.cases import parse_case
from mla_core.bench.plot import MARKERS, contender_of, new_figure
from mla_core.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Ceilings = tuple[str, float, float]


def draw(rows: Iterable[Row]) -> Figure:
    """Return a figure with a panel for each pair of ceilings, those of one device in one run.

    A point is one row: its intensity is ``flops / bytes``, both the least that the case needs, its
    height the TFLOP/s of its median. Colour is the contender, marker the dtypes, heads and query
    tokens. The line is the best that the measured ceilings allow.

    Raises
    ------
    BackendUnavailableError
        matplotlib is not installed.
    """
    panels: dict[_Ceilings, list[Row]] = defaultdict(list)
    for row in rows:
        panels[row.device, row.ceiling_gbps, row.ceiling_tflops].append(row)
    figure = new_figure(8.0, 4.8 * max(len(panels), 1))
    for number, (ceilings, of_panel) in enumerate(panels.items(), start=1):
        _draw_panel(figure.add_subplot(len(panels), 1, number), ceilings, of_panel)
    return figure


def _draw_panel(axes: Axes, ceilings: _Ceilings, rows: list[Row]) -> None:
    device, gbps, tflops = ceilings
    colours: dict[str, str] = {}
    markers: dict[str, str] = {}
    for row in rows:
        contender, kind = contender_of(row), _kind(row)
        colour = colours.setdefault(contender, f"C{len(colours)}")
        marker = markers.setdefault(kind, MARKERS[len(markers) % len(MARKERS)])
        axes.plot(
            [row.flops / row.bytes],
            [row.tflops],
            color=colour,
            marker=marker,
            markersize=5,
            alpha=0.7,
            linestyle="none",
        )
    ridge = tflops / gbps * 1e3
    intensities = [row.flops / row.bytes for row in rows]
    xs = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    roof = [min(x * gbps * 1e-3, tflops) for x in xs]
    label = f"ceilings: {gbps:.4g} GB/s, {tflops:.3g} TFLOP/s"
    axes.plot(xs, roof, color="0.3", label=label, zorder=0)
    for contender, colour in colours.items():
        axes.plot([], [], color=colour, marker="o", linestyle="none", label=contender)
    for kind, marker in markers.items():
        axes.plot([], [], color="0.5", marker=marker, linestyle="none", label=kind)
    axes.set_title(device, fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity, flops per byte")
    axes.set_ylabel("TFLOP/s of the median call")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _kind(row: Row) -> str:
    """Return what decides the intensity of a case: its dtypes, heads and query tokens."""
    return "/".join(str(parse_case(row.case)).split("/")[1:4])
