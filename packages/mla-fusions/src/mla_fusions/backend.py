"""Descriptor of the ``fusions`` backend."""

from __future__ import annotations

from mla_core.backend import Backend

BACKEND = Backend(
    name="fusions",
    priority=50,
    capabilities=(),
    ops={},
    description="Fused operations around attention; no kernel is offered in this release.",
)
