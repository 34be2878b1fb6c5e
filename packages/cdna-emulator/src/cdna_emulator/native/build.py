"""Compile the native core: ``python -m cdna_emulator.native.build``.

Used by the package's build hook and by developers after an edit. Each source becomes an object in
``.build``, named by a hash of the source, of every header it includes and of the command, so a
rebuild compiles what changed and links. The standard library is all this module imports: the hook
runs it before the package is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: The library that `cdna_emulator.native_core` loads.
LIBRARY = HERE / "_core.so"

# Old enough a C library for every distribution with Python 3.11.
_GLIBC = "2.28"
_CPUS = {"x86_64": "x86_64_v3", "aarch64": "generic"}
# Results are bit-exact IEEE 754: no contraction into fused operations and no fast-math.
_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-sanitize=undefined"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror=return-type"),
]
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class BuildError(RuntimeError):
    """The compiler is missing or refused a source; the message holds its output."""


def wheel_platform() -> str:
    """Return the platform tag of a wheel that holds the library."""
    return f"manylinux_{_GLIBC.replace('.', '_')}_{_machine()}"


def build(*, force: bool = False, jobs: int | None = None, verbose: bool = False) -> Path:
    """Compile what changed, link, and return the path of the library.

    Parameters
    ----------
    force : bool
        Compile every source, whatever the cache holds.
    jobs : int, optional
        Compilers to run at once; all processors by default.
    verbose : bool
        Print the name of each source that is compiled.
    """
    machine = _machine()
    target = ["-target", f"{machine}-linux-gnu.{_GLIBC}", f"-mcpu={_CPUS[machine]}"]
    compiler = [sys.executable, "-m", "ziglang", "c++", *target]
    cache = HERE / ".build"
    cache.mkdir(exist_ok=True)
    sources = sorted(HERE.glob("*.cpp"))
    if not sources:
        raise BuildError(f"native build: {HERE} must hold C++ sources, found none")

    def compile_one(source: Path) -> Path:
        found = cache / f"{source.stem}-{_fingerprint(source, compiler)}.o"
        if force or not found.exists():
            if verbose:
                print(f"compiling {source.name}", flush=True)
            _run_into(found, [*compiler, *_FLAGS, "-c", str(source)])
            for stale in cache.glob(f"{source.stem}-*.o"):
                if stale != found:
                    stale.unlink(missing_ok=True)
        return found

    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    # A symbol that no source defines fails here, not when somebody loads the library.
    _run_into(LIBRARY, [*compiler, "-shared", "-s", "-Wl,-z,defs", *objects])
    return LIBRARY


def _machine() -> str:
    machine = platform.machine()
    if machine not in _CPUS or sys.platform != "linux":
        raise BuildError(
            f"native build: the machine must be Linux on {' or '.join(_CPUS)}, got {sys.platform}"
            f" on {machine}; use core='numpy', which needs no compiled code"
        )
    return machine


def _fingerprint(source: Path, compiler: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*compiler, *_FLAGS, _compiler_version()]).encode())
    for path in sorted(_with_headers(source)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler_version() -> str:
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(
            "native build: the package ziglang must be installed, it was not found; "
            "pip install ziglang==0.17.0"
        ) from None


def _with_headers(source: Path) -> set[Path]:
    """Return a source and everything of this folder that it includes, directly or not."""
    found: set[Path] = set()
    pending = [source]
    while pending:
        path = pending.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        pending += [HERE / name for name in _INCLUDE.findall(path.read_text("utf-8"))]
    return found


def _run_into(result: Path, command: list[str]) -> None:
    # Under another name first: a half-written object must not look finished, and a process that
    # has the old library mapped keeps it.
    handle, name = tempfile.mkstemp(prefix=result.stem, suffix=result.suffix, dir=HERE / ".build")
    os.close(handle)
    done = subprocess.run([*command, "-o", name], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        os.unlink(name)
        raise BuildError(f"native build: {result.name} failed\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)
    os.chmod(name, 0o755)
    os.replace(name, result)


def main() -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description="Compile the native core of cdna-emulator.")
    parser.add_argument("--force", action="store_true", help="compile every source again")
    parser.add_argument("--jobs", type=int, help="compilers to run at once")
    options = parser.parse_args()
    try:
        print(build(force=options.force, jobs=options.jobs, verbose=True))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
