"""Inputs of the indexer against the reference: rotation and quantiser byte for byte."""

from __future__ import annotations

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, LayoutError, MLADims
from mla_core.dtypes import dtype_name, fp8_of_arch
from mla_core.reference import indexer, quant
from mla_core.reference.cache_ops import indexer_k_quant
from mla_core.reference.norm import layer_norm
from mla_core.reference.rope import rope
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_
from mla_fusions import indexer_k_quant_and_cache, indexer_qk_rope_quant_and_cache

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP, FNUZ, U8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.uint8
SLOTS = (40, -1, 3, 17, -5, 0, 31)
MAX_POSITION = 50


def rows(dtype, *shape):
    """Return rows that are slices of wider, poisoned ones, of very different magnitudes."""
    *outer, width = shape
    wide = poison_(torch.empty(*outer, width + 16, dtype=dtype, device=DEVICE))
    x = torch.randn(shape, device=DEVICE) * 10.0 ** torch.randint(-3, 3, (*outer, 1), device=DEVICE)
    wide[..., 8 : 8 + width] = x.to(dtype)
    return wide[..., 8 : 8 + width]


def poisoned(*shape, dtype):
    return poison_(torch.empty(shape, dtype=dtype, device=DEVICE))


def index(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def tables(columns, dtype=FP32):
    both = torch.randn(MAX_POSITION, 2 * columns, device=DEVICE).to(dtype)
    return both[:, :columns], both[:, columns:]


def equal(got, want):
    got, want = (each.cpu().contiguous().view(U8) for each in (got, want))
    return torch.equal(got, want)


def flavour_of(dtype):
    if dtype != U8:
        return dtype_name(dtype)
    return fp8_of_arch("cpu" if DEVICE == "cpu" else "sm90")


def page_of(keys, scales, page_size, group, *, is_tiled):
    """Return where a token's key and its scales are in its page, as byte numbers."""
    width, num_groups = keys.shape[1], scales.shape[1]

    def place(o):
        d = torch.arange(width)
        if is_tiled:
            at = o // 16 * 16 * width + d // 16 * 256 + o % 16 * 16 + d % 16
        else:
            at = o * width + d
        start = page_size * width + o * 4 * num_groups
        return torch.cat([at, start + torch.arange(4 * num_groups)])

    return place


def written(before, keys, scales, slots, *, is_tiled):
    """Write quantised keys by the formulas of the layout."""
    num_blocks, page_size, _ = before.shape
    place = page_of(keys, scales, page_size, keys.shape[1] // scales.shape[1], is_tiled=is_tiled)
    pages = before.flatten(1).clone()
    for key, scale, slot in zip(keys.view(U8), scales, slots, strict=False):
        if 0 <= slot < num_blocks * page_size:
            token = torch.cat([key, scale.contiguous().view(U8)])
            pages[slot // page_size][place(slot % page_size)] = token
    return pages.view(before.shape)


@pytest.mark.parametrize("is_tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "width", "group"),
    [
        (BF16, U8, 128, 128),
        (FP16, FNUZ, 128, 128),
        (FP32, OCP, 128, 32),
        (BF16, FNUZ, 96, 32),
        (BF16, OCP, 64, 64),
    ],
    ids=str,
)
def test_keys(dtype, cache_dtype, width, group, scale_format, is_tiled, seed):
    k = rows(dtype, 9, width)
    k[2] = 0
    cache = poisoned(4, 16, width + 4 * width // group, dtype=cache_dtype)
    before = cache.view(U8).clone().cpu()
    slots = index(SLOTS if is_tiled else (*SLOTS, 64), torch.int32)
    indexer_k_quant_and_cache(k, cache, slots, group, scale_format, is_tiled)
    keys, scales = indexer_k_quant(
        k.cpu(), group_size=group, scale_format=scale_format, fp8=flavour_of(cache_dtype)
    )
    wanted = written(before, keys, scales, slots.tolist(), is_tiled=is_tiled)
    assert equal(cache, wanted)


@pytest.mark.parametrize("name", ["indexer", "indexer_fnuz", "indexer_shuffled"])
def test_keys_as_core_writes_them(name, seed):
    """Into a cache of core's layout."""
    cache, wanted = (
        LatentCache.allocate(name, MLADims(1, 128, 0), 3, 16, device=where, fill=0xA5)
        for where in (DEVICE, "cpu")
    )
    k, slots = rows(BF16, 5, 128), index([40, -1, 3, 17, 0])
    pages = cache.buffers[0].view(FNUZ if name.endswith("fnuz") else OCP)
    indexer_k_quant_and_cache(k, pages, slots, 128, None, "shuffled" in name)
    wanted.write(k.cpu(), k[:, :0].cpu(), slots.cpu())
    assert equal(cache.buffers[0], wanted.buffers[0])


def expected(q, weights, k, norm, positions, cos, sin, **options):
    """Return queries, weights, keys and scales, rotated in fp32 on the host."""
    fp8, key_fp8, scale_format = (options.pop(name) for name in ("fp8", "key_fp8", "scale_format"))
    weights_scale, width = options.pop("weights_scale"), q.shape[-1]
    positions = positions.cpu().clamp(0, MAX_POSITION - 1)

    def turned(x):
        return rope(x, positions, cos.cpu(), sin.cpu(), dtype=FP32, **options)

    def quantised(x, fp8):
        return indexer_k_quant(x, group_size=width, scale_format=scale_format, fp8=fp8)

    k = k.cpu().float()
    if norm is not None:
        k = layer_norm(k, *(each.cpu() for each in norm), 1e-5).float()
    codes, scales = quantised(turned(q.cpu()), fp8)
    folded = weights.cpu().float() * scales[..., 0] * weights_scale
    return codes, folded, *quantised(turned(k), key_fp8)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
@pytest.mark.parametrize(
    ("dtype", "q_dtype", "cache_dtype", "heads", "width", "is_neox"),
    [
        (BF16, U8, U8, 5, 128, True),
        (FP16, OCP, FNUZ, 3, 128, False),
        (FP32, FNUZ, OCP, 2, 64, True),
    ],
    ids=str,
)
def test_queries_and_keys(
    dtype, q_dtype, cache_dtype, heads, width, is_neox, scale_format, is_tiled, has_norm, seed
):
    q, k, weights = rows(dtype, 9, heads, width), rows(dtype, 9, width), rows(dtype, 9, heads)
    norm = (rows(FP32, width), rows(FP32, width)) if has_norm else None
    cache = poisoned(4, 16, width + 4, dtype=cache_dtype)
    before = cache.view(U8).clone().cpu()
    q_out, weights_out = poisoned(9, heads, width, dtype=q_dtype), poisoned(9, heads, dtype=FP32)
    slots, (cos, sin) = index(SLOTS), tables(width // 4, BF16)
    positions = index([3, 70, 0, -2, *range(5, 10)], torch.int32)
    result = indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, cache, slots, *(norm or (None, None)), positions),
        *(cos, sin, 1e-5, width, scale_format, 0.3, is_tiled, is_neox),
    )
    assert result is None
    codes, folded, keys, scales = expected(
        q, weights, k, norm, positions, cos, sin, is_neox=is_neox, rotary_dim=width // 2,
        fp8=flavour_of(q_dtype), key_fp8=flavour_of(cache_dtype), scale_format=scale_format,
        weights_scale=0.3,
    )  # fmt: skip
    assert equal(q_out, codes)
    assert equal(weights_out, folded)
    wanted = written(before, keys, scales, SLOTS, is_tiled=is_tiled)
    if norm is None:
        assert equal(cache, wanted)
        return
    # The norm's last bits depend on the order of its sums: a code may be the next one.
    got, wanted = cache.view(U8).flatten(1).cpu(), wanted.flatten(1)
    place = page_of(keys, scales, 16, width, is_tiled=is_tiled)
    for token, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        mine, theirs = (pages[slot // 16][place(slot % 16)] for pages in (got, wanted))
        mine, theirs = (
            quant.dequantize_groups(
                each[:width].view(keys.dtype)[None], each[width:].view(FP32)[None]
            )
            for each in (mine, theirs)
        )
        assert_close(mine, theirs, what=f"key of token {token}", dtype="fp8_e4m3")
        got[slot // 16][place(slot % 16)] = wanted[slot // 16][place(slot % 16)]
    assert torch.equal(got, wanted)


def test_as_the_reference_prepares_them(seed):
    """The whole of it, in fp64."""
    q, k, weights = rows(BF16, 4, 8, 128), rows(BF16, 4, 128), rows(BF16, 4, 8)
    norm_weight, norm_bias = rows(FP32, 128), rows(FP32, 128)
    cache = torch.zeros(1, 16, 132, dtype=U8, device=DEVICE)
    q_out, weights_out = poisoned(4, 8, 128, dtype=OCP), poisoned(4, 8, dtype=FP32)
    slots, positions, (cos, sin) = index(range(4)), index([3, 9, 0, 12]), tables(32)
    flavour = cache.view(OCP)
    indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, flavour, slots, norm_weight, norm_bias, positions),
        *(cos[:, None, None], sin[:, None, None], 1e-6, 128, "ue8m0", 128**-0.5),
    )
    wanted = indexer.qk_rope_quant(
        *(each.cpu() for each in (q, k, weights, norm_weight, norm_bias, positions, cos, sin)),
        eps=1e-6,
        weights_scale=128**-0.5,
        scale_format="ue8m0",
    )
    logits = (
        (weights_out * (q_out.float() @ torch.ones(128, device=DEVICE))).cpu(),
        wanted.weights * (wanted.q.float() @ torch.ones(128)),
    )
    assert_close(*logits, what="sums", dtype="fp8_e4m3")
    latents = LatentCache.bind("indexer", MLADims(1, 128, 0), 16, cache).read(slots)[0]
    keys = quant.dequantize_groups(wanted.k, wanted.k_scales)
    assert_close(latents, keys, what="keys", dtype="fp8_e4m3")


@pytest.mark.parametrize("is_full", [False, True], ids=["pairs", "elements"])
@pytest.mark.parametrize(("rotary_dim", "dim_offset"), [(None, 0), (48, 64), (None, 7)])
def test_partial_rotations(rotary_dim, dim_offset, is_full, seed):
    turning = 64 if rotary_dim is None else rotary_dim
    q, k, weights = rows(BF16, 4, 3, 128), rows(BF16, 4, 128), rows(FP32, 4, 3)
    cos, sin = tables(turning if is_full else turning // 2)
    cache = poisoned(2, 8, 132, dtype=OCP)
    before = cache.view(U8).clone().cpu()
    q_out, weights_out = poisoned(4, 3, 128, dtype=OCP), poisoned(4, 3, dtype=FP32)
    slots, positions, offs = index([3, 15, -1, 0]), index([3, 9, 0, 12]), index([1, -20, 5, 0])
    named = {"rotary_dim": turning if is_full else rotary_dim, "dim_offset": dim_offset}
    indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, cache, slots, None, None, positions, cos, sin),
        *(1e-5, 128, None, 1.0),
        offs=offs,
        **named,
    )
    codes, folded, keys, scales = expected(
        q, weights, k, None, positions + offs, cos, sin, is_neox=True, rotary_dim=turning,
        dim_offset=dim_offset, fp8="fp8_e4m3", key_fp8="fp8_e4m3", scale_format="fp32",
        weights_scale=1.0,
    )  # fmt: skip
    assert equal(q_out, codes)
    assert equal(weights_out, folded)
    assert equal(cache, written(before, keys, scales, slots.tolist(), is_tiled=False))


@pytest.mark.parametrize(("num_tokens", "heads"), [(21, 64), (3, 7), (0, 4), (2, 0)])
def test_tiles_and_empty_batches(num_tokens, heads, seed, monkeypatch):
    # As if there were many more.
    monkeypatch.setattr(mla_fusions.rotation, "_MIN_PROGRAMS", 4)
    monkeypatch.setattr(mla_fusions.rows, "_MIN_PROGRAMS", 4)
    q, k = rows(BF16, num_tokens, heads, 128), rows(BF16, num_tokens, 128)
    weights = rows(BF16, num_tokens, heads)
    cache = poisoned(4, 16, 132, dtype=OCP)
    before = cache.view(U8).clone().cpu()
    q_out = poisoned(num_tokens, heads, 128, dtype=OCP)
    weights_out = poisoned(num_tokens, heads, dtype=FP32)
    slots, positions = torch.randperm(64)[:num_tokens].to(DEVICE), index(range(num_tokens))
    cos, sin = tables(32)
    indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, cache, slots, None, None, positions, cos, sin),
        *(1e-5, 128, "ue8m0", 0.5),
    )
    if not num_tokens:
        assert equal(cache, before)
        return
    codes, folded, keys, scales = expected(
        q, weights, k, None, positions, cos, sin, is_neox=True, rotary_dim=64, fp8="fp8_e4m3",
        key_fp8="fp8_e4m3", scale_format="ue8m0", weights_scale=0.5,
    )  # fmt: skip
    assert equal(q_out, codes)
    assert equal(weights_out, folded)
    assert equal(cache, written(before, keys, scales, slots.tolist(), is_tiled=False))


def test_rows_that_are_not_finite_stay_apart(seed):
    """A token that is NaN, padding perhaps, spoils nothing but its own."""
    q, k, weights = rows(BF16, 4, 2, 128), rows(BF16, 4, 128), rows(BF16, 4, 2)
    q[1], k[1] = float("nan"), float("nan")
    cache = torch.zeros(1, 16, 132, dtype=OCP, device=DEVICE)
    q_out, weights_out = poisoned(4, 2, 128, dtype=OCP), poisoned(4, 2, dtype=FP32)
    slots, positions = index([3, 7, 0, -1]), index(range(4))
    norm = rows(FP32, 128), rows(FP32, 128)
    indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, cache, slots, *norm, positions, *tables(32)),
        *(1e-5, 128, "ue8m0", 0.5),
    )
    is_nan = [False, True, False, False]
    assert q_out.float().isnan().flatten(1).all(1).tolist() == is_nan
    assert weights_out.isnan().all(1).tolist() == is_nan
    keys = LatentCache.bind("indexer", MLADims(1, 128, 0), 16, cache).read(index([3, 7, 0]))[0]
    assert keys.isnan().all(1).tolist() == [False, True, False]
    assert not keys[[0, 2]].isnan().any()


