"""The named writers of per-head caches against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

import mla_fusions
from mla_core import BackendUnavailableError, LayoutError, UnsupportedProblemError
from mla_core.dtypes import dtype_name
from mla_core.reference import cache_ops
from mla_core.testing.poison import poison_
from mla_fusions.rows import require_kernel

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, OCP, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz
SLOTS = (40, -1, 3, 17, -5, 0, 31)
DTYPES = [(BF16, BF16), (torch.float32, torch.float32), (BF16, OCP), (torch.float16, FNUZ)]


def rows(dtype, *shape):
    """Return keys or values as slices of fused projections, heads apart from each other."""
    *outer, width = shape
    return (4 * torch.randn(*outer, 2 * width + 4, device=DEVICE)).to(dtype)[..., 4 : 4 + width]


def poisoned(*shape, dtype):
    return poison_(torch.empty(shape, dtype=dtype, device=DEVICE))


def slots(dtype=torch.int64):
    return torch.tensor(SLOTS, dtype=dtype, device=DEVICE)


def equal(got, want):
    got, want = (each.cpu().contiguous().view(torch.uint8) for each in (got, want))
    return torch.equal(got, want)


def lane_caches(dtype, heads, key_dim, value_dim, page_size, asm_layout):
    x = 16 // dtype.itemsize
    shape = (page_size // x, value_dim, x) if asm_layout else (value_dim, page_size)
    return (
        poisoned(3, heads, key_dim // x, page_size, x, dtype=dtype),
        poisoned(3, heads, *shape, dtype=dtype),
    )


@pytest.mark.parametrize("asm_layout", [False, True])
@pytest.mark.parametrize(("row_dtype", "dtype"), DTYPES, ids=str)
def test_reshape_and_cache(row_dtype, dtype, asm_layout, seed):
    key, value = rows(row_dtype, 9, 3, 48), rows(row_dtype, 9, 3, 32)
    caches = lane_caches(dtype, 3, 48, 32, 16, asm_layout)
    before = [cache.clone().cpu() for cache in caches]
    is_fp8 = dtype.itemsize == 1
    factors = (torch.tensor([0.05], device=DEVICE), 0.1) if is_fp8 else (None, None)
    mla_fusions.reshape_and_cache(
        key, value, *caches, slots(torch.int32), "fp8" if is_fp8 else "auto", *factors, asm_layout
    )
    wanted = cache_ops.reshape_and_cache(
        key.cpu(),
        value.cpu(),
        *before,
        slots().cpu(),
        cache_dtype=dtype_name(dtype),
        k_scale=torch.tensor([0.05]) if is_fp8 else None,
        v_scale=0.1 if is_fp8 else None,
        is_value_shuffled=asm_layout,
    )
    for got, want in zip(caches, wanted, strict=True):
        assert equal(got, want)


@pytest.mark.parametrize(("row_dtype", "dtype"), DTYPES, ids=str)
def test_reshape_and_cache_flash(row_dtype, dtype, seed):
    key, value = rows(row_dtype, 7, 3, 40), rows(row_dtype, 7, 3, 24)
    # Keys and values of one buffer, block by block.
    memory = poisoned(3, 2, 16, 3, 40, dtype=dtype)
    before = memory.clone().cpu()
    key_cache, value_cache = memory[:, 0], memory[:, 1, :, :, :24]
    is_fp8 = dtype.itemsize == 1
    mla_fusions.reshape_and_cache_flash(
        *(key, value, key_cache, value_cache, slots(), "fp8_e4m3" if is_fp8 else "auto"),
        *(None, torch.tensor(0.1, device=DEVICE)),
    )
    wanted = cache_ops.reshape_and_cache_flash(
        key.cpu(),
        value.cpu(),
        before[:, 0].contiguous(),
        before[:, 1, :, :, :24].contiguous(),
        slots().cpu(),
        cache_dtype=dtype_name(dtype),
        k_scale=1.0 if is_fp8 else None,
        v_scale=torch.tensor([0.1]) if is_fp8 else None,
    )
    before[:, 0], before[:, 1, :, :, :24] = wanted
    assert equal(memory, before)


@pytest.mark.parametrize("asm_layout", [False, True])
@pytest.mark.parametrize("dtype", [OCP, FNUZ, torch.uint8], ids=str)
def test_a_scale_for_each_token(dtype, asm_layout, seed):
    fp8 = OCP if dtype == torch.uint8 else dtype
    key, value = rows(BF16, 7, 2, 48), rows(BF16, 7, 2, 64)
    key[0, 1] = 0
    caches = lane_caches(dtype, 2, 48, 64, 16, asm_layout)
    scales = [poisoned(2, 50, dtype=torch.float32) for _ in range(2)]
    before = [each.clone().cpu() for each in (*caches, *scales)]
    mla_fusions.reshape_and_cache_with_pertoken_quant(
        key, value, *caches, *scales, slots(), asm_layout
    )
    stored = [cache_ops.per_token_quant(part.cpu(), dtype_name(fp8)) for part in (key, value)]
    wanted = cache_ops.reshape_and_cache(
        stored[0][0].float(),
        stored[1][0].float(),
        before[0].view(fp8),
        before[1].view(fp8),
        slots().cpu(),
        cache_dtype=dtype_name(fp8),
        is_value_shuffled=asm_layout,
    )
    for got, want in zip(caches, wanted, strict=True):
        assert equal(got, want)
    for got, want, (_, factors) in zip(scales, before[2:], stored, strict=True):
        for token, slot in enumerate(SLOTS):
            if slot >= 0:
                want[:, slot] = factors[token]
        assert equal(got, want)


def block_reference(key, value, caches, scales, slots, fp8, page_size, scale_tokens, asm_layout):
    """Write runs of neighbours one after another, each as a whole."""
    caches = [cache.view(fp8).float() for cache in caches]
    scales = [each.clone() if asm_layout else each.t().clone() for each in scales]
    limit = torch.finfo(fp8).max
    runs = []
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        if (
            runs
            and runs[-1][-1][0] == token - 1
            and runs[-1][-1][1] // scale_tokens == (slot // scale_tokens)
        ):
            runs[-1].append((token, slot))
        else:
            runs.append([(token, slot)])

    def row(part, slot, head):
        page, o = divmod(slot, page_size)
        if part == 0:
            return caches[0][page, head, :, o, :]
        if not asm_layout:
            return caches[1][page, head, :, o]
        x = caches[1].shape[-1]
        return caches[1][page, head, o // x, :, o % x]

    for run in runs:
        block = run[0][1] // scale_tokens
        num_old = min(slot for _, slot in run) - block * scale_tokens
        for part, rows_ in enumerate((key, value)):
            for head in range(key.shape[1]):
                new = {slot: rows_[token, head].float() for token, slot in run}
                amax = torch.stack(list(new.values())).abs().max().clamp(min=1e-6)
                scale = amax / torch.tensor(limit)
                if num_old:
                    old_scale = scales[part][block, head].clone()
                    for slot in range(block * scale_tokens, block * scale_tokens + num_old):
                        if old_scale < scale:
                            place = row(part, slot, head)
                            values = (place * old_scale / scale).clamp(-limit, limit)
                            place.copy_(values.to(fp8).float())
                    scale = torch.maximum(old_scale, scale)
                scales[part][block, head] = scale
                for slot, x in new.items():
                    place = row(part, slot, head)
                    values = (x / scale).clamp(-limit, limit).to(fp8).float()
                    place.copy_(values.view(place.shape))
    return [each.to(fp8) for each in caches], [each if asm_layout else each.t() for each in scales]


@pytest.mark.parametrize("pages_per_scale", [1, 2])
@pytest.mark.parametrize("asm_layout", [False, True])
@pytest.mark.parametrize("dtype", [OCP, FNUZ, torch.uint8], ids=str)
def test_a_scale_for_each_block(dtype, asm_layout, pages_per_scale, seed):
    fp8 = OCP if dtype == torch.uint8 else dtype
    caches = [
        torch.zeros_like(cache)
        for cache in lane_caches(dtype, 2, 48, 64, 16, asm_layout)
        for cache in (torch.cat([cache, cache[:1]]),)
    ]
    shape = (4 // pages_per_scale, 2) if asm_layout else (2, 4 // pages_per_scale)
    scales = [poisoned(*shape, dtype=torch.float32) for _ in range(2)]
    # Prompts of 21 and 5 tokens with padding between, then larger and smaller steps, in any order.
    steps = (
        ([*range(21), -1, *range(32, 37)], 1.0),
        ([22, 21, -1, 38, 37], 3.0),
        ([23, 39], 0.5),
    )
    for step, factor in steps:
        key, value = factor * rows(BF16, len(step), 2, 48), factor * rows(BF16, len(step), 2, 64)
        key[0, 0] = 0
        wanted = block_reference(
            *(key.cpu(), value.cpu(), [each.cpu() for each in caches]),
            *([each.cpu() for each in scales], step, fp8, 16, 16 * pages_per_scale, asm_layout),
        )
        slots = torch.tensor(step, device=DEVICE)
        arguments = (*caches, *scales, slots, asm_layout)
        if pages_per_scale == 1:
            shaped = key[None], value[None]
            mla_fusions.reshape_and_cache_with_block_quant(*shaped, *arguments)
        else:
            mla_fusions.reshape_and_cache_with_block_quant_for_asm_pa(key, value, *arguments, 32)
        for got, want in zip((*caches, *scales), (*wanted[0], *wanted[1]), strict=True):
            assert equal(got, want)


def test_blocks_without_their_scales_are_refused():
    key, caches = torch.zeros(4, 2, 16), [torch.zeros(3, 2, 1, 8, 16), torch.zeros(3, 2, 16, 8)]
    caches = [cache.to(OCP) for cache in caches]
    arguments = (key, key, *caches, torch.ones(2, 3), torch.ones(2, 2), torch.arange(4), False)
    with pytest.raises(LayoutError, match=r"v_dequant_scales must be \[2, 3\], got"):
        mla_fusions.reshape_and_cache_with_block_quant(*arguments)
    with pytest.raises(LayoutError, match="must be a multiple of the block size 8, got 12"):
        mla_fusions.reshape_and_cache_with_block_quant_for_asm_pa(*arguments, 12)
    with pytest.raises(LayoutError, match="must have a multiple of 2 blocks, got 3"):
        mla_fusions.reshape_and_cache_with_block_quant_for_asm_pa(*arguments, 16)


def test_nothing_to_write():
    key, caches = rows(BF16, 0, 2, 16), lane_caches(BF16, 2, 16, 16, 8, False)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    mla_fusions.reshape_and_cache(key, key, *caches, none, "auto")
    empty = [cache[:0] for cache in caches]
    mla_fusions.reshape_and_cache(
        rows(BF16, 7, 2, 16), rows(BF16, 7, 2, 16), *empty, slots(), "auto"
    )
    assert all(cache.isnan().all() for cache in caches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache_dtype": "int8"}, "must be one of auto, fp8, fp8_e4m3, got 'int8'"),
        ({"key_cache": torch.zeros(2, 2, 4, 8)}, r"key_cache must have 5 dimensions"),
        ({"key_cache": torch.zeros(2, 2, 5, 8, 4)}, r"key_cache must be \[2, 2, 4, 8, 4\], got"),
        ({"value_cache": torch.zeros(3, 2, 16, 8)}, r"value_cache must be \[2, 2, 16, 8\], got"),
        ({"value_cache": torch.zeros(2, 2, 16, 8).half()}, "must be torch.float32 like key_cache"),
        ({"value": torch.zeros(3, 2, 16)}, r"value must be \[4, 2, dv\]"),
        ({"key": torch.zeros(4, 2, 1040)}, r"key must have a head dim in 1..1024, got 1040"),
        ({"slot_mapping": torch.arange(5)}, "as many slots as there are tokens, 4, got 5"),
        ({"kv_cache_dtype": "fp8"}, "key_cache must be float8_e4m3fn, float8_e4m3fnuz or uint8"),
        (
            {"value_cache": torch.zeros(2, 2, 16, 9)[..., :8]},
            "value_cache must be dense inside a head of a block",
        ),
        (
            {"key": torch.zeros(4, 2, 16).half(), "value": torch.zeros(4, 2, 16).half()},
            "key_cache must be torch.float16 like key for 'auto'",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "key": torch.zeros(4, 2, 16),
        "value": torch.zeros(4, 2, 16),
        "key_cache": torch.zeros(2, 2, 4, 8, 4),
        "value_cache": torch.zeros(2, 2, 16, 8),
        "slot_mapping": torch.arange(4),
        "kv_cache_dtype": "auto",
    }
    with pytest.raises(LayoutError, match=message):
        mla_fusions.reshape_and_cache(**(good | change))


def test_too_few_scales_are_refused():
    key, caches = torch.zeros(4, 2, 16), [torch.zeros(2, 2, 1, 8, 16), torch.zeros(2, 2, 16, 8)]
    caches = [cache.to(OCP) for cache in caches]
    with pytest.raises(LayoutError, match=r"must be \[2, 16 or more\], got \(2, 15\)"):
        mla_fusions.reshape_and_cache_with_pertoken_quant(
            key, key, *caches, torch.ones(2, 16), torch.ones(2, 15), torch.arange(4), False
        )


def test_a_chip_without_kernels_is_refused(monkeypatch):
    require_kernel.cache_clear()
    with pytest.raises(UnsupportedProblemError, match=r"device must be one of sm90, .* got sm80"):
        require_kernel("op", "sm80")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailableError, match="set TRITON_INTERPRET=1"):
        require_kernel("op", "cpu")
