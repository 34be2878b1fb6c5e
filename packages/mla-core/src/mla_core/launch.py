"""Launching jitted kernels again and again at little cost on the host.

``launch(kernel, grid, *args, **constants)`` does what ``kernel[grid](*args, **constants)`` does, on
the device of its tensors. With 50 arguments, Triton spends tens of microseconds on finding out
which compiled kernel it is. Here it is found by the arguments as they are (numbers by value,
tensors by dtype and alignment), which determine what Triton would find, and the compiled kernel is
then called directly.

An op that does nothing else can be `repeatable`: what it launches is recorded once, in a `Tape`,
and a `Repeat` launches it again for other tensors that look alike, knowing their addresses alone.
"""

from __future__ import annotations

import copy
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mla_core.launcher import Flat, Marker, flatten, picker

#: Launches that are told apart, and descriptors of one launch; one more, and they start over.
MAX_KNOWN = 8192
#: Triton compiles for pointers that are multiples of this.
_ALIGNMENT = 16
#: AMD's compiler makes another kernel for buffers of this many bytes and above.
_LARGE_BYTES = 2**31

_Values = tuple[Any, ...]
_Grid = tuple[int, int, int]
_Places = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
#: The nth of the addresses given, None for none of them, and the bytes from there.
_Place = tuple[int | None, int]
_NULL: _Place = (None, 0)
_Op = TypeVar("_Op", bound=Callable[..., None])
#: Type of each argument to where tensors, numbers and descriptors are; None for plain launches.
_places: dict[tuple[type, ...], _Places | None] = {}
_known: dict[tuple[object, ...], _Known] = {}
_repeatable: set[Callable[..., None]] = set()
#: Grows when launches are forgotten: repeats of before are not valid any more.
_epoch = [0]
#: What `torch.Tensor.get_device` says on the CPU.
_NO_DEVICE = -1
_TELLS_LARGE = torch.version.hip is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a jitted kernel on a grid, on its tensors' device and the current stream there.

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
    if triton is None or not isinstance(kernel, triton.jitted):
        _spoil()
        kernel[grid](*args, **constants)
        return
    types = tuple(map(type, args))
    places = _places[types] if types in _places else _learn(types)
    tensors = [args[place] for place in places[0]] if places else []
    index = tensors[0].get_device() if tensors else _index_of((*args, *constants.values()))
    driver = triton.driver.active
    device = driver.get_current_device()
    if index in (device, _NO_DEVICE):
        _launch(triton, device, kernel, grid, args, constants, types, places, tensors)
        return
    with _made_current(driver, index, device) as device:
        _launch(triton, device, kernel, grid, args, constants, types, places, tensors)


def forget() -> None:
    """Look every kernel up anew at its next launch, for instance under another driver."""
    _known.clear()
    _epoch[0] += 1


def repeatable(op: _Op) -> _Op:
    """Declare that a backend's op may be repeated.

    It does nothing on the device but `launch`. Grids, numbers and constants follow from the plan,
    from the call's numbers, and from its tensors' shapes, strides, dtypes and addresses modulo 16.
    """
    _repeatable.add(op)
    return op


def is_repeatable(op: Callable[..., None]) -> bool:
    """Say whether an op is declared `repeatable`."""
    return op in _repeatable


def alignment(tensors: Iterable[torch.Tensor], addresses: Sequence[int]) -> object:
    """Return what tells launches with these tensors apart besides their dtypes."""
    # Pointers of torch are aligned, apart from views that start in the middle.
    misaligned: object = functools.reduce(operator.or_, addresses, 0) % _ALIGNMENT
    if misaligned:
        misaligned = tuple([address % _ALIGNMENT for address in addresses])
    return (misaligned, *map(_is_large, tensors)) if _TELLS_LARGE else misaligned


@contextmanager
def recording() -> Iterator[Tape]:
    """Record what this thread launches in a block; the launches happen as always."""
    before, tape = _recording.tape, Tape()
    _recording.tape = tape
    try:
        yield tape
    finally:
        _recording.tape = before


