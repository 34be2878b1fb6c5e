"""Portable Triton kernels for Multi-head Latent Attention, the ``triton`` backend of mla-core.

Installing the package is enough: `mla_core` finds it through its entry point. Importing it loads no
Triton.
"""

from mla_triton.__about__ import __version__

__all__ = ["__version__"]
