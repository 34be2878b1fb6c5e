"""The argument block of the decode kernels, declared once.

`DecodeKernargs` has one field per kernel argument: its names, offsets and sizes are those of the
metadata inside every code object, which `check_layout` compares. Strides and sizes are in bytes.
All kernels take the same block; pointers that a kernel does not use are null.

===================== ==========================================================================
argument              meaning
===================== ==========================================================================
out                   bf16 [total_q, num_heads, 512], written where a row has one partial only
lse                   f32 [total_q, num_heads], natural log, or null
partial_out           f32 [..., num_heads, 512], each normalised by its own denominator
partial_lse           f32 [..., num_heads]
ql_nope, q_pe         bf16 [total_q, num_heads, 512] and [total_q, num_heads, 64]
kv                    bf16 rows of 576: kv_c, then k_pe
qo_indptr             i32 [batch + 1] prefix sums of query tokens
kv_indptr             i32 [batch + 1] prefix sums of pages
kv_page_indices       i32 page ids; one outside 0..num_cache_pages - 1 hides the page's tokens
kv_last_page_len      i32 [batch]
work_indptr           i32 [num_workers + 1]; persistent kernels only
work_info             i32 [num_works, 8], as `mla_core.metadata` plans it
page_stride           bytes from page to page of ``kv``
token_stride          bytes from token to token inside a page
sm_scale_log2         softmax scale times log2(e)
num_splits            partials of each query token; with 1 a kernel writes ``out`` itself
is_causal             1 for the mask aligned to the bottom right corner
===================== ==========================================================================
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from mla_core.errors import LayoutError

KV_LORA_RANK = 512
ROPE_DIM = 64

#: What the caller of a kernel passes: a tensor or None for a pointer, a number otherwise.
Arguments = Mapping[str, torch.Tensor | int | float | None]


class DecodeKernargs(ctypes.Structure):
    """The block as the kernels read it."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("partial_out", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
        ("ql_nope", ctypes.c_void_p),
        ("q_pe", ctypes.c_void_p),
        ("kv", ctypes.c_void_p),
        ("qo_indptr", ctypes.c_void_p),
        ("kv_indptr", ctypes.c_void_p),
        ("kv_page_indices", ctypes.c_void_p),
        ("kv_last_page_len", ctypes.c_void_p),
        ("work_indptr", ctypes.c_void_p),
        ("work_info", ctypes.c_void_p),
        ("page_stride", ctypes.c_uint64),
        ("token_stride", ctypes.c_uint32),
        ("sm_scale_log2", ctypes.c_float),
        ("num_heads", ctypes.c_uint32),
        ("log2_page_size", ctypes.c_uint32),
        ("num_splits", ctypes.c_uint32),
        ("num_cache_pages", ctypes.c_uint32),
        ("is_causal", ctypes.c_uint32),
        ("out_stride_t", ctypes.c_uint32),
        ("out_stride_h", ctypes.c_uint32),
        ("ql_nope_stride_t", ctypes.c_uint32),
        ("ql_nope_stride_h", ctypes.c_uint32),
        ("q_pe_stride_t", ctypes.c_uint32),
        ("q_pe_stride_h", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


FIELDS: dict[str, type] = {name: kind for name, kind, *_ in DecodeKernargs._fields_}


class ArgumentLike(Protocol):
    """One kernel argument of a code object's metadata."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def size(self) -> int: ...  # noqa: D102


def pack(arguments: Arguments) -> DecodeKernargs:
    """Fill a block; every field must be given, and no other name.

    Raises
    ------
    LayoutError
        A name is missing or unknown, or a number does not fit its field.
    """
    if different := sorted(FIELDS.keys() ^ arguments.keys()):
        raise LayoutError(
            f"kernargs: arguments must be the {len(FIELDS)} fields of DecodeKernargs, missing or "
            f"unknown: {', '.join(different)}"
        )
    block = DecodeKernargs()
    for name, kind in FIELDS.items():
        value = arguments[name]
        if kind is ctypes.c_void_p:
            if value is not None and not isinstance(value, torch.Tensor):
                raise LayoutError(f"kernargs: {name} must be a tensor or None, got {value!r}")
            setattr(block, name, None if value is None else value.data_ptr())
        elif kind is ctypes.c_float:
            setattr(block, name, value)
        else:
            # ctypes would drop the bits that do not fit.
            bits = 8 * ctypes.sizeof(kind)
            if not isinstance(value, int) or not 0 <= value < 1 << bits:
                raise LayoutError(f"kernargs: {name} must be in 0..2**{bits} - 1, got {value!r}")
            setattr(block, name, value)
    return block


def check_layout(where: str, arguments: Iterable[ArgumentLike], kernarg_size: int) -> None:
    """Compare the block with the arguments that a code object declares.

    Raises
    ------
    LayoutError
        A name, an offset or a size differs; the message names ``where`` and the argument.
    """
    found = {argument.name: (argument.offset, argument.size) for argument in arguments}
    for name in FIELDS:
        declared = getattr(DecodeKernargs, name)
        ours = (declared.offset, declared.size)
        if found.get(name) != ours:
            raise LayoutError(
                f"{where}: argument {name} must be at offset {ours[0]} with {ours[1]} bytes, got "
                f"{found.get(name, 'none')}; the code object and mla_asm.kernargs disagree"
            )
    if unknown := sorted(found.keys() - FIELDS.keys()):
        raise LayoutError(
            f"{where}: arguments must be those of mla_asm.kernargs, got {', '.join(unknown)} as "
            "well"
        )
    if kernarg_size != ctypes.sizeof(DecodeKernargs):
        raise LayoutError(
            f"{where}: the argument block must have {ctypes.sizeof(DecodeKernargs)} bytes, got "
            f"{kernarg_size}"
        )
