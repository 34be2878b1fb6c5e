"""The interpreter's repairs, and alarms for the day Triton moves or fixes what they replace."""

from __future__ import annotations

import importlib.util
import inspect
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from mla_core.errors import BackendUnavailableError
from mla_core.testing import interpreter

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(
        "triton" in sys.modules and not interpreter.is_enabled(), reason="kernels run on a GPU here"
    ),
]


@pytest.fixture(scope="module")
def kernels():
    """Small kernels, defined after `enable` so that they are interpreted."""
    interpreter.enable()
    path = __file__.replace("test_interpreter.py", "interpreter_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreter_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_multiplies_values(kernels, dtype):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.full((16, 32), float("nan"))
    kernels.dot_kernel[(1,)](a, b, out, M=16, N=32, K=64)
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_dot_adds_to_its_accumulator(kernels):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.randn(16, 16)
    expected = out + a.float() @ b.float()
    kernels.dot_accumulate_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_cast_rounds_to_nearest_even(kernels, dtype):
    ties = torch.tensor([1.00390625, 1.01171875, 1.0625, 1.1875, -1.0625, 2.0**-8, 2.0**-10, 0.0])
    x = torch.cat([torch.randn(1000), ties, torch.randn(16) * 1e-3])
    out = torch.zeros(1024, dtype=dtype)
    kernels.cast_kernel[(1,)](x, out, N=1024)
    assert torch.equal(out.float(), x.to(dtype).float())


def test_fp8_cast_saturates_and_keeps_nan(kernels):
    x = torch.tensor([1e6, -1e6, float("inf"), float("nan")])
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)
    kernels.cast_kernel[(1,)](x, out, N=4)
    assert out.float()[:3].tolist() == [448.0, -448.0, 448.0]
    assert out.float()[3].isnan()


def test_fma_rounds_once(kernels):
    # Exactly, as fractions, on random numbers that cancel, on ties, and on what is not finite.
    x, y = torch.randn(2, 1000)
    z = -(x * y) * (1 + 2.0 ** torch.randint(-30, 3, (1000,)))
    x[:3], y[:3] = 1 + 2.0**-12, 1 + 2.0**-12
    z[:3] = torch.tensor([2.0**-60, -(2.0**-60), 0.0])
    x[3], z[4], y[5] = float("inf"), float("nan"), 0.0
    z[5], x[6:8], z[6:8] = 0.0, 3e38, torch.tensor([float("-inf"), -3e38])
    y[6:8], z[8] = 2.0, 1e-45
    x[8:10], y[8:10] = 1e-30, -1e-30
    z = torch.cat([z, torch.zeros(24)])
    x, y = (torch.nn.functional.pad(each, (0, 24)) for each in (x, y))
    out = torch.zeros(1024)
    kernels.fma_kernel[(1,)](x, y, z, out, N=1024)
    for got, *terms in zip(out.tolist(), x.tolist(), y.tolist(), z.tolist(), strict=True):
        a, b, c = terms
        if not all(map(math.isfinite, terms)):
            expected = a * b + c
            assert got == expected or (math.isnan(got) and math.isnan(expected))
            continue
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        # Nothing of fp32 is closer; of two that are as close, the even one.
        bits = torch.tensor(got).view(torch.int32).item()
        near = torch.tensor([bits - 1, bits, bits + 1], dtype=torch.int32).view(torch.float32)
        if math.isinf(got):
            assert abs(exact) >= Fraction(2**128 - 2**103)
            continue
        error = abs(Fraction(got) - exact)
        others = [abs(Fraction(each) - exact) for each in near.tolist() if math.isfinite(each)]
        assert error <= min(others)
        assert error == 0 or others.count(error) == 1 or bits % 2 == 0


def test_widening_is_exact(kernels):
    x = torch.cat([torch.randn(60), torch.tensor([0.0, -0.0, 1e-40, float("inf")])]).bfloat16()
    out = torch.zeros(64)
    kernels.cast_kernel[(1,)](x, out, N=64)
    assert torch.equal(out, x.float())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ],
    ids=str,
)
def test_every_fp8_value_widens(kernels, dtype):
    x = torch.arange(256).to(torch.uint8).view(dtype)
    out = torch.zeros(256)
    kernels.cast_kernel[(1,)](x, out, N=256)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)


