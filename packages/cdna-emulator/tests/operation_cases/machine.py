"""One wave on either core, for tests that know the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from operation_cases import assembly, compare, states

LANE = np.arange(64)
ALL = (1 << 64) - 1
U32, U64, F32, F64 = np.uint32, np.uint64, np.float32, np.float64

#: The 8-bit formats of each architecture.
EIGHT = {
    ("gfx942", "fp8"): torch.float8_e4m3fnuz,
    ("gfx942", "bf8"): torch.float8_e5m2fnuz,
    ("gfx950", "fp8"): torch.float8_e4m3fn,
    ("gfx950", "bf8"): torch.float8_e5m2,
}


class Machine:
    """One wave on one core: set registers, run lines, read registers."""

    def __init__(self, core, arch="gfx942"):
        self.core, self.arch = core, arch
        self.state = states.State(np.random.default_rng(0), "integer")
        self.state.vgpr[:] = 0
        self.state.mode = 0x3F0
        self.exec(ALL)

    def exec(self, mask):
        self.state.set_pair(states.EXEC, mask)

    def v(self, index, values):
        """Set a vector register, or a pair from 64-bit values."""
        values = np.broadcast_to(np.asarray(values), 64)
        bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
        if values.dtype.itemsize == 8:
            self.state.vgpr[index] = bits.astype(U32)
            self.state.vgpr[index + 1] = (bits >> U64(32)).astype(U32)
        else:
            self.state.vgpr[index] = bits
        return self

    def s(self, index, value):
        self.state.sgpr[index] = value
        return self

    def run(self, *lines):
        instructions = assembly.parsed([*lines, "s_endpgm"], self.arch)
        if self.core == "native":
            self.after, counters = compare.run_native(instructions, self.state, self.arch)
            assert not counters.findings
        else:
            self.after = compare.run_numpy(instructions, self.state, self.arch)
            assert not self.after.faults
        return self

    def bits(self, index):
        return self.after.vgpr[index].copy()

    def f32(self, index):
        return self.bits(index).view(F32)

    def f64(self, index):
        low, high = self.bits(index).astype(U64), self.bits(index + 1).astype(U64)
        return (low | high << U64(32)).view(F64)

    def pair(self, index):
        return int(self.after.sgpr[index]) | int(self.after.sgpr[index + 1]) << 32


@pytest.fixture(params=["native", "numpy"])
def machine(request):
    return lambda arch="gfx942": Machine(request.param, arch)


def f32_bits(*patterns):
    return np.resize(np.array(patterns, U32), 64).view(F32)


def same_floats(got, want):
    """Equal, zeros by their sign, NaN with NaN."""
    got, want = np.asarray(got), np.asarray(want)
    nan = np.isnan(got) & np.isnan(want)
    np.testing.assert_array_equal(np.where(nan, 0, got), np.where(nan, 0, want))
    np.testing.assert_array_equal(nan | np.signbit(got) == nan | np.signbit(want), True)


def ordinary_f32(seed, count=64, spread=40):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread, count)).astype(F32)
