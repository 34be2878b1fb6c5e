"""The argument block: its layout, what may be packed, and what a code object must agree with."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
import torch

from mla_asm.kernargs import FIELDS, check_layout, pack
from mla_core.errors import LayoutError


@dataclass(frozen=True)
class Argument:
    name: str
    offset: int
    size: int


def arguments_of_the_block() -> list[Argument]:
    """The table that the sources of the kernels print at their top."""
    pointers = (
        "out lse partial_out partial_lse ql_nope q_pe kv qo_indptr kv_indptr kv_page_indices "
        "kv_last_page_len work_indptr work_info page_stride"
    )
    numbers = (
        "token_stride sm_scale_log2 num_heads log2_page_size num_splits num_cache_pages is_causal "
        "out_stride_t out_stride_h ql_nope_stride_t ql_nope_stride_h q_pe_stride_t q_pe_stride_h "
        "reserved"
    )
    return [
        *(Argument(name, 8 * i, 8) for i, name in enumerate(pointers.split())),
        *(Argument(name, 0x70 + 4 * i, 4) for i, name in enumerate(numbers.split())),
    ]


def values(**changes):
    return dict.fromkeys(FIELDS, 0) | dict.fromkeys(FIELDS_OF_POINTERS) | changes


FIELDS_OF_POINTERS = [name for name, kind in FIELDS.items() if kind is ctypes.c_void_p]


def test_the_block_is_laid_out_as_the_kernels_read_it():
    check_layout("a kernel", arguments_of_the_block(), 168)


def test_values_land_in_their_fields():
    kv = torch.zeros(4, dtype=torch.bfloat16)
    block = pack(values(kv=kv, page_stride=2**40, num_heads=128, sm_scale_log2=0.25, is_causal=1))
    assert (block.kv, block.out, block.page_stride) == (kv.data_ptr(), None, 2**40)
    assert (block.num_heads, block.sm_scale_log2, block.is_causal) == (128, 0.25, 1)
    data = bytes(block)
    assert data[0x30:0x38] == kv.data_ptr().to_bytes(8, "little")
    assert data[0x78:0x7C] == (128).to_bytes(4, "little")
    assert len(data) == 0xA8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 2**32}, r"num_heads must be in 0\.\.2\*\*32 - 1, got 4294967296"),
        ({"out_stride_t": -2}, r"out_stride_t must be in 0\.\.2\*\*32 - 1, got -2"),
        ({"page_stride": 2**64}, r"page_stride must be in 0\.\.2\*\*64 - 1"),
        ({"num_splits": 1.0}, r"num_splits must be in .*, got 1\.0"),
        ({"kv": 4096}, r"kv must be a tensor or None, got 4096"),
        ({"speed": 1}, r"missing or unknown: speed"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(LayoutError, match=message):
        pack(values(**changes))


def test_every_field_must_be_given():
    short = values()
    del short["q_pe"]
    with pytest.raises(LayoutError, match="missing or unknown: q_pe"):
        pack(short)


@pytest.mark.parametrize("index", range(len(FIELDS)))
@pytest.mark.parametrize("change", [{"offset": 2}, {"size": 2}, {"name": "other"}])
def test_each_argument_is_compared(index, change):
    found = arguments_of_the_block()
    name = found[index].name
    found[index] = replace(found[index], **change)
    with pytest.raises(LayoutError, match=f"a kernel: argument {name} must be at offset"):
        check_layout("a kernel", found, 168)


def test_further_arguments_and_another_size_are_refused():
    found = arguments_of_the_block()
    with pytest.raises(LayoutError, match="got sink as well"):
        check_layout("a kernel", [*found, Argument("sink", 168, 8)], 176)
    with pytest.raises(LayoutError, match="must have 168 bytes, got 176"):
        check_layout("a kernel", found, 176)
