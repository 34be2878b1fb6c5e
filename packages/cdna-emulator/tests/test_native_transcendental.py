"""Transcendental instructions of the native core against NumPy in double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

X, D = 16, 0
DENORMALS = 0x3F0
Function = Callable[[np.ndarray], np.ndarray]


def _sine(turns: np.ndarray) -> np.ndarray:
    return np.where(np.abs(turns) > 256, 0.0, np.sin(2 * np.pi * (turns - np.rint(turns))))


def _cosine(turns: np.ndarray) -> np.ndarray:
    return np.where(np.abs(turns) > 256, 1.0, np.cos(2 * np.pi * (turns - np.rint(turns))))


FUNCTIONS: dict[str, Function] = {
    "exp": np.exp2,
    "log": np.log2,
    "rcp": lambda x: 1 / x,
    "rsq": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": _sine,
    "cos": _cosine,
}
SINGLE = [f"v_{name}_f32 v0, v16" for name in [*FUNCTIONS, "rcp_iflag", "exp_legacy", "log_legacy"]]
HALF = [f"v_{name}_f16 v0, v16" for name in FUNCTIONS]
DOUBLE = [f"v_{name}_f64 v[0:1], v[16:17]" for name in ("rcp", "rsq", "sqrt")]
MODIFIED = ["v_exp_f32 v0, -|v16| clamp", "v_rcp_f32 v0, v16 mul:4"]


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Poles and NaN are what these tests are about."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="module")
def compiled(instructions):
    return instructions(SINGLE + HALF + DOUBLE + MODIFIED, "gfx942")


def _function(text: str) -> Function:
    return FUNCTIONS[text.split("_")[1]]


@pytest.mark.parametrize("text", SINGLE)
def test_f32(compiled, text, seed):
    """One unit of the last place at most, with denormals as zeros on both sides."""
    rng = np.random.default_rng(seed)
    for round_ in range(40):
        bits = rng.integers(0, 2**32, 64, dtype=np.uint64).astype(np.uint32)
        values = bits.view(np.float32)
        if round_ % 2:
            values = (rng.standard_normal(64) * 2.0 ** rng.integers(-8, 9, 64)).astype(np.float32)
        after = compiled.run(text, {X: values.view(np.uint32)})
        got = after[D].view(np.float32)
        smallest = np.float32(2.0**-126)
        x = np.where(np.abs(values) < smallest, np.copysign(0.0, values), values)
        exact = _function(text)(x.astype(np.float64))
        exact = np.where(np.isinf(x) & (("sin" in text) | ("cos" in text)), np.nan, exact)
        want = exact.astype(np.float32)
        ordinary = np.isfinite(want) & (np.abs(exact) >= smallest)
        ulp = np.spacing(np.abs(want[ordinary]))
        floor = 1e-15 if "sin" in text or "cos" in text else 0  # the reference near its zeros
        error = np.abs(got[ordinary] - exact[ordinary])
        assert (error <= ulp + floor).all()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(got[np.isinf(want)], want[np.isinf(want)])
        tiny = np.isfinite(want) & (np.abs(exact) < smallest / 2)
        if "sin" not in text and "cos" not in text:
            assert (got[tiny] == 0).all()


SPECIAL_INPUTS = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, -1.0]
SPECIAL_RESULTS = {
    "exp": [1, 1, np.inf, 0, np.nan, 1, 1, 0.5],
    "log": [-np.inf, -np.inf, np.inf, np.nan, np.nan, -np.inf, -np.inf, np.nan],
    "rcp": [np.inf, -np.inf, 0, -0.0, np.nan, np.inf, -np.inf, -1],
    "rsq": [np.inf, -np.inf, 0, np.nan, np.nan, np.inf, -np.inf, np.nan],
    "sqrt": [0, -0.0, np.inf, np.nan, np.nan, 0, -0.0, np.nan],
    "sin": [0, -0.0, np.nan, np.nan, np.nan, 0, -0.0, 0],
    "cos": [1, 1, np.nan, np.nan, np.nan, 1, 1, 1],
}


@pytest.mark.parametrize("name", SPECIAL_RESULTS)
def test_f32_special_values(compiled, name):
    values = np.resize(np.array(SPECIAL_INPUTS, np.float32), 64)
    want = np.resize(np.array(SPECIAL_RESULTS[name], np.float32), 64)
    got = compiled.run(f"v_{name}_f32 v0, v16", {X: values.view(np.uint32)})[D].view(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))
    made = np.isnan(got) & ~np.isnan(values)
    assert (got.view(np.uint32)[made] == 0x7FC00000).all()


def test_exp2_of_integers_is_exact(compiled):
    values = np.arange(-126, 130, dtype=np.float32)
    for part in values.reshape(4, 64):
        got = compiled.run("v_exp_f32 v0, v16", {X: part.view(np.uint32)})[D].view(np.float32)
        np.testing.assert_array_equal(got, np.exp2(part.astype(np.float64)).astype(np.float32))


def test_f32_modifiers_and_exec(compiled, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(64).astype(np.float32)
    registers = {X: values.view(np.uint32)}
    after = compiled.run(MODIFIED[0], registers, exec_mask=0xFFFF0000FFFF)
    got = after[D].view(np.float32)
    active = [*range(16), *range(32, 48)]
    want = np.exp2(-np.abs(values.astype(np.float64))).astype(np.float32)
    np.testing.assert_array_equal(got[active], want[active])
    assert (after[D, 16:32] == 0xDEADBEEF).all()
    # An output modifier acts only without IEEE mode and with denormal results flushed.
    after = compiled.run(MODIFIED[1], registers, mode=DENORMALS & ~0x230)
    np.testing.assert_allclose(after[D].view(np.float32), 4 / values, rtol=1e-6)
    after = compiled.run(MODIFIED[1], registers)
    np.testing.assert_allclose(after[D].view(np.float32), 1 / values, rtol=1e-6)


@pytest.mark.parametrize("text", HALF)
def test_all_f16(compiled, text):
    worst = 0.0
    for first in range(0, 65536, 64):
        codes = np.arange(first, first + 64, dtype=np.uint32)
        values = codes.astype(np.uint16).view(np.float16)
        got = (compiled.run(text, {X: codes})[D] & 0xFFFF).astype(np.uint16).view(np.float16)
        exact = _function(text)(values.astype(np.float64))
        if "sin" in text or "cos" in text:
            exact = np.where(np.isinf(values), np.nan, exact)
        want = exact.astype(np.float16)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(got[np.isinf(want)], want[np.isinf(want)])
        ordinary = np.isfinite(want)
        ulp = np.spacing(np.abs(want[ordinary]).astype(np.float16)).astype(np.float64)
        error = np.abs(got[ordinary].astype(np.float64) - exact[ordinary]) / ulp
        worst = max(worst, error.max(initial=0.0))
    assert worst <= 0.5001


@pytest.mark.parametrize("text", DOUBLE)
def test_f64(compiled, text, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, 64, dtype=np.uint64).view(np.float64).copy()
    values[:6] = [0.0, -0.0, np.inf, -1.0, 4.0, 5e-324]
    pair = values.view(np.uint32).reshape(64, 2)
    after = compiled.run(text, {X: pair[:, 0], X + 1: pair[:, 1]})
    got = np.stack([after[D], after[D + 1]], axis=1).copy().view(np.float64)[:, 0]
    np.testing.assert_allclose(got, _function(text)(values), rtol=3e-16)
