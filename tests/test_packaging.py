"""What the five projects declare agrees with each other, with the sources and with the tools."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_CODE = ("mla-core", "mla-triton", "mla-asm", "mla-fusions")
ALL = (*WITH_CODE, "mla-kernels")
#: Stands alone: it knows nothing of the packages above.
EMULATOR = "cdna-emulator"

sys.path.insert(0, str(ROOT / "tools"))

import environment  # noqa: E402
import from_source  # noqa: E402


def project(name: str) -> dict:
    return tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]


def imported_packages(folder: Path) -> set[str]:
    """Top-level names that the modules of a folder import, anywhere in them."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def requirement_names(requirements: list[str]) -> set[str]:
    return {
        requirement.split("[")[0].split(">")[0].split("<")[0].split("=")[0].strip()
        for requirement in requirements
    }


@pytest.mark.parametrize("name", [*ALL, EMULATOR])
def test_every_project_says_the_same_about_itself(name):
    table = project(name)
    assert table["name"] == name
    assert (table["license"], table["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert table["requires-python"] == ">=3.11"
    folder = ROOT / "packages" / name
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert f"# {name}\n" in (folder / "README.md").read_text()
    assert "## Unreleased" in (folder / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", [*WITH_CODE, EMULATOR])
def test_the_version_is_in_one_place(name):
    module = __import__(name.replace("-", "_"))
    assert version(name) == module.__version__
    # Before 1.0 a minor release may break, so everything moves together.
    assert module.__version__.startswith("0.1.")


@pytest.mark.parametrize("name", ALL[1:])
def test_our_packages_pin_each_other_to_one_minor(name):
    table = project(name)
    extras = [item for items in table.get("optional-dependencies", {}).values() for item in items]
    ours = [item for item in table["dependencies"] + extras if item.startswith("mla-")]
    pinned = [item for item in ours if not item.startswith("mla-kernels[")]
    assert pinned
    assert all(item.endswith(">=0.1,<0.2") for item in pinned)


@pytest.mark.parametrize("name", WITH_CODE)
def test_what_is_imported_is_declared(name):
    table = project(name)
    extras = [item for items in table["optional-dependencies"].values() for item in items]
    declared = requirement_names(table["dependencies"] + extras)
    module = name.replace("-", "_")
    used = imported_packages(ROOT / "packages" / name / "src") - {module}
    if name != "mla-core":
        # A package that mla-core depends on comes with it.
        declared |= requirement_names(project("mla-core")["dependencies"])
    # transformers brings these along.
    declared |= {"tokenizers", "safetensors"} if "transformers" in declared else set()
    undeclared = {package.replace("_", "-") for package in used} - declared
    assert not undeclared


def test_hard_dependencies_stay_few():
    assert requirement_names(project("mla-core")["dependencies"]) == {"torch"}
    for name in WITH_CODE[1:]:
        assert requirement_names(project(name)["dependencies"]) == {"mla-core"}


def test_backends_are_registered_by_their_own_distribution():
    found = {(p.name, p.dist.name) for p in entry_points(group="mla_core.backends")}
    assert found == {
        ("reference", "mla-core"),
        ("triton", "mla-triton"),
        ("asm", "mla-asm"),
        ("fusions", "mla-fusions"),
    }


def test_the_meta_package_has_no_code_and_an_extra_for_each_backend():
    files = [path for path in (ROOT / "packages" / "mla-kernels").rglob("*.py")]
    assert files == []
    extras = project("mla-kernels")["optional-dependencies"]
    assert requirement_names(extras["triton"] + extras["asm"] + extras["fusions"]) == {
        "mla-triton",
        "mla-asm",
        "mla-fusions",
    }
    assert extras["all"] == ["mla-kernels[triton,asm,fusions]"]


def test_the_developers_environment_covers_every_extra():
    groups = requirement_names(environment.dependency_group("dev"))
    pinned_apart = {"torch", "triton"}
    for name in WITH_CODE:
        table = project(name)
        extras = [item for items in table["optional-dependencies"].values() for item in items]
        needed = requirement_names(extras) - set(environment.PACKAGES)
        assert needed - groups - pinned_apart == set()


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm"])
def test_constraints_pin_what_the_metadata_allows(kind):
    lines = (ROOT / "constraints" / f"{kind}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==2.13.0")
    # ROCm builds of torch bring Triton under a name of their own.
    assert ("triton==3.7.1" in pins) == (kind != "rocm")


def test_torch_is_chosen_as_told(monkeypatch):
    monkeypatch.setenv("MLA_TORCH", "torch==2.11.0 triton==3.6.0")
    choice = environment.choose_torch()
    assert choice.requirements == ("torch==2.11.0", "triton==3.6.0")
    assert choice.constraints == ()


def test_a_gpu_build_of_the_starting_python_is_kept(monkeypatch, tmp_path):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported to ask')")
    (package / "version.py").write_text("cuda = '13.0'\nhip = None\n")
    monkeypatch.delenv("MLA_TORCH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MLA_BASE_PYTHON", sys.executable)
    choice = environment.choose_torch()
    assert (choice.kept_in, choice.requirements) == (str(tmp_path), ())
    (package / "version.py").write_text("cuda = None\nhip = None\n")
    assert environment.choose_torch().kept_in == ""


def test_the_key_changes_with_what_was_asked(monkeypatch):
    cpu = environment.TorchChoice(("torch",), ("cpu",))
    before = environment._key(cpu)
    assert environment._key(cpu) == before
    assert environment._key(environment.TorchChoice(("torch==2.11.0",))) != before
    monkeypatch.setenv("MLA_TORCH_INDEX", "https://example.org/simple")
    assert environment._key(cpu) != before


def test_metadata_for_running_from_source_has_the_entry_points(tmp_path):
    from_source.write_metadata(ROOT / "packages" / "mla-asm", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "mla_asm-0.1.0.dist-info"
    text = (folder / "entry_points.txt").read_text()
    assert text == "[mla_core.backends]\nasm = mla_asm.backend:BACKEND\n"


def test_the_bootstrap_explains_itself_without_setting_up(tmp_path):
    copy = tmp_path / "dev"
    copy.write_bytes((ROOT / "dev").read_bytes())
    done = subprocess.run(
        [sys.executable, str(copy), "--help"], check=True, capture_output=True, text=True
    )
    assert "./dev demo" in done.stdout
    for variable in ("MLA_PIP", "MLA_TORCH", "MLA_TORCH_INDEX"):
        assert variable in done.stdout
    assert not (tmp_path / ".nox").exists()
