"""Launching the kernel that rotates queries and keys, joins the queries and writes the keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.dtypes import fp8_of_arch
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_core.layouts.codecs import Cast, PerTensor
from mla_fusions import rows
from mla_fusions.latent_writers import ROWS, SLOTS, as_scale

FP8_OF = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e4m3fnuz: "fp8_e4m3fnuz"}
#: Elements of a tile of queries at most, and programs to have before tiles grow.
_TILE_ELEMENTS = 4096
_MIN_PROGRAMS = 1024
#: Elements for a warp: 4 accesses of 16 bytes of bf16 in each thread.
_WARP_ELEMENTS = 1024
#: Rows of fp8 queries from which on tiles are twice as large.
_MANY_ROWS = 1 << 18
#: The same beside other programs, whose warps share registers: an access in each thread.
_JOINED_ELEMENTS = 256


@dataclass(frozen=True, slots=True)
class Rotation:
    """How rows turn; `rotation_of` checks it.

    Parameters
    ----------
    positions : [>= T], int32 or int64
        Clamped into the tables, with ``offsets`` added before.
    cos, sin : [num_positions, columns], bf16, fp16 or fp32
    offsets : like ``positions``, or None
    rope : tuple, or None
        As `mla_fusions.kernels.rope_rows` describes; None where nothing turns.
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    offsets: torch.Tensor | None
    rope: tuple[int, int, bool, bool, int] | None


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of a launch, and where they go.

    Parameters
    ----------
    nope : [T, heads, c], or None
    pe : [T, heads, r]
        Rotated.
    out : [T, heads, c + r or more], floating, or ``uint8`` for fp8
    codec : tuple
        How ``out`` is stored; see `queries_of`.
    factor : fp32 [1], or None
    is_nope_first : bool
    needs_slot : bool
        Whether tokens without a slot are left out.
    pe_out : [n, heads, r], or None
        Receives the rotated part of the first n tokens once more.
    zeros : [n, heads, any], or None
        Receives zeros for the first n tokens.
    """

    nope: torch.Tensor | None
    pe: torch.Tensor
    out: torch.Tensor
    codec: rows.Numbers
    factor: torch.Tensor | None = None
    is_nope_first: bool = True
    needs_slot: bool = False
    pe_out: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a launch: ``a`` is copied, ``b`` rotated, and both go to their slots.

    Parameters
    ----------
    spec : Rows
    a, b : Target
        With as many rows as there are keys; ``b`` is None without a rotary part.
    slots : [at most as many], int32 or int64, or None
        Tokens past its end are not written. None is each token's own number.
    num_slots, heads : int
    num_turned : int
        Keys of tokens from here on are not rotated.
    out : like the rows of ``b``, or None
        Receives the rotated keys.
    is_divided : bool
        Whether rows are divided by the factors first, for codecs that do not.
    """

    spec: rows.Rows
    a: rows.Target
    b: rows.Target | None
    slots: torch.Tensor | None
    num_slots: int
    heads: int
    num_turned: int
    out: torch.Tensor | None = None
    is_divided: bool = False


