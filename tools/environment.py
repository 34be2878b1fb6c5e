"""Build the shared development environment ``.nox/dev``; the nox session ``env`` calls `build`.

Three steps: torch and triton as the machine needs them, the tools of the dependency group ``dev``,
and the packages of this repository, editable. A key of everything that was asked for is kept in the
environment, so that a second call costs nothing and a changed requirement costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / ".nox" / "dev"
PACKAGES = (
    "cdna-emulator",
    "mla-core",
    "mla-triton",
    "mla-asm",
    "mla-fusions",
    "mla-kernels",
)

#: A Triton beside the pinned one: it compiles the same kernels to other machine code, which the
#: tests of the emulator execute as well. Only its files are laid out, without dependencies.
SECOND_TRITON = "3.9.0"

#: Prints where the starting interpreter keeps a torch built for a GPU, or nothing.
_FIND_GPU_TORCH = """
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
version = pathlib.Path(spec.origin).parent / "version.py" if spec and spec.origin else None
if version and version.is_file():
    known = runpy.run_path(str(version))
    if known.get("cuda") or known.get("hip"):
        print(version.parents[1])
"""


@dataclass(frozen=True, slots=True)
class TorchChoice:
    """Where torch comes from: requirements to install, or the folder of one that is there."""

    requirements: tuple[str, ...]
    constraints: tuple[str, ...] = ()
    kept_in: str = ""
    because: str = ""


def build(*, clean: bool = False, log=print) -> None:  # type: ignore[no-untyped-def]
    """Make ``.nox/dev`` match the requirements; do nothing when it already does."""
    torch = choose_torch()
    key = _key(torch)
    key_file = DEV / "key"
    if not clean and key_file.is_file() and key_file.read_text() == key:
        return
    started_by = Path(sys.executable).resolve()
    python = DEV / "bin" / "python"
    if clean or not python.exists() or python.resolve() != started_by:
        log(f"making .nox/dev with {started_by}")
        shutil.rmtree(DEV, ignore_errors=True)
        create(DEV)
    key_file.unlink(missing_ok=True)
    log(f"torch: {torch.because}")
    if torch.kept_in:
        site = next(DEV.glob("lib/python*/site-packages"))
        (site / "torch_of_the_machine.pth").write_text(torch.kept_in + "\n")
    else:
        install(DEV, *torch.requirements, *_constraint_arguments(torch.constraints))
    install(DEV, *dependency_group("dev"), *_constraint_arguments(torch.constraints))
    # Their dependencies are in already, and without isolation nothing is fetched to build them.
    local = ["--no-deps", "--no-build-isolation"]
    for name in PACKAGES:
        # The meta-package has no code that could be edited.
        local += [] if name == "mla-kernels" else ["-e"]
        local.append(str(ROOT / "packages" / name))
    install(DEV, *local)
    if torch.constraints == ("cpu",):
        fetch_second_triton(log)
    key_file.write_text(key)


def choose_torch() -> TorchChoice:
    """Choose the torch of this machine: as told, the GPU build that is there, or the pinned one."""
    if told := os.environ.get("MLA_TORCH", "").split():
        return TorchChoice(tuple(told), because=f"MLA_TORCH={' '.join(told)}")
    if site := _gpu_torch_of_starter():
        return TorchChoice((), kept_in=site, because=f"keeping the GPU build in {site}")
    if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
        return TorchChoice(("torch", "triton"), ("cuda",), because="constraints/cuda.txt")
    if Path("/dev/kfd").exists():
        return TorchChoice(("torch",), ("rocm",), because="constraints/rocm.txt")
    return TorchChoice(("torch", "triton"), ("cpu",), because="constraints/cpu.txt")


def _gpu_torch_of_starter() -> str:
    """Ask the interpreter that started ``./dev``; the environment of nox has no torch."""
    starter = os.environ.get("MLA_BASE_PYTHON", "")
    if not starter:
        return ""
    # Another Python could not load the compiled parts.
    script = f"import sys\nif sys.version_info[:2] == {sys.version_info[:2]}:\n" + "".join(
        f"    {line}\n" for line in _FIND_GPU_TORCH.splitlines()
    )
    return subprocess.run(
        [starter, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()


def fetch_second_triton(log=print) -> Path:  # type: ignore[no-untyped-def]
    """Lay the second Triton out in ``.nox/second-triton`` unless it is there."""
    folder = ROOT / ".nox" / "second-triton"
    if (folder / f"triton-{SECOND_TRITON}.dist-info").is_dir():
        return folder
    log(f"fetching triton {SECOND_TRITON} into {folder.relative_to(ROOT)}")
    # Under another name first: an interrupted installation must not look finished.
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    install(DEV, "--no-deps", "--target", str(unfinished), f"triton=={SECOND_TRITON}")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def create(environment: Path) -> None:
    """Create an empty virtual environment for the running Python."""
    if use_pip():
        _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    else:
        _run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(environment))


def install(environment: Path, *arguments: str) -> None:
    """Install into an environment with uv, or with pip when ``MLA_PIP=1``."""
    python = str(environment / "bin" / "python")
    index = os.environ.get("MLA_TORCH_INDEX", "")
    extra = ("--extra-index-url", index) if index else ()
    if use_pip():
        _run(*_pip(), "--python", python, "install", "-qq", *extra, *arguments)
        return
    if index:
        # uv otherwise takes a package from the first index that has any release of it.
        extra = (*extra, "--index-strategy", "unsafe-best-match")
    uv = ("uv", "pip", "install", "--quiet", "--python", python)
    _run(*uv, *_find_links(), *extra, *arguments)


def install_wheel(environment: Path, requirement: str, dist: Path) -> None:
    """Install one of our requirements from the wheels in ``dist``, with what it declares."""
    # uv would otherwise take an earlier build of the same version from its cache.
    ours = () if use_pip() else tuple(f"--refresh-package={name}" for name in PACKAGES)
    found = ("--find-links", str(dist))
    install(environment, requirement, *found, *ours, *_constraint_arguments(("cpu",)))


def dependency_group(name: str) -> list[str]:
    """Return the requirements of a dependency group of the root pyproject, includes resolved."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    requirements: list[str] = []
    for item in groups[name]:
        if isinstance(item, dict):
            requirements.extend(dependency_group(item["include-group"]))
        else:
            requirements.append(item)
    return requirements


