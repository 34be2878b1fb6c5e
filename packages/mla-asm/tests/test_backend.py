"""The ``asm`` backend: discovered, honest about this machine, and as capable as its catalogs."""

from __future__ import annotations

import pytest
import torch

from mla_asm import backend, emulation, read_catalogs
from mla_asm.capabilities import capabilities
from mla_core import MLADims, Problem, UnsupportedProblemError, registry, select
from mla_core.errors import BackendUnavailableError, LayoutError


def problem(arch: str, **changes) -> Problem:
    return Problem("decode", arch, "bf16", "bf16", MLADims(16), page_size=64, **changes)


def test_it_is_discovered():
    record = registry.record("asm")
    assert record.distributions == ("mla-asm",)
    assert record.require().priority == 100
    assert "emulated, slowly" in record.require().description


def test_capabilities_are_those_of_the_catalogs():
    catalogs = read_catalogs()
    assert set(catalogs) == {"gfx942", "gfx950", "sm90a"}
    derived = capabilities(row for rows in catalogs.values() for row in rows)
    assert registry.record("asm").require().capabilities == derived
    assert {arch for row in derived for arch in row.archs} == {"gfx942", "gfx950", "cpu"}


@pytest.mark.parametrize(
    ("arch", "hip", "found", "message"),
    [
        ("sm90", None, "", "asm has kernels for gfx942, gfx950, this is sm90"),
        ("gfx942", None, "", "asm needs a ROCm build of torch on gfx942, this is torch"),
        ("gfx950", "7.2", "libamdhip64.so", "asm needs the HIP runtime libamdhip64.so"),
        ("gfx950", "7.2", "/opt/rocm/lib/libamdhip64.so", None),
    ],
)
def test_a_gpu_needs_rocm(monkeypatch, arch, hip, found, message):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backend, "library_path", lambda: found)
    failure = select.probe_failure(backend.BACKEND, arch)
    assert failure is None if message is None else message in failure


def test_a_cpu_needs_the_emulator(monkeypatch):
    monkeypatch.delenv("MLA_ASM_EMULATE", raising=False)
    with pytest.raises(BackendUnavailableError, match="set MLA_ASM_EMULATE=1"):
        select.select(problem("cpu"), backend="asm")
    monkeypatch.setenv("MLA_ASM_EMULATE", "gfx950")
    assert select.select(problem("cpu"), backend="asm").backend.name == "asm"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "mla-asm\[emulator\]"'):
        select.select(problem("cpu"), backend="asm")


def test_emulation_is_never_chosen_automatically(monkeypatch):
    monkeypatch.setenv("MLA_ASM_EMULATE", "1")
    choice = select.select(problem("cpu"))
    assert choice.backend.name != "asm"
    reasons = {verdict.backend: verdict.reasons for verdict in choice.rejected}
    assert "runs only when 'asm' is named" in reasons["asm"][0]


@pytest.mark.parametrize(
    ("value", "arch"), [("0", None), ("1", "gfx942"), ("gfx942", "gfx942"), ("gfx950", "gfx950")]
)
def test_the_variable_chooses_the_architecture(monkeypatch, value, arch):
    monkeypatch.setenv("MLA_ASM_EMULATE", value)
    assert backend.emulator.emulated_arch() == arch
    with emulation("gfx950"):
        assert backend.emulator.emulated_arch() == "gfx950"
    assert backend.emulator.emulated_arch() == arch


def test_wrong_architectures_are_refused(monkeypatch):
    monkeypatch.setenv("MLA_ASM_EMULATE", "gfx90a")
    with pytest.raises(LayoutError, match="MLA_ASM_EMULATE: must be one of 0, 1, gfx942, gfx950"):
        backend.emulator.emulated_arch()
    with (
        pytest.raises(LayoutError, match="emulation: arch must be gfx942 or gfx950, got 'sm90'"),
        emulation("sm90"),
    ):
        pass


def test_what_no_kernel_does_is_refused_with_a_reason():
    windowed = problem("cpu", features=frozenset({"window"}))
    with (
        emulation("gfx942"),
        pytest.raises(UnsupportedProblemError, match="asm: feature window"),
    ):
        select.select(windowed, backend="asm")
