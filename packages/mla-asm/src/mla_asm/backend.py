"""Descriptor of the ``asm`` backend: what its catalogs hold, without loading a driver."""

from __future__ import annotations

import ctypes.util

import torch

from mla_asm import emulator
from mla_asm.capabilities import ARCHS, capabilities
from mla_asm.catalog import read_catalogs
from mla_asm.driver import LIBRARY, library_path
from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError


def probe(arch: str) -> None:
    """Raise when there is neither a ROCm build of torch with its runtime nor an emulator.

    Raises
    ------
    BackendUnavailableError
    """
    if arch == "cpu":
        emulator.probe()
        return
    if arch not in ARCHS:
        raise BackendUnavailableError(f"asm has kernels for {', '.join(ARCHS)}, this is {arch}")
    if torch.version.hip is None:
        raise BackendUnavailableError(
            f"asm needs a ROCm build of torch on {arch}, this is torch {torch.__version__}"
        )
    if library_path() == LIBRARY and ctypes.util.find_library("amdhip64") is None:
        raise BackendUnavailableError(f"asm needs the HIP runtime {LIBRARY}, and none was found")


BACKEND = Backend(
    name="asm",
    priority=100,
    probe=probe,
    description="Hand-written AMD kernels as checked binaries; on a CPU only emulated, slowly "
    "(MLA_ASM_EMULATE=1).",
    ops={"plan_decode": "mla_asm.decode:plan_decode", "decode": "mla_asm.decode:decode"},
    capabilities=capabilities(row for rows in read_catalogs().values() for row in rows),
)
