"""Compile the kernels of an architecture: ``python compile_check.py gfx942``.

Prints one JSON line for each compiled kernel, the last one about launches that are repeated. A
process of its own, since pytest runs kernels in Triton's interpreter, which replaces what the
compiler needs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, product

import torch
from triton.runtime.jit import JITFunction

from mla_core import LatentCache, MLADims, layouts, write_kv_cache
from mla_core.arch import cpu_as
from mla_core.compiling import TARGETS, compile_launch, kernels, recorded
from mla_core.dtypes import fp8_of_arch, torch_dtype
from mla_core.resources import resources_of
from mla_core.testing.null_driver import null_driver
from mla_core.testing.writes import WRITE_CASES
from mla_fusions import (
    MLAEpilogue,
    MLAPrologue,
    batched_gemm_a16wfp4,
    batched_gemm_a16wnvfp4,
    batched_gemm_afp4wfp4,
    batched_gemm_bf16,
    cat_and_cache_mla,
    concat_and_cache_mla_seg,
    fused_bf16_bmm_rope_cat_and_cache_mla,
    fused_fp4_bmm_rope_cat_and_cache_mla,
    fused_fp8_bmm_rope_cat_and_cache_mla,
    fused_kv_norm_rope_write_kv_cache,
    fused_nvfp4_bmm_rope_cat_and_cache_mla,
    fused_qk_cat,
    fused_qk_rmsnorm_group_quant,
    fused_qk_rmsnorm_per_token_quant,
    fused_qk_rope_cat,
    fused_qk_rope_cat_and_cache_mla,
    fused_qk_rope_concat_and_cache_mla,
    fused_qk_rope_concat_and_cache_mla_seg,
    fused_qk_rope_reshape_and_cache,
    fused_qk_rope_write_kv_cache,
    indexer_k_quant_and_cache,
    indexer_qk_rope_quant_and_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
    reshape_and_cache_with_block_quant,
    reshape_and_cache_with_pertoken_quant,
)
from mla_fusions import (
    batched_gemm_a8w8_a_per_token_group_prequant_w_per_batched_tensor_quant as a8w8,
)
from mla_fusions import reshape_and_cache_with_block_quant_for_asm_pa as by_blocks

KERNELS = "mla_fusions.kernels"


def cases():
    """Yield each layout with many tokens, and some with one token and other dtypes."""
    for case in WRITE_CASES:
        if case.name == "rows":
            page_size = max(64, layouts.get(case.layout).page_multiple)
            yield replace(case, page_size=page_size, num_tokens=4096)
    for name in ("bf16", "fp8_ds656", "nvfp4_shuffled", "fp8_seg644_fnuz"):
        case = next(case for case in WRITE_CASES if (case.name, case.layout) == ("one", name))
        yield case
        yield replace(case, q_dtype="fp32", num_tokens=4096)


def write(case):
    """Return a call that writes a case's rows."""
    inputs = case.build()
    cache = case.cache(inputs.memory, inputs.scale)
    return lambda: write_kv_cache(inputs.kv_c, inputs.k_pe, cache, inputs.slots, backend="fusions")


