"""Speed of the emulator on decode kernels: JSON lines under ``benchmarks/results/emulator``.

    python benchmarks/emulator.py

Every contender decodes the same batch, 8 requests of 2048 tokens with 16 heads in bf16, and is
checked against fp64 before its time counts. ``interpreter`` is Triton's own, which takes the tile
sizes of its own tuning table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path

import cdna_emulator
from mla_asm.emulator import emulation
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode
from mla_core.testing.emulation import emulated_triton

RESULTS = Path(__file__).resolve().parent / "results" / "emulator"
TRITON_KERNEL = "mla_triton.kernels.decode:decode_kernel"
ARCHS = ("gfx942", "gfx950")
REQUESTS, TOKENS = 8, 2048
REPETITIONS = 3
CASE = DecodeCase("speed", (TOKENS,) * REQUESTS, page_size=64, num_kv_splits=1)


def main() -> None:
    """Measure and write one row per contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"emulator-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    rows = [*emulated_rows(), interpreted_row()]
    common = {
        "case": f"decode/bf16/h16/q1/b{REQUESTS}/s{TOKENS}/p64",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "triton", "cdna-emulator")},
        "commit": commit(),
        "date": str(date.today()),
    }
    path.write_text("".join(json.dumps(common | row) + "\n" for row in rows))
    for row in rows:
        print(row)
    print(path)


def emulated_rows() -> Iterator[dict[str, object]]:
    """Time the compiled Triton kernel and the hand-written one, with and without checks."""
    for arch in ARCHS:
        for checks in ("none", "all"):

            def triton(arch: str = arch, checks: str = checks) -> list[cdna_emulator.Result]:
                with emulated_triton(arch, TRITON_KERNEL, checks=checks) as results:
                    check_decode("triton", CASE)
                return results

            yield row("triton", arch, checks, best(triton))

        def written(arch: str = arch) -> list[cdna_emulator.Result]:
            with emulation(arch) as run:
                check_decode("asm", CASE)
            return run.results

        yield row("asm", arch, "all", best(written))


def best(run) -> list[cdna_emulator.Result]:  # type: ignore[no-untyped-def]
    """Return the fastest of some runs; the first one also compiles."""
    runs = [run() for _ in range(REPETITIONS + 1)]
    return min(runs, key=lambda results: sum(result.seconds for result in results))


def row(
    backend: str, arch: str, checks: str, results: list[cdna_emulator.Result]
) -> dict[str, object]:
    """Return the numbers of one contender."""
    seconds = sum(result.seconds for result in results)
    instructions = sum(result.instructions for result in results)
    cached = REQUESTS * TOKENS
    return {
        "backend": backend,
        "arch": arch,
        "checks": checks,
        "seconds": seconds,
        "wave_instructions": instructions,
        "wave_instructions_per_second": instructions / seconds,
        "wave_instructions_per_kv_row": instructions / cached,
        "kv_rows_per_second": cached / seconds,
    }


def interpreted_row() -> dict[str, object]:
    """Time Triton's interpreter in a process of its own, where nothing is emulated."""
    done = subprocess.run(
        [sys.executable, __file__, "--interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = float(done.stdout.split()[-1])
    cached = REQUESTS * TOKENS
    return {
        "backend": "triton",
        "arch": "interpreter",
        "checks": "none",
        "seconds": seconds,
        "kv_rows_per_second": cached / seconds,
    }


def interpret() -> None:
    """Decode the batch in the interpreter and print the seconds of its launches."""
    from mla_core.testing import interpreter

    interpreter.enable()
    from mla_triton import decode

    spent = []
    launch = decode.launch_decode

    def timed(*args: object, **kwargs: object) -> None:
        begin = time.perf_counter()
        launch(*args, **kwargs)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - begin)

    decode.launch_decode = timed
    check_decode("triton", CASE)
    print(sum(spent))


def commit() -> str:
    """Return the commit of the checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    interpret() if sys.argv[1:] == ["--interpreted"] else main()
