"""Launches of compiled kernels under a driver that launches nothing; run by `test_launch`.

A process of its own: in pytest's, Triton's interpreter replaces the compiler.
"""

from __future__ import annotations

import torch
import triton
from triton import knobs
from triton import language as tl
from triton.runtime.jit import JITFunction

from mla_core.launch import forget, launch
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
    check_bound()
    print("launches agree")
