"""Descriptor of the ``asm`` backend."""

from __future__ import annotations

from mla_core.backend import Backend

BACKEND = Backend(
    name="asm",
    priority=100,
    capabilities=(),
    ops={},
    description="Instruction-tuned kernels as binaries; no kernel is offered in this release.",
)
