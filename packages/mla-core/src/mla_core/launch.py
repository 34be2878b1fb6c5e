"""Launching jitted kernels again and again at little cost on the host.

``launch(kernel, grid, *args, **constants)`` does what ``kernel[grid](*args, **constants)`` does.
With 50 arguments, Triton spends tens of microseconds on finding out which compiled kernel it is.
Here it is found by the arguments as they are (numbers by value, tensors by dtype and alignment),
which determine what Triton would find, and the compiled kernel is then called directly.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

#: Launches that are told apart; a process that makes more of them starts over.
MAX_KNOWN = 8192
#: Triton compiles for pointers that are multiples of this.
_ALIGNMENT = 16
#: AMD's compiler makes another kernel for buffers of this many bytes and above.
_LARGE_BYTES = 2**31

_Values = tuple[Any, ...]
_Places = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: Type of each argument to where tensors, numbers and descriptors are; None for plain launches.
_places: dict[tuple[type, ...], _Places | None] = {}
#: The last element keeps alive what the key has the ids of: the kernel and descriptors.
_known: dict[tuple[object, ...], tuple[Callable[..., None], Any, Any, _Values, Any]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a jitted kernel on a grid, on the current device and stream.

    Parameters
    ----------
    kernel : a jitted function
        Or what stands for one: interpreted, emulated and recorded kernels are called as they are.
    grid : tuple of one to three ints
    args : tensors, ints, floats, bools, None, and tensor descriptors
        The kernel's first parameters. Other values are legal and make the launch a plain one.
        Descriptors are told apart by identity: make one once, not for each launch.
    constants : values
        The kernel's other parameters, and options of the launch such as ``num_warps``.

    Notes
    -----
    Triton's launch hooks and a kernel's own are called: with any of them set, launches are plain.
    Options that Triton reads from the environment count from a kernel's first launch on.
    """
    triton = _triton()
    types = tuple(map(type, args))
    places = _places[types] if types in _places else _learn(types)
    if (
        places is None
        or triton is None
        or not isinstance(kernel, triton.jitted)
        or triton.is_watched(kernel)
    ):
        kernel[grid](*args, **constants)
        return
    tensors = [args[place] for place in places[0]]
    descriptors = [args[place] for place in places[2]]
    addresses = [tensor.data_ptr() for tensor in tensors]
    # Pointers of torch are aligned, apart from views that start in the middle.
    misaligned: object = functools.reduce(operator.or_, addresses) % _ALIGNMENT
    if misaligned:
        misaligned = tuple(address % _ALIGNMENT for address in addresses)
    driver = triton.driver.active
    device = driver.get_current_device()
    key = (
        id(kernel),
        device,
        types,
        tuple([args[place] for place in places[1]]),
        tuple(map(id, descriptors)),
        tuple([tensor.dtype for tensor in tensors]),
        misaligned,
        triton.tells_large and tuple(map(_is_large, tensors)),
        tuple(constants),
        tuple(constants.values()),
    )
    try:
        known = _known.get(key)
    except TypeError:
        # A constant that has no hash.
        kernel[grid](*args, **constants)
        return
    if known is None:
        compiled = kernel[grid](*args, **constants)
        if isinstance(compiled, triton.compiled):
            if len(_known) >= MAX_KNOWN:
                _known.clear()
            rest = tuple(
                constants.get(parameter.name, parameter.default)
                for parameter in kernel.params[len(args) :]
            )
            metadata = compiled.packed_metadata
            alive = (kernel, *descriptors)
            _known[key] = (compiled.run, compiled.function, metadata, rest, alive)
        return
    run, function, metadata, rest, _ = known
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    values = list(args)
    for place, address in zip(places[0], addresses, strict=True):
        values[place] = address
    run(x, y, z, stream, function, metadata, None, None, None, *values, *rest)


def forget() -> None:
    """Look every kernel up anew at its next launch, for instance under another driver."""
    _known.clear()


def _learn(types: tuple[type, ...]) -> _Places | None:
    """Say where among arguments of these types there are tensors, numbers and descriptors."""
    kinds = [
        "tensor" if issubclass(kind, torch.Tensor) else _KINDS.get(kind.__name__) for kind in types
    ]
    places: _Places | None = None
    if "tensor" in kinds and None not in kinds:
        tensors, numbers, descriptors = (
            tuple(place for place, kind in enumerate(kinds) if kind == wanted)
            for wanted in ("tensor", "number", "descriptor")
        )
        places = tensors, numbers, descriptors
    _places[types] = places
    return places


#: Types by name, since descriptors are Triton's and Gluon's.
_KINDS = {
    "int": "number",
    "float": "number",
    "bool": "number",
    "NoneType": "number",
    "TensorDescriptor": "descriptor",
}


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().size() >= _LARGE_BYTES


class _Triton:
    """The names of Triton that a launch needs, imported once."""

    def __init__(self) -> None:
        from triton import knobs
        from triton.compiler import CompiledKernel
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        self.jitted = JITFunction
        self.compiled = CompiledKernel
        self.driver = driver
        self.tells_large = torch.version.hip is not None
        self._runtime = knobs.runtime

    def is_watched(self, kernel: Any) -> bool:
        """Say whether somebody wants to hear of launches, or to choose how kernels are compiled."""
        runtime = self._runtime
        return bool(
            kernel.pre_run_hooks
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
            or runtime.add_stages_inspection_hook
        )


def _calls(hook: Any) -> object:
    """Return the functions of a chain of hooks, or the single hook of older releases."""
    return getattr(hook, "calls", hook)


@functools.cache
def _triton() -> _Triton | None:
    """Import Triton, unless it is absent: kernels of other makes are called as they are."""
    try:
        return _Triton()
    except ImportError:
        return None
