"""Conformance of cache writes: every layout, hostile caches and rows, compared byte for byte.

The reference is `mla_core.layouts.Layout.pack` on the CPU. Caches are full of random bytes before
a write, with gaps between pages, and compared as a whole afterwards, so a byte that belongs to no
written row may not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from mla_core import layouts, registry
from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.dtypes import torch_dtype
from mla_core.ops import write_kv_cache
from mla_core.problem import Problem
from mla_core.testing.poison import poison_


@dataclass(frozen=True)
class WriteCase:
    """One write; ``str`` is its test id.

    Parameters
    ----------
    name, layout : str
    num_tokens : int
        About a quarter of them have a negative slot.
    index_dtype : str
        Of the slots, ``int32`` or ``int64``.
    strided : bool
        Rows are slices of wider ones, and pages have gaps.
    is_finite : bool
        Otherwise some rows hold infinity and NaN; which NaN is stored for one is free.
    """

    name: str
    layout: str
    dims: MLADims = field(default_factory=lambda: MLADims(16))
    page_size: int = 16
    q_dtype: str = "bf16"
    num_tokens: int = 9
    index_dtype: str = "int64"
    strided: bool = False
    is_finite: bool = True
    seed: int = 0

    def __str__(self) -> str:
        """Name, then what differs from case to case."""
        dims = self.dims
        return (
            f"{self.name}-{self.q_dtype}-{self.layout}-d{dims.kv_lora_rank}+"
            f"{dims.qk_rope_head_dim}-p{self.page_size}-t{self.num_tokens}"
        )

    def problem(self, arch: str) -> Problem:
        """Return the question this case asks of a backend."""
        layout = layouts.get(self.layout)
        return Problem(
            op="write_kv_cache",
            arch=arch,
            q_dtype=self.q_dtype,
            kv_dtype=layout.kv_dtype,
            dims=self.dims,
            layout=layout.family,
            page_size=self.page_size,
        )

    def build(self, device: torch.device | str = "cpu") -> WriteInputs:
        """Draw rows, slots and a cache of random bytes; write them by the layout itself."""
        generator = torch.Generator().manual_seed(self.seed)
        layout, dims, num_tokens = layouts.get(self.layout), self.dims, self.num_tokens
        num_pages = -(-num_tokens // self.page_size) + 2
        scale = None
        if layout.needs_scale:
            scale = torch.rand(1, generator=generator) * 0.05 + 1e-3
        held = [
            torch.randint(0, 256, (num_pages, _page_bytes(spec, self.strided)), generator=generator)
            for spec in layout.buffer_specs(dims, num_pages, self.page_size)
        ]
        memory = tuple(each.to(torch.uint8) for each in held)
        slots = torch.randperm(num_pages * self.page_size, generator=generator)[:num_tokens]
        slots[torch.rand(num_tokens, generator=generator) < 0.25] = -1
        kv_c = self._rows(dims.kv_lora_rank, generator)
        k_pe = self._rows(dims.qk_rope_head_dim, generator)
        wanted = tuple(each.clone() for each in memory)
        self.cache(wanted, scale).write(kv_c, k_pe, slots)
        return WriteInputs(
            kv_c=self._placed(kv_c, device),
            k_pe=self._placed(k_pe, device),
            slots=slots.to(device, torch_dtype(self.index_dtype)),
            scale=None if scale is None else scale.to(device),
            memory=tuple(each.to(device) for each in memory),
            expected=wanted,
        )

    def cache(self, memory: tuple[torch.Tensor, ...], scale: torch.Tensor | None) -> LatentCache:
        """Bind memory of `WriteInputs` as a cache."""
        layout = layouts.get(self.layout)
        num_pages = memory[0].shape[0]
        buffers = []
        for bytes_, spec in zip(
            memory, layout.buffer_specs(self.dims, num_pages, self.page_size), strict=True
        ):
            page = bytes_[:, : _page_bytes(spec, is_strided=False)]
            buffers.append(page.view(torch_dtype(spec.dtype)))
        return LatentCache.bind(layout, self.dims, self.page_size, *buffers, scale=scale)

    def _rows(self, width: int, generator: torch.Generator) -> torch.Tensor:
        """Draw rows of very different magnitudes, some of them special."""
        dtype = torch_dtype(self.q_dtype)
        x = torch.randn(self.num_tokens, width, generator=generator)
        x *= 10.0 ** (torch.rand(self.num_tokens, 1, generator=generator) * 7 - 4)
        if width and self.num_tokens > 4:
            # Zeros of both signs, ties of every narrow format, the range's ends, mixed groups.
            x[0] = torch.where(x[0] > 0, 0.0, -0.0)
            x[1] = (x[1] * 64).round() / 64
            x[2] = x[2].sign() * torch.finfo(dtype).max
            x[3] = x[3].sign() * torch.finfo(dtype).tiny
            x[4] *= 10.0 ** (torch.rand(width, generator=generator) * 8 - 6)
            if not self.is_finite:
                x[1, ::3], x[2, 1::5], x[3, :] = float("inf"), float("-inf"), float("nan")
                x[4, width // 2] = float("nan")
        return x.to(dtype)

    def _placed(self, rows: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """Move rows to a device, as a slice of wider poisoned ones if asked for."""
        if not self.strided:
            return rows.to(device)
        wide = torch.empty(rows.shape[0], rows.shape[1] + 13, dtype=rows.dtype, device=device)
        poison_(wide)[:, 5 : 5 + rows.shape[1]] = rows.to(device)
        return wide[:, 5 : 5 + rows.shape[1]]


@dataclass(frozen=True)
class WriteInputs:
    """Arguments of one write on a device, and what the memory must hold afterwards (CPU).

    ``memory`` and ``expected`` are bytes [num_pages, bytes of a page and its gap], one for each
    buffer of the layout.
    """

    kv_c: torch.Tensor
    k_pe: torch.Tensor
    slots: torch.Tensor
    scale: torch.Tensor | None
    memory: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]


def _page_bytes(spec: layouts.BufferSpec, is_strided: bool) -> int:
    size = torch_dtype(spec.dtype).itemsize
    for length in spec.shape[1:]:
        size *= length
    return size + 48 * is_strided


def _cases() -> Iterator[WriteCase]:
    widths = {
        "v4": MLADims(4, 448, 64, 448, 512, value_includes_rope=True),
        "indexer": MLADims(1, 128, 0),
        "nvfp4": MLADims(4, 256, 64),
    }
    for name, layout in layouts.ALL.items():
        dims = widths.get(name.split("_")[0], MLADims(4))
        page_size = {1: 3, 16: 32, 128: 256}[layout.page_multiple]
        base = WriteCase("rows", name, dims, page_size)
        yield base
        yield replace(base, name="strided", strided=True, q_dtype="fp32", index_dtype="int32")
        yield replace(base, name="fp16", q_dtype="fp16", page_size=layout.page_multiple)
        yield replace(base, name="non_finite", is_finite=False, q_dtype="fp32", num_tokens=7)
    yield WriteCase("nothing", "bf16", num_tokens=0)
    yield WriteCase("one", "bf16", num_tokens=1, seed=1)
    for name in ("bf16", "fp8_ds656", "nvfp4_shuffled", "fp8_seg644_fnuz"):
        page_size = 128 if name.startswith("nv") else 64
        yield WriteCase("one", name, MLADims(4, 256), page_size, num_tokens=1, seed=1)
        yield WriteCase("many", name, MLADims(4, 256), page_size, num_tokens=1100)
    for rank, rope in ((64, 16), (192, 0), (512, 0), (1024, 64), (96, 8)):
        dims = MLADims(4, rank, rope)
        for name in ("fp16", "fp8", "fp8_seg644", "fp8_seg576_fnuz"):
            yield WriteCase("dims", name, dims, 5)


#: Layouts, dtypes, widths, page sizes and numbers of tokens.
WRITE_CASES: tuple[WriteCase, ...] = tuple(
    replace(case, seed=case.seed + index) for index, case in enumerate(_cases())
)


def write_cases(backend: str, arch: str) -> tuple[WriteCase, ...]:
    """Return the cases a backend claims on an architecture."""
    rows = registry.record(backend).require().capabilities
    return tuple(
        case for case in WRITE_CASES if any(not row.why_not(case.problem(arch)) for row in rows)
    )


def check_write(backend: str, case: WriteCase, device: torch.device | str = "cpu") -> None:
    """Run one case on a backend and compare all memory of the cache with the reference.

    Raises
    ------
    AssertionError
        A byte differs; the message says which page, and what the layout keeps there.
    """
    inputs = case.build(device)
    cache = case.cache(inputs.memory, inputs.scale)
    write_kv_cache(inputs.kv_c, inputs.k_pe, cache, inputs.slots, backend=backend)
    got = tuple(each.cpu() for each in inputs.memory)
    if not case.is_finite:
        got = _with_equal_nans(case, got, inputs)
    for buffer, (ours, wanted) in enumerate(zip(got, inputs.expected, strict=True)):
        wrong = (ours != wanted).nonzero()
        if wrong.numel():
            page, byte = wrong[0].tolist()
            raise AssertionError(
                f"{case}: {len(wrong)} bytes of buffer {buffer} differ, the first is byte {byte} "
                f"of page {page} ({_owner(case, buffer, byte)}): got {int(ours[page, byte])}, "
                f"want {int(wanted[page, byte])}"
            )


def _with_equal_nans(
    case: WriteCase, got: tuple[torch.Tensor, ...], inputs: WriteInputs
) -> tuple[torch.Tensor, ...]:
    """Take the reference's bytes for each stored value that is NaN, or scaled by NaN, in both."""
    slots = inputs.slots.cpu().long()
    scale = None if inputs.scale is None else inputs.scale.cpu()
    ours, wanted = (case.cache(memory, scale) for memory in (got, inputs.expected))
    layout = ours.layout
    for name, codec, read in (
        ("kv_c", layout.latent, 0),
        ("k_pe", layout.rope, 1),
    ):
        nan = ours.read(slots)[read].isnan()
        assert torch.equal(nan, wanted.read(slots)[read].isnan()), f"{case}: {name} has other NaNs"
        for item in codec.items(name, nan.shape[1]):
            if not item.width:
                continue
            # A scale belongs to a group, a byte of fp4 to a pair: NaN if all of them are.
            covers = nan.view(len(slots), item.width, -1).all(-1)
            arrangement = layout.arrangement(case.dims, case.page_size)
            place = arrangement.field(item.name)
            values = [
                place.take(cache.buffers[place.buffer], slots).view(len(slots), -1)
                for cache in (ours, wanted)
            ]
            as_bytes = [each.view(torch.uint8).view(*covers.shape, -1) for each in values]
            merged = torch.where(covers[..., None], as_bytes[1], as_bytes[0])
            merged = merged.flatten(1).view(values[0].dtype)
            place.put(ours.buffers[place.buffer], slots, merged)
    return got


def _owner(case: WriteCase, buffer: int, byte: int) -> str:
    """Say what a layout keeps at a byte of a page."""
    layout = layouts.get(case.layout)
    for place in layout.fields(case.dims, case.page_size):
        if place.buffer != buffer:
            continue
        size = torch_dtype(place.dtype).itemsize
        tokens = torch.arange(place.page_size)[:, None, None]
        elems = torch.arange(place.width)[None, :, None]
        for copy in range(place.copies[0].size if place.copies else 1):
            found = place.address(tokens, elems, copy) + torch.arange(size) == byte
            if found.any():
                token, elem, _ = found.nonzero()[0].tolist()
                return f"{place.name}[{elem}] of token {token}"
    return "padding"