class Tape:
    """The launches of a block, in order."""

    def __init__(self) -> None:
        self._steps: list[tuple[_Known, _Grid, list[int]]] = []
        self._device = _NO_DEVICE
        self._is_whole = True

    def add(self, known: _Known, grid: _Grid, addresses: list[int], device: int) -> None:
        """Write a launch down."""
        self._steps.append((known, grid, addresses))
        self._device = device

    def spoil(self) -> None:
        """Note a launch that cannot be repeated."""
        self._is_whole = False

    def repeat(
        self,
        given: Sequence[torch.Tensor],
        whole: Sequence[torch.Tensor],
    ) -> Repeat | None:
        """Return what launches the same for other tensors, or None where that cannot be told.

        Parameters
        ----------
        given : sequence of tensors
            Those that change. A launch's tensor that starts where one of them does follows it.
        whole : sequence of tensors
            The same, but launches may also get views of them that start elsewhere.
        """
        if not self._is_whole:
            return None
        starts = [tensor.data_ptr() for tensor in (*given, *whole)]
        movable = [(nth, _extent(tensor)) for nth, tensor in enumerate(whole, len(given))]

        def place_of(address: int) -> _Place:
            found: list[_Place] = [(nth, 0) for nth, start in enumerate(starts) if start == address]
            if not found:
                found = [(nth, address - it.start) for nth, it in movable if address in it]
            # Nothing is read at 0, where empty tensors are.
            if not address and not found:
                found.append(_NULL)
            if len(found) != 1:
                raise _AmbiguousError
            return found[0]

        try:
            places = [
                ([*map(place_of, addresses)], [*map(place_of, known.bases)])
                for known, _, addresses in self._steps
            ]
        except _AmbiguousError:
            return None
        used = dict.fromkeys(place for pair in places for one in pair for place in one)
        # What steps pick from: all the addresses given, then 0, then parts.
        parts = [(source, offset) for source, offset in used if source is not None and offset]
        pool: list[_Place] = [*((nth, 0) for nth in range(len(starts))), _NULL, *parts]
        steps = [
            _Step(known, grid, _picker(pool, tensors), _picker(pool, bases) if bases else None)
            for (known, grid, _), (tensors, bases) in zip(self._steps, places, strict=True)
        ]
        return Repeat(
            self._device,
            _epoch[0],
            tuple(parts),
            tuple(steps),
        )


@dataclass(frozen=True, slots=True)
class Repeat:
    """Launches that were recorded, for other tensors of the same shapes, strides and dtypes.

    Parameters
    ----------
    device : int
        Index of the tensors' device, -1 for the CPU.
    epoch : int
    parts : tuple of (int, int)
        Which of the given addresses, and bytes to add.
    steps : tuple
    """

    device: int
    epoch: int
    parts: tuple[tuple[int, int], ...]
    steps: tuple[_Step, ...]

    def __call__(self, addresses: Sequence[int]) -> bool:
        """Launch for tensors at these addresses, in the order of ``given`` and ``whole``.

        Returns
        -------
        bool
            Whether it did. Not so if somebody watches launches, or launches were forgotten: make
            them anew.
        """
        triton = _triton()
        if (
            triton is None
            or self.epoch != _epoch[0]
            or triton.is_watched(*[step.known.kernel for step in self.steps])
        ):
            return False
        driver = triton.driver.active
        device = driver.get_current_device()
        if self.device in (device, _NO_DEVICE):
            self._run(driver.get_current_stream(device), addresses)
        else:
            with _made_current(driver, self.device, device) as device:
                self._run(driver.get_current_stream(device), addresses)
        return True

    def _run(self, stream: int, addresses: Sequence[int]) -> None:
        pool = self._pool(addresses)
        for step in self.steps:
            flat = step.known.flat if step.bases is None else step.known.at(step.bases(pool))
            flat(stream, step.grid, step.tensors(pool))

    def _pool(self, addresses: Sequence[int]) -> _Values:
        parts = [addresses[source] + offset for source, offset in self.parts]
        return (*addresses, 0, *parts)

    def calls(self, addresses: Sequence[int]) -> list[tuple[Callable[..., object], _Values]]:
        """Return the calls of the driver's functions alone, to tell what those take."""
        pool, calls = self._pool(addresses), []
        for step in self.steps:
            flat = step.known.flat if step.bases is None else step.known.at(step.bases(pool))
            calls.append((flat.function, flat.arguments(0, step.grid, step.tensors(pool))))
        return calls


@dataclass(frozen=True, slots=True)
class Address:
    """Memory as a tensor descriptor's base, without keeping it alive."""

    pointer: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """Return the address."""
        return self.pointer


@dataclass(frozen=True, slots=True)
class _Step:
    """A launch that picks tensors' addresses, and descriptors' bases, from those of a repeat."""

    known: _Known
    grid: _Grid
    tensors: Callable[[_Values], _Values]
    bases: Callable[[_Values], _Values] | None


