"""What stands behind a compiled kernel of Triton: one call of a function in C.

At each launch Triton's launcher turns the kernel's arguments into those of that function, among
them tensor descriptors, which it makes anew. `flatten` lets it do so once, with markers in place of
stream, grid and addresses; a `Flat` call then passes what the launcher would have passed.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

_Values = tuple[Any, ...]


class Marker(int):
    """Stands for a value that changes from launch to launch; told apart by identity."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A launch reduced to the call of one function.

    Parameters
    ----------
    function : callable
        Triton's function in C; its launcher object where that could not be looked into.
    outer : callable
        Picks the arguments out of (stream, x, y, z, addresses, what is fixed).
    inner : callable, or None
        The same for the kernel's own arguments, where they are passed as one sequence.
    fixed : tuple
    """

    function: Callable[..., object]
    outer: Callable[[_Values], _Values]
    inner: Callable[[_Values], _Values] | None
    fixed: _Values

    def __call__(self, stream: int, grid: tuple[int, int, int], addresses: Sequence[int]) -> None:
        """Launch."""
        self.function(*self.arguments(stream, grid, addresses))

    def arguments(
        self, stream: int, grid: tuple[int, int, int], addresses: Sequence[int]
    ) -> _Values:
        """Return what the function takes."""
        values = (stream, *grid, *addresses, *self.fixed)
        if self.inner is None:
            return self.outer(values)
        return (*self.outer(values), self.inner(values))


def flatten(compiled: Any, arguments: Sequence[object], markers: Sequence[Marker]) -> Flat:
    """Reduce the launches of a compiled kernel.

    Parameters
    ----------
    compiled : triton.compiler.CompiledKernel
    arguments : sequence
        All the kernel's arguments, constants too, with a marker for each tensor.
    markers : sequence of Marker
        In the order in which calls give the tensors' addresses.
    """
    changing = tuple(Marker() for _ in range(4))
    stream, *grid = changing
    handles = compiled.function, compiled.packed_metadata
    passed = (*grid, stream, *handles, None, None, None, *arguments)
    seen = _look_into(compiled.run, passed)
    flat = seen and _flat(*seen, (*changing, *markers))
    whole = flat or _flat(compiled.run, passed, (*changing, *markers))
    assert whole is not None
    return whole


def picker(index: Sequence[int]) -> Callable[[_Values], _Values]:
    """Return a function that picks items out of a tuple, as a tuple."""
    return itemgetter(*index) if len(index) > 1 else lambda values: tuple(values[i] for i in index)


def _look_into(run: Any, arguments: _Values) -> tuple[Callable[..., object], _Values] | None:
    """Return the function that a launcher calls and with what, or None where it does more."""
    launch = getattr(run, "launch", None)
    # Memory that a launcher allocates at each launch cannot be fixed.
    allocates = launch is not None and (
        getattr(run, "gsan_enabled", False)
        or any(size for name, size in vars(run).items() if name.endswith("scratch_size"))
    )
    if launch is None or allocates:
        return None
    seen: list[_Values] = []

    def record(*passed: object) -> None:
        seen.append(passed)

    function, stand_in = launch, record
    if isinstance(launch, types.FunctionType):
        # Makes descriptors, then calls the function of this name.
        names, cells = launch.__code__.co_freevars, list(launch.__closure__ or ())
        if "launcher" not in names:
            return None
        place = names.index("launcher")
        function, cells[place] = cells[place].cell_contents, types.CellType(record)
        stand_in = types.FunctionType(
            launch.__code__, launch.__globals__, launch.__name__, launch.__defaults__, tuple(cells)
        )
    recorder = copy.copy(run)
    recorder.launch = stand_in
    recorder(*arguments)
    return (function, seen[0]) if len(seen) == 1 else None


def _flat(
    function: Callable[..., object], passed: _Values, changing: tuple[Marker, ...]
) -> Flat | None:
    """Return the call with places for what changes, or None unless each is passed once."""
    places = {id(marker): place for place, marker in enumerate(changing)}
    fixed: list[object] = []

    def pick(values: Sequence[object]) -> Callable[[_Values], _Values]:
        index = []
        for value in values:
            place = places.get(id(value))
            if place is None:
                place = len(changing) + len(fixed)
                fixed.append(value)
            index.append(place)
        counted.extend(index)
        return picker(index)

    counted: list[int] = []
    last = passed[-1]
    is_nested = isinstance(last, (tuple, list)) and any(id(value) in places for value in last)
    outer = pick(passed[:-1] if is_nested else passed)
    inner = pick(last) if is_nested else None
    if sorted(place for place in counted if place < len(changing)) != [*range(len(changing))]:
        return None
    return Flat(function, outer, inner, tuple(fixed))
