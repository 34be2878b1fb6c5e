"""The few calls of the HIP runtime that loading and launching a code object takes, by ctypes.

No HIP header, compiler or binding is needed: the runtime that torch brought is used, and nothing
here makes a device context before the first module is loaded.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from mla_core.errors import BackendUnavailableError

LIBRARY = "libamdhip64.so"
#: Marks in the ``extra`` array of a launch: the argument block, its size, the end.
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 3

_Pointer, _Out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
#: Result and arguments of each call.
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "hipGetErrorName": (ctypes.c_char_p, ctypes.c_int),
    "hipGetErrorString": (ctypes.c_char_p, ctypes.c_int),
    "hipModuleLoadData": (ctypes.c_int, _Out, ctypes.c_char_p),
    "hipModuleGetFunction": (ctypes.c_int, _Out, _Pointer, ctypes.c_char_p),
    # Kernel; grid, block and LDS bytes; stream, argument pointers, extra.
    "hipModuleLaunchKernel": (
        *(ctypes.c_int, _Pointer),
        *[ctypes.c_uint] * 7,
        *(_Pointer, _Pointer, _Out),
    ),
}


class DriverError(BackendUnavailableError):
    """A call of the HIP runtime failed; the message has its name and the runtime's own words."""


class HipRuntime:
    """The HIP runtime behind one shared library.

    Parameters
    ----------
    path : str
        What the dynamic loader takes: a path, or a bare library name.
    """

    def __init__(self, path: str) -> None:
        """Load the library and declare the calls used."""
        self.path = path
        self._loaded: list[bytes] = []
        try:
            self._library = ctypes.CDLL(path)
        except OSError as exc:
            raise BackendUnavailableError(
                f"driver: cannot load the HIP runtime {path}: {exc}"
            ) from exc
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise BackendUnavailableError(
                    f"driver: the HIP runtime {path} must have {name}, got none; is it another "
                    "library?"
                )
            function.restype, function.argtypes = result, arguments

    def load(self, code: bytes, symbol: str) -> int:
        """Load a code object on the current device and return the handle of one kernel.

        Modules are never unloaded, so ``code`` lives as long as this object.
        """
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("hipModuleLoadData", ctypes.byref(module), code, what=symbol)
        self._loaded.append(code)  # the runtime may read it later, without a copy of its own
        self._call(
            "hipModuleGetFunction", ctypes.byref(kernel), module, symbol.encode(), what=symbol
        )
        if not kernel.value:
            raise DriverError(f"driver: hipModuleGetFunction gave no kernel for {symbol}")
        return kernel.value

    def launch(
        self,
        kernel: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: ctypes.Structure,
        stream: int,
        *,
        what: str,
    ) -> None:
        """Enqueue a kernel; the runtime copies the argument block before it returns."""
        size = ctypes.c_size_t(ctypes.sizeof(arguments))
        extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER,
            ctypes.addressof(arguments),
            _BUFFER_SIZE,
            ctypes.addressof(size),
            _END,
        )
        shared_bytes = 0  # the kernels declare their LDS themselves
        self._call(
            "hipModuleLaunchKernel",
            kernel,
            *grid,
            *block,
            shared_bytes,
            stream,
            None,
            extra,
            what=what,
        )

    def _call(self, name: str, *arguments: object, what: str) -> None:
        if (status := getattr(self._library, name)(*arguments)) != 0:
            word = (self._library.hipGetErrorName(status) or b"unknown").decode()
            text = (self._library.hipGetErrorString(status) or b"").decode()
            raise DriverError(f"driver: {name} of {what} failed with {word} ({status}): {text}")


@functools.cache
def runtime() -> HipRuntime:
    """Return the runtime of this process, loading it at first use.

    Raises
    ------
    BackendUnavailableError
    """
    return HipRuntime(library_path())


def library_path(maps: Path = Path("/proc/self/maps")) -> str:
    """Return where the HIP runtime is, without loading it.

    A process must have one runtime: the library that is loaded already comes first, then the one
    inside torch, then whatever the dynamic loader finds. ``maps`` is the kernel's list of the files
    in this process.
    """
    if maps.is_file():
        for line in maps.read_text().splitlines():
            name = line.partition("/")[2]
            if Path(name).name.startswith(LIBRARY):
                return f"/{name}"
    inside_torch = Path(torch.__file__).parent / "lib" / LIBRARY
    return str(inside_torch) if inside_torch.is_file() else LIBRARY
