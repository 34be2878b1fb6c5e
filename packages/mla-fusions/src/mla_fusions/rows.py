"""Layouts as the kernel that writes rows wants them: tuples of numbers, known when it compiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from mla_core.cache import LatentCache
from mla_core.dims import MLADims
from mla_core.dtypes import itemsize
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.launch import launch
from mla_core.layouts import Field, Layout
from mla_core.layouts.codecs import Cast, Codec, GroupScaled, NvFp4, PerTensor, TokenScaled
from mla_fusions.backend import probe

#: The fp8 flavour that a chip converts to in an instruction; the other one takes about a dozen.
#: The interpreter converts as told, so that both ways are tested.
NATIVE_FP8 = {
    "sm90": "fp8_e4m3",
    "gfx942": "fp8_e4m3fnuz",
    "gfx950": "fp8_e4m3",
    "cpu": "fp8_e4m3",
}
_BIAS = {"fp8_e4m3": 7, "fp8_e4m3fnuz": 8}
#: Kinds of codecs, as in `mla_fusions.kernels._quantise`.
_CAST, _PER_TENSOR, _GROUP_FP32, _GROUP_E8M0, _NVFP4, _FP8, _GROUP_POWER = range(7)
#: Elements of a part that one tile holds at most, and programs to have before tiles grow.
_TILE_ELEMENTS = 4096
_MIN_PROGRAMS = 512
_MAX_BLOCK_T = 16

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a row: its tile, how it is quantised, and where it and its scales go.

    The tuples are those that `mla_fusions.kernels.write_rows` describes. ``values`` and
    ``scales`` are names of fields; a part without scales in the page has ``scales`` None.
    """

    shape: tuple[int, int, int]
    codec: Numbers
    place: Numbers
    scales_place: Numbers | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What a launch needs to know of a layout; ``b`` is None where rows have one part."""

    a: Part
    b: Part | None
    constants: dict[str, object]

    def schedule(self, num_tokens: int, heads: int = 1) -> tuple[int, int]:
        """Return tokens of a program and its warps."""
        width = self.a.shape[1] * self.a.shape[2]
        block_t = min(
            max(1, _TILE_ELEMENTS // width),
            max(1, num_tokens * heads // _MIN_PROGRAMS),
            _MAX_BLOCK_T,
        )
        block_t = 1 << block_t.bit_length() - 1
        return block_t, max(1, min(4, block_t * width // 256))


@dataclass(frozen=True, slots=True)
class Target:
    """Tensors of one part: rows [T, heads, width], and what they are written to.

    ``out`` and ``scales`` are views whose first dimension is the page; fp8 and fp4 are ``uint8``.
    ``out_stride_h`` and ``scales_stride_h`` are elements from head to head.
    """

    rows: torch.Tensor
    stride_h: int
    out: torch.Tensor
    out_stride_h: int = 0
    scales: torch.Tensor | None = None
    scales_stride_h: int = 0
    factor: torch.Tensor | None = None


def of_layout(layout: Layout, dims: MLADims, page_size: int, arch: str) -> Rows:
    """Return what the kernel needs to write a layout.

    Raises
    ------
    LayoutError
        The layout quantises or arranges rows in a way that the kernel has no tuple for.
    """
    key = (id(layout), dims, page_size, arch)
    known = _known.get(key)
    if known is None:
        arrangement = layout.arrangement(dims, page_size)
        fields = {field.name: field for field in arrangement.fields}
        parts = []
        for name, codec, width in (
            ("kv_c", layout.latent, dims.kv_lora_rank),
            ("k_pe", layout.rope, dims.qk_rope_head_dim),
        ):
            scales = fields.get(f"{name}_scale")
            parts.append(part_of(layout.name, codec, width, fields[name], scales, arch))
        a, b = parts
        known = layout, rows_of(a, b if dims.qk_rope_head_dim else None, page_size)
        _known[key] = known
    return known[1]


#: What `of_layout` answered. The layouts are kept, so that no other one gets the id of one of them.
_known: dict[tuple[int, MLADims, int, str], tuple[Layout, Rows]] = {}


def rows_of(a: Part, b: Part | None, page_size: int) -> Rows:
    """Join two parts with the constants of their launch."""
    constants: dict[str, object] = {"PAGE_SIZE": page_size}
    for name, part in (("A", a), ("B", b)):
        constants |= {
            f"{name}_SHAPE": None if part is None else part.shape,
            f"{name}_CODEC": None if part is None else part.codec,
            f"{name}_PLACE": None if part is None else part.place,
            f"{name}_SCALES": None if part is None else part.scales_place,
        }
    return Rows(a, b, constants)


def part_of(
    layout: str, codec: Codec, width: int, values: Field, scales: Field | None, arch: str
) -> Part:
    """Return the tuples of one part.

    Raises
    ------
    LayoutError
        As `of_layout`.
    """
    numbers = codec_of(layout, codec, width, arch)
    shape = (width, 1, power_of_two(width))
    if isinstance(codec, GroupScaled | NvFp4) and codec.group:
        shape = (width, power_of_two(width // codec.group), codec.group)
    return Part(
        shape,
        numbers,
        place_of(layout, values),
        None if scales is None else place_of(layout, scales),
    )


def codec_of(layout: str, codec: Codec, width: int, arch: str) -> Numbers:
    """Return how rows are quantised; `mla_fusions.kernels._quantise` says how.

    Raises
    ------
    LayoutError
        As `of_layout`.
    """
    kind, group, dtype, min_amax = _CAST, 0, "fp8_e4m3", 0.0
    match codec:
        case Cast():
            pass
        case PerTensor(dtype=dtype):
            kind = _PER_TENSOR
        case TokenScaled(dtype=dtype):
            kind = _GROUP_FP32
        case GroupScaled(dtype=dtype, group=group, e8m0=e8m0, min_amax=min_amax):
            kind = _GROUP_E8M0 if e8m0 else _GROUP_FP32
        case NvFp4(group=group):
            kind = _NVFP4
        case _:
            raise LayoutError(
                f"layout {layout}: codec must be Cast, PerTensor, TokenScaled, GroupScaled or "
                f"NvFp4 for this kernel, got {type(codec).__name__}"
            )
    if dtype not in _BIAS:
        raise LayoutError(
            f"layout {layout}: fp8 must be {' or '.join(_BIAS)} for this kernel, got {dtype}"
        )
    if group & (group - 1) or (group and width % group):
        raise LayoutError(
            f"layout {layout}: group must be a power of two that divides the width {width} for "
            f"this kernel, got {group}"
        )
    return (kind, _BIAS[dtype], NATIVE_FP8.get(arch) == dtype, min_amax)


def without_factor(codec: Numbers) -> Numbers:
    """Return a codec that stores as if its factor were 1."""
    kind, *rest = codec
    return (_FP8, *rest) if kind == _PER_TENSOR else codec


def with_powers_of_two(codec: Numbers) -> Numbers:
    """Return a codec of groups whose fp32 scales are rounded up to powers of two."""
    kind, *rest = codec
    assert kind == _GROUP_FP32
    return (_GROUP_POWER, *rest)


def place_of(layout: str, field: Field) -> Numbers:
    """Return where a field's elements go, in elements; `mla_fusions.kernels.write_rows` says how.

    Raises
    ------
    LayoutError
        An index has more digits than the kernel takes apart.
    """
    size = itemsize(field.dtype)
    if len(field.tokens) > 3 or len(field.elems) > 2 or len(field.copies) > 1:
        raise LayoutError(
            f"layout {layout}: {field.name} must have at most 3 token digits, 2 element digits "
            f"and 1 copy digit for this kernel, got {len(field.tokens)}, {len(field.elems)} and "
            f"{len(field.copies)}"
        )
    # Missing digits take one value. The most significant one is never taken modulo its size.
    first, *rest = ((digit.size, digit.stride // size) for digit in field.tokens)
    (t1, s1), (t0, s0) = [(1, 0), (1, 0), *rest][-2:]
    top, *low = ((digit.size, digit.stride // size) for digit in field.elems)
    e0, d0 = [(1, 0), *low][-1]
    copies, step = next(((digit.size, digit.stride // size) for digit in field.copies), (1, 0))
    return (t1, t0, first[1], s1, s0, e0, top[1], d0, copies, step)


@functools.cache
def require_kernel(op: str, arch: str) -> None:
    """Raise where the kernels cannot run; asked once, since looking for Triton takes a while.

    Raises
    ------
    BackendUnavailableError, UnsupportedProblemError
    """
    probe(arch)
    if arch not in NATIVE_FP8:
        raise UnsupportedProblemError(
            f"{op}: device must be one of {', '.join(NATIVE_FP8)}, got {arch}"
        )


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below ``n``, for n >= 1."""
    return 1 << max(n - 1, 0).bit_length()


