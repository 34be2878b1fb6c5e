"""What a compiled kernel takes from the chip, read from what the compiler wrote, and the limits."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_core.errors import BackendUnavailableError, LayoutError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one thread or work-group may take.

    Parameters
    ----------
    registers : int
        32-bit registers of one thread; on AMD architectural and accumulation registers together.
    shared_bytes : int
        Shared memory (LDS) of one work-group.
    register_file : int
        Registers of all threads of a work-group.
    """

    registers: int
    shared_bytes: int
    register_file: int


_KIB = 1024
#: On NVIDIA a multiprocessor's file, and its shared memory less what the driver keeps; on AMD four
#: SIMDs with 512 registers for each of 64 lanes.
LIMITS: Mapping[str, Limits] = {
    "sm90": Limits(255, 227 * _KIB, 64 * _KIB),
    "gfx942": Limits(512, 64 * _KIB, 128 * _KIB),
    "gfx950": Limits(512, 160 * _KIB, 128 * _KIB),
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes.

    Parameters
    ----------
    registers : int
        32-bit registers of one thread; on AMD architectural and accumulation registers together.
    accumulators : int
        Accumulation registers among them; 0 on NVIDIA.
    shared_bytes : int
        Shared memory (LDS) of one work-group, with what is asked for at the launch.
    local_bytes : int
        Memory of one thread for what does not fit its registers: NVIDIA's stack and local memory,
        AMD's private segment.
    spills : int
        Registers spilled to local memory, as AMD's compiler counts them. NVIDIA's does not say:
        there spilled bytes show in ``local_bytes``.
    scalar_spills : int
        AMD's scalar registers that are parked in lanes of a vector register, which costs two
        instructions and no memory.
    num_threads : int
        Of one work-group.
    """

    registers: int
    accumulators: int
    shared_bytes: int
    local_bytes: int
    spills: int
    scalar_spills: int
    num_threads: int

    def excess(self, arch: str) -> list[str]:
        """Return one line for each limit of an architecture that is passed; [] means it fits.

        Spilling to memory counts as a passed limit: a kernel that does it runs, at a fraction of
        its speed.

        Raises
        ------
        LayoutError
            There are no limits for the architecture.
        """
        limits = LIMITS.get(arch)
        if limits is None:
            raise LayoutError(f"Resources: arch must be one of {', '.join(LIMITS)}, got {arch!r}")
        asked = (
            ("registers of a thread", self.registers, limits.registers),
            ("registers of a work-group", self.registers * self.num_threads, limits.register_file),
            ("bytes of shared memory", self.shared_bytes, limits.shared_bytes),
            ("bytes of local memory of a thread", self.local_bytes, 0),
            ("spilled registers", self.spills, 0),
        )
        return [f"{what}: {got}, at most {most}" for what, got, most in asked if got > most]


def resources_of(compiled: Any) -> Resources:
    """Read the resources of one of Triton's compiled kernels.

    Raises
    ------
    BackendUnavailableError
        The compiler's output has not the expected form, or a tool that reads it is missing.
    """
    metadata = compiled.metadata
    target = metadata.target
    num_threads = metadata.num_warps * target.warp_size
    if target.backend == "hip":
        if "amdgcn" not in compiled.asm:
            raise BackendUnavailableError(
                f"resources: Triton's cache must hold the assembly of {metadata.name}, got the "
                "code object alone; set TRITON_CACHE_DIR to an empty folder"
            )
        return of_amdgcn(compiled.asm["amdgcn"], metadata.shared, num_threads)
    place = compiled.metadata_group[f"{metadata.name[:150]}.cubin"]
    return of_usage(_usage(Path(place)), metadata.shared, num_threads)


def of_amdgcn(text: str, dynamic_shared: int, num_threads: int) -> Resources:
    """Read the metadata that AMD's compiler puts at the end of an assembly file with one kernel."""

    def number(name: str) -> int:
        found = re.findall(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", text, re.MULTILINE)
        if len(found) != 1:
            raise BackendUnavailableError(
                f"resources: the assembly must state .{name} once, got {len(found)} times"
            )
        return int(found[0])

    return Resources(
        registers=number("vgpr_count"),
        accumulators=number("agpr_count"),
        shared_bytes=number("group_segment_fixed_size") + dynamic_shared,
        local_bytes=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        scalar_spills=number("sgpr_spill_count"),
        num_threads=num_threads,
    )


def of_usage(text: str, shared: int, num_threads: int) -> Resources:
    """Read what ``cuobjdump --dump-resource-usage`` says of a file with one kernel."""
    lines = re.findall(r"^\s*Function \S+:\s*\n\s*(REG:.*)$", text, re.MULTILINE)
    if len(lines) != 1:
        raise BackendUnavailableError(
            f"resources: cuobjdump must list one function, got {len(lines)} in {text!r}"
        )
    usage = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", lines[0]))
    return Resources(
        registers=int(usage["REG"]),
        accumulators=0,
        # What Triton asks for at the launch; the file lists 1 KiB that every kernel on Hopper has.
        shared_bytes=shared,
        local_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        spills=0,
        scalar_spills=0,
        num_threads=num_threads,
    )


def _usage(cubin: Path) -> str:
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError as exc:
        raise BackendUnavailableError(
            f"resources: cuobjdump must be there to read {cubin.name}, got {exc}; "
            "CUDA builds of Triton bring it, or set TRITON_CUOBJDUMP_PATH"
        ) from exc
    done = subprocess.run(
        [tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BackendUnavailableError(f"resources: cuobjdump failed: {done.stderr.strip()}")
    return done.stdout
