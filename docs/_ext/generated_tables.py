"""Directives that write tables from the code's own data, so that pages cannot drift from it.

``{layout-table}``, ``{support-matrix}``, ``{env-vars}``, ``{models}``, ``{bad-input}``,
``{benchmark-results}`` and, as a picture, ``{benchmark-roofline}``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

import mla_core
from mla_core import env, layouts
from mla_core.bench import roofline
from mla_core.bench.rows import Row
from mla_core.errors import LayoutError
from mla_core.problem import LEVELS, Capability, describe_values
from mla_core.testing.bad_input import BAD_INPUTS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> nodes.table:
    """Build a docutils table; text between backquotes becomes code."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    head = nodes.thead()
    head += _row(header)
    body = nodes.tbody()
    body += [_row(row) for row in rows]
    group += [head, body]
    result = nodes.table()
    result += group
    return result


def _row(cells: Sequence[str]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        paragraph = nodes.paragraph()
        for index, part in enumerate(cell.split("`")):
            if part:
                paragraph += nodes.literal(part, part) if index % 2 else nodes.Text(part)
        entry = nodes.entry()
        entry += paragraph
        row += entry
    return row


class LayoutTable(Directive):
    """One row per cache layout: bytes for the widths of DeepSeek-V3, V4 or the indexer."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        header = ["Layout", "Family", "Latent", "Scales", "Bytes per token", "Page sizes", "What"]
        return [table(header, map(self._cells, layouts.ALL.values()))]

    @staticmethod
    def _cells(layout: layouts.Layout) -> list[str]:
        pages = "any" if layout.page_multiple == 1 else f"multiples of {layout.page_multiple}"
        per_token = "-"
        indexer = mla_core.MLADims(1, kv_lora_rank=128, qk_rope_head_dim=0)
        for dims in (mla_core.MODELS["deepseek-v3"], mla_core.MODELS["deepseek-v4-pro"], indexer):
            try:
                per_token = str(layout.bytes_per_token(dims))
                break
            except LayoutError:
                continue
        return [
            f"`{layout.name}`",
            f"`{layout.family}`",
            f"`{layout.kv_dtype}`",
            layout.scale_kind,
            per_token,
            pages,
            layout.summary,
        ]


class HeadLayoutTable(Directive):
    """One row per layout of per-head keys and values."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        header = ["Layout", "Dtype", "Scales", "What"]
        rows = [
            [f"`{layout.name}`", f"`{layout.codec.dtype}`", layout.codec.scale_kind, layout.summary]
            for layout in layouts.HEADS.values()
        ]
        return [table(header, rows)]


class SupportMatrix(Directive):
    """One row per capability of every installed backend, with how it was verified."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        header = ["Op, backend, kernel", "Where, how verified", "Accepts", "Features"]
        rows = [
            self._cells(record.name, row)
            for record in mla_core.backends()
            if record.backend is not None
            for row in record.backend.capabilities
        ]
        silent = [
            f"{record.name}: offers no kernel yet"
            for record in mla_core.backends()
            if record.backend is not None and not record.backend.capabilities
        ]
        note = nodes.paragraph(text="; ".join(silent))
        return [table(header, sorted(rows)), note]

    @staticmethod
    def _cells(backend: str, row: Capability) -> list[str]:
        limits = {
            "q": row.q_dtypes,
            "kv": row.kv_dtypes,
            "layout": row.layouts,
            "heads": row.num_heads,
            "q_len": row.q_lens,
            "page": row.page_sizes,
            "kv_lora": row.kv_lora_ranks,
            "rope": row.rope_dims,
        }
        accepts = [f"{k} {describe_values(v)}" for k, v in limits.items() if v is not None]
        if row.same_dtypes:
            accepts.append("q and kv of one dtype")
        if not row.automatic:
            accepts.append("only when its backend is named")
        where = "any" if row.archs is None else describe_values(row.archs)
        verified = sorted(row.verified, key=lambda item: LEVELS.index(item.level))
        proofs = "; ".join(f"{v.arch} {v.level} {v.date} (`{v.evidence}`)" for v in verified)
        return [
            f"{row.op}, {backend}, `{row.kernel}`",
            f"{where}. {proofs or 'not verified'}",
            "; ".join(accepts) or "anything",
            ", ".join(sorted(row.features)).replace("_", " ") or "-",
        ]


class EnvVars(Directive):
    """The table of environment variables."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        rows = [
            [f"`{v.name}`", v.accepts, f"`{v.default}`" if v.default else "unset", v.meaning]
            for v in env.VARIABLES
        ]
        return [table(["Variable", "Accepts", "Default", "Meaning"], rows)]


