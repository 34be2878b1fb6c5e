"""Launching a catalog's kernel: through the HIP runtime on a GPU, in the emulator on a CPU."""

from __future__ import annotations

import functools

import torch

from mla_asm import driver, emulator
from mla_asm.catalog import CatalogRow, verified_code_object
from mla_asm.kernargs import Arguments, pack

#: Work-items of a workgroup: four waves.
BLOCK = (256, 1, 1)


def launch(row: CatalogRow, grid: tuple[int, int, int], arguments: Arguments) -> None:
    """Run a kernel on the device of its cache, on torch's current stream.

    Parameters
    ----------
    row : CatalogRow
    grid : (x, y, z)
        Workgroups.
    arguments : mapping
        A value for each field of `mla_asm.kernargs.DecodeKernargs`.

    Raises
    ------
    LayoutError
        The arguments do not fit the block, or the code object has other bytes than its row says.
    DriverError
        The HIP runtime refused.

    Notes
    -----
    The first launch of a kernel on a device loads its code object, which a stream capture does not
    allow: run a step once before capturing it.
    """
    kv = arguments["kv"]
    assert isinstance(kv, torch.Tensor)
    if kv.device.type == "cpu":
        emulator.run(row, grid, BLOCK, arguments)
        return
    with torch.cuda.device(kv.device):
        kernel = _kernel(row, torch.cuda.current_device())
        stream = torch.cuda.current_stream().cuda_stream
        driver.runtime().launch(kernel, grid, BLOCK, pack(arguments), stream, what=row.symbol)


@functools.cache
def _kernel(row: CatalogRow, device_index: int) -> int:
    """Load a kernel on the current device, once per process."""
    del device_index  # part of the key
    return driver.runtime().load(verified_code_object(row), row.symbol)
