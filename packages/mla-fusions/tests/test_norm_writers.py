"""Norm, RoPE and cache write in one launch against the fp64 norm and the fp32 rotation.

The norm's last bits depend on the order of its sum, so it is compared with fp64; what is stored of
it is compared byte for byte with what the cache stores of the fp32 norm that the op returns.
"""

from __future__ import annotations

import functools

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, LayoutError, MLADims, layouts
from mla_core.reference import quant, rope_quant
from mla_core.reference.norm import rms_norm
from mla_core.reference.rope import rope
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_
from mla_core.testing.writes import WRITE_CASES
from mla_fusions import fused_kv_norm_rope_write_kv_cache as write

pytest.importorskip("triton")
pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OCP = torch.float8_e4m3fn
MAX_POSITION = 50
#: Large enough to show.
EPS = 0.25


def projected(*widths, num_tokens=5, dtype=BF16):
    """Return what one projection makes, slices of rows with poison behind."""
    wide = poison_(torch.empty(num_tokens, sum(widths) + 8, dtype=dtype, device=DEVICE))
    wide[:, :-8] = (3 * torch.randn(num_tokens, sum(widths), device=DEVICE)).to(dtype)
    return wide[:, :-8].split(widths, 1)


def drawn(*shape, dtype=BF16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(*shape, dtype):
    """Return the start of longer, poisoned rows."""
    *outer, width = shape
    wide = torch.empty(*outer, width + 16, dtype=dtype, device=DEVICE)
    return poison_(wide)[..., :width]


def index(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def tables(columns, dtype=FP32):
    both = torch.randn(MAX_POSITION, 2 * columns, device=DEVICE).to(dtype)
    return both[:, :columns], both[:, columns:]


def turned(x, positions, cos, sin, **kwargs):
    """Rotate in fp32 on the host."""
    positions = positions.cpu().clamp(0, cos.shape[0] - 1)
    return rope(x.cpu(), positions, cos.cpu(), sin.cpu(), dtype=FP32, **kwargs)


def equal(got, want):
    got, want = (each.cpu().contiguous().view(torch.uint8) for each in (got, want))
    return torch.equal(got, want)


@functools.cache
def case_of(layout):
    return next(case for case in WRITE_CASES if (case.name, case.layout) == ("rows", layout))


@pytest.mark.parametrize("is_joined", [False, True], ids=["latent", "row"])
@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_layout(layout, is_joined, seed):
    """Rows normed alone or with their rotary part; the cache holds what the outputs say."""
    case, kind = case_of(layout), layouts.get(layout)
    dims, page_size, is_neox = case.dims, case.page_size, len(layout) % 2 == 0
    rank, width = dims.kv_lora_rank, dims.qk_rope_head_dim
    kv_c, k_pe = projected(rank, width)
    weight = drawn(rank + width if is_joined else rank)
    factor = torch.tensor([0.03], device=DEVICE) if kind.needs_scale else None
    cache = LatentCache.allocate(
        kind, dims, 3, page_size, device=DEVICE, scale=factor, fill=0xA5
    )  # fmt: skip
    slots = index([2 * page_size, -1, 1, page_size, 3 * page_size])
    positions, (cos, sin) = index([7, 3, 0, 49, 60]), tables(width // 2)
    normed, rotated = poisoned(5, rank, dtype=FP32), poisoned(5, width, dtype=FP32)
    write(
        torch.cat([kv_c, k_pe], 1) if is_joined else kv_c,
        None if is_joined else k_pe,
        weight,
        cache,
        slots,
        positions,
        cos,
        sin,
        is_neox=is_neox,
        kv_epsilon=EPS,
        kv_out=normed,
        k_pe_out=rotated,
    )
    if is_joined:
        wanted = rms_norm(torch.cat([kv_c, k_pe], 1).cpu(), weight.cpu(), EPS)[0]
        pe = turned(wanted[:, rank:].float(), positions, cos, sin, is_neox=is_neox)
        assert_close(normed, wanted[:, :rank], what="kv_c", dtype="fp32")
        if width:
            assert_close(rotated, pe, what="k_pe", dtype="fp32")
    else:
        assert_close(normed, rms_norm(kv_c, weight, EPS)[0], what="kv_c", dtype="fp32")
        assert equal(rotated, turned(k_pe, positions, cos, sin, is_neox=is_neox))
    host_factor = None if factor is None else factor.cpu()
    wanted = LatentCache.allocate(kind, dims, 3, page_size, scale=host_factor, fill=0xA5)
    # The last slot is past the end.
    wanted.write(normed.cpu(), rotated.cpu(), torch.where(slots < 3 * page_size, slots, -1).cpu())
    for got, want in zip(cache.buffers, wanted.buffers, strict=True):
        assert equal(got, want)


@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_as_a_norm_and_a_write(dtype, is_gemma, seed):
    """The same bits as two ops, where what is stored is rounded as the norm's output is."""
    name = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    dims = MLADims(2, 96, 32)
    q, kv_c, k_pe = projected(176, 96, 32, dtype=dtype)
    q_weight, weight = drawn(176, dtype=dtype), drawn(96, dtype=dtype)
    slots, positions = index([3, -1, 0, 7, 5], torch.int32), index([0, 5, 49, 7, 12])
    table = tables(16, dtype)
    held = []
    for is_fused in (True, False):
        cache = LatentCache.allocate(name, dims, 2, 4, device=DEVICE, fill=0xA5)
        q_out, kv_out = poisoned(5, 176, dtype=dtype), poisoned(5, 96, dtype=dtype)
        if is_fused:
            write(
                kv_c, k_pe, weight, cache, slots, positions, *table, is_neox=False, kv_out=kv_out,
                q=q, q_weight=q_weight, q_out_unquantized=q_out, gemma_norm=is_gemma,
            )  # fmt: skip
        else:
            mla_fusions.fused_qk_rmsnorm(
                q=q, q_weight=q_weight, q_out_unquantized=q_out, k=kv_c, k_weight=weight,
                k_out=kv_out, gemma_norm=is_gemma,
            )  # fmt: skip
            nothing = q.new_empty(5, 0, 96), q.new_empty(5, 0, 32)
            mla_fusions.fused_qk_rope_write_kv_cache(
                *nothing, kv_out, k_pe, cache, slots, positions, *table, is_neox=False
            )
        held.append((q_out, kv_out, cache.buffers[0]))
    for got, x, w in zip(held[0], (q, kv_c), (q_weight, weight), strict=False):
        assert_close(got, rms_norm(x, w, 1e-6, is_gemma=is_gemma)[0], what="rows", dtype=name)
    for fused, apart in zip(*held, strict=True):
        if DEVICE == "cpu":
            assert equal(fused, apart)
        else:
            # The order of a sum is that of a launch's threads.
            is_live = ~apart.isnan()
            assert torch.equal(is_live, ~fused.isnan())
            assert_close(fused[is_live], apart[is_live], what="rows", dtype=name)


@pytest.mark.parametrize("is_full", [False, True], ids=["pairs", "elements"])
@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize(
    ("width", "rotary_dim", "dim_offset"), [(32, 16, 0), (40, 24, 6), (48, None, 8), (20, 20, 0)]
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_partial_rotations(is_joined, width, rotary_dim, dim_offset, is_neox, is_full, seed):
    """Positions with offsets that run over the tables, in place."""
    turning = width - dim_offset if rotary_dim is None else rotary_dim
    cos, sin = tables(turning if is_full else turning // 2, FP32 if is_full else BF16)
    dims = MLADims(1, 64, width)
    kv_c, k_pe = projected(64, width, dtype=FP32)
    weight = drawn(64 + width if is_joined else 64, dtype=FP32)
    before = [kv_c.clone().cpu(), k_pe.clone().cpu()]
    cache = LatentCache.allocate("fp16", dims, 5, 3, device=DEVICE, fill=0xA5)
    positions, offs = index([0, 5, 49, 40, -7], torch.int32), index([1, 0, 30, -3, 2])
    write(
        kv_c,
        k_pe,
        weight,
        cache,
        index([3, 14, 15, -1, 0], torch.int32),
        positions,
        cos[:, None, None],
        sin[:, None, None],
        is_neox=is_neox,
        kv_epsilon=EPS,
        kv_out=kv_c,
        k_pe_out=k_pe,
        offs=offs,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    named = {"is_neox": is_neox, "rotary_dim": turning, "dim_offset": dim_offset}
    if is_joined:
        normed = rms_norm(torch.cat(before, 1), weight.cpu(), EPS)[0].float()
        pe = turned(normed[:, 64:], positions + offs, cos, sin, **named)
        assert_close(k_pe, pe, what="k_pe", dtype="fp32")
    else:
        normed = rms_norm(before[0], weight.cpu(), EPS)[0]
        assert equal(k_pe, turned(before[1], positions + offs, cos, sin, **named))
    assert_close(kv_c, normed[:, :64], what="kv_c", dtype="fp32")
    wanted = LatentCache.allocate("fp16", dims, 5, 3, fill=0xA5)
    wanted.write(kv_c.cpu(), k_pe.cpu(), index([3, 14, -1, -1, 0]).cpu())
    assert equal(cache.buffers[0], wanted.buffers[0])


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("kind", ["No", "per_Token", "per_1x128", "per_1x32"])
def test_the_query_as_its_own_norm(kind, has_residual, seed):
    """What `fused_qk_rmsnorm` makes of it, in all its ways."""
    m, n = 5, 320
    q, kv_c, k_pe = projected(n, 128, 16)
    q_weight, weight, residual = drawn(n), drawn(128), drawn(m, n) if has_residual else None
    group, groups = {
        "No": (None, 0), "per_Token": (None, 1), "per_1x128": (128, 3), "per_1x32": (32, 10)
    }[kind]  # fmt: skip
    is_fp4, is_turned = kind == "per_1x32", kind == "per_1x128"
    cache = LatentCache.allocate("bf16", MLADims(1, 128, 16), 2, 4, device=DEVICE)
    held = []
    for is_fused in (True, False):
        codes = scales = None
        if groups:
            codes = poisoned(m, n // 2 if is_fp4 else n, dtype=torch.uint8 if is_fp4 else OCP)
            shape = (groups, m) if is_turned else (m, groups)
            scales = torch.empty(shape, dtype=torch.uint8 if is_fp4 else FP32, device=DEVICE)
            scales = poison_(scales).view(m, groups)
        whole = poisoned(m, n, dtype=BF16)
        kept = poisoned(m, n, dtype=BF16) if has_residual else None
        if is_fused:
            write(
                *(kv_c, k_pe, weight, cache, index([3, -1, 0, 7, 5]), index(range(m)), *tables(8)),
                is_neox=True,
                kv_epsilon=1.0,
                q=q,
                q_weight=q_weight,
                q_epsilon=EPS,
                q_out_unquantized=whole,
                q_out_quantized=codes,
                q_out_scale=scales,
                q_residual=residual,
                q_res_out=kept,
                # MXFP4 has groups of 32 alone.
                group_size=None if is_fp4 else group,
                transpose_scale=is_turned,
            )
        elif groups:
            mla_fusions.fused_qk_rmsnorm(
                *(codes, scales, q, q_weight, EPS, whole, None, kept, None, None, None, residual),
                quant_type=kind,
                transpose_scale=is_turned,
            )
        else:
            mla_fusions.fused_qk_rmsnorm(
                q_out_unquantized=whole, q=q, q_weight=q_weight, q_epsilon=EPS,
                q_residual=residual, q_res_out=kept,
            )  # fmt: skip
        held.append((codes, scales, whole, kept))
    for got, want in zip(*held, strict=True):
        assert (got is None) == (want is None)
        if got is not None and DEVICE == "cpu":
            assert equal(got, want)
    expected = rms_norm(q, q_weight, EPS, residual=residual)[0]
    codes, scales, whole, _ = held[0]
    assert_close(whole, expected, what="q")
    if is_fp4:
        got = quant.dequantize_mxfp4(codes, scales).to(expected)
        assert float((got - expected).norm() / expected.norm()) < 0.2
    elif kind == "per_Token":
        assert_close(quant.dequantize_groups(codes, scales), expected, what="q", dtype="fp8_e4m3")


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_rows_without_a_rotary_part_and_empty_batches(num_tokens, seed):
    (kv_c,) = projected(64, num_tokens=num_tokens)
    weight, empty = drawn(64, dtype=FP32), torch.empty(1, 0, device=DEVICE)
    cache = LatentCache.allocate("bf16", MLADims(1, 64, 0), 2, 4, device=DEVICE, fill=0xA5)
    slots = index([5][:num_tokens])
    write(kv_c, None, weight, cache, slots, slots, empty, empty, is_neox=True)
    wanted = LatentCache.allocate("bf16", MLADims(1, 64, 0), 2, 4, fill=0xA5)
    normed = rms_norm(kv_c.cpu(), weight.cpu(), 1e-6)[0].bfloat16()
    wanted.write(normed, normed[:, :0], slots.cpu())
    got = cache.buffers[0].cpu()
    assert_close(got[1, 1:2], wanted.buffers[0][1, 1:2], what="row")
    got[1, 1] = wanted.buffers[0][1, 1]
    assert equal(got, wanted.buffers[0])


def test_a_cache_without_pages_and_outputs_all_the_same(seed):
    """Tokens of a prompt whose latents only prefill reads."""
    kv_c, k_pe = projected(64, 16)
    cache = LatentCache.allocate("bf16", MLADims(1, 64, 16), 0, 4, device=DEVICE)
    kv_out, (cos, sin) = poisoned(5, 64, dtype=BF16), tables(8)
    weight, slots = drawn(64), index([-1] * 5)
    write(kv_c, k_pe, weight, cache, slots, index(range(5)), cos, sin, is_neox=True, kv_out=kv_out)
    assert_close(kv_out, rms_norm(kv_c, weight, 1e-6)[0], what="kv_c")


@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize(("dtype", "buffer_dtype"), [(BF16, OCP), (FP32, torch.uint8)], ids=str)
def test_rows_of_deepseek_v4(dtype, buffer_dtype, is_neox, seed):
    (kv,) = projected(512, dtype=dtype)
    weight, (cos, sin) = drawn(512, dtype=dtype), tables(32)
    nope, pe = poisoned(3, 4, 512, dtype=buffer_dtype), poisoned(3, 4, 64, dtype=BF16)
    nope, pe = nope.contiguous(), pe.contiguous()
    before = nope.view(torch.uint8).flatten(0, 1).clone().cpu()
    slots, positions = index([3, -1, 11, 0, 12]), index(range(5))
    mla_fusions.fused_kv_norm_rope_group_quant(
        kv[:, None], weight, positions, slots, cos, sin, EPS, nope, pe, is_neox
    )
    host = (each.cpu() for each in (kv, weight, positions, cos, sin))
    stored, scales, tails = rope_quant.norm_rope_group_quant(*host, eps=EPS, is_neox=is_neox)
    got, tail = nope.view(torch.uint8).flatten(0, 1).cpu(), pe.flatten(0, 1).cpu()
    for token, slot in ((0, 3), (2, 11), (3, 0)):
        bytes_ = quant.e8m0_encode(scales[token])
        assert got[slot, 448:462].tolist() == bytes_.repeat_interleave(2).tolist()
        numbers = quant.dequantize_groups(got[slot, :448].view(OCP)[None], scales[token][None])
        wanted = quant.dequantize_groups(stored[token][None], scales[token][None])
        assert_close(numbers, wanted, what=f"token {token}", dtype="fp8_e4m3")
        assert_close(tail[slot], tails[token], what=f"tail of token {token}")
        got[slot, :462] = before[slot, :462]
        tail[slot] = float("nan")
    assert torch.equal(got, before)
    assert tail.isnan().all()


def test_rows_that_are_not_finite_stay_apart(seed):
    """Rows of skipped tokens too, which are NaN for padding."""
    kv_c, k_pe = projected(64, 16)
    kv_c[1], k_pe[3] = float("nan"), float("nan")
    cache = LatentCache.allocate("bf16", MLADims(1, 64, 16), 2, 4, device=DEVICE)
    slots, (cos, sin) = index([3, -1, 0, 7, 5]), tables(8)
    write(kv_c, k_pe, drawn(64), cache, slots, index(range(5)), cos, sin, is_neox=True)
    got = cache.buffers[0].flatten(0, 1).isnan()
    assert got.any(1).nonzero().tolist() == [[7]]
    assert got[7].tolist() == [False] * 64 + [True] * 16


@pytest.mark.parametrize("num_tokens", [21, 3])
def test_tiles_of_several_tokens(num_tokens, seed, monkeypatch):
    # As if there were many more.
    monkeypatch.setattr(mla_fusions.rows, "_MIN_PROGRAMS", 4)
    q, kv_c, k_pe = projected(1536, 512, 64, num_tokens=num_tokens)
    cache = LatentCache.allocate("fp8_ds656", MLADims(1), 4, 64, device=DEVICE, fill=0xA5)
    slots, positions = torch.randperm(256)[:num_tokens].to(DEVICE), index(range(num_tokens))
    (cos, sin), weight, q_weight = tables(32), drawn(512), drawn(1536)
    normed = poisoned(num_tokens, 512, dtype=FP32)
    q_before = q.clone()
    write(
        kv_c, k_pe, weight, cache, slots, positions, cos, sin, is_neox=False, kv_out=normed,
        q=q, q_weight=q_weight, q_out_unquantized=q,
    )  # fmt: skip
    assert_close(q, rms_norm(q_before, q_weight, 1e-6)[0], what="q")
    assert_close(normed, rms_norm(kv_c, weight, 1e-6)[0], what="kv_c", dtype="fp32")
    wanted = LatentCache.allocate("fp8_ds656", MLADims(1), 4, 64, fill=0xA5)
    pe = turned(k_pe, positions, cos, sin, is_neox=False)
    wanted.write(normed.cpu(), pe, slots.cpu())
    assert equal(cache.buffers[0], wanted.buffers[0])


@pytest.mark.large
def test_offsets_of_more_than_four_gib(seed):
    """Rows and pages far apart in memory, of which the system hands out what is touched."""
    step = (5 << 30) // 2
    memory = [torch.empty(step + 192, dtype=BF16, device=DEVICE) for _ in range(2)]
    kv, pages = memory[0].as_strided((2, 96), (step, 1)), memory[1].as_strided((2, 192), (step, 1))
    kv.copy_(drawn(2, 96))
    cache = LatentCache.bind("bf16", MLADims(1, 64, 32), 2, pages)
    weight, positions, (cos, sin) = drawn(64), index([3, 8]), tables(16)
    normed = rms_norm(kv[:, :64], weight, 1e-6)[0]
    pe = turned(kv[:, 64:], positions, cos, sin, is_neox=True).bfloat16()
    write(
        kv, None, weight, cache, index([1, 3]), positions, cos, sin, is_neox=True,
        kv_out=kv[:, :64], k_pe_out=kv[:, 64:],
    )  # fmt: skip
    assert_close(kv[:, :64], normed, what="kv_c")
    assert equal(kv[:, 64:], pe)
    assert equal(pages.view(2, 2, 96)[:, 1], kv)


def good():
    """Return arguments that are right."""
    return {
        "kv_c": torch.zeros(4, 64),
        "k_pe": torch.zeros(4, 16),
        "kv_weight": torch.zeros(64),
        "cache": LatentCache.allocate("bf16", MLADims(1, 64, 16), 2, 4),
        "slots": torch.arange(4),
        "positions": torch.arange(4),
        "cos": torch.zeros(9, 8),
        "sin": torch.zeros(9, 8),
        "is_neox": True,
    }


Q = {"q": torch.zeros(4, 96), "q_weight": torch.zeros(96)}
CODES = {"q_out_quantized": torch.zeros(4, 96, dtype=OCP), "q_out_scale": torch.zeros(4, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_pe": None}, r"kv_c must be \[T, 80\], got shape \(4, 64\)"),
        ({"kv_c": torch.zeros(4, 80)}, r"kv_c must be \[T, 64\], got shape \(4, 80\)"),
        ({"k_pe": torch.zeros(3, 16)}, r"k_pe must be \[4, 16\], got shape \(3, 16\)"),
        ({"k_pe": torch.zeros(4, 16).half()}, "k_pe must be float32, got torch.float16"),
        ({"kv_weight": torch.zeros(70)}, "kv_weight must have 64 or 80 elements, got 70"),
        ({"slots": torch.arange(3)}, r"slots must be \[4\], got shape \(3,\)"),
        ({"positions": torch.arange(3)}, "positions must be contiguous with at least 4 elements"),
        ({"rotary_dim": 18}, "rotary_dim must be even .* at most the width 16"),
        ({"kv_out": torch.zeros(4, 80)}, r"kv_out must be \[4, 64\]"),
        ({"k_pe_out": torch.zeros(4, 16).int()}, "k_pe_out must be bfloat16 or float16 or float32"),
        ({"q_out_unquantized": torch.zeros(4, 96)}, "q must be given with outputs of it, got None"),
        (Q, "q_out_unquantized must be given without q_out_scale"),
        (Q | {"q_weight": None}, "q_weight must be given with q"),
        (Q | {"q_out_scale": torch.zeros(4, 1)}, "must be given together"),
        (Q | CODES | {"group_size": 24}, "group_size must be a power of two from 16 on, got 24"),
        (Q | CODES | {"q": torch.zeros(3, 96)}, r"q_out_quantized must be \[3, 96\]"),
        ({"q": torch.zeros(3, 9), "q_weight": torch.zeros(9), "q_out_unquantized":
          torch.zeros(3, 9)}, "q must have 4 tokens on cpu as kv_c does, got 3 on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, message):
    with pytest.raises(LayoutError, match=message):
        write(**(good() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.zeros(4, 576)}, r"kv must be \[T, 512\]"),
        ({"kv_weight": torch.zeros(448)}, r"kv_weight must be \[512\]"),
        ({"slot_mapping": torch.arange(3)}, r"slot_mapping must be \[4\]"),
        ({"k_nope_scale_buff": torch.zeros(2, 8, 512)}, "must be float8_e4m3fn or uint8"),
        ({"k_rope_buff": torch.zeros(2, 8, 32).to(BF16)}, r"k_rope_buff must be \[2, 8, 64\]"),
        ({"quant_group_size": 128}, "must be 64 and 'e8m0', got 128 and 'e8m0'"),
        ({"scale_dtype": "fp32"}, "must be 64 and 'e8m0', got 64 and 'fp32'"),
    ],
)
def test_bad_rows_of_deepseek_v4_are_refused(change, message):
    given = {
        "kv": torch.zeros(4, 512),
        "kv_weight": torch.zeros(512),
        "positions": torch.arange(4),
        "slot_mapping": torch.arange(4),
        "cos": torch.zeros(9, 32),
        "sin": torch.zeros(9, 32),
        "eps": EPS,
        "k_nope_scale_buff": torch.zeros(2, 8, 512).to(OCP),
        "k_rope_buff": torch.zeros(2, 8, 64).to(BF16),
    }
    with pytest.raises(LayoutError, match=message):
        mla_fusions.fused_kv_norm_rope_group_quant(**(given | change))


@pytest.mark.gpu
def test_replays_in_a_graph_follow_slots_and_positions():
    caches = [
        LatentCache.allocate("fp8_seg656", MLADims(16), 4, 16, device=DEVICE) for _ in range(2)
    ]
    q, kv_c, k_pe = projected(1536, 512, 64)
    slots, positions, (cos, sin) = index([3, -1, 40, 17, 0]), index(range(5)), tables(32)
    weight, q_weight, outs = drawn(512), drawn(1536), [torch.empty_like(q) for _ in range(2)]

    def step(cache, out):
        write(
            kv_c, k_pe, weight, cache, slots, positions, cos, sin, is_neox=False,
            q=q, q_weight=q_weight, q_out_unquantized=out,
        )  # fmt: skip

    step(caches[0], outs[0])
    caches[0].buffers[0].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(caches[0], outs[0])
    for _ in range(3):
        slots.copy_(torch.randperm(64, device=DEVICE)[:5] - 8)
        positions.copy_(torch.randint(0, MAX_POSITION, (5,), device=DEVICE))
        for each in (q, kv_c, k_pe):
            each.normal_()
        graph.replay()
        step(caches[1], outs[1])
        assert torch.equal(*outs)
    assert torch.equal(caches[0].buffers[0], caches[1].buffers[0])