def test_autotune_needs_no_gpu(kernels):
    x, out = torch.randn(64), torch.zeros(64)
    kernels.tuned_copy_kernel[(1,)](x, out, 64)
    assert torch.equal(out, x)


def test_upstream_still_needs_the_repairs(kernels):
    """Fails when Triton repairs itself (then drop the patch) or when nothing is patched."""
    from triton import language as tl
    from triton.runtime import interpreter as triton_interpreter

    convert = triton_interpreter._convert_float
    upstream_convert = inspect.unwrap(convert)
    assert upstream_convert is not convert
    x = torch.tensor([1.0078124]).numpy()
    nearest, truncated = 0x3F81, 0x3F80
    assert int(convert(x, tl.float32, tl.bfloat16, None)[0]) == nearest
    assert int(upstream_convert(x, tl.float32, tl.bfloat16, None)[0]) == truncated

    builder = triton_interpreter.InterpreterBuilder
    upstream_dot = inspect.unwrap(builder.create_dot)
    assert upstream_dot is not builder.create_dot
    one = torch.ones(16, 16).bfloat16().view(torch.uint16).numpy()
    ones = triton_interpreter.TensorHandle(one, tl.bfloat16)
    zeros = triton_interpreter.TensorHandle(torch.zeros(16, 16).numpy(), tl.float32)
    assert upstream_dot(None, ones, ones, zeros, None, 0).data[0, 0] != 16.0
    assert builder.create_dot(None, ones, ones, zeros, None, 0).data[0, 0] == 16.0

    upstream_fma = inspect.unwrap(builder.create_fma)
    assert upstream_fma is not builder.create_fma
    x = triton_interpreter.TensorHandle(torch.tensor([1 + 2.0**-12]).numpy(), tl.float32)
    z = triton_interpreter.TensorHandle(torch.tensor([-1 - 2.0**-11]).numpy(), tl.float32)
    assert upstream_fma(None, x, x, z).data[0] == 0.0
    assert builder.create_fma(None, x, x, z).data[0] == 2.0**-24


def test_upstream_still_refuses_fnuz(kernels, monkeypatch):
    """Fails when Triton learns these types; then drop the patch."""
    from triton.runtime import interpreter as triton_interpreter

    upstream = inspect.unwrap(triton_interpreter._patch_lang_core)
    assert upstream is not triton_interpreter._patch_lang_core
    monkeypatch.setattr(triton_interpreter, "_patch_lang_core", upstream)
    x = torch.zeros(16).to(torch.float8_e4m3fnuz)
    with pytest.raises(Exception, match="fail to convert fp8e4b8"):
        kernels.cast_kernel[(1,)](x, torch.zeros(16), N=16)


def test_enable_twice_patches_once(kernels):
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    interpreter.enable()
    assert InterpreterBuilder.create_dot is before


def test_moved_name_is_an_error(kernels, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    with pytest.raises(BackendUnavailableError, match=r"must have InterpreterBuilder\.create_dot"):
        interpreter.enable()


def test_missing_driver_switch_is_an_error(kernels, monkeypatch):
    from triton.runtime import driver

    monkeypatch.delattr(type(driver), "set_active")
    with pytest.raises(BackendUnavailableError, match=r"must have triton\.runtime\.driver"):
        interpreter.enable()


def test_old_triton_with_new_numpy_is_an_error(kernels, monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("numpy.__version__", "2.4.6")
    with pytest.raises(BackendUnavailableError, match=r"numpy must be < 2\.4 with triton 3\.6\.0"):
        interpreter.enable()
    monkeypatch.setattr("numpy.__version__", "2.3.5")
    interpreter.enable()


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("import triton", "triton must not be imported before"),
        ("import sys; sys.modules['triton'] = None", "triton must be importable"),
    ],
    ids=["imported-for-gpu", "missing"],
)
def test_enable_in_the_wrong_process(before, message):
    code = f"{before}\nfrom mla_core.testing.interpreter import enable\nenable()"
    environment = {"TRITON_INTERPRET": "0", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
