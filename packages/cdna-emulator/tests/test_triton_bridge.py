"""Binding arguments as Triton does, the compiler process, and emulated kernels in a module."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cdna_emulator.code_object import CodeObject
from cdna_emulator.errors import ArgumentError, ToolchainError

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from cdna_emulator import triton_bridge, triton_worker  # noqa: E402
from cdna_emulator.triton_bridge import emulate, locate, replaced  # noqa: E402
from cdna_emulator.triton_compiler import TritonWorker  # noqa: E402
from cdna_emulator.triton_signature import Parameter, bind, specialise  # noqa: E402

KERNELS = Path(__file__).with_name("bridge_kernels.py")
COPY = f"{KERNELS}:scaled_copy"


def parameter(name, **changed):
    plain = {
        "is_constexpr": False,
        "type": "",
        "has_default": False,
        "default": None,
        "specialize": True,
        "align": True,
    }
    return Parameter(name=name, **{**plain, **changed})


def special(value, **changed):
    one = parameter("x", **changed)
    found = specialise("kernel", [one], {"x": value})
    return found.signature["x"], found.attributes.get("x", []), len(found.passed)


ALIGNED = [["tt.divisibility", 16]]


@pytest.mark.parametrize(
    ("value", "changed", "expected"),
    [
        (1, {}, ("constexpr", [], 0)),
        (1, {"specialize": False}, ("i32", [], 1)),
        (7, {}, ("i32", [], 1)),
        (32, {}, ("i32", ALIGNED, 1)),
        (0, {}, ("i32", ALIGNED, 1)),
        (32, {"align": False}, ("i32", [], 1)),
        (32, {"specialize": False}, ("i32", [], 1)),
        (-(2**31), {}, ("i32", ALIGNED, 1)),
        (2**31, {}, ("i64", ALIGNED, 1)),
        (2**63 + 1, {}, ("u64", [], 1)),
        (3, {"type": "i64"}, ("i64", [], 1)),
        (True, {}, ("u1", [], 1)),
        (0.5, {}, ("fp32", [], 1)),
        (0.5, {"type": "fp64"}, ("fp64", [], 1)),
        (None, {}, ("constexpr", [], 0)),
        (5, {"is_constexpr": True}, ("constexpr", [], 0)),
    ],
)
def test_scalars_are_classified_as_triton_does(value, changed, expected):
    assert special(value, **changed) == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, "*bf16"),
        (torch.float16, "*fp16"),
        (torch.float64, "*fp64"),
        (torch.uint8, "*u8"),
        (torch.int64, "*i64"),
        (torch.bool, "*i1"),
        (torch.float8_e4m3fn, "*fp8e4nv"),
        (torch.float8_e5m2, "*fp8e5"),
        (torch.float8_e4m3fnuz, "*fp8e4b8"),
        (torch.float8_e5m2fnuz, "*fp8e5b16"),
    ],
)
def test_tensors_become_pointers(dtype, expected):
    kind, hints, passed = special(torch.zeros(64).to(dtype))
    assert kind == expected
    assert hints == [*ALIGNED, ["tt.pointer_range", 32]]
    assert passed == 1


def test_arrays_become_pointers_and_alignment_is_seen():
    array = np.zeros(64, np.int16)
    start = -(array.ctypes.data // 2) % 8
    assert special(array[start:])[:2] == ("*i16", [*ALIGNED, ["tt.pointer_range", 32]])
    assert special(array[start + 1 :])[:2] == ("*i16", [["tt.pointer_range", 32]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "must be a tensor, an array, int"),
        (2**64, "must fit in 64 bits"),
        (np.zeros(2, np.complex64), "must be of a dtype in"),
    ],
)
def test_other_arguments_are_refused(value, message):
    with pytest.raises(ArgumentError, match=f"kernel: argument x {message}"):
        special(value)


def test_bind():
    parameters = [parameter("a"), parameter("b", has_default=True, default=4)]
    assert bind("k", parameters, (1,), {"num_warps": 2}) == ({"a": 1, "b": 4}, {"num_warps": 2})
    assert bind("k", parameters, (), {"b": 2, "a": 1}) == ({"a": 1, "b": 2}, {})
    with pytest.raises(ArgumentError, match="argument a must be passed, got none"):
        bind("k", parameters, (), {})
    with pytest.raises(ArgumentError, match="argument a must be passed once"):
        bind("k", parameters, (1,), {"a": 1})
    with pytest.raises(ArgumentError, match="at most 2 arguments"):
        bind("k", parameters, (1, 2, 3), {})


def test_same_machine_code_for_same_specialisation():
    def key(value):
        return specialise("k", [parameter("x")], {"x": value}).key

    assert key(3) == key(5)
    assert len({key(value) for value in (3, 1, 16, 2**40, 1.0, True, None)}) == 7


def test_locate():
    assert locate("package.module:name") == ("package.module", "name")
    assert locate(COPY) == (str(KERNELS), "scaled_copy")
    for wrong in ("name", ":name", "file.py:"):
        with pytest.raises(ArgumentError, match="kernel must be"):
            locate(wrong)
    with pytest.raises(ArgumentError, match="a jitted function or a string, got int"):
        locate(3)

    def inner():
        pass

    with pytest.raises(ArgumentError, match="at module level"):
        locate(inner)
    # An importable module goes by name, a file that was loaded by path by its path.
    assert locate(triton_bridge.locate) == ("cdna_emulator.triton_bridge", "locate")
    spec = importlib.util.spec_from_file_location("loaded_by_path", KERNELS)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loaded_by_path"] = module
    try:
        spec.loader.exec_module(module)
        assert locate(module.scaled_copy) == (str(KERNELS), "scaled_copy")
        assert locate(module.tuned) == (str(KERNELS), "tuned")
    finally:
        del sys.modules["loaded_by_path"]


@pytest.fixture(scope="module")
def compiler():
    """A compiler process of this module's own, which tests may break."""
    own = TritonWorker()
    yield own
    own.close()


