"""The HIP driver against a runtime that takes notes: what is called, with what, and what fails."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

from mla_asm import driver
from mla_asm.driver import DriverError, HipRuntime
from mla_asm.kernargs import DecodeKernargs
from mla_core.errors import BackendUnavailableError

CODE = b"\0a code object"


@pytest.fixture
def hip(notes, fake_hip):
    return HipRuntime(str(fake_hip))


def number(notes, name: str, kind: type = ctypes.c_int):
    return kind.in_dll(notes, name).value


def test_a_kernel_is_found_by_its_symbol(hip, notes):
    first, second = hip.load(CODE, "mla_one"), hip.load(CODE, "mla_two")
    assert (first, second) == (1101, 1102)
    assert number(notes, "loads") == 2
    assert (ctypes.c_char * 64).in_dll(notes, "last_symbol").value == b"mla_two"


def test_a_code_object_lives_as_long_as_its_module(hip):
    gone = []

    class Code(bytes):
        def __del__(self) -> None:
            gone.append(bytes(self[1:]))

    with pytest.raises(DriverError, match="hipErrorNoBinaryForGpu"):
        hip.load(Code(b"\xd1refused"), "mla_one")
    gc.collect()
    assert gone == [b"refused"]
    hip.load(Code(b"\0loaded"), "mla_one")
    gc.collect()
    assert gone == [b"refused"]


def test_a_launch_passes_grid_block_stream_and_the_argument_block(hip, notes):
    block = DecodeKernargs(kv=0x7F00_1234_5678, num_heads=16, page_stride=2**35)
    hip.launch(1101, (3, 2, 5), (256, 1, 1), block, 77, what="mla_one")
    assert list((ctypes.c_uint * 7).in_dll(notes, "sizes")) == [3, 2, 5, 256, 1, 1, 0]
    assert number(notes, "last_kernel", ctypes.c_void_p) == 1101
    assert number(notes, "last_stream", ctypes.c_void_p) == 77
    size = number(notes, "block_bytes", ctypes.c_size_t)
    assert size == ctypes.sizeof(DecodeKernargs) == 168
    assert bytes((ctypes.c_ubyte * size).in_dll(notes, "block")) == bytes(block)


def test_torchs_default_stream_is_null(hip, notes):
    hip.launch(1101, (1, 1, 1), (256, 1, 1), DecodeKernargs(), 0, what="mla_one")
    assert number(notes, "last_stream", ctypes.c_void_p) is None


def test_failures_carry_the_runtimes_words(hip, notes):
    message = r"hipModuleLoadData of mla_one failed with hipErrorNoBinaryForGpu \(209\): no kernel"
    with pytest.raises(DriverError, match=message):
        hip.load(bytes([209]), "mla_one")
    with pytest.raises(DriverError, match=r"hipModuleGetFunction of absent .*hipErrorNotFound"):
        hip.load(CODE, "absent")
    with pytest.raises(DriverError, match="gave no kernel for no_handle"):
        hip.load(CODE, "no_handle")
    ctypes.c_int.in_dll(notes, "next_error").value = 98
    with pytest.raises(DriverError, match=r"LaunchKernel of mla_one failed with unknown \(98\)"):
        hip.launch(1101, (1, 1, 1), (256, 1, 1), DecodeKernargs(), 0, what="mla_one")


def test_a_missing_library_is_named(tmp_path):
    with pytest.raises(BackendUnavailableError, match=r"cannot load the HIP runtime .*nowhere"):
        HipRuntime(str(tmp_path / "nowhere.so"))


def test_another_library_is_refused():
    with pytest.raises(BackendUnavailableError, match="must have hipGetErrorName, got none"):
        HipRuntime("libc.so.6")


def test_the_runtime_inside_torch_comes_before_the_systems(tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    assert driver.library_path(maps) == "libamdhip64.so"
    inside = tmp_path / "lib" / "libamdhip64.so"
    inside.parent.mkdir()
    inside.touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert driver.library_path(maps) == str(inside)


def test_the_runtime_that_is_loaded_comes_first(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0000000000-7f0000001000 r-xp 00000000 08:01 12 /usr/lib/libc.so.6\n"
        "7f0000001000-7f0000002000 r--p 00000000 00:00 0 \n"
        "7f0000002000-7f0000003000 r-xp 00000000 08:01 13 /opt/my rocm/libamdhip64.so.7.1\n"
    )
    assert driver.library_path(maps) == "/opt/my rocm/libamdhip64.so.7.1"
