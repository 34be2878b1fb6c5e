"""SGLang's Triton kernel for MLA decode as a contender, without installing what SGLang needs.

    pip download sglang --no-deps && unzip -q sglang-*.whl -d sglang-wheel
    export SGLANG_DIR=sglang-wheel
    python benchmarks/run.py --contenders triton,peers.sglang_triton:CONTENDER

Three files are loaded, from the directory in ``SGLANG_DIR`` or from an installed ``sglang``: the
kernels, the score hook they import and the kernel that chooses the splits. The package itself is
never imported; the few other names its kernels import are replaced by what they are on NVIDIA.

What is measured is what SGLang's Triton backend launches for one layer on an NVIDIA GPU, read in
SGLang 0.5.23:

- It addresses single tokens. The slots of a batch are listed on the device before anything is
  timed, in int64 as SGLang keeps them, so the page size of a case decides only where tokens lie.
- A device kernel chooses the splits of each request, bounded by the number of multiprocessors
  rounded up to a power of two, or by the server's 8 where that is more. (The context length bounds
  them too, below 8192 on an H200; a server takes the model's, 163840 for DeepSeek-V3.)
- Eager calls choose the splits and decode; graph replays only decode, as for every contender.
- From sm90 on, the merge is launched dependent on the first kernel, as SGLang does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from mla_core.batch import PagedKV, indptr_of
from mla_core.bench import Prepared
from mla_core.bench.workload import DecodeWorkload
from mla_core.errors import BackendUnavailableError, UnsupportedProblemError
from mla_core.testing.poison import poison_

NAME = "sglang_triton"

#: Where the kernels lie in a wheel, and the names they import that decide something on AMD only.
_FOLDER = Path("sglang/kernels/ops/attention")
_ABSENT: dict[str, dict[str, object]] = {
    "sglang.srt.environ": {"envs": SimpleNamespace()},
    "sglang.srt.utils": {
        "get_device_core_count": lambda device: 0,
        "is_gfx95_supported": lambda: False,
        "is_gfx1250_supported": lambda: False,
        "is_hip": lambda: False,
    },
}

#: SGLang's default of ``--triton-attention-num-kv-splits``.
_SERVER_SPLITS = 8
#: Multiprocessors that Triton's interpreter claims: few, because the merge walks over all splits.
_INTERPRETED_SMS = 8


@dataclass(frozen=True, slots=True)
class _Kernels:
    """What is used of SGLang, and the version it comes from."""

    version: str
    decode_attention_fwd: Callable[..., None]
    get_num_kv_splits_triton: Mapping[tuple[int], Callable[..., None]]


class SGLangTriton:
    """``decode_attention_fwd`` of SGLang over token slots, bf16, one query token per request."""

    name = NAME

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        """List the token slots of every data set and choose the splits once.

        Raises
        ------
        UnsupportedProblemError
            The case is not plain bf16 decode with one query token per request.
        BackendUnavailableError
            SGLang's files are missing or import what this adapter does not know, or the device is
            neither an NVIDIA GPU nor the CPU with Triton's interpreter.
        """
        _refuse(workload)
        kernels, device = _kernels(), workload.device
        case, dims = workload.case, workload.dims
        _refuse_device(device)
        num_sms, use_pdl = _INTERPRETED_SMS, False
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            num_sms, use_pdl = properties.multi_processor_count, properties.major >= 9
        max_kv_splits = max(_SERVER_SPLITS, _next_power_of_2(num_sms))

        seq_lens = torch.tensor(workload.kv_lens, dtype=torch.int64, device=device)
        kv_indptr = indptr_of(seq_lens)
        kv_indices = [_token_slots(kv, max(workload.kv_lens)) for kv in workload.kvs]
        k_buffers = [kv.cache.rows().view(-1, 1, dims.latent_dim) for kv in workload.kvs]
        splits = torch.empty(case.batch_size, dtype=torch.int32, device=device)
        is_uneven = torch.zeros(1, dtype=torch.int32, device=device)
        partial_shape = (case.batch_size, dims.num_heads, max_kv_splits, dims.value_dim)
        partial_out = poison_(torch.empty(partial_shape, dtype=torch.float32, device=device))
        partial_lse = poison_(torch.empty(partial_shape[:3], dtype=torch.float32, device=device))
        out_shape = (case.batch_size, dims.num_heads, dims.value_dim)
        outs = [
            poison_(torch.empty(out_shape, dtype=workload.out_dtype, device=device))
            for _ in workload.kvs
        ]

        def choose_splits() -> None:
            kernels.get_num_kv_splits_triton[(1,)](
                splits,
                seq_lens,
                case.batch_size,
                1,
                dims.num_heads,
                1,
                max_kv_splits,
                num_sms,
                MAX_NUM_SEQ=max(256, _next_power_of_2(case.batch_size)),
                uneven_batch_ptr=is_uneven,
            )

        def replay(i: int) -> torch.Tensor:
            kernels.decode_attention_fwd(
                workload.q,
                k_buffers[i],
                k_buffers[i][..., : dims.value_dim],
                outs[i],
                kv_indptr,
                kv_indices[i],
                partial_out,
                partial_lse,
                splits,
                max_kv_splits,
                dims.sm_scale,
                1.0,
                1.0,
                has_mla=True,
                use_pdl=use_pdl,
                uneven_batch=is_uneven,
            )
            return outs[i]

        def step(i: int) -> torch.Tensor:
            choose_splits()
            return replay(i)

        choose_splits()
        used = int(splits.max())
        return Prepared(
            f"sglang {kernels.version} decode_attention_fwd num_kv_splits={used} "
            f"max_kv_splits={max_kv_splits} page_size=1",
            step,
            replay,
        )


CONTENDER = SGLangTriton()


def _refuse(workload: DecodeWorkload) -> None:
    case = workload.case
    for name, want in (("q_dtype", "bf16"), ("layout", "bf16"), ("q_len", 1)):
        if (got := getattr(case, name)) != want:
            raise UnsupportedProblemError(f"{NAME}: {name} must be {want}, got {got}")


def _refuse_device(device: torch.device) -> None:
    import triton

    if device.type == "cuda" and torch.version.hip is not None:
        raise BackendUnavailableError(
            f"{NAME}: device must be an NVIDIA GPU; on AMD, settings of SGLang's server choose "
            "among several kernels"
        )
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise BackendUnavailableError(
            f"{NAME}: device must be an NVIDIA GPU, or the CPU with TRITON_INTERPRET=1"
        )


def _token_slots(kv: PagedKV, max_len: int) -> torch.Tensor:
    """Return the slots of all cached tokens, [sum of lengths] int64, request after request."""
    slots = kv.token_slots(max_len)
    return slots[slots >= 0]


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _kernels() -> _Kernels:
    """Load SGLang's files, once in a process."""
    root = _root()
    with _modules(_ABSENT):
        hook = _load(root, "score_mod")
        with _modules({"sglang.kernels.ops.attention.score_mod": vars(hook)}):
            decode = _load(root, "decode_attention")
        splits = _load(root, "metadata")
    found = next(iter(metadata.distributions(name="sglang", path=[str(root)])), None)
    try:
        return _Kernels(
            "of unknown version" if found is None else found.version,
            decode.decode_attention_fwd,
            splits.get_num_kv_splits_triton,
        )
    except AttributeError as exc:
        raise BackendUnavailableError(f"{NAME}: sglang must be like 0.5.23: {exc}") from exc


