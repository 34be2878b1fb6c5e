"""Operations around MLA attention in Triton: cache writes.

Installing the package is enough: `mla_core` finds it through its entry point. Importing it loads no
Triton.
"""

from mla_fusions.__about__ import __version__

__all__ = ["__version__"]
