"""Time that planning and decoding take on the host, beside the GPU's work.

    python benchmarks/overhead.py                  one table, microseconds of the processor
    python benchmarks/overhead.py --profile        and what they are spent on

A batch of 256 requests, 128 heads, bf16, page 64; limits are given to the plan, so nothing is read
from the device. On a GPU launches are real and kernels short: each request has one page. Of a
decode, "driver" is what the functions in C take by themselves, with their arguments at hand: they
read 60 of these and call the GPU's driver.

Without a GPU, run with TRITON_INTERPRET=0: kernels are compiled for sm90 and go through Triton's
launcher, but the function in C is replaced by one that returns at once, and planning also pays for
checks that only CPU tensors get.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mla_core import LatentCache, MLADims, PagedKV, decode, plan_decode
from mla_core.arch import cpu_as
from mla_core.launch import Repeat
from mla_core.plan import DecodePlan
from mla_core.testing.null_driver import null_driver
from mla_triton.aot import kernels

BATCH_SIZE, PAGE_SIZE = 256, 64
ROUNDS, CALLS = 9, 200


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--heads", type=int, default=128)
    options = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if has_gpu else 'no GPU'}")
    # As in a process that has run a kernel: the first plan looks for Triton, the rest do not.
    import triton

    print(f"Triton {triton.__version__}")
    with nothing_to_launch_on() if not has_gpu else no_change():
        for num_kv_splits in (1, 4):
            for name, call in calls(device, options.heads, num_kv_splits).items():
                whole = fastest(call, device)
                shown = f"{name:<24} splits {num_kv_splits}  {whole:7.1f} us"
                if isinstance(call, Decode):
                    driver = fastest(call.launch_alone(), device)
                    shown += f" = Python {whole - driver:6.1f} + driver {driver:5.1f}"
                print(shown, flush=True)
                if options.profile:
                    profile(call)
    return 0


def calls(device: str, num_heads: int, num_kv_splits: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    dims = MLADims(num_heads)
    cache = LatentCache.allocate("bf16", dims, BATCH_SIZE, PAGE_SIZE, device=device)
    table = torch.arange(BATCH_SIZE, dtype=torch.int32, device=device)[:, None]
    lens = torch.full((BATCH_SIZE,), PAGE_SIZE, dtype=torch.int32, device=device)
    kv = PagedKV.from_block_table(cache, table, lens)
    qo_indptr = torch.arange(BATCH_SIZE + 1, dtype=torch.int32, device=device)
    q = torch.zeros(BATCH_SIZE, num_heads, dims.latent_dim, dtype=torch.bfloat16, device=device)
    ql_nope, q_pe = q[..., : dims.kv_lora_rank], q[..., dims.kv_lora_rank :]
    out = torch.empty_like(ql_nope)

    def plan() -> object:
        return plan_decode(
            dims,
            qo_indptr,
            kv,
            num_kv_splits=num_kv_splits,
            total_q=BATCH_SIZE,
            max_seqlen_q=1,
            max_seqlen_k=PAGE_SIZE,
            backend="triton",
        )

    planned = plan_decode(dims, qo_indptr, kv, num_kv_splits=num_kv_splits, backend="triton")
    return {
        "plan": plan,
        "decode, out given": Decode(ql_nope, q_pe, kv, planned, dims.sm_scale, out),
        "decode": Decode(ql_nope, q_pe, kv, planned, dims.sm_scale, None),
    }


@dataclass(frozen=True)
class Decode:
    """A decode of one step, to be called again and again."""

    ql_nope: torch.Tensor
    q_pe: torch.Tensor
    kv: PagedKV
    plan: DecodePlan
    sm_scale: float
    out: torch.Tensor | None

    def __call__(self) -> None:
        """Decode."""
        decode(self.ql_nope, self.q_pe, self.kv, self.plan, sm_scale=self.sm_scale, out=self.out)

    def launch_alone(self) -> Callable[[], None]:
        """Return what calls the functions in C alone, with what a decode gave them."""
        seen: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        repeats_of = Repeat.__call__

        def look(repeat: Repeat, addresses: list[int]) -> bool:
            seen[:] = repeat.calls(addresses)
            return repeats_of(repeat, addresses)

        Repeat.__call__ = look  # type: ignore[method-assign]
        self()
        Repeat.__call__ = repeats_of  # type: ignore[method-assign]
        if not seen:
            sys.exit("overhead: a decode like others before it must be repeated, was made anew")

        def launch_all() -> None:
            for function, arguments in seen:
                function(*arguments)

        return launch_all


def fastest(call: Callable[[], object], device: str) -> float:
    """Return the host's microseconds of a call in the best of some rounds."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        # Time of this thread: neither other processes nor waiting for a full queue count.
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.thread_time() - start) / CALLS)
    return min(rounds) * 1e6


def profile(call: Callable[[], object]) -> None:
    """Print the functions that take most of the time of a call."""
    profiler = cProfile.Profile()
    with profiler:
        for _ in range(1000):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


@contextmanager
def nothing_to_launch_on() -> Iterator[None]:
    """Let launches go through all of the host's code for sm90, in a block."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("overhead: TRITON_INTERPRET must be 0, got 1; interpreted kernels tell nothing")
    # Before the next line, or they would be interpreted.
    list(kernels())
    # Backends take CPU tensors for Triton only where they believe the interpreter is on.
    os.environ["TRITON_INTERPRET"] = "1"
    with cpu_as("sm90"), null_driver("cuda", 90, 32, keeps=False):
        yield


@contextmanager
def no_change() -> Iterator[None]:
    """Leave everything as it is."""
    yield


if __name__ == "__main__":
    sys.exit(main())
