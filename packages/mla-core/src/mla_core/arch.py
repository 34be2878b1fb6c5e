"""Short architecture names: ``cpu``, ``sm90``, ``gfx942`` ..., never marketing names."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_CPU_ARCH: ContextVar[str] = ContextVar("mla_core_cpu_arch", default="cpu")


@contextmanager
def cpu_as(arch: str) -> Iterator[None]:
    """Call the CPU by another architecture's name, for which kernels are emulated, in a block."""
    token = _CPU_ARCH.set(arch)
    try:
        yield
    finally:
        _CPU_ARCH.reset(token)


def arch_of(device: torch.device | str) -> str:
    """Return the architecture name of a device.

    CUDA devices give ``sm<major><minor>``, ROCm devices the part of ``gcnArchName`` before the
    first colon, and every other device its type, the CPU inside `cpu_as` the name given there.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _CPU_ARCH.get()
    if device.type != "cuda":
        return device.type
    index = torch.cuda.current_device() if device.index is None else device.index
    return _gpu_arch(index)


@functools.cache
def _gpu_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":", maxsplit=1)[0]
    return f"sm{properties.major}{properties.minor}"