@pytest.mark.large
def test_offsets_of_more_than_four_gib(seed):
    """Queries and pages far apart in memory, of which the system hands out what is touched."""
    step = 5 << 30
    memory = [torch.empty(step + 264, dtype=U8, device=DEVICE) for _ in range(2)]
    q_out = memory[0].view(OCP).as_strided((2, 1, 128), (step, 128, 1))
    cache = memory[1].as_strided((2, 2, 132), (step, 132, 1)).view(OCP)
    q, k, weights = rows(BF16, 2, 1, 128), rows(BF16, 2, 128), rows(BF16, 2, 1)
    positions, (cos, sin) = index([3, 8]), tables(32)
    weights_out = poisoned(2, 1, dtype=FP32)
    indexer_qk_rope_quant_and_cache(
        *(q, q_out, weights, weights_out, k, cache, index([1, 3]), None, None, positions, cos, sin),
        *(1e-5, 128, None, 1.0),
    )
    codes, _, keys, scales = expected(
        q, weights, k, None, positions, cos, sin, is_neox=True, rotary_dim=64, fp8="fp8_e4m3",
        key_fp8="fp8_e4m3", scale_format="fp32", weights_scale=1.0,
    )  # fmt: skip
    assert equal(q_out, codes)
    pages = cache.view(U8).flatten(1).cpu()
    assert equal(pages[:, 128:256], keys)
    assert equal(pages[:, 260:], scales)


