"""Kernels as AMD machine code, executed by the emulator with every checker on."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mla_fusions
from mla_core import LatentCache, MLADims, layouts
from mla_core.dtypes import torch_dtype
from mla_core.reference import gemm, quant
from mla_core.reference.norm import rms_norm
from mla_core.reference.rope import rope
from mla_core.testing.assertions import assert_close
from mla_core.testing.emulation import emulated_triton
from mla_core.testing.writes import WRITE_CASES, check_write
from mla_fusions import (
    batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant as a8w8,
)

pytest.importorskip("cdna_emulator")
pytest.importorskip("triton")

pytestmark = pytest.mark.slow

KERNELS = (
    "mla_fusions.kernels.write_rows:write_rows_kernel",
    "mla_fusions.kernels.write_blocks:write_blocks_kernel",
    "mla_fusions.kernels.absorbed:absorbed_kernel",
    "mla_fusions.kernels.absorbed:reduce_splits_kernel",
    "mla_fusions.kernels.rope_rows:rope_rows_kernel",
    "mla_fusions.kernels.norms:norm_rows_kernel",
    "mla_fusions.kernels.norm_rope_rows:norm_rope_rows_kernel",
    "mla_fusions.kernels.indexer_rows:indexer_rows_kernel",
    "mla_fusions.kernels.absorbed_rope:absorbed_rope_kernel",
)
CASES = tuple(
    case
    for case in WRITE_CASES
    if case.name in ("rows", "non_finite", "one") or (case.name, case.layout) == ("strided", "fp8")
)


@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch in ("gfx942", "gfx950")
        for case in CASES
    ],
)
def test_conformance(arch, case):
    with emulated_triton(arch, *KERNELS) as results:
        check_write("fusions", replace(case, num_tokens=min(case.num_tokens, 7)))
    assert sum(result.instructions for result in results) > 0


@pytest.mark.parametrize("asm_layout", [False, True])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_writers_of_heads(arch, asm_layout, seed):
    """What the interpreter writes: bytes are the flavour of the chip, here and there."""
    dtype = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    shape = (1, 32, 16) if asm_layout else (32, 16)
    batches = [torch.randn(2, len(slots), 2, 32).bfloat16() for slots in (range(10), range(3))]
    batches[1] *= 3
    held = []
    for where in (None, arch):
        caches = [torch.zeros(2, 2, 2, 16, 16).to(dtype), torch.zeros(2, 2, *shape).to(dtype)]
        by_token = [torch.zeros(2, 32) for _ in range(2)]
        by_block = [torch.zeros(2, 2) for _ in range(2)]
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            for rows, slots in zip(batches, ([*range(10)], [11, 10, -1]), strict=True):
                key, value = rows
                mla_fusions.reshape_and_cache_with_block_quant(
                    key, value, *caches, *by_block, torch.tensor(slots), asm_layout
                )
            mla_fusions.reshape_and_cache_with_pertoken_quant(
                key, value, *caches, *by_token, torch.tensor([16, 17, 30]), asm_layout
            )
        assert where is None or sum(result.instructions for result in results) > 0
        held.append([*caches, *by_token, *by_block])
    for interpreted, emulated in zip(*held, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("weights", ["bf16", "fp8_e4m3", "fp8_e4m3fnuz", "nvfp4"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_absorbed_products(arch, weights, seed):
    """Odd tokens and outputs; K in two steps, and split where weights are bf16."""
    heads, tokens, n, k = 2, 5, 40, 192
    x, w = torch.randn(heads, tokens, k).bfloat16(), torch.randn(heads, n, k)
    factor = torch.tensor([0.375])
    with emulated_triton(arch, *KERNELS) as results:
        if weights == "bf16":
            w = w.bfloat16()
            got = mla_fusions.batched_gemm_bf16(x, w, dtype=torch.float32, splitK=2)
            expected = gemm.batched_gemm(x, w)
        elif weights == "nvfp4":
            packed, scales = quant.quantize_nvfp4(w)
            got = mla_fusions.batched_gemm_a16wnvfp4(
                x, packed, scales, torch.float32, w_global_scale=factor
            )
            expected = gemm.batched_gemm(x, quant.dequantize_nvfp4(packed, scales)) * 0.375
        else:
            w = w.to(torch_dtype(weights))
            got = a8w8(x, w, factor, 64, dtype=torch.float32)
            expected = gemm.batched_gemm_a8w8(x, w, 0.375, fp8=weights, group_size=64)
    assert sum(result.instructions for result in results) > 0
    assert_close(got, expected, what="y", dtype="fp32")


@pytest.mark.parametrize("way", ["quantised", "wide", "packed"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_absorbed_products_of_mxfp4(arch, way, seed):
    """With the instruction that multiplies MXFP4 where there is one, and a scale that is NaN."""
    heads, tokens, n, k = 2, 5, 40, 192
    x = torch.randn(heads, tokens, k).bfloat16()
    w, scales = quant.quantize_mxfp4(torch.randn(heads, n, k))
    scales[0, 3, 1] = 255
    with emulated_triton(arch, *KERNELS) as results:
        if way == "packed":
            packed, x_scales = quant.quantize_mxfp4(x)
            got = mla_fusions.batched_gemm_afp4wfp4(packed, w, x_scales, scales, torch.float32)
        else:
            got = mla_fusions.batched_gemm_a16wfp4(
                x, w, scales, torch.float32, prequant=way == "quantised"
            )
    assert sum(result.instructions for result in results) > 0
    if way == "wide":
        expected = gemm.batched_gemm(x, quant.dequantize_mxfp4(w, scales))
    else:
        expected = gemm.batched_gemm_mxfp4(x, w, scales)
    assert torch.equal(got.isnan(), expected.isnan())
    assert_close(got.nan_to_num(), expected.nan_to_num(), what="y", dtype="fp32")


@pytest.mark.parametrize("is_neox", [False, True], ids=["gptj", "neox"])
@pytest.mark.parametrize("layout", ["bf16", "fp8_ds656", "nvfp4_shuffled", "shuffled_fp8_fnuz"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_rows_that_are_rotated(arch, layout, is_neox, seed):
    """What the interpreter writes, bit for bit: products and sums are not fused on the chip."""
    dims, page_size = MLADims(4, 256, 64), max(16, layouts.get(layout).page_multiple)
    scale = torch.tensor([0.03]) if layouts.get(layout).needs_scale else None
    q_nope, q_pe = (torch.randn(3, 5, n).bfloat16() for n in (256, 64))
    kv_c, k_pe = (torch.randn(3, n).bfloat16() for n in (256, 64))
    table, offs = torch.randn(9, 48), torch.tensor([0, 1, -4])
    slots, positions = torch.tensor([page_size + 1, -1, 2]), torch.tensor([8, 1, 3])
    held = []
    for where in (None, arch):
        cache = LatentCache.allocate(layout, dims, 2, page_size, scale=scale, fill=0xA5)
        q_out = torch.zeros(3, 5, 320).to(torch.float8_e4m3fn)
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            mla_fusions.fused_qk_rope_write_kv_cache(
                *(q_nope, q_pe, kv_c, k_pe, cache, slots, positions, table[:, :24], table[:, 24:]),
                is_neox=is_neox,
                q_out=q_out,
                q_scale=torch.tensor([0.01]),
                offs=offs,
                rotary_dim=48,
                dim_offset=8,
            )
        assert where is None or sum(result.instructions for result in results) > 0
        held.append([q_out, *cache.buffers])
    for interpreted, emulated in zip(*held, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("is_turned", [False, True], ids=["still", "turned"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_joined_parts(arch, is_turned, seed):
    """What the interpreter writes, bit for bit."""
    parts = [torch.randn(3, h, n).bfloat16() for h in (5, 2) for n in (96, 32)]
    table, positions = torch.randn(9, 32), torch.tensor([8, 1, 30])
    slots, one = torch.tensor([7, -1, 0]), torch.tensor([0.3])
    held = []
    for where in (None, arch):
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            if is_turned:
                outputs = mla_fusions.fused_qk_rope_cat(
                    *parts, positions, table[:, :16], table[:, 16:], False
                )
            else:
                # Keys without queries, divided on their way.
                cache = torch.zeros(8, 2, 128).bfloat16()
                mla_fusions.cat_and_cache_mla(*parts[2:], cache, slots, one)
                outputs = (*mla_fusions.fused_qk_cat(*parts), cache)
        assert where is None or sum(result.instructions for result in results) > 0
        held.append(outputs)
    for interpreted, emulated in zip(*held, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_heads_that_are_rotated_in_place(arch, seed, monkeypatch):
    """What the interpreter writes, by programs of several waves that read what they replace."""
    monkeypatch.setattr(mla_fusions.rotation, "_MIN_PROGRAMS", 1)
    monkeypatch.setattr(mla_fusions.rows, "_MIN_PROGRAMS", 1)
    monkeypatch.setattr(mla_fusions.rotation, "_WARP_ELEMENTS", 128)
    q, key, value = torch.randn(3, 8, 128), torch.randn(5, 2, 128), torch.randn(5, 2, 64)
    slots, positions = torch.tensor([3, -1, 17, 18, 19]), torch.tensor([8, 1, 3])
    table, factors = torch.randn(9, 128), (torch.tensor([0.05]), torch.tensor([0.5]))
    dtype = torch.float8_e4m3fnuz
    held = []
    for where in (None, arch):
        given = q.clone(), key.clone()
        caches = [torch.zeros(2, 2, 8, 16, 16).to(dtype), torch.zeros(2, 2, 1, 64, 16).to(dtype)]
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            *_, zeros = mla_fusions.fused_qk_rope_reshape_and_cache(
                *(*given, value, *caches, slots, positions, table[:, :64], table[:, 64:]),
                *(*factors, True, False, True, None, *given),
            )
        assert where is None or sum(result.instructions for result in results) > 0
        held.append([*given, *caches, zeros])
    for interpreted, emulated in zip(*held, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("kind", ["per_Token", "per_1x128", "per_1x32"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_norms(arch, kind, seed):
    """Both rows of a token, a residual, and the query quantised as here."""
    both, weight = torch.randn(3, 192 + 96).bfloat16(), torch.randn(192).bfloat16()
    q, k, residual = both[:, :192], both[:, 192:], torch.randn(3, 192).bfloat16()
    fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    groups = {"per_Token": 1, "per_1x128": 2, "per_1x32": 6}[kind]
    fp4 = kind == "per_1x32"
    held = []
    for where in (None, arch):
        codes = torch.zeros(3, 96 if fp4 else 192, dtype=torch.uint8)
        scales = torch.zeros(3, groups, dtype=torch.uint8 if fp4 else torch.float32)
        out, kept, k_out = (torch.zeros(3, n).bfloat16() for n in (192, 192, 96))
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            mla_fusions.fused_qk_rmsnorm(
                codes if fp4 else codes.view(fp8), scales, q, weight, 1e-6, out,
                k_out, kept, k, weight[:96], 1e-3, residual, quant_type=kind,
            )  # fmt: skip
        assert where is None or sum(result.instructions for result in results) > 0
        stored = quant.dequantize_mxfp4(codes, scales) if fp4 else codes.view(fp8).double()
        held.append([stored, scales.double(), out.double(), kept.double(), k_out.double()])
    for interpreted, emulated in zip(*held, strict=True):
        # The order of the sum of squares is the compiler's.
        assert float((emulated - interpreted).norm() / interpreted.norm()) < 1e-2


@pytest.mark.parametrize("weights", ["fp8", "mxfp4"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_absorbed_products_with_rope_and_write(arch, weights, seed):
    """All in one launch; rotated rows and the cache bit for bit what the interpreter writes."""
    heads, tokens, p, c, r = 2, 5, 64, 64, 16
    fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    x, q_pe = torch.randn(heads, tokens, p).bfloat16(), torch.randn(tokens, heads, r).bfloat16()
    keys, w = torch.randn(tokens + 1, 1, c + r).bfloat16(), torch.randn(heads, c, p)
    slots, positions = torch.tensor([3, -1, 0, 7, 5, 6]), torch.tensor([8, 1, 3, 0, 2])
    table, one = torch.randn(9, r), torch.tensor([0.5])
    rest = (q_pe, keys[..., :c], keys[..., c:])
    held = []
    for where in (None, arch):
        cache = torch.zeros(8, 1, c + r).to(fp8)
        tail = (*rest, cache, slots, positions, table[:, : r // 2], table[:, r // 2 :])
        named = {"k_scale": one, "q_out_dtype": torch.float32, "num_decode_toks_for_zeros": 2}
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            if weights == "fp8":
                call, stored = mla_fusions.fused_fp8_bmm_rope_cat_and_cache_mla, (w.to(fp8), one)
            else:
                call = mla_fusions.fused_fp4_bmm_rope_cat_and_cache_mla
                stored = quant.quantize_mxfp4(w)
            q_out, *others = call(x, *stored, *tail, **named)
        assert where is None or sum(result.instructions for result in results) > 0
        held.append((q_out[..., :c], [q_out[..., c:].contiguous(), *others, cache]))
    (here, exact_here), (there, exact_there) = held
    assert_close(there, here, what="absorbed", dtype="fp32")
    for interpreted, emulated in zip(exact_here, exact_there, strict=True):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))


@pytest.mark.parametrize("layout", ["bf16", "fp8_ds656", "nvfp4_shuffled", "v4_584"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_norms_with_rope_and_write(arch, layout, seed):
    """In place; the cache holds, bit for bit, what core stores of the norm that comes back."""
    is_v4, page_size = layout == "v4_584", max(16, layouts.get(layout).page_multiple)
    dims = MLADims(4, 256, 64)
    if is_v4:
        dims = MLADims(4, 448, 64, 448, 512, value_includes_rope=True)
    rank, width = dims.kv_lora_rank, dims.qk_rope_head_dim
    first = torch.randn(3, 192 + rank + width) * 3
    given = first.clone()
    weight = torch.randn(rank + width if is_v4 else rank).bfloat16()
    slots, positions = torch.tensor([page_size + 1, -1, 2]), torch.tensor([8, 1, 3])
    table, q_weight = torch.randn(9, 48), torch.randn(192).bfloat16()
    cache, wanted = (LatentCache.allocate(layout, dims, 2, page_size, fill=0xA5) for _ in range(2))
    with emulated_triton(arch, *KERNELS) as results:
        mla_fusions.fused_kv_norm_rope_write_kv_cache(
            *(first[:, 192:], None, weight, cache, slots, positions, table[:, :24], table[:, 24:]),
            is_neox=is_v4,
            kv_out=first[:, 192 : 192 + rank],
            k_pe_out=first[:, 192 + rank :],
            q=first[:, :192],
            q_weight=q_weight,
            q_out_unquantized=first[:, :192],
            offs=torch.tensor([0, 1, -4]),
            rotary_dim=48,
            dim_offset=8,
        )
    assert sum(result.instructions for result in results) > 0
    q, row = given[:, :192], given[:, 192:]
    assert_close(first[:, :192], rms_norm(q, q_weight, 1e-6)[0], what="q", dtype="fp32")
    normed = rms_norm(row if is_v4 else row[:, :rank], weight, 1e-6)[0].float()
    pe = rope(
        normed[:, rank:] if is_v4 else row[:, rank:],
        *(torch.tensor([8, 2, 0]), table[:, :24], table[:, 24:]),
        is_neox=is_v4,
        rotary_dim=48,
        dim_offset=8,
        dtype=torch.float32,
    )
    assert_close(first[:, 192 : 192 + rank], normed[:, :rank], what="kv_c", dtype="fp32")
    if is_v4:
        assert_close(first[:, 192 + rank :], pe, what="k_pe", dtype="fp32")
    else:
        assert torch.equal(first[:, 192 + rank :], pe)
    wanted.write(first[:, 192 : 192 + rank], first[:, 192 + rank :], slots)
    for got, want in zip(cache.buffers, wanted.buffers, strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("is_tiled", [False, True], ids=["plain", "tiled"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_inputs_of_the_indexer(arch, is_tiled, seed):
    """What the interpreter writes; bit for bit where there is no norm."""
    q, k = torch.randn(3, 5, 128).bfloat16(), torch.randn(3, 128).bfloat16() * 3
    weights = torch.randn(3, 5).bfloat16()
    norms = ((None, None), (torch.randn(128), torch.randn(128)))
    slots, positions = torch.tensor([17, -1, 2]), torch.tensor([8, 1, 3])
    fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
    table, held = torch.randn(9, 64), []
    for where in (None, arch):
        outputs = []
        with nullcontext([]) if where is None else emulated_triton(where, *KERNELS) as results:
            for norm in norms:
                q_out, folded = torch.zeros(3, 5, 128).to(fp8), torch.zeros(3, 5)
                cache = torch.zeros(2, 16, 132).to(fp8)
                mla_fusions.indexer_qk_rope_quant_and_cache(
                    *(q, q_out, weights, folded, k, cache, slots, *norm, positions),
                    *(table[:, :32], table[:, 32:], 1e-6, 128, "ue8m0", 0.3, is_tiled, is_tiled),
                )
                outputs.append((q_out, folded, cache))
            alone = torch.zeros(2, 16, 132).to(fp8)
            mla_fusions.indexer_k_quant_and_cache(k, alone, slots, 128, "ue8m0", is_tiled)
            outputs[0] = (*outputs[0], alone)
        assert where is None or sum(result.instructions for result in results) > 0
        held.append(outputs)
    (exact_here, here), (exact_there, there) = held
    for interpreted, emulated in zip(
        (*exact_here, *here[:2]), (*exact_there, *there[:2]), strict=True
    ):
        assert torch.equal(interpreted.view(torch.uint8), emulated.view(torch.uint8))
    # Keys that are normed: the order of the sums is the compiler's, so a code may be the next one.
    layout = ("indexer_shuffled" if is_tiled else "indexer") + ("_fnuz" if arch == "gfx942" else "")
    keys = [
        LatentCache.bind(layout, MLADims(1, 128, 0), 16, cache).read(torch.tensor([17, 2]))[0]
        for *_, cache in (here, there)
    ]
    assert_close(keys[1], keys[0], what="keys", dtype="fp8_e4m3")
