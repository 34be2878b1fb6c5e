"""Tasks of the repository; ``./dev NAME`` sets up what they need and runs them.

Every session shares one environment, ``.nox/dev``, because torch and triton take 1.5 GB; only
`tests_isolated` and `build` make environments of their own, to prove what wheels need.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import environment  # noqa: E402

nox.needs_version = ">=2026.4"
nox.options.default_venv_backend = "none"
nox.options.error_on_external_run = False

BIN = environment.DEV / "bin"
DIST = ROOT / "dist"
SOURCES = [f"packages/{name}/src" for name in environment.PACKAGES if name != "mla-kernels"]
shared = nox.session(python=False, requires=["env"])
costly = nox.session(python=False, requires=["env"], default=False)


def dev(session: nox.Session, program: str, *arguments: str, **variables: str) -> None:
    """Run a program of the shared environment."""
    # Compiled files halve the time of importing torch; some machines turn them off.
    changes: dict[str, str | None] = {"PYTHONDONTWRITEBYTECODE": None, **variables}
    # OpenMP threads that spin while they wait take the core from the thread they wait for when a
    # machine has fewer free cores than it reports; steps then take ten times as long.
    changes.setdefault("OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "passive"))
    changes["PATH"] = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    session.run(str(BIN / program), *arguments, env=changes, external=True)


@nox.session(python=False, default=False)
def env(session: nox.Session) -> None:
    """Build .nox/dev, or bring it up to date; `-- --clean` builds it anew."""
    try:
        environment.build(clean="--clean" in session.posargs, log=session.log)
    except subprocess.CalledProcessError as exc:
        session.error(f"this command failed: {' '.join(exc.cmd)}")


@costly
def demo(session: nox.Session) -> None:
    """Decode real text with a DeepSeek-V3-shaped model from a paged latent cache."""
    dev(session, "mla", "demo", *session.posargs)


@shared
def tests(session: nox.Session) -> None:
    """Run the tests of all packages on the CPU; arguments go to pytest."""
    dev(session, "python", "-m", "pytest", "-m", "not gpu", *session.posargs)


@costly
def coverage(session: nox.Session) -> None:
    """Run the tests of mla_core and fail when branch coverage is below 95 %."""
    dev(
        session,
        "python",
        *("-m", "pytest", "-m", "not gpu", "packages/mla-core", "--cov", "--cov-fail-under=95"),
        *session.posargs,
    )


@costly
def tests_gpu(session: nox.Session) -> None:
    """Run the tests of kernels on this machine's GPU, with the torch it has."""
    dev(session, "python", "-m", "pytest", "-m", "gpu or kernel", *session.posargs)


@nox.session(python=False, requires=["wheels"], default=False)
@nox.parametrize("package", ["cdna-emulator", "mla-core", "mla-triton", "mla-asm", "mla-fusions"])
def tests_isolated(session: nox.Session, package: str) -> None:
    """Run one package's tests against its wheel, with nothing but its declared dependencies."""
    place = ROOT / ".nox" / f"isolated-{package}"
    # Beside pytest, the extras without which a package's tests have little to run.
    extras = {
        "mla-core": "testing,cli,plot",
        "mla-triton": "testing,triton",
        "mla-fusions": "testing,triton",
    }.get(package, "testing")
    environment.create(place)
    environment.install_wheel(place, f"{package}[{extras}]", DIST)
    session.run(
        *(str(place / "bin" / "python"), "-m", "pytest", "-m", "not gpu", f"packages/{package}"),
        *session.posargs,
        env={"PYTHONDONTWRITEBYTECODE": None},
        external=True,
    )


@shared
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `-- --fix` mends both."""
    fix = "--fix" in session.posargs
    dev(session, "ruff", "check", *(["--fix"] if fix else []), ".")
    dev(session, "ruff", "format", *([] if fix else ["--check"]), ".")


@shared
def types(session: nox.Session) -> None:
    """Check types with mypy in strict mode."""
    dev(session, "mypy", *session.posargs)


@shared
def imports(session: nox.Session) -> None:
    """Check that packages and layers import only what stands below them."""
    dev(session, "lint-imports")


@shared
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; any warning is an error."""
    dev(session, "sphinx-build", "-W", "-n", "--keep-going", "-q", "docs", "docs/_build/html")


@nox.session(python=False, requires=["wheels"])
def build(session: nox.Session) -> None:
    """Build every sdist and wheel, and use each in an environment with only what it declares."""
    files = sorted(map(str, DIST.iterdir()))
    dev(session, "twine", "check", "--strict", *files)
    with_modules = [file for file in files if file.endswith(".whl") and "mla_kernels" not in file]
    # W002 are equal files: catalogs without a row differ in nothing.
    dev(session, "check-wheel-contents", "--ignore", "W002", *with_modules)
    for requirement in (*environment.PACKAGES[:-1], "mla-kernels[all]"):
        place = ROOT / ".nox" / f"wheel-{requirement.partition('[')[0]}"
        environment.create(place)
        environment.install_wheel(place, requirement, DIST)
        smoke = ROOT / "tools" / "wheel_smoke.py"
        # Isolated mode: neither the current directory nor PYTHONPATH may lend a module.
        session.run(str(place / "bin" / "python"), "-I", str(smoke), requirement, external=True)


@costly
def wheels(session: nox.Session) -> None:
    """Build every sdist, and each wheel from its sdist, into dist/."""
    for old in (*DIST.glob("mla_*"), *DIST.glob("cdna_*")):
        old.unlink()
    for name in environment.PACKAGES:
        project = f"packages/{name}"
        dev(session, "python", "-m", "build", "--no-isolation", "--outdir", str(DIST), project)


@costly
def bench(session: nox.Session) -> None:
    """Time the ops side by side, each checked before its time counts; see `mla bench --help`."""
    dev(session, "mla", "bench", *session.posargs)


@costly
def assemble(session: nox.Session) -> None:
    """Build the code objects in hsa/ with the pinned assembler; `-- --check` only compares them."""
    pins = ROOT / "constraints" / "assemble.txt"
    place = ROOT / ".nox" / "assembler"
    installed = place / "pins.txt"
    if not installed.is_file() or installed.read_text() != pins.read_text():
        shutil.rmtree(place, ignore_errors=True)
        where = ("--target", str(place), "--require-hashes", "--requirement", str(pins))
        environment.install(environment.DEV, *where)
        installed.write_text(pins.read_text())
    # Comes before what the shared environment has of it, which nobody checked.
    dev(session, "python", "tools/assemble.py", *session.posargs, PYTHONPATH=str(place))


@costly
def mutants(session: nox.Session) -> None:
    """Break the library in small ways and see that a test fails for each."""
    dev(session, "python", "tools/mutation_check.py", *session.posargs)
