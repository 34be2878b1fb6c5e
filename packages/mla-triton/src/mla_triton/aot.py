"""Compile decode kernels ahead of time, for GPUs that are not here, and use what was compiled.

Each case is planned and decoded as a caller would, and what it would launch is compiled; see
`mla_core.compiling` and ``mla aot --help``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mla_core import compiling, layouts
from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.compiling import TARGETS, Launch, compile_launch
from mla_core.dims import MLADims
from mla_core.dtypes import torch_dtype
from mla_core.errors import LayoutError
from mla_core.ops import decode
from mla_core.plan import AttentionOptions, plan_decode
from mla_core.resources import Resources, resources_of
from mla_triton.aot_files import MANIFEST
from mla_triton.decode import with_config
from mla_triton.tuning import DecodeConfig

_KERNELS = ("mla_core.kernels", "mla_triton.kernels")
#: Bytes from which AMD's compiler no longer counts on 32-bit offsets into a buffer.
_LARGE_BYTES = 2**31
#: Files of the compiler that a launch needs; the others are its intermediate forms.
_SUFFIXES = (".json", ".cubin", ".hsaco")


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """Decode steps to compile for.

    Parameters
    ----------
    arch : str
        One of ``TARGETS``.
    dims : MLADims
    q_dtype : str
    layout : str
        Name of a cache layout, as `mla_core.layouts.get` takes it.
    page_size, q_len, batch_size : int
        Equal query lengths; batches of other sizes run the same kernels, the merge apart, which
        has one for few rows and one for many.
    options : AttentionOptions
    has_sink, return_lse, batch_invariant : bool
    num_kv_splits : int, optional
        1 writes the output directly, 2 and above stand for every number of splits; but on Hopper
        the merge is one kernel for 2 to 4, another for 5 to 16 and another for more.
    is_persistent : bool
        Follow a work list, made here or on the device.
    is_ragged : bool
        Some requests are much longer than the average; for automatic numbers of splits.
    config : DecodeConfig, optional
        Tile sizes of the portable kernel, whatever planning chooses.
    is_large : bool
        The cache is larger than 2 GiB, which AMD's compiler makes a kernel of its own for.
    """

    arch: str
    dims: MLADims
    q_dtype: str = "bf16"
    layout: str = "bf16"
    page_size: int = 64
    q_len: int = 1
    batch_size: int = 2
    options: AttentionOptions = field(default_factory=AttentionOptions)
    has_sink: bool = False
    return_lse: bool = False
    batch_invariant: bool = False
    num_kv_splits: int | None = 1
    is_persistent: bool = False
    is_ragged: bool = False
    config: DecodeConfig | None = None
    is_large: bool = False

    def __post_init__(self) -> None:
        """Refuse architectures that nothing here compiles for."""
        if self.arch not in TARGETS:
            raise LayoutError(f"aot: arch must be one of {', '.join(TARGETS)}, got {self.arch!r}")

    def __str__(self) -> str:
        """One line, in the words of ``mla bench``."""
        dims, options = self.dims, self.options
        parts = [
            *(self.arch, self.q_dtype, self.layout, f"h{dims.num_heads}"),
            *(f"d{dims.kv_lora_rank}+{dims.qk_rope_head_dim}", f"q{self.q_len}"),
            *(f"b{self.batch_size}", f"p{self.page_size}"),
        ]
        flags = {
            "lse": self.return_lse,
            "sink": self.has_sink,
            "batch_invariant": self.batch_invariant,
            "persistent": self.is_persistent,
            "split": self.num_kv_splits != 1 and not self.is_persistent,
            "ragged": self.is_ragged,
            "large": self.is_large,
        }
        parts += sorted(options.features)
        return "/".join(parts + [name for name, is_asked in flags.items() if is_asked])


@dataclass(frozen=True, slots=True)
class Built:
    """One compiled kernel; ``compiled`` is Triton's, ``cases`` what it serves."""

    arch: str
    name: str
    compiled: Any
    resources: Resources
    cases: tuple[str, ...]

    @property
    def key(self) -> str:
        """Folder of the kernel in Triton's cache."""
        return Path(next(iter(self.compiled.metadata_group.values()))).parent.name

    @property
    def configuration(self) -> str:
        """Constants of the kernel and the options of its launch, on one line."""
        metadata = self.compiled.metadata
        values = {**_constants(self.compiled.src), "num_warps": metadata.num_warps}
        return " ".join(f"{name}={value}" for name, value in values.items())

    def entry(self) -> dict[str, object]:
        """Return the manifest's entry."""
        metadata, source = self.compiled.metadata, self.compiled.src
        target = TARGETS[self.arch]
        files = {
            name: hashlib.sha256(Path(place).read_bytes()).hexdigest()
            for name, place in sorted(self.compiled.metadata_group.items())
            if name.endswith(_SUFFIXES)
        }
        return {
            "kernel": self.name,
            "arch": self.arch,
            "target": list(target),
            "triton": metadata.triton_version,
            "key": self.key,
            "files": files,
            "signature": {name: str(kind) for name, kind in source.signature.items()},
            "constants": _constants(source),
            "num_warps": metadata.num_warps,
            "num_stages": metadata.num_stages,
            "resources": asdict(self.resources),
            "cases": list(self.cases),
        }


