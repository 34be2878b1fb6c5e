"""Compile a kernel of core for each architecture; run by `test_compiling`.

A process of its own: in pytest's, Triton's interpreter replaces the compiler.
"""

from __future__ import annotations

import json
import os

import torch

from mla_core import arch
from mla_core.compiling import TARGETS, compile_launch, kernels, recorded
from mla_core.reduce import reduce_partials
from mla_core.resources import resources_of


def main():
    outs = []
    for name in TARGETS:
        with recorded(name, "mla_core.kernels") as launches:
            assert arch.arch_of("cpu") == name
            out, _ = reduce_partials(
                torch.full((3, 4, 2, 64), 2.0), torch.zeros(3, 4, 2), backend="triton"
            )
            outs.append(out)
        assert arch.arch_of("cpu") == "cpu"
        (launch,) = launches
        compiled = compile_launch(launch, name)
        resources = resources_of(compiled)
        print(
            json.dumps(
                {
                    "arch": name,
                    "kernel": launch.kernel.fn.__qualname__,
                    "kinds": sorted({"cubin", "hsaco"} & compiled.asm.keys()),
                    "registers": resources.registers,
                    "excess": resources.excess(name),
                    "is_restored": os.environ.get("TRITON_INTERPRET") == "0",
                }
            )
        )
    names = {name for _, name, _ in kernels("mla_core.kernels")}
    assert "reduce_partials_kernel" in names, names


if __name__ == "__main__":
    main()
