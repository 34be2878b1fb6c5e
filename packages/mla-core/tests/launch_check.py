"""Launches of compiled kernels under a driver that launches nothing; run by `test_launch`.

A process of its own: in pytest's, Triton's interpreter replaces the compiler.
"""

from __future__ import annotations

import torch
import triton
from triton import knobs
from triton import language as tl
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from mla_core.launch import Address, forget, launch, recording
from mla_core.reduce import launch_reduce
from mla_core.testing.null_driver import null_driver

TARGETS = (("cuda", 90, 32), ("hip", "gfx942", 64))


@triton.jit
def scale_kernel(out_ptr, x_ptr, count, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0) * factor
    if TWICE:
        x *= 2
    tl.store(out_ptr + i, x, mask=i < count)


@triton.jit
def copy_tile_kernel(out_ptr, source, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = source.load([0, 0])
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, tile, mask=at < count)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    def get_device(self):
        return 1


class Plain:
    """Counts the launches that went through Triton's own code."""

    def __enter__(self):
        self.count, self.run = 0, JITFunction.run

        def counted(kernel, *args, **kwargs):
            self.count += 1
            return self.run(kernel, *args, **kwargs)

        JITFunction.run = counted
        return self

    def __exit__(self, *exc):
        JITFunction.run = self.run


def addresses(args):
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_same_launches(target):
    """The second launch gets what the first got, without Triton's help."""
    out, lse = torch.empty(3, 4, 512), torch.empty(3, 4)
    partial_out, partial_lse = torch.empty(3, 5, 4, 512), torch.empty(3, 5, 4)
    with null_driver(*target) as driver, Plain() as plain:
        for sink in (None, torch.empty(4)):
            for _ in range(3):
                launch_reduce(partial_out, partial_lse, out, lse, sink=sink)
        assert plain.count == 2
        first, *others = driver.launches[:3]
        assert first.name == "reduce_partials_kernel"
        assert first.grid == (12, 4, 1)
        for other in others:
            assert (other.name, other.grid, other.stream) == (first.name, first.grid, 0)
            assert list(other.args) == addresses(first.args)


def check_what_tells_launches_apart(target):
    x = torch.empty(200)
    for changed in (
        {"x": x[1:]},
        {"x": x.bfloat16()},
        {"count": 1},
        {"count": 96.0},
        {"factor": 2},
        {"BLOCK": 32},
        {"TWICE": True},
        {"num_warps": 8},
    ):
        plain_values = {"x": x, "count": 96, "factor": 2.0, "BLOCK": 64}
        with null_driver(*target) as driver, Plain() as plain:
            for values in (plain_values, plain_values | changed, plain_values):
                for _ in range(2):
                    constants = {k: v for k, v in values.items() if k[0] in "BTn"}
                    args = (x, values["x"], values["count"], values["factor"])
                    launch(scale_kernel, (2,), *args, **constants)
            assert plain.count == 2, changed
            assert [launch.grid for launch in driver.launches] == [(2, 1, 1)] * 6
            pairs = zip(driver.launches[::2], driver.launches[1::2], strict=True)
            assert all(addresses(one.args) == addresses(two.args) for one, two in pairs)


def check_plain_launches(target):
    """What somebody watches, and arguments out of order, go through Triton."""
    x, seen = torch.empty(128), []
    arguments = (x, x, 96, 2.0)
    with null_driver(*target) as driver, Plain() as plain:
        launch(scale_kernel, (2,), *arguments, BLOCK=64)
        knobs.runtime.launch_enter_hook.add(seen.append)
        launch(scale_kernel, (2,), *arguments, BLOCK=64)
        knobs.runtime.launch_enter_hook.remove(seen.append)
        assert (plain.count, len(seen)) == (2, 1)
        scale_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(args))
        launch(scale_kernel, (2,), *arguments, BLOCK=64)
        scale_kernel.pre_run_hooks.clear()
        assert (plain.count, len(seen)) == (3, 2)
        launch(scale_kernel, (2,), *arguments, BLOCK=64)
        assert plain.count == 3
        # A dictionary has no hash; without tensors in front there is nothing to find a kernel by.
        launch(scale_kernel, (2,), *arguments, BLOCK=64, extern_libs={})
        launch(scale_kernel, (2,), out_ptr=x, x_ptr=x, count=96, factor=2.0, BLOCK=64)
        assert plain.count == 5
        assert len(driver.launches) == 6
        forget()
        launch(scale_kernel, (2, 3, 4), *arguments, BLOCK=64)
        launch(scale_kernel, (2, 3, 4), *arguments, BLOCK=64)
        assert plain.count == 6
        assert driver.launches[-1].grid == driver.launches[-2].grid == (2, 3, 4)


