"""Test setup shared by every package: the interpreter, GPU tests, seeds and poisoned memory."""

from __future__ import annotations

import importlib.util
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from mla_core.testing import interpreter, poison

HAS_GPU = torch.cuda.is_available()
INTERPRETED = not HAS_GPU and importlib.util.find_spec("triton") is not None

# A GPU node without a package index runs kernels from source; the emulator needs what it installs.
EMULATES = all(map(importlib.util.find_spec, ("cdna_emulator", "elftools", "msgpack", "rocm")))
NEED_EMULATOR = ("test_emulated.py", "test_kernels.py", "test_mutations.py")
collect_ignore = [
    "packages/cdna-emulator",
    *(f"packages/mla-asm/tests/{name}" for name in NEED_EMULATOR),
]
if EMULATES:
    collect_ignore.clear()

# Before any kernel module is imported: Triton decides at decoration time who will run a kernel.
if INTERPRETED:
    interpreter.enable()

# What somebody tuned on this machine must not decide what is tested: a directory without tables.
os.environ.setdefault("MLA_TUNING_PATH", str(Path(__file__).parent / "tests"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the seed of the run, so that a failure can be repeated."""
    parser.addoption(
        "--seed", type=int, default=random.randrange(2**31), help="seed of the random test data"
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Say what a failing run needs to be repeated."""
    device = torch.cuda.get_device_name() if HAS_GPU else "cpu"
    triton = "interpreted" if INTERPRETED else "compiled" if HAS_GPU else "absent"
    seed = config.getoption("seed")
    return f"torch {torch.__version__} on {device}, Triton kernels {triton}, --seed {seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if HAS_GPU:
        return
    needs_gpu = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(needs_gpu)


@pytest.fixture(autouse=True)
def taking_turns(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests that need gigabytes of a GPU run one at a time, and give those back."""
    if not HAS_GPU or request.node.get_closest_marker("large") is None:
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / f"mla-large-tests-{os.getuid()}.lock"):
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return a seed of this test in this run, with torch's global generator set to it."""
    # Different tests draw different data, and one test draws the same alone as in the suite.
    value = random.Random(f"{request.config.getoption('seed')} {request.node.nodeid}").randrange(
        2**31
    )
    print("seed", value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """Return a CPU generator with this test's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that an unwritten output shows."""
    with poison.poisoned_empty():
        yield
