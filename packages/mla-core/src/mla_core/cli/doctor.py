"""Report the environment as plain text that pastes well into a bug report."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mla_core import env, registry
from mla_core.arch import arch_of
from mla_core.cli.backends import local_arch, status

Section = dict[str, str]

#: Distributions whose versions matter; Triton has other names in ROCm and XPU builds of torch.
_DISTRIBUTIONS = (
    "mla-core",
    "mla-triton",
    "mla-asm",
    "mla-fusions",
    "mla-kernels",
    "torch",
    "triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
    "numpy",
    "transformers",
    "rich",
    "matplotlib",
)

#: Variables of others that change which device or kernel runs.
_FOREIGN_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 always: a report is not a verdict."""
    report = collect()
    print(json.dumps(report, indent=2) if options.json else markdown(report))
    return 0


def collect() -> dict[str, Section]:
    """Gather the report, section by section."""
    return {
        "machine": _machine(),
        "packages": _packages(),
        "torch": _torch(),
        "gpus": _gpus(),
        "backends": _backends(),
        "settings": _settings(),
        "cache directories": _cache_directories(),
    }


def markdown(report: Mapping[str, Section]) -> str:
    """Return the report as Markdown lists, readable as plain text too."""
    lines = ["### mla doctor"]
    for title, section in report.items():
        lines.append(f"\n**{title}**\n")
        lines.extend(f"- {name}: {value}" for name, value in section.items())
        if not section:
            lines.append("- none")
    return "\n".join(lines)


def _machine() -> Section:
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
    }


def _packages() -> Section:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Another build's Triton is no news; everything else is worth knowing to be absent.
            if not name.startswith("pytorch-"):
                found[name] = "not installed"
    return found


def _torch() -> Section:
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "no",
        "hip": torch.version.hip or "no",
        "gpu available": "yes" if torch.cuda.is_available() else "no",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpus() -> Section:
    gpus = {}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        gpus[str(device)] = (
            f"{properties.name}, {arch_of(device)}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors"
        )
    return gpus


def _backends() -> Section:
    arch = local_arch()
    return {
        record.name: f"{status(record, arch)} ({', '.join(record.distributions)}, {record.value}, "
        f"loaded in {record.load_seconds * 1e3:.0f} ms)"
        for record in registry.records()
    }


def _settings() -> Section:
    """List the variables that are set, and those that look like ours and are not."""
    ours = [variable.name for variable in env.VARIABLES]
    found = {name: os.environ[name] for name in (*ours, *_FOREIGN_VARIABLES) if name in os.environ}
    for name in sorted(os.environ):
        if name.startswith("MLA_") and name not in ours:
            found[name] = f"{os.environ[name]} (not a setting of this library)"
    return {name: _without_home(value) for name, value in found.items()}


def _cache_directories() -> Section:
    directories = {
        "triton": os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache",
        "torch extensions": Path.home() / ".cache" / "torch_extensions",
    }
    return {
        name: f"{_without_home(str(path))}, {'exists' if Path(path).is_dir() else 'absent'}"
        for name, path in directories.items()
    }


def _without_home(text: str) -> str:
    """Keep the user's name out of bug reports."""
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
