"""The named writers of latent caches: call-compatible, and equal to the reference byte for byte."""

from __future__ import annotations

import pytest
import torch

import mla_core
import mla_fusions
from mla_core import LatentCache, LayoutError, MLADims
from mla_core.reference import cache_ops
from mla_core.testing.poison import poison_

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
SLOTS = (40, -1, 3, 17, -5, 0, 31)


@pytest.fixture(params=["fusions", "reference"], autouse=True)
def backend(request):
    with mla_core.use_backend(request.param):
        yield request.param


def rows(dtype, *shape):
    return (4 * torch.randn(shape, device=DEVICE)).to(dtype)


def poisoned(*shape, dtype):
    return poison_(torch.empty(shape, dtype=dtype, device=DEVICE))


def slots(dtype=torch.int64):
    return torch.tensor(SLOTS, dtype=dtype, device=DEVICE)


def equal(got, want):
    return torch.equal(got.cpu().view(torch.uint8), want.cpu().view(torch.uint8))


def scale(value=0.05):
    return torch.tensor([value], device=DEVICE)


@pytest.mark.parametrize(
    ("row_dtype", "cache_dtype", "word"),
    [
        (torch.bfloat16, torch.bfloat16, "auto"),
        (torch.float16, torch.float16, "auto"),
        (torch.float32, torch.float32, "auto"),
        (torch.bfloat16, OCP, "fp8"),
        (torch.float16, FNUZ, "fp8_e4m3"),
        (torch.bfloat16, torch.uint8, "fp8"),
    ],
    ids=str,
)
def test_concat_and_cache_mla(row_dtype, cache_dtype, word, seed):
    # More rows than slots, as padded batches have.
    kv_c, k_pe = rows(row_dtype, 9, 96), rows(row_dtype, 9, 32)
    cache = poisoned(4, 16, 128, dtype=cache_dtype)
    before = cache.view(64, 128).clone().cpu()
    mla_fusions.concat_and_cache_mla(kv_c, k_pe, cache, slots(torch.int32), word, scale()[0])
    name = mla_core.dtypes.dtype_name(OCP if cache_dtype == torch.uint8 else cache_dtype)
    wanted = cache_ops.concat_and_cache_mla(
        kv_c.cpu(),
        k_pe.cpu(),
        before if cache_dtype != torch.uint8 else before.view(OCP),
        slots().cpu(),
        cache_dtype=name,
        scale=None if word == "auto" else scale().cpu(),
    )
    assert equal(cache, wanted.view(4, 16, 128))


def test_flashmlas_token(seed):
    kv_c, k_pe = rows(torch.bfloat16, 7, 512), rows(torch.bfloat16, 7, 64)
    cache = poisoned(4, 16, 1, 656, dtype=torch.uint8)
    wanted = cache.clone().cpu()
    mla_fusions.concat_and_cache_mla(kv_c, k_pe, cache, slots(), "fp8_ds_mla", scale())
    LatentCache.bind("fp8_ds656", MLADims(1), 16, wanted).write(
        kv_c.cpu(), k_pe.cpu(), slots().cpu()
    )
    assert equal(cache, wanted)


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.bfloat16, "auto"),
        (torch.float32, "auto"),
        (OCP, "fp8"),
        (FNUZ, "fp8"),
        (torch.uint8, "fp8"),
    ],
    ids=str,
)
def test_concat_and_cache_mla_seg(dtype, word, seed):
    row_dtype = dtype if word == "auto" else torch.bfloat16
    kv_c, k_pe = rows(row_dtype, 7, 96), rows(row_dtype, 7, 32)
    # A gap behind each block.
    memory = poisoned(4, 16 * 128 + 64, dtype=dtype)
    before = memory.clone()
    cache = memory[:, : 16 * 128]
    mla_fusions.concat_and_cache_mla_seg(kv_c, k_pe, cache, slots(), word, scale())
    stored = {"auto": mla_core.dtypes.dtype_name(row_dtype)}.get(
        word, "fp8_e4m3fnuz" if dtype == FNUZ else "fp8_e4m3"
    )
    factor = None if word == "auto" else scale().cpu()
    wanted = before.cpu()
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            page, o = divmod(slot, 16)
            for part, base in ((kv_c, 0), (k_pe, 16 * 96)):
                width = part.shape[1]
                values = cache_ops.store(part[token].cpu(), stored, factor)
                first = base + o * width
                wanted[page, first : first + width] = values.view(dtype)
    assert equal(memory, wanted)


@pytest.mark.parametrize("apply_scale", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, OCP, FNUZ], ids=str)
def test_cat_and_cache_mla(dtype, heads, apply_scale, seed):
    k_nope, k_pe = rows(torch.bfloat16, 9, heads, 96), rows(torch.bfloat16, 9, heads, 32)
    cache = poisoned(64, heads, 128, dtype=dtype)
    before = cache.clone().cpu()
    assert mla_fusions.cat_and_cache_mla(k_nope, k_pe, cache, slots(), scale(), apply_scale) is None
    name = mla_core.dtypes.dtype_name(dtype)
    joined = torch.cat([k_nope, k_pe], dim=-1).cpu()
    if dtype == torch.bfloat16 and apply_scale:
        joined = joined.float() / scale().cpu()
    factor = scale().cpu() if apply_scale and dtype != torch.bfloat16 else None
    wanted = cache_ops.write_rows(before, cache_ops.store(joined, name, factor), slots().cpu())
    assert equal(cache, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, OCP], ids=str)