def _root() -> Path:
    """Return the directory that holds the folder ``sglang``."""
    if named := os.environ.get("SGLANG_DIR"):
        roots = [Path(named)]
    else:
        # Finds the package without running it.
        spec = importlib.util.find_spec("sglang")
        places = () if spec is None else spec.submodule_search_locations or ()
        roots = [Path(place).parent for place in places]
    for root in roots:
        if (root / _FOLDER / "decode_attention.py").is_file():
            return root.resolve()
    looked = ", ".join(map(str, roots)) or "sys.path"
    raise BackendUnavailableError(
        f"{NAME}: {_FOLDER / 'decode_attention.py'} must be in the directory SGLANG_DIR, or in an "
        f"installed sglang, and is not in {looked}; pip download sglang --no-deps, and unzip it"
    )


def _load(root: Path, name: str) -> ModuleType:
    """Run one file as a module of its own, with a name that no package has."""
    path = root / _FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"_{NAME}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Triton looks functions up in the module of their name.
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as exc:
        raise BackendUnavailableError(
            f"{NAME}: sglang must be like 0.5.23; {path} does not load alone: {exc}"
        ) from exc
    return module


@contextmanager
def _modules(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let modules of these names and contents be imported, and nothing else of their package."""
    before = {name: sys.modules.get(name) for name in contents}
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before