def use_pip() -> bool:
    """Whether the developer asked for pip instead of uv."""
    return os.environ.get("MLA_PIP", "") == "1"


def _pip() -> tuple[str, ...]:
    # The environment of nox has no pip of its own; the interpreter that started ./dev has.
    starter = os.environ.get("MLA_BASE_PYTHON", "") or sys.executable
    return starter, "-m", "pip", "--disable-pip-version-check"


@cache
def _find_links() -> tuple[str, ...]:
    """Return pip's find-links as uv arguments, so that local wheels are seen by both.

    As arguments and never as ``UV_FIND_LINKS``: an argument replaces that variable, and torch would
    then come from the index, with several gigabytes of CUDA.
    """
    places = os.environ.get("PIP_FIND_LINKS", "")
    if not places:
        command = [*_pip(), "config", "get", "global.find-links"]
        places = subprocess.run(command, capture_output=True, text=True).stdout
    return tuple(part for place in places.split() for part in ("--find-links", place))


def _constraint_arguments(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        part for name in names for part in ("-c", str(ROOT / "constraints" / f"{name}.txt"))
    )


def _key(torch: TorchChoice) -> str:
    inputs = [ROOT / "pyproject.toml", Path(__file__), *sorted(ROOT.glob("constraints/*.txt"))]
    inputs += [ROOT / "packages" / name / "pyproject.toml" for name in PACKAGES]
    asked = {
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs],
        "torch": [torch.requirements, torch.constraints, torch.kept_in],
        "index": os.environ.get("MLA_TORCH_INDEX", ""),
        "python": sys.version,
        # Editable installs hold absolute paths, and so do the environment's own scripts.
        "place": str(ROOT),
    }
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _run(*command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
    # Without it, uv and pip would leave compiling to the first import, which then cannot keep it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(command, check=True, env=environment)
