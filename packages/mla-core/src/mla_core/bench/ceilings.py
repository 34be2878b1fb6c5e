"""What this device can do at most, measured in the same run: memory rate and matmul rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_core.bench.timing import EventClock
from mla_core.dtypes import FP8_DTYPES, torch_dtype

_REPEATS = 7


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best rates seen: GB/s of reading or copying, TFLOP/s of a large matmul."""

    gbps: float
    tflops: float

    def floor_us(self, num_bytes: int, flops: int) -> float:
        """Return the least time a call can take, whichever ceiling binds."""
        return max(num_bytes / self.gbps * 1e-3, flops / self.tflops * 1e-6)


def measure(device: torch.device, dtype_name: str, *, megabytes: int | None = None) -> Ceilings:
    """Measure both ceilings once per device and dtype and remember them.

    Parameters
    ----------
    dtype_name : str
        Dtype of the queries. The matmul ceiling is the better of this dtype's and fp32's, because
        a kernel may compute in either; fp8 queries are rated against bf16, which has a portable
        matmul.
    megabytes : int, optional
        Size of the tensor that is read and copied; default 1024 on a GPU, 256 on the host.
    """
    if megabytes is None:
        megabytes = 1024 if device.type == "cuda" else 256
    compute = "bf16" if dtype_name in FP8_DTYPES else dtype_name
    tflops = max(_matmul_tflops(device, torch_dtype(name)) for name in {compute, "fp32"})
    return Ceilings(_memory_gbps(device, megabytes), tflops)


@functools.cache
def _memory_gbps(device: torch.device, megabytes: int) -> float:
    """Return the best of copying (read + write) and reading (a sum, a product) one large tensor."""
    source = torch.ones(megabytes * 2**18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    copy_us = _best_us(lambda: target.copy_(source), device)
    matrix, vector = source.view(-1, 4096), source[:4096]
    read_us = min(_best_us(call, device) for call in (source.sum, lambda: matrix @ vector))
    return max(2 * size / copy_us, size / read_us) * 1e-3


@functools.cache
def _matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1536
    # Random operands: zeros would run at a higher clock than real data does.
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best_us(lambda: a @ b, device) * 1e-6


def _best_us(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    call()
    if device.type == "cuda":
        clock = EventClock(lambda _: call(), 1)
        return min(clock.sample() for _ in range(_REPEATS))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6