def good():
    """Return arguments that are right."""
    table = torch.zeros(9, 32)
    return {
        "q": torch.zeros(4, 2, 128),
        "q_out": torch.zeros(4, 2, 128, dtype=OCP),
        "weights": torch.zeros(4, 2),
        "weights_out": torch.zeros(4, 2),
        "k": torch.zeros(4, 128),
        "kv_cache": torch.zeros(2, 16, 132, dtype=U8),
        "slot_mapping": torch.arange(4),
        "norm_weight": torch.zeros(128),
        "norm_bias": torch.zeros(128),
        "positions": torch.arange(4),
        "cos_cache": table,
        "sin_cache": table,
        "epsilon": 1e-6,
        "quant_block_size": 128,
        "scale_fmt": "ue8m0",
        "weights_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_out": torch.zeros(4, 2, 128)}, "q_out must be uint8 or float8_e4m3fn or"),
        ({"q_out": torch.zeros(4, 3, 128, dtype=OCP)}, r"q_out must be \[4, 2, 128\]"),
        ({"weights": torch.zeros(4, 3)}, r"weights must be \[4, 2\]"),
        ({"weights_out": torch.zeros(4, 2).half()}, "weights_out must be float32"),
        ({"k": torch.zeros(4, 64)}, r"k must be \[4, 128\]"),
        ({"kv_cache": torch.zeros(2, 16, 132)}, "kv_cache must be float8_e4m3fn, .* or uint8"),
        ({"kv_cache": torch.zeros(2, 16, 128, dtype=U8)}, r"\[num_blocks, block_size, 132\]"),
        ({"kv_cache": torch.zeros(2, 24, 132, dtype=U8), "preshuffle": True}, "multiple of 16 .*"),
        ({"slot_mapping": torch.arange(5)}, "at most as many slots as there are keys, 4, got 5"),
        ({"norm_bias": None}, "norm_weight and norm_bias must be given together"),
        ({"norm_weight": torch.zeros(64)}, r"norm_weight must be \[128\]"),
        ({"positions": torch.arange(3)}, "positions must be contiguous with at least 4"),
        ({"sin_cache": torch.zeros(8, 32)}, r"sin_cache must be \(9, 32\) like cos_cache"),
        ({"quant_block_size": 64}, "quant_block_size must be 128, the width of a query"),
        ({"scale_fmt": "e8m0"}, "scale_fmt must be one of None, '', 'fp32', 'ue8m0', got 'e8m0'"),
        ({"dim_offset": 65}, "rotary_dim must be even and .* at most the width 128"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        indexer_qk_rope_quant_and_cache(**(good() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_block_size": 24}, "quant_block_size must be a power of two .* 128, got 24"),
        ({"quant_block_size": 8}, "a power of two from 16 on that divides the width 128, got 8"),
        ({"k": torch.zeros(4, 2, 128)}, r"k must be \[T, d\]"),
    ],
)
def test_bad_keys_are_refused(change, message):
    names = ("k", "kv_cache", "slot_mapping", "quant_block_size", "scale_fmt")
    given = {name: value for name, value in good().items() if name in names}
    with pytest.raises(LayoutError, match=message):
        indexer_k_quant_and_cache(**(given | change))


@pytest.mark.gpu
def test_replays_in_a_graph_follow_slots_and_positions():
    q, k, weights = rows(BF16, 5, 64, 128), rows(BF16, 5, 128), rows(BF16, 5, 64)
    caches = [torch.zeros(4, 16, 132, dtype=U8, device=DEVICE) for _ in range(2)]
    outs = [(poisoned(5, 64, 128, dtype=OCP), poisoned(5, 64, dtype=FP32)) for _ in range(2)]
    slots, positions, (cos, sin) = index([3, -1, 40, 17, 0]), index(range(5)), tables(32)
    norm = rows(FP32, 128), rows(FP32, 128)

    def step(cache, q_out, weights_out):
        indexer_qk_rope_quant_and_cache(
            *(q, q_out, weights, weights_out, k, cache, slots, *norm, positions, cos, sin),
            *(1e-5, 128, "ue8m0", 0.5),
        )

    step(caches[0], *outs[0])
    caches[0].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(caches[0], *outs[0])
    for _ in range(3):
        slots.copy_(torch.randperm(64, device=DEVICE)[:5] - 8)
        positions.copy_(torch.randint(0, MAX_POSITION, (5,), device=DEVICE))
        for each in (q, k, weights):
            each.normal_()
        graph.replay()
        step(caches[1], *outs[1])
        assert equal(outs[0][0], outs[1][0])
        assert torch.equal(outs[0][1], outs[1][1])
    assert torch.equal(*caches)
