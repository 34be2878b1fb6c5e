"""Instruction-tuned MLA kernels, shipped as binaries and found through checked catalogs.

This release ships the catalogs, their reader and the registration with `mla_core`; it offers no
kernel yet, and says so through its empty capabilities.
"""

from mla_asm.__about__ import __version__
from mla_asm.catalog import CatalogRow, hsa_root, read_catalog, read_catalogs, verified_code_object

__all__ = [
    "CatalogRow",
    "__version__",
    "hsa_root",
    "read_catalog",
    "read_catalogs",
    "verified_code_object",
]