def check_functions(target):
    """What a launch calls is the function in C, and not Triton's launcher in front of it."""
    import mla_core.launch as module

    with null_driver(*target) as driver:
        x, y = torch.empty(64, 64).half(), torch.empty(64, 64).half()
        launch(scale_kernel, (2,), x, x, 96, 2.0, BLOCK=64)
        if target[0] == "cuda":
            launch(copy_tile_kernel, (1,), x, descriptor_of(y), 9, ROWS=8, COLUMNS=64)
        assert len(module._known) == len(driver.launches)
        assert all(known.flat.function is driver.launch for known in module._known.values())


def descriptor_of(tensor):
    base = Address(tensor.data_ptr(), tensor.dtype)
    return TensorDescriptor(base, [64, 64], [64, 1], [8, 64])


def plainly(kernel, grid, *args, **constants):
    kernel[grid](*args, **constants)


def strip(launches):
    return [(each.name, each.grid, each.stream, addresses(each.args)) for each in launches]


def check_repeats(target):
    """A repeat launches what Triton's own code would for the tensors at these addresses."""
    pages, fixed = torch.empty(2, 64, 64).half(), torch.empty(64)
    sets = [
        (torch.empty(64), torch.empty(64, 64).half(), torch.empty(64, 128).half()) for _ in range(3)
    ]

    def op(go, out, x, cache):
        go(scale_kernel, (2,), out, x, 96, 2.0, BLOCK=64)
        go(scale_kernel, (1, 3), fixed, cache[:, 64:], 96, 2.0, BLOCK=64)
        if target[0] == "cuda":
            go(copy_tile_kernel, (1,), out, descriptor_of(x), 9, ROWS=8, COLUMNS=64)
            tile = descriptor_of(pages[1])
            go(copy_tile_kernel, (1,), fixed[16:], tile, 9, ROWS=8, COLUMNS=64)

    with null_driver(*target) as driver, Plain() as plain:
        with recording() as tape:
            op(launch, *sets[0])
        repeat = tape.repeat(sets[0][:2], (*sets[0][2:], fixed, pages))
        for tensors in (*sets, *sets):
            driver.launches.clear()
            op(plainly, *tensors)
            expected = strip(driver.launches)
            driver.launches.clear()
            count = plain.count
            assert repeat(addresses((*tensors, fixed, pages)))
            assert plain.count == count
            assert strip(driver.launches) == expected
        last = strip(driver.launches)
        for function, args in repeat.calls(addresses((*sets[-1], fixed, pages))):
            function(*args)
        assert strip(driver.launches)[len(last) :] == last

        seen = []
        knobs.runtime.launch_exit_hook.add(seen.append)
        assert not repeat(addresses((*sets[1], fixed, pages)))
        knobs.runtime.launch_exit_hook.remove(seen.append)
        scale_kernel.pre_run_hooks.append(seen.append)
        assert not repeat(addresses((*sets[1], fixed, pages)))
        scale_kernel.pre_run_hooks.clear()
        assert repeat(addresses((*sets[1], fixed, pages)))
        forget()
        assert not repeat(addresses((*sets[1], fixed, pages)))
        assert not seen


