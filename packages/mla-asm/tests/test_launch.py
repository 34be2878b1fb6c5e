"""Launching on a GPU: what reaches the driver, and what is loaded once.

No AMD GPU is needed: tensors are on the meta device, and the HIP runtime only takes notes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from types import SimpleNamespace

import pytest
import torch

from mla_asm import driver, launch
from mla_asm.driver import HipRuntime
from mla_asm.kernargs import FIELDS, pack
from mla_core.errors import LayoutError

CODE = b"\0a code object"


@pytest.fixture
def gpu(fake_hip, notes, monkeypatch):
    """Stand in for torch on ROCm; the current device and stream can be changed."""
    state = SimpleNamespace(device=0, stream=77, notes=notes, hip=HipRuntime(str(fake_hip)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.device)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=state.stream)
    )
    monkeypatch.setattr(driver, "runtime", lambda: state.hip)
    launch._kernel.cache_clear()
    yield state
    launch._kernel.cache_clear()


@pytest.fixture
def row(tmp_path, make_row):
    path = tmp_path / "mla_one.co"
    path.write_bytes(CODE)
    return make_row(symbol="mla_one", code_object=path, sha256=hashlib.sha256(CODE).hexdigest())


def arguments():
    pointers = {name for name, kind in FIELDS.items() if kind is ctypes.c_void_p}
    values = {name: None if name in pointers else index for index, name in enumerate(FIELDS)}
    return values | {"kv": torch.empty(2, 16, 576, device="meta"), "sm_scale_log2": 0.5}


def test_the_packed_block_goes_to_the_current_stream(gpu, row):
    launch.launch(row, (3, 2, 5), arguments())
    sizes = (ctypes.c_uint * 7).in_dll(gpu.notes, "sizes")
    assert list(sizes) == [3, 2, 5, 256, 1, 1, 0]
    assert ctypes.c_void_p.in_dll(gpu.notes, "last_stream").value == 77
    block = bytes((ctypes.c_ubyte * 168).in_dll(gpu.notes, "block"))
    assert block == bytes(pack(arguments()))


def test_a_kernel_is_loaded_once_per_device(gpu, row):
    kernels = []
    for gpu.device in (0, 0, 1, 1, 0):
        launch.launch(row, (1, 1, 1), arguments())
        kernels.append(ctypes.c_void_p.in_dll(gpu.notes, "last_kernel").value)
    assert ctypes.c_int.in_dll(gpu.notes, "loads").value == 2
    assert kernels == [1101, 1101, 1102, 1102, 1101]


def test_other_bytes_than_the_catalogs_are_not_loaded(gpu, row):
    row.code_object.write_bytes(CODE + b"!")
    with pytest.raises(LayoutError, match="sha256 of mla_one"):
        launch.launch(row, (1, 1, 1), arguments())
    assert ctypes.c_int.in_dll(gpu.notes, "loads").value == 0
