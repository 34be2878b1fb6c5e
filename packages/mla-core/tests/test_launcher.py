"""A launcher is looked into where it only hands its arguments on, and else called as a whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mla_core.launcher import Marker, flatten

GRID, STREAM = (4, 3, 2), 9


class Launcher:
    """As Triton's: attributes, and a call that hands on what it gets."""

    def __init__(self, function, *, nests=False, **attributes):
        self.launch, self.nests = function, nests
        self.global_scratch_size = self.profile_scratch_size = 0
        vars(self).update(attributes)

    def __call__(self, x, y, z, stream, handle, metadata, told, enter, leave, *args):
        args = (args,) if self.nests else args
        self.launch("front", x, y, z, stream, handle, metadata, told, enter, leave, *args)


class Function:
    """As the one in C."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append(args)


def with_descriptors(launcher, name="launcher"):
    """As Triton's stage in front: each string becomes two arguments."""
    if name == "launcher":

        def inner(*args):
            expanded = []
            for arg in args[-1]:
                expanded += (arg.upper(), len(arg)) if isinstance(arg, str) else (arg,)
            return launcher(*args[:-1], expanded)

    else:
        renamed = launcher

        def inner(*args):
            return renamed(*args)

    return inner


def flat_of(run, *arguments):
    compiled = SimpleNamespace(run=run, function=77, packed_metadata=(4, 1, 0))
    markers = [value for value in arguments if isinstance(value, Marker)]
    return flatten(compiled, arguments, markers)


@pytest.mark.parametrize("nests", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_function_gets_what_the_launcher_would_pass(nests, count):
    function = Function()
    run = Launcher(function, nests=nests)
    arguments = [value for _ in range(count) for value in (Marker(), 1.5, None)][: 3 * count - 2]
    flat = flat_of(run, *arguments)
    assert flat.function is function
    assert not function.calls
    addresses = [64 * nth for nth in range(count)]
    flat(STREAM, GRID, addresses)
    following = iter(addresses)
    passed = [next(following) if isinstance(value, Marker) else value for value in arguments]
    run(*GRID, STREAM, 77, (4, 1, 0), None, None, None, *passed)
    assert function.calls[0] == function.calls[1]


def test_descriptors_are_expanded_once():
    function = Function()
    run = Launcher(with_descriptors(function), nests=True)
    flat = flat_of(run, Marker(), "tile", Marker())
    assert flat.function is function
    flat(STREAM, GRID, (16, 32))
    assert list(function.calls[0][-1]) == [16, "TILE", 4, 32]


@pytest.mark.parametrize(
    "attributes",
    [
        {"global_scratch_size": 128},
        {"profile_scratch_size": 128},
        {"gsan_enabled": True},
        {"launch": with_descriptors(Function(), name="another")},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_launchers_that_do_more_are_called_as_a_whole(attributes):
    calls = []

    class Whole(Launcher):
        def __call__(self, *args):
            calls.append(args)

    flat = flat_of(Whole(Function(), **attributes), Marker(), 5)
    flat(STREAM, GRID, (16,))
    assert type(flat.function) is Whole
    assert calls == [(*GRID, STREAM, 77, (4, 1, 0), None, None, None, 16, 5)]


def test_functions_are_launchers_too():
    calls = []
    flat = flat_of(lambda *args: calls.append(args), Marker())
    flat(STREAM, GRID, (16,))
    assert calls == [(*GRID, STREAM, 77, (4, 1, 0), None, None, None, 16)]


def test_what_does_not_pass_an_address_on_is_called_as_a_whole():
    class Forgetful(Launcher):
        def __call__(self, *args):
            self.launch(*args[:-1])

    function = Function()
    flat = flat_of(Forgetful(function), Marker(), Marker())
    flat(STREAM, GRID, (16, 32))
    assert type(flat.function) is Forgetful
    assert function.calls == [(*GRID, STREAM, 77, (4, 1, 0), None, None, None, 16)]