def check_what_cannot_be_repeated():
    x, y, hidden = (torch.empty(200) for _ in range(3))

    def record(*tensors, given=(x, y), whole=(), **constants):
        with recording() as tape:
            launch(scale_kernel, (2,), *tensors, 96, 2.0, BLOCK=64, **constants)
        return tape.repeat(given, whole)

    with null_driver(*TARGETS[0]):
        for _ in range(2):
            assert record(x, y) is not None
        assert record(x, x[:64]) is not None
        # None of those that were named, and several of them.
        assert record(x, hidden) is None
        assert record(x, x[32:]) is None
        assert record(x, x[32:], given=(y,), whole=(x,)) is not None
        assert record(x, x[32:], given=(y,), whole=(x, x)) is None
        assert record(x, y, given=(x, y, y)) is None
        assert record(x, y, whole=(y,)) is None
        # An empty tensor is nowhere.
        assert record(x, y[:0], given=(x,)) is not None
        assert record(x, y[:0], given=(x, y[:0], y[:0])) is None
        # What Triton launches by itself: somebody watches, or a constant has no hash.
        assert record(x, y, extern_libs={}) is None
        scale_kernel.pre_run_hooks.append(lambda *args, **kwargs: None)
        assert record(x, y) is None
        scale_kernel.pre_run_hooks.clear()
        # Nothing is recorded outside of the block, and nothing twice.
        with recording() as outer:
            assert record(x, y) is not None
            launch(scale_kernel, (2,), x, y, 96, 2.0, BLOCK=64)
        launch(scale_kernel, (2,), hidden, y, 96, 2.0, BLOCK=64)
        assert len(outer.repeat((x, y), ()).steps) == 1


def check_other_devices(target):
    """Launches happen on the device of their tensors, which is then left again."""
    here = torch.empty(64)
    there, also_there = (torch.empty(64).as_subclass(Elsewhere) for _ in range(2))
    with null_driver(*target) as driver:
        home = driver.get_current_device()
        with recording() as tape:
            launch(scale_kernel, (2,), there, there, 60, 2.0, BLOCK=64)
        repeat = tape.repeat((there,), ())
        launch(scale_kernel, (2,), there, there, 60, 2.0, BLOCK=64)
        launch(scale_kernel, (2,), out_ptr=there, x_ptr=here, count=60, factor=2.0, BLOCK=64)
        assert repeat([also_there.data_ptr()])
        launch(scale_kernel, (2,), here, here, 60, 2.0, BLOCK=64)
        assert [each.stream for each in driver.launches] == [1, 1, 1, 1, 0]
        assert driver.launches[3].args[0] == also_there.data_ptr()
        assert driver.get_current_device() == home
        try:
            launch(scale_kernel, (2,), there, there, object(), 2.0, BLOCK=64)
        except Exception:
            assert driver.get_current_device() == home
        else:
            raise AssertionError("an object is no argument")
        # Those who are there already stay.
        driver.set_current_device(1)
        driver.set_current_device = None
        driver.get_current_device = lambda: 1
        driver.get_current_stream = lambda device: 10 + device
        launch(scale_kernel, (2,), there, there, 60, 2.0, BLOCK=64)
        forget()
        with recording() as tape:
            launch(scale_kernel, (2,), there, there, 60, 2.0, BLOCK=64)
        assert tape.repeat((there,), ())([there.data_ptr()])
        assert [each.stream for each in driver.launches[5:]] == [11, 11, 11]


def check_bound():
    """A process that launches too much starts over."""
    import mla_core.launch as module

    x, limit = torch.empty(128), module.MAX_KNOWN
    module.MAX_KNOWN = 2
    with null_driver(*TARGETS[0]), Plain() as plain:
        for count in (96, 97, 98, 98, 96):
            launch(scale_kernel, (2,), x, x, count, 2.0, BLOCK=64)
        assert plain.count == 4
        assert len(module._known) <= 2
    module.MAX_KNOWN = limit


if __name__ == "__main__":
    for each in TARGETS:
        check_same_launches(each)
        check_what_tells_launches_apart(each)
        check_plain_launches(each)
        check_functions(each)
        check_repeats(each)
        check_other_devices(each)
    check_what_cannot_be_repeated()
    check_bound()
    print("launches agree")
