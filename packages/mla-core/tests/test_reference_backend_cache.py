"""Cache writes through the public op: every layout, skipped slots, refused input."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core import LatentCache, LayoutError, MLADims
from mla_core.testing import writes
from mla_core.testing.poison import poison_
from mla_core.testing.writes import WRITE_CASES, check_write, write_cases

DIMS = MLADims(2)


@pytest.mark.parametrize("layout", ["bf16", "fp32", "fp8_seg656", "fp8_ds656", "shuffled_bf16"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_op_writes_what_the_layout_packs(layout, index_dtype):
    torch.manual_seed(0)
    caches = [LatentCache.allocate(layout, DIMS, 3, 16) for _ in range(2)]
    for cache in caches:
        for buffer in cache.buffers:
            poison_(buffer)
    kv_c, k_pe = torch.randn(6, 512).bfloat16(), torch.randn(6, 64).bfloat16()
    slots = torch.tensor([40, -1, 3, 17, -5, 0], dtype=index_dtype)
    mla_core.write_kv_cache(kv_c, k_pe, caches[0], slots)
    caches[1].write(kv_c, k_pe, slots)
    for got, want in zip(caches[0].buffers, caches[1].buffers, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    read_c, read_pe = caches[0].read(slots, torch.float32)
    assert not read_c.isnan().any()
    assert (read_c[1] == 0).all()
    assert (read_pe[4] == 0).all()


@pytest.mark.parametrize("case", WRITE_CASES, ids=str)
def test_conformance(case):
    check_write("reference", case)


def test_every_case_is_claimed():
    assert write_cases("reference", "cpu") == WRITE_CASES


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("fp8_ds656", "kv_c", r"1 bytes of buffer 0 differ, .* \(kv_c\[0\] of token \d\)"),
        ("fp8_ds32", "kv_c_scale", r"of buffer 2 differ, .*\(kv_c_scale\[0\] of token \d\)"),
        ("v4_nm", None, r"byte 470 of page 0 \(padding\)"),
    ],
)
def test_a_wrong_byte_is_noticed_and_named(monkeypatch, layout, name, message):
    case = next(case for case in WRITE_CASES if (case.name, case.layout) == ("rows", layout))

    def wrong(kv_c, k_pe, cache, slots, backend):
        cache.write(kv_c, k_pe, slots)
        if name is None:
            cache.buffers[0].view(torch.uint8).flatten(1)[0, 470] ^= 1
        else:
            slot = int(slots[slots >= 0][0])
            view = cache.field_bytes(name)[slot // case.page_size, slot % case.page_size]
            view[..., 0] += 1

    monkeypatch.setattr(writes, "write_kv_cache", wrong)
    with pytest.raises(AssertionError, match=message):
        check_write("anything", case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_c": torch.randn(4, 511)}, r"kv_c must be \[num_tokens, 512\], got shape \(4, 511\)"),
        ({"kv_c": torch.randn(4, 512).double()}, r"kv_c must be bfloat16 or float16 or float32"),
        ({"k_pe": torch.randn(3, 64)}, r"k_pe must be \[4, 64\]"),
        ({"k_pe": torch.randn(4, 64).half()}, r"k_pe must be float32, got torch.float16"),
        ({"slots": torch.arange(3)}, r"slots must be \[4\]"),
        ({"slots": torch.arange(4).short()}, r"slots must be int64 or int32, got torch.int16"),
        ({"slots": torch.tensor([0, 1, 2, 48])}, r"slots must be below num_slots=48, got 48"),
        ({"slots": torch.arange(4, device="meta")}, r"slots must be on cpu, got meta"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "kv_c": torch.randn(4, 512),
        "k_pe": torch.randn(4, 64),
        "cache": LatentCache.allocate("bf16", DIMS, 3, 16),
        "slots": torch.arange(4),
    }
    with pytest.raises(LayoutError, match=message):
        mla_core.write_kv_cache(**{**good, **change})
