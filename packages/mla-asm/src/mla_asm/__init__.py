"""Hand-written MLA kernels for AMD GPUs, shipped as binaries and found through checked catalogs.

The backend ``asm`` of `mla_core` launches them through the HIP runtime; on a CPU they run in an
emulator, inside `emulation` or under ``MLA_ASM_EMULATE=1``.
"""

from mla_asm.__about__ import __version__
from mla_asm.catalog import CatalogRow, hsa_root, read_catalog, read_catalogs, verified_code_object
from mla_asm.emulator import Emulation, emulation

__all__ = [
    "CatalogRow",
    "Emulation",
    "__version__",
    "emulation",
    "hsa_root",
    "read_catalog",
    "read_catalogs",
    "verified_code_object",
]