def test_heads_that_are_apart(dtype, seed):
    """Slots and heads with gaps between them, which stay as they are."""
    k_nope, k_pe = rows(torch.bfloat16, 7, 3, 96), rows(torch.bfloat16, 7, 3, 32)
    memory = poisoned(64, 4, 144, dtype=dtype)
    cache = memory[:, :3, :128]
    wanted = memory.clone().cpu()
    mla_fusions.cat_and_cache_mla(k_nope, k_pe, cache, slots(), scale())
    joined = torch.cat([k_nope, k_pe], dim=-1).cpu().float()
    factor = None if dtype == torch.bfloat16 else scale().cpu()
    if factor is None:
        joined /= scale().cpu()
    stored = cache_ops.store(joined, mla_core.dtypes.dtype_name(dtype), factor)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            wanted[slot, :3, :128] = stored[token]
    assert equal(memory, wanted)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "layout", "page_size"),
    [
        (torch.bfloat16, "shuffled_bf16", 16),
        (OCP, "shuffled_fp8", 32),
        (torch.uint8, "nvfp4_shuffled", 128),
    ],
    ids=str,
)
def test_shuffled_blocks(dtype, layout, page_size, heads, scaled, seed):
    dims = MLADims(1, 256, 64)
    k_scale = scale() if scaled else None
    k_nope, k_pe = rows(torch.bfloat16, 7, heads, 256), rows(torch.bfloat16, 7, heads, 64)
    width = 180 if dtype == torch.uint8 else 320
    cache = poisoned(4, heads, page_size, width, dtype=dtype)
    wanted = cache.clone().cpu()
    mla_fusions.cat_and_cache_mla(k_nope, k_pe, cache, slots(), k_scale, shuffled_kv_cache=True)
    divisor = scale().cpu() if scaled else torch.ones(1)
    for head in range(heads):
        factor = divisor if dtype == OCP else None
        block = wanted[:, head].contiguous()
        bound = LatentCache.bind(layout, dims, page_size, block, scale=factor)
        parts = (part[:, head].cpu().float() for part in (k_nope, k_pe))
        bound.write(*(part if dtype == OCP else part / divisor for part in parts), slots().cpu())
        wanted[:, head] = block
    assert equal(cache, wanted)


GOOD = {
    "kv_c": torch.zeros(4, 64),
    "k_pe": torch.zeros(4, 16),
    "kv_cache": torch.zeros(2, 8, 80),
    "slot_mapping": torch.arange(4),
    "kv_cache_dtype": "auto",
    "scale": torch.ones(1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_dtype": "int8"}, "must be one of auto, fp8, fp8_e4m3, fp8_ds_mla, got 'int8'"),
        ({"kv_cache": torch.zeros(2, 8, 81)}, r"kv_cache must be \[num_blocks, block_size, 80\]"),
        ({"kv_cache": torch.zeros(2, 8, 80).half()}, r"must be torch.float32 like kv_c for 'auto'"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache must be float8_e4m3fn, float8_e4m3fnuz or uint8"),
        ({"kv_cache_dtype": "fp8_ds_mla"}, "kv_cache must be uint8 for 'fp8_ds_mla'"),
        ({"k_pe": torch.zeros(3, 16)}, r"k_pe must be \[4, r\]"),
        ({"slot_mapping": torch.arange(5)}, "at most as many slots as there are rows, 4, got 5"),
        ({"slot_mapping": torch.arange(4).short()}, "slot_mapping must be int64 or int32"),
        ({"slot_mapping": torch.tensor([16])}, "slots must be below num_slots=16, got 16"),
        (
            {"kv_cache": torch.zeros(2, 8, 80).to(OCP), "kv_cache_dtype": "fp8",
             "scale": torch.ones(2)},
            r"scale must be fp32 with one element, got \(2,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        mla_fusions.concat_and_cache_mla(**(GOOD | change))


def test_bad_blocks_are_refused():
    bad = GOOD | {"kv_cache": torch.zeros(2, 81)}
    with pytest.raises(LayoutError, match=r"must be \[num_blocks, page_size \* 80\], got \(2, 81"):
        mla_fusions.concat_and_cache_mla_seg(**bad)
    with pytest.raises(LayoutError, match=r"must be one of auto, fp8, fp8_e4m3, got 'fp8_ds_mla"):
        mla_fusions.concat_and_cache_mla_seg(**(GOOD | {"kv_cache_dtype": "fp8_ds_mla"}))
    k_nope, k_pe, cache = torch.zeros(4, 2, 64), torch.zeros(4, 2, 16), torch.zeros(4, 2, 80)
    write = mla_fusions.cat_and_cache_mla
    with pytest.raises(LayoutError, match=r"must be one of .*, got torch.uint8"):
        write(k_nope, k_pe, cache.to(torch.uint8), torch.arange(4), None)
    with pytest.raises(LayoutError, match=r"k_scale must be fp32 with one element, got \(2,\)"):
        write(k_nope[:, :1], k_pe[:, :1], cache[:, :1], torch.arange(4), torch.ones(2))
    with pytest.raises(LayoutError, match="k_nope must have a head or more"):
        write(k_nope[:, :0], k_pe[:, :0], cache[:, :0], torch.arange(4), None)
