"""Portable Triton kernels for Multi-head Latent Attention, the ``triton`` backend of mla-core.

Installing the package is enough: `mla_core` finds it through its entry point. Importing it loads no
Triton.
"""

from mla_triton.__about__ import __version__
from mla_triton.mla_decode_rope import decode_attention_fwd_grouped_rope

__all__ = ["__version__", "decode_attention_fwd_grouped_rope"]
