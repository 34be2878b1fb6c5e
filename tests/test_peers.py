"""Adapters of other libraries, where the library is at hand; what they refuse, everywhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mla_core import bench
from mla_core.bench.workload import build_decode
from mla_core.errors import BackendUnavailableError, MLAError

pytest.importorskip("triton")

PEERS = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: SGLang's kernel computes with rows of heads that do not exist, and drops them.
IGNORE_NAN = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def sglang_triton() -> Iterator[ModuleType]:
    """Return the adapter, as nobody used it before."""
    spec = importlib.util.spec_from_file_location("sglang_triton", PEERS / "sglang_triton.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def with_sglang(sglang_triton: ModuleType) -> ModuleType:
    """Skip where SGLang's files are neither installed nor in SGLANG_DIR."""
    try:
        sglang_triton._root()
    except BackendUnavailableError as exc:
        pytest.skip(str(exc))
    return sglang_triton


@IGNORE_NAN
@pytest.mark.kernel
@pytest.mark.parametrize(
    "name",
    [
        "decode/bf16/h2/q1/b1/s1/p16",
        "decode/bf16/h3/q1/b2/s40/p16",
        "decode/bf16/h17/q1/b3/s70/p1/lognormal",
    ],
)
def test_sglang_agrees_with_the_truth(with_sglang: ModuleType, name: str, seed: int):
    before = dict(sys.modules)
    workload = build_decode(bench.parse_case(name), DEVICE, seed=seed)
    prepared = with_sglang.CONTENDER.prepare(workload)
    assert "sglang" not in sys.modules or "sglang" in before
    assert prepared.kernel.startswith("sglang ")
    for call in (prepared.step, prepared.replay):
        outs = [call(i) for i in range(len(workload.kvs))]
        assert workload.error(outs) < 1e-2
        for out in outs:
            out.fill_(float("nan"))


@IGNORE_NAN
@pytest.mark.kernel
def test_sglang_uses_several_splits(with_sglang: ModuleType, seed: int):
    workload = build_decode(bench.parse_case("decode/bf16/h4/q1/b1/s300/p64"), DEVICE, seed=seed)
    prepared = with_sglang.CONTENDER.prepare(workload)
    used = int(prepared.kernel.partition("num_kv_splits=")[2].split()[0])
    assert used > 1
    assert workload.error([prepared.step(i) for i in range(len(workload.kvs))]) < 1e-2


@pytest.mark.gpu
def test_sglang_is_captured(with_sglang: ModuleType):
    case = bench.parse_case("decode/bf16/h16/q1/b4/s300/p16/lognormal")
    settings = bench.Settings(DEVICE, graph=True, max_samples=5, seconds=0.1)
    events = list(bench.run([case], [with_sglang.CONTENDER], settings))
    assert [event.outcome for event in events] == ["timed"] * 2, [e.detail for e in events]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode/fp32/h3/q1/b2/s40/p16", "q_dtype must be bf16, got fp32"),
        ("decode/bf16-fp8ds656/h2/q1/b2/s70/p64", "layout must be bf16, got fp8_ds656"),
        ("decode/bf16/h3/q2/b2/s40/p16", "q_len must be 1, got 2"),
    ],
)
def test_sglang_refuses_other_cases(sglang_triton: ModuleType, name: str, message: str):
    workload = build_decode(bench.parse_case(name), DEVICE, seed=0)
    with pytest.raises(MLAError, match=f"sglang_triton: {message}"):
        sglang_triton.CONTENDER.prepare(workload)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "decode_attention.py must be in the directory SGLANG_DIR, .* not in .*wheel"),
        ("import sglang.srt.distributed", "does not load alone: No module named 'sglang"),
        ("", "must be like 0.5.23: .* no attribute 'decode_attention_fwd'"),
    ],
    ids=["absent", "other_imports", "other_names"],
)
def test_sglang_of_another_kind_is_refused(
    sglang_triton: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    message: str,
):
    root = tmp_path / "wheel"
    folder = root / sglang_triton._FOLDER
    folder.mkdir(parents=True)
    if source is not None:
        for name in ("score_mod", "decode_attention", "metadata"):
            (folder / f"{name}.py").write_text(source if name == "decode_attention" else "")
    monkeypatch.setenv("SGLANG_DIR", str(root))
    workload = build_decode(bench.parse_case("decode/bf16/h2/q1/b1/s4/p1"), DEVICE, seed=0)
    with pytest.raises(BackendUnavailableError, match=message):
        sglang_triton.CONTENDER.prepare(workload)
    assert not [name for name in sys.modules if name.startswith("sglang.")]


def test_an_installed_sglang_is_found_and_not_imported(
    sglang_triton: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / sglang_triton._FOLDER
    folder.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "sglang-0.1.dist-info").mkdir()
    (tmp_path / "sglang-0.1.dist-info" / "METADATA").write_text("Name: sglang\nVersion: 0.1\n")
    for name in ("score_mod", "decode_attention", "metadata"):
        source = "decode_attention_fwd = get_num_kv_splits_triton = __file__\n"
        (folder / f"{name}.py").write_text(source)
    monkeypatch.delenv("SGLANG_DIR", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    kernels = sglang_triton._kernels()
    assert kernels.version == "0.1"
    assert kernels.decode_attention_fwd == str(folder / "decode_attention.py")


def test_sglang_needs_an_nvidia_gpu_or_the_interpreter(
    sglang_triton: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(BackendUnavailableError, match="or the CPU with TRITON_INTERPRET=1"):
        sglang_triton._refuse_device(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "7.2")
    with pytest.raises(BackendUnavailableError, match="must be an NVIDIA GPU; on AMD"):
        sglang_triton._refuse_device(torch.device("cuda"))