def write(
    rows: Rows, a: Target, b: Target | None, slots: torch.Tensor, num_slots: int, heads: int = 1
) -> None:
    """Launch the kernel that writes rows; everything was checked, and nothing waits.

    Parameters
    ----------
    slots : [T], int32 or int64
        ``page * page_size + offset``, distinct; those outside 0..num_slots-1 skip their token.
    heads : int
        Rows of a token, each with its own place in the page.
    """
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.write_rows import write_rows_kernel

    num_tokens = slots.shape[0]
    if not num_tokens or not num_slots:
        return
    block_t, num_warps = rows.schedule(num_tokens, heads)
    pointers, strides = operands(slots, a, b)
    launch(
        write_rows_kernel,
        (-(-num_tokens // block_t), heads),
        a.rows,
        slots if b is None else b.rows,
        slots,
        *pointers,
        num_tokens,
        num_slots,
        *strides,
        **rows.constants,
        BLOCK_T=block_t,
        num_warps=num_warps,
    )


def operands(unused: torch.Tensor, *targets: Target | None) -> tuple[list[torch.Tensor], list[int]]:
    """Return the pointers and the strides of some targets, as kernels take them.

    For each: outputs, scales, factor; strides of rows by token and head, of outputs by page and
    head, of scales by page and head. ``unused`` stands where a target has no tensor.
    """
    strides: list[int] = []
    pointers: list[torch.Tensor] = []
    for target in targets:
        if target is None:
            pointers += [unused] * 3
            strides += [0] * 6
            continue
        out, scales = target.out, target.scales
        pointers.append(out)
        pointers.append(unused if scales is None else scales)
        pointers.append(unused if target.factor is None else target.factor)
        strides += [
            target.rows.stride(0),
            target.stride_h,
            out.stride(0),
            target.out_stride_h,
            0 if scales is None else scales.stride(0),
            target.scales_stride_h,
        ]
    return pointers, strides


def target_of(cache: LatentCache, name: str, rows: torch.Tensor) -> Target:
    """Return rows [T, width] of one part, and the fields of a cache that they go to."""
    codec = cache.layout.latent if name == "kv_c" else cache.layout.rope
    kind = codec.scale_kind
    return Target(
        rows,
        0,
        cache.field_bytes(name),
        scales=None if kind in ("none", "per_tensor") else cache.field_bytes(f"{name}_scale"),
        factor=cache.scale if kind == "per_tensor" else None,
    )
