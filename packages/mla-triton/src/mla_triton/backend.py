"""Descriptor of the ``triton`` backend: what its kernels take, without importing Triton."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec

from mla_core.backend import Backend
from mla_core.errors import BackendUnavailableError
from mla_core.problem import Capability, Verified

#: Architectures with a tuning table of their own; others are refused until somebody tunes them.
GPU_ARCHS = frozenset({"sm90", "gfx942", "gfx950"})

_INTERPRETED = Verified(
    "cpu", "interpreted", "2026-11-21", "packages/mla-triton/tests/test_decode.py"
)
_RAN = Verified("sm90", "ran", "2026-11-21", "benchmarks/results/sm90/tests_gpu.log")
_GFX942, _GFX950 = (
    Verified(arch, "emulated", "2026-11-21", "packages/mla-triton/tests/test_emulated.py")
    for arch in ("gfx942", "gfx950")
)
_FEATURES = frozenset({"lse", "non_causal", "window", "softcap", "sink", "batch_invariant"})
_ALL_FEATURES = _FEATURES | {"cp_round_robin", "rope", "rope_write_back"}
_FLOATS = frozenset({"bf16", "fp16", "fp32"})
_HOPPER = Capability(
    op="decode",
    kernel="hopper_decode",
    archs=frozenset({"sm90"}),
    q_dtypes=frozenset({"bf16", "fp16"}),
    kv_dtypes=frozenset({"bf16", "fp16"}),
    same_dtypes=True,
    layouts=frozenset({"standard"}),
    page_sizes=range(1, 2**20 + 1),
    num_heads=range(1, 129),
    kv_lora_ranks=frozenset({256, 512}),
    rope_dims=frozenset({32, 64}),
    features=_FEATURES | {"cp_round_robin"},
    verified=(_RAN,),
)
_HOPPER_FP8 = replace(
    _HOPPER,
    kernel="hopper_decode_fp8",
    q_dtypes=frozenset({"bf16", "fp16", "fp8_e4m3"}),
    kv_dtypes=frozenset({"fp8_e4m3"}),
    same_dtypes=False,
    layouts=frozenset({"standard", "seg576"}),
    rope_dims=frozenset({64}),
)
# Their rotary keys are bf16, which meets the queries' own 16 bits.
_HOPPER_SCALED = replace(
    _HOPPER_FP8,
    q_dtypes=frozenset({"bf16", "fp8_e4m3"}),
    layouts=frozenset({"seg656", "ds656"}),
    kv_lora_ranks=frozenset({512}),
)
#: The kernels of `mla_triton.hopper`; planning takes them wherever one of these rows holds.
HOPPER_ROWS = (
    _HOPPER,
    _HOPPER_FP8,
    _HOPPER_SCALED,
    # Rows of other pages would not start at multiples of 16 bytes.
    replace(_HOPPER_SCALED, layouts=frozenset({"seg644"}), page_sizes=range(4, 2**20 + 1, 4)),
)
_DECODE = Capability(
    op="decode",
    kernel="flash_decode",
    archs=GPU_ARCHS,
    q_dtypes=_FLOATS,
    kv_dtypes=_FLOATS,
    same_dtypes=True,
    layouts=frozenset({"standard"}),
    # Larger pages would overflow the 32-bit offsets of tokens inside one.
    page_sizes=range(1, 2**20 + 1),
    num_heads=range(1, 129),
    kv_lora_ranks=range(32, 1025, 32),
    rope_dims=range(0, 129, 2),
    features=_FEATURES,
    verified=(_RAN, _GFX942, _GFX950),
)
_DECODE_ALL = replace(_DECODE, features=_ALL_FEATURES)
_DECODE_FP8 = replace(
    _DECODE,
    archs=GPU_ARCHS - {"gfx942"},
    q_dtypes=_FLOATS | {"fp8_e4m3"},
    kv_dtypes=frozenset({"fp8_e4m3"}),
    same_dtypes=False,
    features=_ALL_FEATURES,
    layouts=frozenset({"standard", "seg576", "seg644", "seg656", "ds656", "ds32"}),
    verified=(_RAN, _GFX950),
)
# Each chip converts one flavour in an instruction; the other takes thousands, or does not compile.
_DECODE_FNUZ = replace(
    _DECODE_FP8,
    archs=frozenset({"gfx942"}),
    q_dtypes=_FLOATS | {"fp8_e4m3fnuz"},
    kv_dtypes=frozenset({"fp8_e4m3fnuz"}),
    verified=(_GFX942,),
)


def _persistent(row: Capability) -> Capability:
    """Return the row of the kernel that walks a work list; it takes the same problems."""
    return replace(
        row,
        kernel="flash_decode_worklist",
        features=row.features - {"batch_invariant"} | {"persistent"},
    )


_GPU_ROWS = (
    *(_DECODE, _DECODE_ALL, _DECODE_FP8, _DECODE_FNUZ),
    *map(_persistent, (_DECODE_ALL, _DECODE_FP8, _DECODE_FNUZ)),
)


def _in_interpreter(row: Capability) -> Capability:
    """Return the row for a CPU; the interpreter takes seconds, so only those who name it get it."""
    return replace(row, archs=frozenset({"cpu"}), automatic=False, verified=(_INTERPRETED,))


def probe(arch: str) -> None:
    """Raise when Triton is missing, or on a CPU without Triton's interpreter.

    Raises
    ------
    BackendUnavailableError
    """
    # Looking for it takes a hundred microseconds, which only the first plans pay.
    if "triton" not in sys.modules and find_spec("triton") is None:
        raise BackendUnavailableError('triton is not installed; pip install "mla-triton[triton]"')
    if arch == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise BackendUnavailableError(
            "triton runs on the CPU only in its interpreter; set TRITON_INTERPRET=1 to test with it"
        )


BACKEND = Backend(
    name="triton",
    priority=50,
    description="Portable Triton kernels for NVIDIA and AMD GPUs, and Gluon ones for Hopper.",
    probe=probe,
    ops={
        "plan_decode": "mla_triton.decode:plan_decode",
        "decode": "mla_triton.decode:decode",
    },
    commands={"aot": "mla_triton.cli.aot", "tune": "mla_triton.cli.tune"},
    capabilities=(*HOPPER_ROWS, *_GPU_ROWS, *map(_in_interpreter, _GPU_ROWS)),
)