def build(cases: Iterable[DecodeCase]) -> list[Built]:
    """Compile what the cases launch, each distinct kernel once, through Triton's cache.

    Raises
    ------
    BackendUnavailableError
        Triton is missing, or its interpreter is on.
    """
    found: dict[tuple[str, str], Built] = {}
    for case in cases:
        for launch in record(case):
            compiled = compile_launch(launch, case.arch)
            key = (case.arch, compiled.hash)
            known = found.get(key)
            if known is None:
                function = launch.kernel.fn
                name = f"{function.__module__}:{function.__qualname__}"
                resources = resources_of(compiled)
                found[key] = Built(case.arch, name, compiled, resources, (str(case),))
            elif str(case) not in known.cases:
                served = (*known.cases, str(case))
                found[key] = Built(known.arch, known.name, compiled, known.resources, served)
    return list(found.values())


def record(case: DecodeCase) -> list[Launch]:
    """Plan and decode a case without running any kernel, and return what would be launched."""
    with recorded(case.arch) as launches:
        _decode(case)
    return launches


def save(built: Sequence[Built], folder: Path) -> Path:
    """Write compiled kernels and their manifest into a folder; returns the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for kernel in built:
        entry = kernel.entry()
        place = folder / kernel.key
        place.mkdir(exist_ok=True)
        for name, path in kernel.compiled.metadata_group.items():
            if name.endswith(_SUFFIXES):
                shutil.copyfile(path, place / name)
        entries.append(entry)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"kernels": entries}, indent=1) + "\n", encoding="utf-8")
    return manifest


def recorded(arch: str) -> AbstractContextManager[list[Launch]]:
    """Record the launches of decode in a block; see `mla_core.compiling.recorded`."""
    return compiling.recorded(arch, *_KERNELS)


def kernels() -> Iterator[tuple[ModuleType, str, Any]]:
    """Yield every kernel of decode with its module and name; see `mla_core.compiling.kernels`."""
    return compiling.kernels(*_KERNELS)


def _decode(case: DecodeCase) -> None:
    """Plan and decode as a caller would; kernels must be recorders."""
    # Two pages for each request, so that the page table is no special case.
    batch_size, page_size, dims = case.batch_size, case.page_size, case.dims
    num_pages = 2 * batch_size
    lens = torch.full((batch_size,), 2 * page_size, dtype=torch.int32)
    table = torch.arange(num_pages, dtype=torch.int32).view(batch_size, 2)
    kv = PagedKV.from_block_table(_cache(case, num_pages), table, lens)
    qo_indptr = torch.arange(batch_size + 1, dtype=torch.int32) * case.q_len
    dtype = torch_dtype(case.q_dtype)
    world_size = case.options.cp_world_size
    plan = plan_decode(
        dims,
        qo_indptr,
        kv,
        q_dtype=dtype,
        options=case.options,
        has_sink=case.has_sink,
        batch_invariant=case.batch_invariant,
        num_kv_splits=None if case.is_persistent else case.num_kv_splits,
        max_seqlen_k=(100 if case.is_ragged else 2) * page_size,
        fixed_lengths=case.is_persistent,
        persistent=case.is_persistent,
        backend="triton",
    )
    if case.config is not None:
        plan = with_config(plan, case.config, case.num_kv_splits)
    q = torch.empty(batch_size * case.q_len, dims.num_heads, dims.latent_dim, dtype=dtype)
    rope = case.options.rope
    decode(
        q[..., : dims.kv_lora_rank],
        q[..., dims.kv_lora_rank :],
        kv,
        plan,
        sm_scale=dims.sm_scale,
        return_lse=case.return_lse,
        sink=torch.zeros(dims.num_heads) if case.has_sink else None,
        q_scale=torch.ones(1) if case.q_dtype.startswith("fp8") else None,
        global_kv_lens=lens * world_size if world_size > 1 else None,
        cos_sin_cache=None if rope is None else torch.zeros(1, rope.rotary_dim),
        positions=None if rope is None else torch.zeros(q.shape[0], dtype=torch.int64),
    )


def _cache(case: DecodeCase, num_pages: int) -> LatentCache:
    """Return a cache that nothing reads; its memory is never touched, so large ones cost none."""
    layout = layouts.get(case.layout)
    if case.is_large:
        (first, *_) = layout.buffer_specs(case.dims, 1, case.page_size)
        page_bytes = torch.empty(first.shape, dtype=torch_dtype(first.dtype), device="meta").nbytes
        num_pages = max(num_pages, _LARGE_BYTES // page_bytes + 1)
    specs = layout.buffer_specs(case.dims, num_pages, case.page_size)
    buffers = [torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in specs]
    scale = torch.ones(1) if layout.needs_scale else None
    return LatentCache.bind(layout, case.dims, case.page_size, *buffers, scale=scale)


def _constants(source: Any) -> dict[str, object]:
    names = source.fn.arg_names
    return {
        names[path[0]]: value if isinstance(value, (bool, int, float)) else str(value)
        for path, value in source.constants.items()
    }
