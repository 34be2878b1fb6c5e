"""RoPE, concatenation and cache writes in one launch against the reference, byte for byte.

What is rotated is compared with the fp32 formula of the reference, rounded once.
"""

from __future__ import annotations

import functools

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, LayoutError, MLADims, layouts
from mla_core.dtypes import dtype_name, fp8_of_arch
from mla_core.reference import cache_ops
from mla_core.reference.rope import rope
from mla_core.testing.poison import poison_
from mla_core.testing.writes import WRITE_CASES

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
SLOTS = (40, -1, 3, 17, -5, 0, 31)
MAX_POSITION = 50


def rows(dtype, *shape):
    """Return rows that are slices of wider, poisoned ones."""
    *outer, width = shape
    wide = poison_(torch.empty(*outer, width + 16, dtype=dtype, device=DEVICE))
    wide[..., 8 : 8 + width] = (4 * torch.randn(shape, device=DEVICE)).to(dtype)
    return wide[..., 8 : 8 + width]


def poisoned(*shape, dtype):
    return poison_(torch.empty(shape, dtype=dtype, device=DEVICE))


def index(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def scale(value):
    return torch.tensor([value], device=DEVICE)


def tables(columns, dtype=FP32):
    """Return a table of cosines and one of sines whose columns all differ."""
    both = torch.randn(MAX_POSITION, 2 * columns, device=DEVICE).to(dtype)
    return both[:, :columns], both[:, columns:]


def turned(x, positions, cos, sin, **kwargs):
    """Rotate in fp32 on the host."""
    positions = positions[: x.shape[0]].cpu().clamp(0, cos.shape[0] - 1)
    return rope(x.cpu(), positions, cos.cpu(), sin.cpu(), dtype=FP32, **kwargs)


def equal(got, want):
    got, want = (each.cpu().contiguous().view(torch.uint8) for each in (got, want))
    return torch.equal(got, want)


@functools.cache
def case_of(layout):
    return next(case for case in WRITE_CASES if (case.name, case.layout) == ("rows", layout))


@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_layout(layout, seed):
    case, kind = case_of(layout), layouts.get(layout)
    dims, page_size, is_neox = case.dims, case.page_size, len(layout) % 2 == 0
    rank, width = dims.kv_lora_rank, dims.qk_rope_head_dim
    q_nope, q_pe = rows(BF16, 4, 3, rank), rows(BF16, 4, 3, width)
    kv_c, k_pe = rows(BF16, 4, rank), rows(BF16, 4, width)
    factor = scale(0.03) if kind.needs_scale else None
    cache = LatentCache.allocate(
        kind, dims, 3, page_size, device=DEVICE, scale=factor, fill=0xA5
    )  # fmt: skip
    slots, positions = index([2 * page_size, -1, 1, page_size]), index([7, 3, 0, 49])
    cos, sin = tables(width // 2)
    q_out = mla_fusions.fused_qk_rope_write_kv_cache(
        q_nope, q_pe, kv_c, k_pe, cache, slots, positions, cos, sin, is_neox=is_neox
    )
    turn = functools.partial(turned, positions=positions, cos=cos, sin=sin, is_neox=is_neox)
    assert equal(q_out, torch.cat([q_nope.cpu(), turn(q_pe).bfloat16()], -1))
    host_factor = None if factor is None else factor.cpu()
    wanted = LatentCache.allocate(kind, dims, 3, page_size, scale=host_factor, fill=0xA5)
    wanted.write(kv_c.cpu().float(), turn(k_pe), slots.cpu())
    for got, want in zip(cache.buffers, wanted.buffers, strict=True):
        assert equal(got, want)


@pytest.mark.parametrize("is_full", [False, True], ids=["pairs", "elements"])
@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize(
    ("width", "rotary_dim", "dim_offset"),
    [(32, None, 0), (32, 16, 0), (40, 24, 6), (16, 2, 3), (48, None, 8), (20, 20, 0)],
)
def test_partial_rotations(width, rotary_dim, dim_offset, is_neox, is_full, seed):
    turning = width - dim_offset if rotary_dim is None else rotary_dim
    cos, sin = tables(turning if is_full else turning // 2, FP32 if is_full else BF16)
    dims = MLADims(1, 64, width)
    q_nope, q_pe = rows(FP16, 5, 5, 64), rows(FP16, 5, 5, width)
    kv_c, k_pe = rows(FP32, 5, 64), rows(FP32, 5, width)
    cache = LatentCache.allocate("fp16", dims, 5, 3, device=DEVICE, fill=0xA5)
    # Positions and offsets that run over the tables at both ends.
    positions, offs = index([0, 5, 49, 40, -7], torch.int32), index([1, 0, 30, -3, 2])
    q_out = poisoned(5, 5, 64 + width + 8, dtype=FP32)
    before = q_out.clone().cpu()
    slots = index([3, 14, 15, -1, 0], torch.int32)
    got = mla_fusions.fused_qk_rope_write_kv_cache(
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        cache,
        slots,
        positions,
        cos[:, None, None],
        sin[:, None, None],
        is_neox=is_neox,
        q_out=q_out,
        offs=offs,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    assert got is q_out
    turn = functools.partial(
        turned,
        positions=positions + offs,
        cos=cos,
        sin=sin,
        is_neox=is_neox,
        rotary_dim=turning,
        dim_offset=dim_offset,
    )
    before[..., :64], before[..., 64 : 64 + width] = q_nope.cpu(), turn(q_pe)
    assert equal(q_out, before)
    wanted = LatentCache.allocate("fp16", dims, 5, 3, fill=0xA5)
    # The slot of the third token is past the end.
    wanted.write(kv_c.cpu(), turn(k_pe), index([3, 14, -1, -1, 0]).cpu())
    assert equal(cache.buffers[0], wanted.buffers[0])


def stored_as(dtype):
    if dtype != torch.uint8:
        return dtype_name(dtype)
    return fp8_of_arch("cpu" if DEVICE == "cpu" else "sm90")


@pytest.mark.parametrize("compute_all", [False, True])
@pytest.mark.parametrize("is_nope_first", [False, True])
@pytest.mark.parametrize(
    ("row_dtype", "cache_dtype", "q_dtype", "key_heads"),
    [
        (BF16, BF16, BF16, None),
        (BF16, OCP, OCP, None),
        (FP16, FNUZ, FP16, 2),
        (FP32, torch.uint8, torch.uint8, 1),
        (BF16, BF16, FNUZ, 3),
    ],
    ids=str,
)
def test_concat_and_cache_mla(
    row_dtype, cache_dtype, q_dtype, key_heads, is_nope_first, compute_all, seed
):
    rank, width, heads = 96, 32, 3
    is_neox = is_nope_first != compute_all
    q_nope, q_pe = rows(row_dtype, 9, heads, rank), rows(row_dtype, 9, heads, width)
    shape = (9,) if key_heads is None else (9, key_heads)
    kv_c, k_pe = rows(row_dtype, *shape, rank), rows(row_dtype, *shape, width)
    cache = poisoned(4, 16, *shape[1:], rank + width, dtype=cache_dtype)
    before = cache.flatten(0, 1).clone().cpu()
    q_out = poisoned(9, heads, rank + width + 16, dtype=q_dtype)
    q_before = q_out.clone().cpu()
    positions, (cos, sin) = index(range(3, 12)), tables(width // 2)
    got = mla_fusions.fused_qk_rope_concat_and_cache_mla(
        q_nope,
        q_pe,
        kv_c,
        k_pe,
        cache,
        q_out,
        index(SLOTS),
        scale(0.05),
        scale(0.07),
        positions,
        cos,
        sin,
        is_neox,
        is_nope_first,
        compute_all,
    )
    assert got is None
    turn = functools.partial(turned, positions=positions, cos=cos, sin=sin, is_neox=is_neox)

    def joined(nope, pe):
        parts = [nope.cpu().float(), turn(pe)]
        return torch.cat(parts if is_nope_first else parts[::-1], -1)

    is_fp8 = q_dtype.itemsize == 1
    name = stored_as(q_dtype)
    query = cache_ops.store(joined(q_nope, q_pe), name, scale(0.07).cpu() if is_fp8 else None)
    live = [compute_all or (t < len(SLOTS) and SLOTS[t] >= 0) for t in range(9)]
    for token in range(9):
        if live[token]:
            q_before[token, :, : rank + width] = query[token].view(q_dtype)
    assert equal(q_out, q_before)
    name = stored_as(cache_dtype)
    factor = scale(0.05).cpu() if cache_dtype.itemsize == 1 else None
    stored = cache_ops.store(joined(kv_c, k_pe), name, factor).view(cache_dtype)
    wanted = cache_ops.write_rows(before, stored, index(SLOTS).cpu())
    assert equal(cache.flatten(0, 1), wanted)


@pytest.mark.parametrize("compute_all", [False, True])
@pytest.mark.parametrize(
    ("row_dtype", "cache_dtype", "q_dtype", "page_size"),
    [
        (BF16, OCP, OCP, 16),
        (BF16, BF16, FP32, 64),
        (FP16, FNUZ, FNUZ, 1),
        (FP32, torch.uint8, torch.uint8, 5),
    ],
    ids=str,
)
def test_concat_and_cache_mla_seg(row_dtype, cache_dtype, q_dtype, page_size, compute_all, seed):
    """The queries of the op for plain pages, and its rows in two segments with a gap behind."""
    rank, width, heads, num_blocks = 96, 32, 3, -(-64 // page_size)
    q_nope, q_pe = rows(row_dtype, 9, heads, rank), rows(row_dtype, 9, heads, width)
    kv_c, k_pe = rows(row_dtype, 9, rank), rows(row_dtype, 9, width)
    memory = poisoned(num_blocks, page_size * (rank + width) + 64, dtype=cache_dtype)
    wanted = memory.clone().cpu()
    plain = poisoned(num_blocks, page_size, rank + width, dtype=cache_dtype)
    # Rows of queries are padded to 768 bytes a head in some caches' readers; the padding stays.
    q_out, plain_q_out = (poisoned(9, heads, rank + width + 64, dtype=q_dtype) for _ in range(2))
    rest = (index(SLOTS), scale(0.05), scale(0.07), index(range(3, 12)), *tables(width // 2))
    parts, named = (q_nope, q_pe, kv_c, k_pe), {"compute_all_q_rope": compute_all}
    got = mla_fusions.fused_qk_rope_concat_and_cache_mla_seg(
        *parts, memory[:, : page_size * (rank + width)], q_out, *rest, True, **named
    )
    assert got is None
    mla_fusions.fused_qk_rope_concat_and_cache_mla(
        *parts, plain, plain_q_out, *rest, True, True, **named
    )
    assert equal(q_out, plain_q_out)
    for slot in SLOTS:
        if slot >= 0:
            page, o = divmod(slot, page_size)
            row = plain[page, o].cpu()
            wanted[page, o * rank : (o + 1) * rank] = row[:rank]
            first = page_size * rank + o * width
            wanted[page, first : first + width] = row[rank:]
    assert equal(memory, wanted)


@pytest.mark.parametrize(
    ("dtype", "heads", "num_zeros", "apply_scale", "is_neox"),
    [
        (BF16, 1, 0, False, True),
        (BF16, 2, 2, True, False),
        (OCP, 1, 4, True, True),
        (OCP, 3, 1, False, False),
        (FNUZ, 1, 3, True, False),
        (FP32, 1, 4, True, True),
    ],
    ids=str,
)
def test_cat_and_cache_mla(dtype, heads, num_zeros, apply_scale, is_neox, seed):
    q_nope, q_pe = rows(BF16, 4, 6, 96), rows(BF16, 4, 6, 32)
    # Three keys that are rotated already, one of them without a slot.
    k_nope, k_pe = rows(BF16, 8, heads, 96), rows(BF16, 8, heads, 32)
    cache = poisoned(64, heads, 128, dtype=dtype)
    before = cache.clone().cpu()
    positions, (cos, sin) = index([4, 0, 49, 7, 9], torch.int32), tables(32 if is_neox else 16)
    outputs = mla_fusions.fused_qk_rope_cat_and_cache_mla(
        q_nope,
        q_pe,
        k_nope,
        k_pe,
        cache,
        index(SLOTS),
        positions,
        cos,
        sin,
        scale(0.05),
        is_neox,
        num_zeros,
        apply_scale,
        q_out_dtype=OCP if dtype == OCP else None,
    )
    turn = functools.partial(turned, cos=cos, sin=sin, is_neox=is_neox)
    pe = turn(q_pe, positions=positions)
    keys = torch.cat([turn(k_pe[:4], positions=positions), k_pe[4:].cpu().float()])
    query = torch.cat([q_nope.cpu().float(), pe], -1)
    wanted = (
        cache_ops.store(query, "fp8_e4m3" if dtype == OCP else "bf16"),
        pe[:num_zeros].bfloat16(),
        keys.bfloat16(),
        torch.zeros(num_zeros, 6, 96).bfloat16(),
    )
    for got, want in zip(outputs, wanted, strict=True):
        assert got.dtype == want.dtype
        assert equal(got, want)
    joined = torch.cat([k_nope.cpu().float(), keys], -1)
    factor = scale(0.05).cpu() if apply_scale else None
    name = dtype_name(dtype)
    if apply_scale and dtype.itemsize > 1:
        joined, factor = joined / factor, None
    stored = cache_ops.store(joined, name, factor if dtype.itemsize == 1 else None)
    assert equal(cache, cache_ops.write_rows(before, stored, index(SLOTS).cpu()))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "layout", "page_size"),
    [
        (BF16, "shuffled_bf16", 16),
        (OCP, "shuffled_fp8", 32),
        (torch.uint8, "nvfp4_shuffled", 128),
    ],
    ids=str,
)
def test_shuffled_blocks(dtype, layout, page_size, heads, seed):
    dims = MLADims(1, 256, 64)
    q_nope, q_pe = rows(BF16, 7, 2, 256), rows(BF16, 7, 2, 64)
    k_nope, k_pe = rows(BF16, 7, heads, 256), rows(BF16, 7, heads, 64)
    width = 180 if dtype == torch.uint8 else 320
    cache = poisoned(4, heads, page_size, width, dtype=dtype)
    wanted = cache.clone().cpu()
    positions, (cos, sin) = index(range(7)), tables(32)
    keys = turned(k_pe, positions, cos, sin, is_neox=True)
    held = k_pe.clone()
    outputs = mla_fusions.fused_qk_rope_cat_and_cache_mla(
        q_nope,
        q_pe,
        k_nope,
        held,
        cache,
        index(SLOTS, torch.int32),
        positions,
        cos,
        sin,
        None,
        True,
        k_pe_out=held,
        shuffled_kv_cache=True,
    )
    assert outputs[2] is held
    assert equal(held, keys.bfloat16())
    for head in range(heads):
        block = wanted[:, head].contiguous()
        factor = torch.ones(1) if dtype == OCP else None
        bound = LatentCache.bind(layout, dims, page_size, block, scale=factor)
        bound.write(k_nope[:, head].cpu().float(), keys[:, head], index(SLOTS).cpu())
        wanted[:, head] = block
    assert equal(cache, wanted)


def lane_caches(dtype, is_shuffled):
    x = 16 // dtype.itemsize
    values = (16 // x, 48, x) if is_shuffled else (48, 16)
    return poisoned(3, 2, 64 // x, 16, x, dtype=dtype), poisoned(3, 2, *values, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "layout", "apply_scale", "is_neox"),
    [
        (BF16, "flash", False, True),
        (BF16, "lanes", True, False),
        (OCP, "lanes", True, True),
        (FNUZ, "shuffled", True, False),
        (OCP, "flash", False, False),
        (BF16, "shuffled", False, True),
    ],
)
def test_reshape_and_cache(dtype, layout, apply_scale, is_neox, seed):
    q, k, v = rows(BF16, 5, 4, 64), rows(BF16, 8, 2, 64), rows(BF16, 8, 2, 48)
    is_flash = layout == "flash"
    if is_flash:
        caches = poisoned(3, 16, 2, 64, dtype=dtype), poisoned(3, 16, 2, 48, dtype=dtype)
    else:
        caches = lane_caches(dtype, layout == "shuffled")
    before = [cache.clone().cpu() for cache in caches]
    positions, offs, (cos, sin) = index(range(5)), index(range(8)), tables(32)
    given = q.clone(), k.clone()
    q_pe = turned(q, positions + offs[:5], cos, sin, is_neox=is_neox)
    keys = turned(k[:5], positions + offs[:5], cos, sin, is_neox=is_neox)
    keys = torch.cat([keys, k[5:].cpu().float()])
    outputs = mla_fusions.fused_qk_rope_reshape_and_cache(
        *given,
        v,
        *caches,
        index(SLOTS),
        positions,
        cos,
        sin,
        scale(0.05),
        0.25,
        is_neox,
        is_flash,
        apply_scale,
        offs,
        # In place, and not.
        given[0] if is_neox else None,
        given[1] if is_neox else None,
        output_zeros=is_flash,
    )
    assert len(outputs) == (5 if is_flash else 4)
    assert (outputs[0] is given[0]) == is_neox
    assert equal(outputs[0], q_pe.bfloat16())
    assert equal(outputs[1], keys.bfloat16())
    assert outputs[2:4] == caches
    if is_flash:
        assert equal(outputs[4], torch.zeros_like(q_pe).bfloat16())
    values = v.cpu().float()
    factors = {"k_scale": scale(0.05).cpu(), "v_scale": 0.25} if apply_scale else {}
    if apply_scale and dtype == BF16:
        keys, values, factors = keys / factors["k_scale"], values / factors["v_scale"], {}
    write = cache_ops.reshape_and_cache_flash if is_flash else functools.partial(
        cache_ops.reshape_and_cache, is_value_shuffled=layout == "shuffled"
    )  # fmt: skip
    wanted = write(
        keys, values, *before, index(SLOTS).cpu(), cache_dtype=dtype_name(dtype), **factors
    )
    for got, want in zip(caches, wanted, strict=True):
        assert equal(got, want)
    # The same without copies of the keys.
    again = [poisoned(*each.shape, dtype=dtype).copy_(each) for each in before]
    result = mla_fusions.fused_qk_rope_cosine_cache_llama(
        q,
        k,
        v,
        *again,
        index(SLOTS),
        positions,
        cos,
        sin,
        scale(0.05),
        0.25,
        is_neox,
        is_flash,
        apply_scale,
        offs,
    )
    assert equal(result[0], q_pe.bfloat16())
    for got, want in zip(result[1:], wanted, strict=True):
        assert equal(got, want)


def test_rows_without_a_rotary_part_and_empty_batches(seed):
    dims = MLADims(1, 64, 0)
    cache = LatentCache.allocate("bf16", dims, 2, 4, device=DEVICE, fill=0xA5)
    empty = torch.empty(1, 0, device=DEVICE)
    for num_tokens in (3, 0):
        q_nope, kv_c = rows(BF16, num_tokens, 2, 64), rows(BF16, num_tokens, 64)
        slots = index([5, -1, 0][:num_tokens])
        q_out = mla_fusions.fused_qk_rope_write_kv_cache(
            q_nope,
            q_nope[..., :0],
            kv_c,
            kv_c[..., :0],
            cache,
            slots,
            index([0, 1, 2][:num_tokens]),
            empty,
            empty,
            is_neox=True,
        )
        assert equal(q_out, q_nope)
        wanted = LatentCache.allocate("bf16", dims, 2, 4, fill=0xA5)
        if num_tokens:
            wanted.write(kv_c.cpu(), kv_c[..., :0].cpu(), slots.cpu())
            assert equal(cache.buffers[0], wanted.buffers[0])


@pytest.mark.parametrize(("num_tokens", "heads"), [(21, 16), (3, 100), (5, 7)])
def test_tiles_of_several_tokens_and_heads(num_tokens, heads, seed, monkeypatch):
    # As if there were many more.
    monkeypatch.setattr(mla_fusions.rotation, "_MIN_PROGRAMS", 4)
    monkeypatch.setattr(mla_fusions.rows, "_MIN_PROGRAMS", 4)
    dims = MLADims(1, 512, 64)
    q_nope, q_pe = rows(BF16, num_tokens, heads, 512), rows(BF16, num_tokens, heads, 64)
    kv_c, k_pe = rows(BF16, num_tokens, 512), rows(BF16, num_tokens, 64)
    cache = LatentCache.allocate("fp8_ds656", dims, 4, 64, device=DEVICE, fill=0xA5)
    slots, positions = torch.randperm(256)[:num_tokens].to(DEVICE), index(range(num_tokens))
    cos, sin = tables(32)
    q_out = mla_fusions.fused_qk_rope_write_kv_cache(
        q_nope, q_pe, kv_c, k_pe, cache, slots, positions, cos, sin, is_neox=False
    )
    turn = functools.partial(turned, positions=positions, cos=cos, sin=sin, is_neox=False)
    assert equal(q_out, torch.cat([q_nope.cpu(), turn(q_pe).bfloat16()], -1))
    wanted = LatentCache.allocate("fp8_ds656", dims, 4, 64, fill=0xA5)
    wanted.write(kv_c.cpu().float(), turn(k_pe), slots.cpu())
    assert equal(cache.buffers[0], wanted.buffers[0])


@pytest.mark.large
def test_offsets_of_more_than_four_gib(seed):
    """Queries and pages far apart in memory, of which the system hands out what is touched."""
    dims, step = MLADims(1, 64, 32), (5 << 30) // 2
    memory = [torch.empty(step + 192, dtype=BF16, device=DEVICE) for _ in range(2)]
    q_out, pages = memory[0].as_strided((2, 1, 96), (step, 96, 1)), memory[1].as_strided(
        (2, 192), (step, 1)
    )  # fmt: skip
    cache = LatentCache.bind("bf16", dims, 2, pages)
    q_nope, q_pe = rows(BF16, 2, 1, 64), rows(BF16, 2, 1, 32)
    positions, (cos, sin) = index([3, 8]), tables(16)
    mla_fusions.fused_qk_rope_write_kv_cache(
        q_nope,
        q_pe,
        q_nope[:, 0],
        q_pe[:, 0],
        cache,
        index([1, 3]),
        positions,
        cos,
        sin,
        is_neox=True,
        q_out=q_out,
    )
    turn = turned(q_pe, positions, cos, sin, is_neox=True).bfloat16()
    wanted = torch.cat([q_nope.cpu(), turn], -1)
    assert equal(q_out, wanted)
    assert equal(pages.view(2, 2, 96)[:, 1], wanted[:, 0])


GOOD = {
    "q_nope": torch.zeros(4, 2, 64),
    "q_pe": torch.zeros(4, 2, 16),
    "kv_c": torch.zeros(4, 64),
    "k_pe": torch.zeros(4, 16),
    "kv_cache": torch.zeros(2, 8, 80),
    "q_out": torch.zeros(4, 2, 80),
    "slot_mapping": torch.arange(4),
    "k_scale": None,
    "q_scale": None,
    "positions": torch.arange(4),
    "cos_cache": torch.zeros(9, 8),
    "sin_cache": torch.zeros(9, 8),
    "is_neox": True,
    "is_nope_first": True,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_pe": torch.zeros(4, 3, 16)}, r"q_pe must be \[4, 2, r\], got shape \(4, 3, 16\)"),
        ({"kv_c": torch.zeros(4, 60)}, r"kv_c must be \[4, kh, 64\], got shape \(4, 1, 60\)"),
        ({"kv_cache": torch.zeros(2, 8, 81)}, r"must be \[num_blocks, block_size, 1, 80\]"),
        ({"kv_cache": torch.zeros(2, 8, 80).half()}, "kv_cache must be float8_e4m3fn, .* or uint8"),
        ({"q_out": torch.zeros(4, 2, 79)}, "q_out must have at least 80 elements .*, got 79"),
        ({"q_out": torch.zeros(4, 2, 80).int()}, "q_out must be bfloat16, .* got torch.int32"),
        ({"slot_mapping": torch.arange(5)}, "at most as many slots as there are keys, 4, got 5"),
        ({"positions": torch.arange(3)}, "positions must be contiguous with at least 4 elements"),
        ({"cos_cache": torch.zeros(9, 7)}, r"cos_cache must be \[max_position, 8 or 16\] with a"),
        ({"sin_cache": torch.zeros(8, 8)}, r"sin_cache must be \(9, 8\) like cos_cache"),
        ({"rotary_dim": 7}, "rotary_dim must be even .* got rotary_dim=7 and dim_offset=0"),
        ({"rotary_dim": 10, "dim_offset": 8}, "at most the width 16, got rotary_dim=10"),
        ({"offs": torch.arange(3)}, "offs must be contiguous with at least 4 elements, got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        mla_fusions.fused_qk_rope_concat_and_cache_mla(**(GOOD | change))


def test_too_many_zeros_are_refused():
    q_nope, q_pe = torch.zeros(4, 2, 64), torch.zeros(4, 2, 16)
    table, cache = torch.zeros(9, 8), torch.zeros(8, 1, 80)
    arguments = (torch.arange(4), torch.arange(4), table, table, None, True)
    with pytest.raises(LayoutError, match=r"num_decode_toks_for_zeros must be in 0\.\.4, got 5"):
        mla_fusions.fused_qk_rope_cat_and_cache_mla(
            q_nope, q_pe, q_nope[:, :1], q_pe[:, :1], cache, *arguments, 5
        )
    with pytest.raises(LayoutError, match="k_nope must have a head or more and at least 4 tokens"):
        mla_fusions.fused_qk_rope_cat_and_cache_mla(
            q_nope, q_pe, q_nope[:3, :1], q_pe[:3, :1], cache, *arguments
        )
    heads = torch.zeros(4, 2, 16)
    caches = torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)
    with pytest.raises(LayoutError, match=r"k must be on cpu with .* at least 4 tokens"):
        mla_fusions.fused_qk_rope_reshape_and_cache(
            heads, heads[:3], heads[:3], *caches, torch.arange(3), *arguments[1:4], *(None, None),
            True, True,
        )  # fmt: skip


@pytest.mark.gpu
def test_replays_in_a_graph_follow_slots_and_positions():
    dims = MLADims(16)
    caches = [LatentCache.allocate("fp8_seg656", dims, 4, 16, device=DEVICE) for _ in range(2)]
    q_nope, q_pe = (torch.randn(5, 16, n, device=DEVICE).bfloat16() for n in (512, 64))
    kv_c, k_pe = (torch.randn(5, n, device=DEVICE).bfloat16() for n in (512, 64))
    slots, positions = index([3, -1, 40, 17, 0]), index(range(5))
    q_out, (cos, sin) = torch.empty(5, 16, 576, device=DEVICE).bfloat16(), tables(32)

    def step(cache, out):
        mla_fusions.fused_qk_rope_write_kv_cache(
            q_nope, q_pe, kv_c, k_pe, cache, slots, positions, cos, sin, is_neox=False, q_out=out
        )

    step(caches[0], q_out)
    caches[0].buffers[0].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(caches[0], q_out)
    for _ in range(3):
        slots.copy_(torch.randperm(64, device=DEVICE)[:5] - 8)
        positions.copy_(torch.randint(0, MAX_POSITION, (5,), device=DEVICE))
        kv_c.normal_()
        q_pe.normal_()
        graph.replay()
        eager = torch.empty_like(q_out)
        step(caches[1], eager)
        assert torch.equal(q_out, eager)
    for got, want in zip(caches[0].buffers, caches[1].buffers, strict=True):
        assert torch.equal(got, want)
