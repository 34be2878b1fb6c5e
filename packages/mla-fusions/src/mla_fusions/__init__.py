"""Fused operations around MLA attention: RoPE and cache writes, absorbed products, norms.

This release is declared, installable and discovered by `mla_core`; it offers no kernel yet, and
says so through its empty capabilities.
"""

from mla_fusions.__about__ import __version__

__all__ = ["__version__"]
