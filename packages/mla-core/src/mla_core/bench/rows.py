"""One benchmark result, with exactly the columns of a results file."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mla_core.__about__ import __version__


@dataclass(frozen=True, slots=True)
class Row:
    """What one contender did on one case.

    Parameters
    ----------
    case, op, backend, kernel : str
        ``backend`` is the contender's name, ``kernel`` what it ran, with its configuration.
    arch, device : str
        Architecture (``cpu``, ``sm90``) and the name of the device.
    median_us, p10_us, p90_us : float
        Microseconds of one call.
    bytes, flops : int
        What one call must move and compute at least: live cache rows, queries and outputs once,
        and two operations for each multiply-add over the visible keys.
    gbps, tflops : float
        ``bytes`` and ``flops`` over the median.
    ceiling_gbps, ceiling_tflops : float
        Best memory rate and matmul rate measured on this device in this run.
    share : float
        Time at the ceiling that binds over the median; 1 is the best possible.
    error : float
        Relative L2 distance from the fp64 truth, the worst over all data sets.
    graph : bool
        Whether calls were replayed from a captured CUDA graph.
    versions : dict of str to str
    commit, date : str
    """

    case: str
    op: str
    backend: str
    kernel: str
    arch: str
    device: str
    median_us: float
    p10_us: float
    p90_us: float
    bytes: int
    flops: int
    gbps: float
    tflops: float
    ceiling_gbps: float
    ceiling_tflops: float
    share: float
    error: float
    graph: bool
    versions: dict[str, str]
    commit: str
    date: str

    def to_json(self) -> str:
        """Return one line of a results file."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Read one line of a results file; unknown or missing columns raise ``TypeError``."""
        return cls(**json.loads(line))


def read_rows(path: Path) -> list[Row]:
    """Read a results file."""
    lines = path.read_text("utf-8").splitlines()
    return [Row.from_json(line) for line in lines if line.strip()]


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    found = {"python": platform.python_version(), "mla-core": __version__}
    for name in ("torch", "triton", "mla-triton", "mla-asm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.version.hip is not None:
        found["hip"] = torch.version.hip
    return found


@functools.cache
def commit() -> str:
    """Return the commit at the start of the run, ``-dirty`` with local changes, or ``unknown``."""
    root = Path(__file__).parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the CPU's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