class _Known:
    """A compiled kernel and all its arguments, but for the addresses of tensors."""

    def __init__(
        self, kernel: Any, compiled: Any, args: _Values, places: _Places, rest: _Values
    ) -> None:
        self.kernel = kernel
        self._compiled = compiled
        self._markers = [Marker() for _ in places[0]]
        self._values = [*args, *rest]
        for place, marker in zip(places[0], self._markers, strict=True):
            self._values[place] = marker
        # Alive as long as this is, since it is found by their ids.
        self._descriptors = [(place, args[place]) for place in places[2]]
        self.bases = tuple(descriptor.base.data_ptr() for _, descriptor in self._descriptors)
        self.flat = flatten(compiled, self._values, self._markers)
        self._flats = {self.bases: self.flat}

    def at(self, bases: tuple[int, ...]) -> Flat:
        """Return the launch with descriptors that are alike, but start at these addresses."""
        flat = self._flats.get(bases)
        if flat is None:
            values = list(self._values)
            for (place, descriptor), base in zip(self._descriptors, bases, strict=True):
                values[place] = copy.copy(descriptor)
                values[place].base = Address(base, descriptor.base.dtype)
            if len(self._flats) >= MAX_KNOWN:
                self._flats.clear()
            flat = self._flats[bases] = flatten(self._compiled, values, self._markers)
        return flat


def _launch(
    triton: _Triton,
    device: Any,
    kernel: Any,
    grid: tuple[int, ...],
    args: _Values,
    constants: dict[str, Any],
    types: tuple[type, ...],
    places: _Places | None,
    tensors: list[torch.Tensor],
) -> None:
    """Launch on the current device."""
    if places is None or triton.is_watched(kernel):
        _spoil()
        kernel[grid](*args, **constants)
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    key = (
        id(kernel),
        device,
        types,
        tuple([args[place] for place in places[1]]),
        tuple([id(args[place]) for place in places[2]]),
        tuple([tensor.dtype for tensor in tensors]),
        alignment(tensors, addresses),
        tuple(constants),
        tuple(constants.values()),
    )
    try:
        known = _known.get(key)
    except TypeError:
        # A constant that has no hash.
        _spoil()
        kernel[grid](*args, **constants)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if known is not None:
        known.flat(triton.driver.active.get_current_stream(device), (x, y, z), addresses)
    else:
        compiled = kernel[grid](*args, **constants)
        if not isinstance(compiled, triton.compiled):
            _spoil()
            return
        if len(_known) >= MAX_KNOWN:
            _known.clear()
        rest = tuple(
            constants.get(parameter.name, parameter.default)
            for parameter in kernel.params[len(args) :]
        )
        known = _known[key] = _Known(kernel, compiled, args, places, rest)
    if _recording.tape is not None:
        _recording.tape.add(known, (x, y, z), addresses, tensors[0].get_device())


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


class _Recording(threading.local):
    """The tape that a thread's launches are written down on."""

    tape: Tape | None = None


_recording = _Recording()


def _spoil() -> None:
    if _recording.tape is not None:
        _recording.tape.spoil()


class _AmbiguousError(Exception):
    """A tensor of a launch is none of those that were named, or several."""


def _picker(pool: list[_Place], places: list[_Place]) -> Callable[[_Values], _Values]:
    return picker([pool.index(place) for place in places])


def _extent(tensor: torch.Tensor) -> range:
    """Return the addresses that a tensor lies in."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return range(0)
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps)
    return range(start, start + count * tensor.element_size())


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().size() >= _LARGE_BYTES


def _index_of(values: Iterable[object]) -> int:
    """Return the device's index of the first tensor; -1 without one, and on the CPU."""
    found = (value.get_device() for value in values if isinstance(value, torch.Tensor))
    return next(found, _NO_DEVICE)


@contextmanager
def _made_current(driver: Any, index: int, before: Any) -> Iterator[Any]:
    """Make another device the current one in a block."""
    driver.set_current_device(index)
    try:
        yield driver.get_current_device()
    finally:
        driver.set_current_device(before)


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
        self._runtime = knobs.runtime

    def is_watched(self, *kernels: Any) -> bool:
        """Say whether somebody wants to hear of launches, or to choose how kernels are compiled."""
        runtime = self._runtime
        return bool(
            _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
            or runtime.add_stages_inspection_hook
            or any([kernel.pre_run_hooks for kernel in kernels])
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