def calls():
    """Yield the name and the call of everything to compile."""
    for case in cases():
        yield str(case), write(case)
    yield "large", large()
    bf16, fp8 = torch.bfloat16, torch.uint8
    key = torch.empty(4096, 8, 128, dtype=bf16)
    slots = torch.arange(4096)
    for name, dtype in (("auto", bf16), ("fp8", fp8)):
        x = 16 // dtype.itemsize
        keys = torch.empty(256, 8, 128 // x, 16, x, dtype=dtype)
        values = torch.empty(256, 8, 128, 16, dtype=dtype)
        shuffled = torch.empty(256, 8, 16 // x, 128, x, dtype=dtype)
        flat = torch.empty(256, 16, 8, 128, dtype=dtype)
        pages = (key, key, keys, values)
        yield f"reshape_and_cache-{name}", partial(reshape_and_cache, *pages, slots, name)
        yield (
            f"flash-{name}",
            partial(reshape_and_cache_flash, *(key, key, flat, flat), slots, name, None, None),
        )
    pages = (key, key, keys, shuffled)
    scales = torch.ones(8, 4096)
    yield (
        "per token",
        partial(reshape_and_cache_with_pertoken_quant, *pages, scales, scales, slots, True),
    )
    scales = torch.ones(256, 8)
    yield (
        "per block",
        partial(reshape_and_cache_with_block_quant, *pages, scales, scales, slots, True),
    )
    shuffled = (key, key, keys, torch.empty(256, 8, 1, 128, 16, dtype=fp8))
    scales = torch.ones(16, 8)
    yield (
        "per 16 blocks",
        partial(by_blocks, *shuffled, scales, scales, slots, True, 256),
    )
    latents, ropes = torch.empty(4096, 512, dtype=bf16), torch.empty(4096, 64, dtype=bf16)
    segments = torch.empty(64, 64 * 576, dtype=bf16)
    yield (
        "segments of bf16",
        partial(concat_and_cache_mla_seg, latents, ropes, segments, slots, "auto", torch.ones(1)),
    )
    yield from rotations()


def rotations():
    """Yield calls that also rotate: every layout with many tokens, and every variation once."""
    for case in cases():
        yield f"rope {case}", rotate(case)
    bf16, fp8 = torch.bfloat16, torch.uint8
    for tokens, heads in ((1, 16), (128, 16), (4096, 128)):
        for dtype in (bf16, fp8):
            for is_neox, is_nope_first in ((False, True), (True, False)):
                call = partial(
                    fused_qk_rope_concat_and_cache_mla,
                    *(torch.empty(tokens, heads, n, dtype=bf16) for n in (512, 64)),
                    *(torch.empty(tokens, n, dtype=bf16) for n in (512, 64)),
                    torch.empty(64, 64, 576, dtype=dtype),
                    torch.empty(tokens, heads, 576, dtype=dtype),
                    torch.arange(tokens),
                    *(torch.ones(1), torch.ones(1), torch.arange(tokens)),
                    *(torch.empty(8192, 32, dtype=bf16) for _ in range(2)),
                    *(is_neox, is_nope_first, is_neox),
                )
                yield f"concat t{tokens} h{heads} {dtype} {is_neox}", call
    for is_neox in (False, True):
        parts = [torch.empty(512, h, n, dtype=bf16) for h in (16, 1) for n in (512, 64)]
        table = torch.empty(8192, 64, dtype=bf16)
        slots = torch.arange(512)
        call = partial(
            fused_qk_rope_cat_and_cache_mla,
            *(*parts, torch.empty(512, 1, 576, dtype=bf16), slots, slots, table, table),
            *(torch.ones(1), is_neox, 100),
        )
        yield f"cat {is_neox}", call
        yield (
            f"joined {is_neox}",
            partial(fused_qk_rope_cat, *parts, slots, table, table, is_neox),
        )
        segments = torch.empty(64, 64 * 576, dtype=fp8)
        q_out, one = torch.empty(512, 16, 768, dtype=fp8), torch.ones(1)
        call = partial(
            fused_qk_rope_concat_and_cache_mla_seg,
            *(*parts[:2], parts[2][:, 0], parts[3][:, 0], segments, q_out, slots, one, one),
            *(slots, table, table, is_neox),
        )
        yield f"segments {is_neox}", call
        q, key = torch.empty(512, 64, 128, dtype=bf16), torch.empty(512, 8, 128, dtype=bf16)
        caches = torch.empty(32, 8, 8, 16, 16, dtype=fp8), torch.empty(32, 8, 128, 16, dtype=fp8)
        # A part of the heads turns, with a table of a column for each element.
        call = partial(
            fused_qk_rope_reshape_and_cache,
            *(q, key, key, *caches, slots, slots, table, table, torch.ones(1), torch.ones(1)),
            *(is_neox, False, True, slots, q, key),
            rotary_dim=64,
            dim_offset=32,
        )
        yield f"reshape {is_neox}", call
    yield "joined as they are", partial(fused_qk_cat, *parts)
    keys = [torch.empty(4096, 2, n, dtype=bf16) for n in (512, 64)]
    for dtype in (bf16, torch.float8_e4m3fn):
        cache = torch.empty(4096, 2, 576).to(dtype)
        call = partial(cat_and_cache_mla, *keys, cache, torch.arange(4096), torch.ones(1))
        yield f"keys as they are {dtype}", call


def rotate(case):
    """Return a call that writes a case's rows, rotated."""
    inputs = case.build()
    cache = case.cache(inputs.memory, inputs.scale)
    width = case.dims.qk_rope_head_dim
    queries = torch.empty(case.num_tokens, 16, case.dims.latent_dim, dtype=inputs.kv_c.dtype)
    table, positions = torch.empty(8192, width // 2), torch.arange(case.num_tokens)
    split = queries.split([case.dims.kv_lora_rank, width], -1)
    arguments = (*split, inputs.kv_c, inputs.k_pe, cache, inputs.slots, positions, table, table)
    return partial(fused_qk_rope_write_kv_cache, *arguments, is_neox=False)


def products(arch):
    """Yield absorbed products of 16 heads: W_UK and W_UV, and few, many and very many tokens."""
    fp8 = torch_dtype(fp8_of_arch(arch))
    foreign = ({torch.float8_e4m3fn, torch.float8_e4m3fnuz} - {fp8}).pop()
    one = torch.ones(1)
    for tokens, (n, k) in product((1, 64, 4096), ((512, 128), (128, 512))):
        x = torch.empty(tokens, 16, k, dtype=torch.bfloat16).transpose(0, 1)
        w = torch.empty(16, n, k, dtype=torch.bfloat16)
        packed, scales = w.view(torch.uint8)[..., : k // 2], w.view(torch.uint8)[..., : k // 32]
        nvfp4 = w.view(torch.uint8)[..., : k // 16].view(torch.float8_e4m3fn)
        yield f"product bf16 {tokens} {n}", partial(batched_gemm_bf16, x, w)
        for flavour in (fp8, foreign):
            yield f"product {flavour} {tokens} {n}", partial(a8w8, x, w.to(flavour), one)
        yield f"product mxfp4 {tokens} {n}", partial(batched_gemm_a16wfp4, x, packed, scales)
        yield (
            f"product wide mxfp4 {tokens} {n}",
            partial(batched_gemm_a16wfp4, x, packed, scales, prequant=False),
        )
        yield f"product nvfp4 {tokens} {n}", partial(batched_gemm_a16wnvfp4, x, packed, nvfp4)
    # The last of them, packed on both sides; one head, which is split; a result in fp8.
    yield (
        "product packed",
        partial(batched_gemm_afp4wfp4, packed[:, :64], packed, scales[:, :64], scales),
    )
    yield "product split", partial(batched_gemm_bf16, x[:1, :1], w[:1])
    y = torch.empty(16, 4096, n, dtype=fp8)
    yield "product to fp8", partial(batched_gemm_a16wfp4, x, packed, scales, y=y, y_scale=one)


def absorbed(arch):
    """Yield what absorbs W_UK, rotates and writes at once, at few and at many tokens."""
    one, w = torch.ones(1), torch.empty(16, 512, 128, dtype=torch.bfloat16)
    packed, scales = w.view(torch.uint8)[..., :64], w.view(torch.uint8)[..., :4]
    nvfp4 = w.view(torch.uint8)[..., :8].view(torch.float8_e4m3fn)
    fp8 = torch_dtype(fp8_of_arch(arch))
    cos = torch.empty(100, 32)
    for tokens in (1, 64, 4096):
        q = torch.empty(tokens, 16, 192, dtype=torch.bfloat16)
        k = torch.empty(tokens, 1, 576, dtype=torch.bfloat16)
        cache, index = torch.empty(8192, 1, 576, dtype=torch.bfloat16), torch.arange(tokens)
        x, fp8_cache = q[..., :128].transpose(0, 1), cache.to(fp8)
        rest = (q[..., 128:], k[..., :512], k[..., 512:])
        where = (index, index, cos, cos)
        bf16, named = (*rest, cache, *where), {"k_scale": one, "q_out_dtype": fp8}
        for name, call, weights in (
            ("bf16", fused_bf16_bmm_rope_cat_and_cache_mla, (w,)),
            ("fp8", fused_fp8_bmm_rope_cat_and_cache_mla, (w.to(fp8), one)),
            ("mxfp4", fused_fp4_bmm_rope_cat_and_cache_mla, (packed, scales)),
            ("nvfp4", fused_nvfp4_bmm_rope_cat_and_cache_mla, (packed, nvfp4)),
        ):
            yield f"product rope {name} {tokens}", partial(call, x, *weights, *bf16)
        yield (
            f"product rope to fp8 {tokens}",
            partial(
                fused_fp8_bmm_rope_cat_and_cache_mla,
                *(x, w.to(fp8), one, *rest, fp8_cache, *where),
                **named,
            ),
        )


def norms(arch):
    """Yield norms of DeepSeek-V3's two latents, with each quantiser and without."""
    q = torch.empty(64, 1536 + 576, dtype=torch.bfloat16)
    q, k = q[:, :1536], q[:, 1536:2048]
    q_weight, k_weight = torch.empty(1536, dtype=torch.bfloat16), torch.empty(512)
    codes = torch.empty(64, 1536, dtype=torch_dtype(fp8_of_arch(arch)))
    scales = torch.empty(64, 12)
    packed, exponents = codes.view(torch.uint8)[:, :768], codes.view(torch.uint8)[:, :48]
    keys = {"k_out": k, "k": k, "k_weight": k_weight}
    by_group = partial(fused_qk_rmsnorm_group_quant, q_weight=q_weight, **keys)
    yield "norm groups", partial(by_group, codes, scales, q, q_residual=q, q_res_out=q)
    yield "norm mxfp4", partial(by_group, packed, exponents, q, group_size=32)
    yield "norm", partial(by_group, q=q, q_out_unquantized=q, gemma_norm=True)
    by_token = fused_qk_rmsnorm_per_token_quant
    yield "norm tokens", partial(by_token, codes, scales[:, :1], q, q_weight, 1e-6, q)


def norm_writes(arch):
    """Yield norms of both latents with RoPE and a write of many tokens, and of a few."""
    fp8 = torch_dtype(fp8_of_arch(arch))
    names = ("bf16", "fp8", "fp8_ds656", "fp8_seg644_fnuz", "fp8_ds32", "shuffled_fp8")
    for name in (*names, "nvfp4_shuffled", "v4_584", "v4_nm"):
        kind, is_v4 = layouts.get(name), name.startswith("v4")
        dims = MLADims(1, 448, 64, 448, 512, value_includes_rope=True) if is_v4 else MLADims(16)
        rank, width = dims.kv_lora_rank, dims.qk_rope_head_dim
        for tokens in (1, 4096):
            page_size = max(64, kind.page_multiple)
            scale = torch.ones(1) if kind.needs_scale else None
            cache = LatentCache.allocate(kind, dims, 4, page_size, scale=scale)
            first = torch.empty(tokens, 1536 + rank + width, dtype=torch.bfloat16)
            index, table = torch.arange(tokens), torch.empty(100, width // 2)
            weight = torch.empty(rank + width if is_v4 else rank, dtype=torch.bfloat16)
            keys = (first[:, 1536:], None, weight, cache, index, index, table, table)
            query = {"q": first[:, :1536], "q_weight": torch.empty(1536)}
            query["q_out_quantized"] = torch.empty(tokens, 1536).to(fp8)
            query["q_out_scale"] = torch.empty(tokens, 12)
            yield (
                f"norm write {name} {tokens}",
                partial(
                    fused_kv_norm_rope_write_kv_cache,
                    *keys,
                    is_neox=tokens == 1,
                    kv_out=first[:, 1536 : 1536 + rank] if name == "bf16" else None,
                    k_pe_out=first[:, 1536 + rank :] if name == "bf16" else None,
                    # Most with a query, so that programs of both kinds share registers.
                    **({} if name == "fp8_ds32" else {**query, "group_size": 128}),
                ),
            )


def indexers():
    """Yield what the indexer's inputs take: either flavour, page order and kind of scales."""
    fp8 = torch.float8_e4m3fn, torch.float8_e4m3fnuz
    for tokens, flavour, words in product((1, 4096), fp8, (("ue8m0", True), ("fp32", False))):
        q = torch.empty(tokens, 64, 128, dtype=torch.bfloat16)
        k, weights = torch.empty(tokens, 128, dtype=torch.bfloat16), q[..., 0].contiguous()
        q_out, folded = torch.empty(q.shape).to(flavour), torch.empty(tokens, 64)
        cache = torch.empty(64, 64, 132).to(flavour)
        index, table, norm = torch.arange(tokens), torch.empty(100, 32), torch.empty(128)
        call = partial(
            indexer_qk_rope_quant_and_cache,
            *(q, q_out, weights, folded, k, cache, index, norm, norm, index, table, table),
            *(1e-6, 128, words[0], 0.1, words[1], words[1]),
        )
        yield f"indexer {tokens} {flavour} {words[0]}", call
        call = partial(indexer_k_quant_and_cache, k, cache, index, 128, *words)
        yield f"indexer keys {tokens} {flavour} {words[0]}", call


def layers(arch):
    """Yield what a layer of 16 heads launches before and after attention, joined and apart.

    Of layouts with scales the prologue alone, with weights in fp8.
    """
    dims = MLADims(16)
    flavour = "_fnuz" if fp8_of_arch(arch) == "fp8_e4m3fnuz" else ""

    def bf16(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    def run(tokens, layout="bf16", weights="plain"):
        kv_b = torch.zeros(16 * 256, 512, dtype=torch.bfloat16)
        prologue = MLAPrologue(
            dims,
            kv_a_proj_with_mqa=bf16(576, 64),
            kv_a_layernorm=bf16(512),
            kv_b_proj=kv_b,
            q_a_proj=bf16(1536, 64),
            q_a_layernorm=bf16(1536),
            q_b_proj=bf16(16 * 192, 1536),
            weights=weights,
        )
        page_size = max(64, layouts.get(layout).page_multiple)
        cache = LatentCache.allocate(layout, dims, 4, page_size)
        index, table = torch.arange(tokens), torch.empty(100, 32)
        prologue(bf16(tokens, 64), cache, index, index, table, table)
        if weights == "plain":
            MLAEpilogue(dims, kv_b_proj=kv_b)(bf16(tokens, 16, 512))

    for tokens in (1, 64, 4096):
        yield f"layer {tokens}", partial(run, tokens)
    for layout in (f"fp8_ds656{flavour}", f"fp8_seg656{flavour}", "nvfp4_shuffled"):
        # A product quantises too.
        yield f"product layer {layout}", partial(run, 64, layout, "fp8")


def large():
    """Return a write into a cache of 2 GiB, which AMD's compiler makes a kernel of its own for."""
    dims = MLADims(16)
    pages = torch.empty(2**31 // (64 * 576 * 2) + 1, 64, 576, dtype=torch.bfloat16)
    cache = LatentCache.bind("bf16", dims, 64, pages)
    rows = torch.empty(4096, 576, dtype=torch.bfloat16)
    slots = torch.arange(4096)
    return partial(write_kv_cache, rows[:, :512], rows[:, 512:], cache, slots, backend="fusions")


def check(arch):
    """Compile and print."""
    every = (calls(), products(arch), norms(arch), norm_writes(arch), indexers(), absorbed(arch))
    for name, call in chain(*every, layers(arch)):
        with recorded(arch, KERNELS) as launches:
            call()
        for launch in launches:
            compiled = compile_launch(launch, arch)
            resources = resources_of(compiled)
            asm = compiled.asm
            result = {
                "case": name,
                "excess": resources.excess(arch),
                "resources": asdict(resources),
                "tangled": tangled(asm.get("ptx", "")),
                "is_scaled": "mfma_scale" in asm.get("amdgcn", ""),
                "is_binary": (asm.get("cubin") or asm["hsaco"])[:4] == b"\x7fELF",
            }
            print(json.dumps(result), flush=True)


def tangled(ptx):
    """Return pairs of registers that ptxas 12.8 would mix up: bytes of fp8 beside their upper one.

    It has one instruction convert and join, and takes what it joins from before the conversion.
    """
    converted = set(re.findall(r"e4m3x2\.f32\s+(%rs\d+)", ptx))
    return [
        (both, upper)
        for both, upper in re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx)
        if both in converted and re.search(rf"shr\.u16\s+{upper}, {both}, 8;", ptx)
    ]


def repeat(arch):
    """Launch twice: the second launch skips Triton and must pass what the first one did."""
    # Compiled, not interpreted, although the tensors are on the CPU.
    list(kernels(KERNELS))
    os.environ["TRITON_INTERPRET"] = "1"
    plain, run = [], JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: (
        plain.append(kernel) or run(kernel, *args, **kwargs)
    )
    with cpu_as(arch), null_driver(*TARGETS[arch]) as driver:
        call = write(next(case for case in WRITE_CASES if case.layout == "fp8_ds656"))
        call()
        plain.clear()
        call()
    first, second = driver.launches
    same = addresses(first.args) == addresses(second.args) and first.grid == second.grid
    print(json.dumps({"is_direct": not plain, "is_same": same, "name": second.name}))


def addresses(args):
    """Return arguments with tensors as their addresses."""
    return [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]


if __name__ == "__main__":
    check(sys.argv[1])
    repeat(sys.argv[1])
