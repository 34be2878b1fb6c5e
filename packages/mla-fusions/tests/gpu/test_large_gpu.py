"""Caches and products past 4 GiB: offsets that 32 bits cannot hold."""

from __future__ import annotations

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, MLADims, layouts, write_kv_cache
from mla_core.reference import gemm, quant
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seed")]

BF16 = torch.bfloat16
DIMS = MLADims(16)
PAGE_SIZE = 64
NUM_TOKENS = 40

a8w8 = mla_fusions.batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant


def rows(*shape):
    return torch.randn(shape, device="cuda").to(BF16)


def written(kind):
    """Return what writes keys to a cache in some way, always with the same numbers."""
    kv_c, k_pe = rows(NUM_TOKENS, 512), rows(NUM_TOKENS, 64)
    q_nope, q_pe = rows(NUM_TOKENS, 16, 512), rows(NUM_TOKENS, 16, 64)
    positions = torch.arange(NUM_TOKENS, device="cuda")
    angles = torch.randn(NUM_TOKENS, 32, device="cuda")
    tables = angles.cos(), angles.sin()
    hidden = rows(NUM_TOKENS, 256)
    prologue = mla_fusions.MLAPrologue(
        DIMS,
        kv_a_proj_with_mqa=rows(576, 256),
        kv_a_layernorm=rows(512),
        kv_b_proj=rows(16 * 256, 512) / 16,
        q_proj=rows(16 * 192, 256) / 16,
        max_joined_tokens=0 if kind == "layer apart" else NUM_TOKENS,
    )

    def write(cache, slots):
        match kind:
            case "keys":
                write_kv_cache(kv_c, k_pe, cache, slots, backend="fusions")
            case "rope":
                mla_fusions.fused_qk_rope_write_kv_cache(
                    q_nope, q_pe, kv_c, k_pe, cache, slots, positions, *tables, is_neox=False
                )
            case _:
                prologue(hidden, cache, slots, positions, *tables)

    return write


@pytest.mark.parametrize("kind", ["keys", "rope", "layer", "layer apart"])
@pytest.mark.parametrize("layout", ["bf16", "fp8", "fp8_seg656", "fp8_ds656"])
@pytest.mark.large
def test_caches_past_4_gib_of_elements(layout, kind):
    """The rows at both ends of a large cache are those of a small one, and there are no others."""
    scale = torch.full((1,), 0.1, device="cuda") if layouts.get(layout).needs_scale else None

    def cache_of(num_pages):
        return LatentCache.allocate(
            layout, DIMS, num_pages, PAGE_SIZE, device="cuda", scale=scale, fill=0
        )

    small = cache_of(4)
    per_page = small.buffers[0][0].numel()
    num_pages = 2**32 // per_page + 4
    large = cache_of(num_pages)
    assert large.buffers[0].numel() > 2**32
    slots = torch.randperm(4 * PAGE_SIZE, device="cuda")[:NUM_TOKENS]
    far = slots + (num_pages - 4) * PAGE_SIZE
    # Half of the tokens go to the first two pages, the others to the last two.
    slots_of_large = torch.where(slots < 2 * PAGE_SIZE, slots, far)
    write = written(kind)
    write(small, slots)
    write(large, slots_of_large)
    ours, theirs = large.buffers[0].view(torch.uint8), small.buffers[0].view(torch.uint8)
    ends = torch.cat((ours[:2], ours[-2:]))
    assert theirs.any()
    assert torch.equal(ends, theirs)
    for start in range(2, num_pages - 2, 4096):
        assert not ours[start : min(start + 4096, num_pages - 2)].any()


@pytest.mark.parametrize("weights", ["bf16", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.large
def test_products_past_4_gib_of_elements(weights):
    """A result of more than 2 ** 32 elements; its first and its last tokens against fp64."""
    heads, n, k, tokens = 128, 512, 128, 2**16 + 300
    x = rows(tokens, heads, k)
    w = torch.randn(heads, n, k, device="cuda") / k**0.5
    y = poison_(torch.empty(tokens, heads, n, dtype=BF16, device="cuda"))
    assert y.numel() > 2**32
    one, turned = torch.ones(1, device="cuda"), x.transpose(0, 1)
    ends = torch.cat((x[:130], x[-130:]))
    match weights:
        case "bf16":
            mla_fusions.batched_gemm_bf16(turned, w.to(BF16), YQ=y, transpose_bm=True)
            expected = gemm.batched_gemm(ends.transpose(0, 1), w.to(BF16))
        case "fp8":
            stored = w.to(torch.float8_e4m3fn)
            a8w8(turned, stored, one, YQ=y, transpose_bm=True)
            expected = gemm.batched_gemm_a8w8(ends.transpose(0, 1), stored, 1.0)
        case "mxfp4":
            stored = quant.quantize_mxfp4(w)
            mla_fusions.batched_gemm_a16wfp4(turned, *stored, y=y, transpose_bm=True)
            expected = gemm.batched_gemm_mxfp4(ends.transpose(0, 1), *stored)
        case _:
            stored = quant.quantize_nvfp4(w)
            mla_fusions.batched_gemm_a16wnvfp4(turned, *stored, y=y, transpose_bm=True)
            expected = gemm.batched_gemm(ends.transpose(0, 1), quant.dequantize_nvfp4(*stored))
    got = torch.cat((y[:130], y[-130:])).transpose(0, 1)
    assert_close(got, expected, what="y", dtype="bf16")
    for start in range(0, tokens, 8192):
        assert not y[start : start + 8192].isnan().any()


@pytest.mark.large
def test_a_layer_of_many_tokens_past_4_gib_of_queries():
    """Prologue and epilogue over 60000 tokens: the bits of the same tokens in smaller calls."""
    dims, tokens, hidden = MLADims(128), 60_000, 128
    kv_b = rows(128 * 256, 512) / 16
    prologue = mla_fusions.MLAPrologue(
        dims,
        kv_a_proj_with_mqa=rows(576, hidden) / 8,
        kv_a_layernorm=rows(512),
        kv_b_proj=kv_b,
        q_proj=rows(128 * 192, hidden) / 8,
        max_joined_tokens=tokens,
    )
    epilogue = mla_fusions.MLAEpilogue(dims, kv_b_proj=kv_b)
    x = rows(tokens, hidden)
    cache = LatentCache.allocate("bf16", dims, -(-tokens // 64), 64, device="cuda")
    index = torch.arange(tokens, device="cuda")
    angles = torch.randn(tokens, 32, device="cuda")
    tables = angles.cos(), angles.sin()
    q = None
    for prologue.max_joined_tokens in (tokens, 0):
        del q
        q = prologue(x, cache, index, index, *tables)
        assert q.numel() * q.element_size() > 2**33
        for start in (0, 29_000, tokens - 1000):
            part = slice(start, start + 1000)
            expected = prologue(x[part], cache, index[part], index[part], *tables)
            # torch may multiply fewer rows in another order.
            assert_close(q[part], expected, what="q", dtype="bf16")
    values = epilogue(q[..., :512])
    for start in (0, 29_000, tokens - 1000):
        part = slice(start, start + 1000)
        assert_close(values[part], epilogue(q[part, :, :512]), what="values", dtype="bf16")