def schedule(num_tokens: int, heads: int, width: int, is_narrow: bool = False) -> tuple[int, int]:
    """Return heads of a program and its warps, for queries whose wider part has ``width``.

    ``is_narrow`` says that they are stored in fp8, which takes more instructions for each byte.
    """
    tile, warp, most = _TILE_ELEMENTS, _WARP_ELEMENTS, 4
    if is_narrow and num_tokens * heads >= _MANY_ROWS:
        tile, most = 2 * tile, 2 * most
    block_h = min(
        max(1, tile // width),
        max(1, num_tokens * heads // _MIN_PROGRAMS),
        rows.power_of_two(heads),
    )
    block_h = 1 << block_h.bit_length() - 1
    if is_narrow and block_h * width < tile:
        warp //= 2
    return block_h, max(1, min(most, block_h * width // warp))


def rotate_and_write(op: str, turn: Rotation, queries: Queries, keys: Keys) -> None:
    """Launch; everything was checked, and nothing waits."""
    rows.require_kernel(op, arch_of(queries.pe.device))
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.rope_rows import rope_rows_kernel

    arranged = arrange(turn, queries, keys)
    if not arranged.num_programs:
        return
    launch(
        rope_rows_kernel,
        (arranged.num_programs,),
        *arranged.args,
        **arranged.constants,
        num_warps=arranged.num_warps,
        # Products and sums round on their own: the same bits on every chip.
        enable_fp_fusion=False,
    )


@dataclass(frozen=True, slots=True)
class Arranged:
    """A launch of `mla_fusions.kernels.rope_rows`: programs, their warps, and what they get."""

    num_programs: int
    num_warps: int
    args: tuple[object, ...]
    constants: dict[str, object]


def arrange(turn: Rotation, queries: Queries, keys: Keys, num_warps: int | None = None) -> Arranged:
    """Return what to launch; ``num_warps`` are those of other programs that fill the GPU already.

    Then there are as few of these programs as so many warps allow, since each takes as much room as
    one of the others.
    """
    pe, nope, out, zeros = queries.pe, queries.nope, queries.out, queries.zeros
    num_tokens, heads, rope_dim = pe.shape
    rank = 0 if nope is None else nope.shape[2]
    num_keys = keys.a.rows.shape[0]
    tile_c, tile_r = rows.power_of_two(rank), rows.power_of_two(rope_dim)
    has_warps = num_warps is not None
    if num_warps is None:
        is_narrow = out.dtype == torch.uint8
        block_h, num_warps = schedule(num_tokens, max(heads, 1), max(tile_c, tile_r), is_narrow)
    else:
        widest = max(tile_c, tile_r, 1 if zeros is None else rows.power_of_two(zeros.shape[2]))
        block_h = min(max(1, num_warps * _JOINED_ELEMENTS // widest), rows.power_of_two(heads))
    block_t, key_warps = keys.spec.schedule(num_keys, keys.heads)
    writes_keys = num_keys and (keys.num_slots or keys.out is not None)
    num_kv_programs = -(-num_keys // block_t) * keys.heads if writes_keys else 0
    # Queries whose latent part is written elsewhere may have no other.
    writes_queries = rank or rope_dim or zeros is not None
    num_q_programs = num_tokens * -(-heads // block_h) if writes_queries else 0
    if not num_q_programs and not has_warps:
        num_warps = key_warps
    places = (0, rank) if queries.is_nope_first else (rope_dim, 0)
    zero_width = 0 if zeros is None else zeros.shape[2]
    pointers, numbers, strides = arguments_of(turn, keys)
    shape = (rank, tile_c, rope_dim, tile_r, *places, zero_width, rows.power_of_two(zero_width))
    args = (
        pe if nope is None else nope,
        pe,
        out,
        keys.slots if queries.factor is None else queries.factor,
        queries.pe_out,
        zeros,
        *pointers,
        num_kv_programs,
        *numbers,
        0 if queries.pe_out is None else queries.pe_out.shape[0],
        0 if zeros is None else zeros.shape[0],
        turn.cos.stride(0),
        turn.sin.stride(0),
        *_strides(nope),
        *_strides(pe),
        *_strides(out),
        *_strides(queries.pe_out),
        *_strides(zeros),
        *strides,
    )
    constants: dict[str, object] = {
        "HEADS": heads,
        "KEY_HEADS": keys.heads,
        "Q_SHAPE": shape,
        "Q_CODEC": queries.codec,
        "ROPE": turn.rope,
        "IS_IN_PLACE": _is_in_place(queries, keys),
        "IS_DIVIDED": keys.is_divided,
        "SKIPS_QUERIES": queries.needs_slot,
        **keys.spec.constants,
        "BLOCK_T": block_t,
        "BLOCK_H": block_h,
    }
    return Arranged(num_kv_programs + num_q_programs, num_warps, args, constants)


def arguments_of(
    turn: Rotation, keys: Keys
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...], tuple[int, ...]]:
    """Return what `mla_fusions.kernels.rope_rows.write_keys` gets, but for constants.

    Pointers, numbers, and strides but those of the tables.
    """
    pointers, strides = rows.operands(keys.a.rows, keys.a, keys.b)
    numbers = (
        keys.a.rows.shape[0],
        keys.a.rows.shape[0] if keys.slots is None else keys.slots.shape[0],
        keys.num_turned,
        keys.num_slots,
        turn.cos.shape[0],
    )
    tensors = (
        keys.a.rows,
        keys.a.rows if keys.b is None else keys.b.rows,
        keys.out,
        keys.slots,
        turn.positions,
        turn.offsets,
        turn.cos,
        turn.sin,
        *pointers,
    )
    return tensors, numbers, (*_strides(keys.out), *strides)


def rotation_of(
    op: str,
    *,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    offsets: torch.Tensor | None,
    num_tokens: int,
    width: int,
    is_neox: bool,
    rotary_dim: int | None,
    dim_offset: int,
    names: tuple[str, str] = ("cos", "sin"),
    positions_name: str = "positions",
) -> Rotation:
    """Check how rows of ``width`` elements turn.

    Raises
    ------
    LayoutError
        A tensor has another shape, dtype or device, or the rotation reaches past the rows.
    """
    device = positions.device
    widest = max(width - dim_offset, 0)
    turning = widest if rotary_dim is None else rotary_dim
    if dim_offset < 0 or turning % 2 or turning < 2 * bool(width) or turning > widest:
        raise LayoutError(
            f"{op}: rotary_dim must be even and at least 2, and dim_offset + rotary_dim at most "
            f"the width {width}, got rotary_dim={turning} and dim_offset={dim_offset}"
        )
    tables = []
    for name, table in zip(names, (cos, sin), strict=True):
        if table.ndim == 4 and table.shape[1:3] == (1, 1):
            table = table[:, 0, 0]
        if table.ndim != 2 or table.shape[1] not in (turning // 2, turning) or not table.shape[0]:
            raise LayoutError(
                f"{op}: {name} must be [max_position, {turning // 2} or {turning}] with a row or "
                f"more, got {tuple(table.shape)}; pass rotary_dim if fewer elements turn"
            )
        check_tensor(op, name, table, shape=tuple(table.shape), dtypes=ROWS, device=device)
        tables.append(table)
    cos, sin = tables
    if cos.shape != sin.shape:
        raise LayoutError(
            f"{op}: {names[1]} must be {tuple(cos.shape)} like {names[0]}, got {tuple(sin.shape)}"
        )
    for name, tensor in ((positions_name, positions), ("offs", offsets)):
        if tensor is None:
            continue
        check_tensor(op, name, tensor, shape=("T",), dtypes=SLOTS, device=device)
        if tensor.shape[0] < num_tokens or tensor.stride(0) != 1:
            raise LayoutError(
                f"{op}: {name} must be contiguous with at least {num_tokens} elements, got "
                f"{tensor.shape[0]} with stride {tensor.stride(0)}"
            )
    pairs = rows.power_of_two(turning // 2)
    rope = (turning, dim_offset, is_neox, cos.shape[1] == turning, pairs) if width else None
    return Rotation(positions, cos, sin, offsets, rope)


def queries_of(
    op: str,
    nope: torch.Tensor | None,
    pe: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | float | None,
    *,
    is_nope_first: bool = True,
    needs_slot: bool = False,
    pe_out: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> Queries:
    """Check the output of queries, and find its codec.

    Raises
    ------
    LayoutError
    """
    width = pe.shape[2] + (0 if nope is None else nope.shape[2])
    shape = (*pe.shape[:2], f"{width} or more")
    check_tensor(op, "q_out", out, shape=shape, dtypes=(out.dtype,), device=pe.device)
    if out.shape[2] < width:
        raise LayoutError(
            f"{op}: q_out must have at least {width} elements in a head, got {out.shape[2]}"
        )
    factor = None
    if scale is not None and out.dtype.itemsize == 1:
        factor = as_scale(op, "q_scale", scale, pe.device)
    out, codec = _query_codec(op, out, factor)
    return Queries(nope, pe, out, codec, factor, is_nope_first, needs_slot, pe_out, zeros)


def _query_codec(
    op: str, out: torch.Tensor, factor: torch.Tensor | None
) -> tuple[torch.Tensor, rows.Numbers]:
    """Return an output of queries as the kernel stores it, and its codec.

    Raises
    ------
    LayoutError
        Its dtype is none that queries have.
    """
    arch = arch_of(out.device)
    if out.dtype in ROWS:
        return out, rows.codec_of("q_out", Cast("bf16"), out.shape[-1], arch)
    if out.dtype != torch.uint8 and out.dtype not in FP8_OF:
        raise LayoutError(
            f"{op}: q_out must be bfloat16, float16, float32, float8_e4m3fn, float8_e4m3fnuz or "
            f"uint8, got {out.dtype}"
        )
    stored = PerTensor(FP8_OF.get(out.dtype, fp8_of_arch(arch)))
    codec = rows.codec_of("q_out", stored, out.shape[-1], arch)
    return out.view(torch.uint8), codec if factor is not None else rows.without_factor(codec)


def undivided(spec: rows.Rows) -> rows.Rows:
    """Return what is stored with a factor as if the factor were 1."""
    a, b = (
        None if part is None else replace(part, codec=rows.without_factor(part.codec))
        for part in (spec.a, spec.b)
    )
    assert a is not None
    return rows.rows_of(a, b, int(str(spec.constants["PAGE_SIZE"])))


def _strides(tensor: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def _is_in_place(queries: Queries, keys: Keys) -> bool:
    """Say whether rotated rows may be stored where other rows of the launch come from."""
    is_same = queries.out.untyped_storage().data_ptr() == queries.pe.untyped_storage().data_ptr()
    if keys.out is None or keys.b is None:
        return is_same
    storages = (tensor.untyped_storage().data_ptr() for tensor in (keys.out, keys.b.rows))
    return is_same or len(set(storages)) == 1