class Models(Directive):
    """The table of known models."""

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        header = ["Model", "Heads", "kv_lora", "rope", "nope", "v", "Value row", "sm_scale"]
        rows = [
            [
                f"`{name}`",
                str(dims.num_heads),
                str(dims.kv_lora_rank),
                str(dims.qk_rope_head_dim),
                str(dims.qk_nope_head_dim),
                str(dims.v_head_dim),
                str(dims.value_dim),
                f"{dims.sm_scale:.6f}",
            ]
            for name, dims in mla_core.MODELS.items()
        ]
        return [table(header, rows)]


class BadInput(Directive):
    """Every documented kind of bad input with the message it really gives."""

    def run(self) -> list[nodes.Node]:
        """Build the table, raising each error for its text."""
        rows = [[row.what, row.error.__name__, f"`{row.provoke()}`"] for row in BAD_INPUTS]
        return [table(["Bad input", "Error", "Message"], rows)]


class BenchmarkResults(Directive):
    """The committed benchmark rows of one architecture, ``{benchmark-results} sm90``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Build the table from the JSON lines."""
        header = ["Case", "Backend", "Call", "Median us", "GB/s", "TFLOP/s", "Share", "Error"]
        rows = []
        for path in sorted((RESULTS / self.arguments[0]).glob("*.jsonl")):
            for line in path.read_text().splitlines():
                row = json.loads(line)
                if "median_us" not in row:
                    continue
                rows.append(
                    [
                        f"`{row['case']}`",
                        row["backend"],
                        "graph" if row["graph"] else "eager",
                        f"{row['median_us']:.1f}",
                        f"{row['gbps']:.0f}",
                        f"{row['tflops']:.1f}",
                        f"{100 * row['share']:.0f}%",
                        f"{row['error']:.1e}",
                    ]
                )
        if not rows:
            return [nodes.paragraph(text="No results are committed for this architecture.")]
        return [table(header, rows)]


class BenchmarkRoofline(Directive):
    """The committed benchmark rows of one architecture as a picture, inside the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Draw the JSON lines that have rates and ceilings."""
        rows = [
            Row.from_json(line)
            for path in sorted((RESULTS / self.arguments[0]).glob("*.jsonl"))
            for line in path.read_text().splitlines()
            if '"ceiling_tflops"' in line
        ]
        if not rows:
            return [nodes.paragraph(text="No results are committed for this architecture.")]
        svg = io.BytesIO()
        roofline.draw(rows).savefig(svg, format="svg", metadata={"Date": None})
        uri = f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
        alt = f"TFLOP/s over arithmetic intensity, {self.arguments[0]}, under measured ceilings"
        return [nodes.image(uri=uri, alt=alt)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("layout-table", LayoutTable)
    app.add_directive("head-layout-table", HeadLayoutTable)
    app.add_directive("support-matrix", SupportMatrix)
    app.add_directive("env-vars", EnvVars)
    app.add_directive("models", Models)
    app.add_directive("bad-input", BadInput)
    app.add_directive("benchmark-results", BenchmarkResults)
    app.add_directive("benchmark-roofline", BenchmarkRoofline)
    return {"parallel_read_safe": True}