def test_describe(compiler):
    parameters = {one.name: one for one in compiler.describe(str(KERNELS), "scaled_copy")}
    assert list(parameters) == ["x_ptr", "o_ptr", "n", "plain", "loose", "scale", "BLOCK"]
    assert not parameters["plain"].specialize
    assert parameters["loose"].specialize
    assert not parameters["loose"].align
    assert parameters["scale"].type == "fp64"
    assert parameters["BLOCK"].is_constexpr
    assert parameters["BLOCK"].default == 64


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_compile(compiler, arch):
    parameters = compiler.describe(str(KERNELS), "scaled_copy")
    x = torch.zeros(100)
    values, options = bind("scaled_copy", parameters, (x, x, 100, 1, 16, 0.5), {"num_warps": 2})
    found = specialise("scaled_copy", parameters, values)
    compiled = compiler.compile(str(KERNELS), "scaled_copy", arch, found, options)
    image = CodeObject.read(compiled.code_object)
    assert image.arch == arch
    assert list(image.kernels) == [compiled.name] == ["scaled_copy"]
    assert compiled.num_warps == 2
    assert "s_endpgm" in compiled.assembly
    # Seven parameters less the constexpr, and two scratch pointers behind them.
    visible = [
        one
        for one in image.kernels["scaled_copy"].arguments
        if not one.value_kind.startswith("hidden_")
    ]
    assert [one.size for one in visible] == [8, 8, 4, 4, 4, 8, 8, 8]
    assert compiler.compile(str(KERNELS), "scaled_copy", arch, found, options) is compiled


def test_errors_of_the_compiler_are_shown(compiler):
    parameters = compiler.describe(str(KERNELS), "broken")
    found = specialise("broken", parameters, {"x_ptr": torch.zeros(64), "BLOCK": 64})
    with pytest.raises(ToolchainError, match="no_such_name"):
        compiler.compile(str(KERNELS), "broken", "gfx942", found, {})
    with pytest.raises(ToolchainError, match="must be decorated with"):
        compiler.describe(str(KERNELS), "NOT_A_KERNEL")
    with pytest.raises(ToolchainError, match="no_such_module"):
        compiler.describe("no_such_module", "kernel")


def test_process_starts_again_after_its_death(compiler):
    compiler.describe(str(KERNELS), "tuned")
    compiler._process.kill()
    compiler._process.wait()
    assert [one.name for one in compiler.describe(str(KERNELS), "broken")] == ["x_ptr", "BLOCK"]


def test_folder_without_triton(tmp_path):
    with pytest.raises(ToolchainError, match="python_path must hold a triton package"):
        TritonWorker(tmp_path)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_emulated_kernel(arch):
    x, out = torch.randn(150), torch.full((200,), 7.0)
    kernel = emulate(COPY, arch)
    result = kernel[(3,)](x, out, 150, 1, 16, 0.5, num_warps=1)
    assert torch.equal(out[:150], x * 0.5)
    assert (out[150:] == 7).all()
    assert result.instructions > 0
    out.zero_()
    kernel[lambda values: (-(-values["n"] // values["BLOCK"]),)](x, out, 70, 1, 16, 2.0, BLOCK=32)
    assert torch.equal(out[:70], x[:70] * 2)
    assert not out[70:].any()


def test_numpy_arrays():
    x = np.arange(64, dtype=np.float32)
    out = np.zeros_like(x)
    emulate(COPY, "gfx942")[1](x, out, 64, 1, 16, 3.0)
    assert (out == 3 * x).all()


@pytest.mark.parametrize("grid", [(), (0,), (1, 1, 1, 1), ("1",), 0])
def test_grids_are_checked(grid):
    x = torch.zeros(64)
    with pytest.raises(ArgumentError, match="scaled_copy: grid must be one to three"):
        emulate(COPY, "gfx942")[grid](x, x, 64, 1, 16, 1.0)


def test_kernels_in_their_module(monkeypatch):
    """Launchers that look a kernel up in its module get the emulated one inside the block."""
    spec = importlib.util.spec_from_file_location("bridge_kernels", KERNELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "bridge_kernels", module)
    monkeypatch.syspath_prepend(str(KERNELS.parent))
    own = module.tuned
    x = torch.zeros(128, dtype=torch.int32)
    with replaced("gfx950", "bridge_kernels:tuned") as results:
        module.tuned[(2,)](x, 100, BLOCK=64)
    assert module.tuned is own
    assert len(results) == 1
    assert torch.equal(x, torch.where(torch.arange(128) < 100, torch.arange(128), 0).int())


def test_no_compiler_starts_another(monkeypatch):
    monkeypatch.setenv(triton_worker.INSIDE, "1")
    compiler = TritonWorker()
    with pytest.raises(SystemExit, match="while its file was imported"):
        compiler.describe(str(KERNELS), "scaled_copy")


SCRIPT = """
import torch, triton
from triton import language as tl
from cdna_emulator.triton_bridge import emulate

@triton.jit
def twice(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 2.0 * tl.load(x + tl.arange(0, BLOCK)))

x = torch.randn(256)
y = x.clone()
emulate(twice, "gfx942")[(1,)](x, BLOCK=256)
print(torch.equal(x, 2 * y))
"""


def test_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True"], done.stderr
