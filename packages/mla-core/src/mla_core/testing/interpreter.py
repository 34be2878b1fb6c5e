"""Make Triton's CPU interpreter compute what a GPU computes.

``TRITON_INTERPRET=1`` runs kernels on CPU tensors, but Triton 3.6 to 3.9 get five things wrong:

- ``tl.dot`` on bf16 or fp8 operands multiplies their raw bit patterns;
- casts to bf16 and fp8 truncate instead of rounding to the nearest even value;
- ``tl.fma`` rounds its product before it adds;
- pointers to fnuz flavours of fp8 are refused, although their numbers convert;
- ``triton.autotune`` with two or more configurations asks for a GPU driver.

`enable` switches the interpreter on and repairs these. The first four patches replace private
functions of ``triton.runtime.interpreter``; when a release renames them, `enable` raises and names
the release. What stays wrong is bf16 arithmetic other than ``tl.dot``: kernels convert with
``.to(tl.float32)`` right after a load.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mla_core.errors import BackendUnavailableError

_NARROW = {
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5": torch.float8_e5m2,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
_TORCH_OF = {"fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, **_NARROW}


def enable() -> None:
    """Turn on Triton's interpreter and repair it. Call before anything imports Triton.

    Calling it again changes nothing.

    Raises
    ------
    BackendUnavailableError
        Triton is missing, was imported before without the interpreter, or moved a name this
        module patches.
    """
    _require_fresh_triton()
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        from triton.runtime import driver, interpreter
    except ImportError as exc:
        raise BackendUnavailableError(
            f"interpreter.enable: triton must be importable, got {exc}; pip install triton"
        ) from exc
    _require_loops(triton.__version__)
    _patch(interpreter.InterpreterBuilder, "create_dot", _dot_on_values)
    _patch(interpreter.InterpreterBuilder, "create_fma", _rounded_once)
    _patch(interpreter, "_convert_float", _convert_to_nearest)
    _patch(interpreter, "_patch_lang_core", _with_fnuz_types)
    if not callable(getattr(driver, "set_active", None)):
        raise _moved("triton.runtime.driver.set_active")
    driver.set_active(_HostDriver())


def is_enabled() -> bool:
    """Whether kernels defined from now on run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _require_fresh_triton() -> None:
    """Refuse to go on when Triton's own library functions were already made for a GPU."""
    language = sys.modules.get("triton.language")
    if language is not None and type(language.cdiv).__name__ != "InterpretedFunction":
        raise BackendUnavailableError(
            "interpreter.enable: triton must not be imported before, got a triton imported without "
            "TRITON_INTERPRET=1; call enable() first or set the variable"
        )


def _require_loops(triton_version: str) -> None:
    """Triton 3.6 turns loop bounds into ints in a way that NumPy 2.4 refuses."""
    numpy_version = tuple(int(part) for part in np.__version__.split(".")[:2])
    if triton_version.startswith("3.6.") and numpy_version >= (2, 4):
        raise BackendUnavailableError(
            f"interpreter.enable: numpy must be < 2.4 with triton {triton_version}, "
            f'got {np.__version__}; pip install "numpy<2.4"'
        )


def _moved(name: str) -> BackendUnavailableError:
    import triton

    return BackendUnavailableError(
        f"interpreter.enable: triton must have {name}, which triton {triton.__version__} does not; "
        f"use a triton from 3.6 to 3.9 or update mla_core.testing.interpreter"
    )


def _patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` once; ``inspect.unwrap`` gives Triton's own function back."""
    upstream = getattr(owner, name, None)
    if not callable(upstream):
        raise _moved(f"{getattr(owner, '__name__', owner)}.{name}")
    if not hasattr(upstream, "__wrapped__"):
        setattr(owner, name, functools.wraps(upstream)(make(upstream)))


def _dot_on_values(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Widen bf16 and fp8 operands to fp32, which is exact, and let Triton multiply those."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    def widen(handle: Any) -> Any:
        narrow = _NARROW.get(handle.dtype.scalar.name)
        if narrow is None:
            return handle
        return TensorHandle(_as_torch(handle.data, narrow).float().numpy(), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        return upstream(self, widen(a), widen(b), *rest, **named)

    return create_dot


def _rounded_once(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Round ``x * y + z`` of fp32 once, to nearest even."""
    from triton.runtime.interpreter import TensorHandle

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar.name != "fp32":
            return upstream(self, x, y, z)
        a = np.asarray(z.data, np.float64)
        # Products are exact in fp64. A sum that is not is rounded to the neighbour whose last bit
        # is 1: that bit is far below fp32's, and tells on which side of a tie the sum lies.
        with np.errstate(all="ignore"):
            product = np.multiply(x.data, y.data, dtype=np.float64)
            total = np.asarray(product + a)
            other = total - product
            lost = (product - (total - other)) + (a - other)
            is_even = total.view(np.int64) & 1 == 0
            is_rounded = np.isfinite(total) & (lost != 0) & is_even
            odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
            result = np.where(is_rounded, odd, total).astype(np.float32)
        return TensorHandle(result, z.dtype.scalar)

    return create_fma


def _convert_to_nearest(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Convert floats by value, to nearest even; fp8 saturates as the hardware instructions do."""
    from triton._C.libtriton import ir

    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        known = source.name in _TORCH_OF and target.name in _TORCH_OF
        if not known or rounding_mode == ir.ROUNDING_MODE.RTZ:
            return upstream(data, source, target, rounding_mode)
        value = _as_torch(data, _TORCH_OF[source.name])
        result = _TORCH_OF[target.name]
        if result.itemsize <= 2:
            # Hardware has no direct conversion from fp64; it goes through fp32 as well.
            value = value.float()
        if result.itemsize == 1:
            limit = torch.finfo(result).max
            value = value.clamp(-limit, limit)
        bits = getattr(torch, f"uint{8 * result.itemsize}")
        return value.to(result).view(bits).numpy()

    return convert_float


def _with_fnuz_types(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Add the types that the interpreter's dtype table forgets to what it installs for a launch."""

    def patch_lang_core(lang: Any, *rest: Any) -> None:
        upstream(lang, *rest)
        known = lang.dtype.to_ir

        def to_ir(self: Any, builder: Any) -> Any:
            if self.name == "fp8e4b8":
                return builder.get_fp8e4b8_ty()
            return builder.get_fp8e5b16_ty() if self.name == "fp8e5b16" else known(self, builder)

        # Upstream has just set it, and takes it back after the launch.
        lang.dtype.to_ir = to_ir

    return patch_lang_core


def _as_torch(data: Any, dtype: torch.dtype) -> torch.Tensor:
    """View an array of values or of raw bits, as the interpreter keeps them, as ``dtype``."""
    bits = np.ascontiguousarray(data).view(getattr(np, f"uint{8 * dtype.itemsize}"))
    # A copy: the interpreter's arrays may be read-only, which torch warns about.
    return torch.from_numpy(bits.copy()).view(dtype)


class _HostDriver:
    """The part of a Triton driver that the autotuner touches; every configuration is as fast."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(kernel_call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
            kernel_call()
            return [1.0] * len(quantiles)

        return benchmark

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
