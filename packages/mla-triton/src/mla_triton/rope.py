"""Fused RoPE of decode: the launch that rotates keys, and what the decode kernels are told."""

from __future__ import annotations

import math

import torch

from mla_core import layouts
from mla_core.arch import arch_of
from mla_core.batch import PagedKV
from mla_core.dtypes import torch_dtype
from mla_core.launch import launch
from mla_core.plan import AttentionOptions, DecodePlan, PlanRequest
from mla_core.rope import RopeInputs
from mla_triton.arguments import power_of_two


def workspace(request: PlanRequest) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the buffer of rotated keys that a request without write-back needs."""
    fused, problem = request.options.rope, request.problem
    if fused is None or fused.write_back:
        return {}
    stored_as = next(
        layout.rope.dtype
        for layout in layouts.ALL.values()
        if (layout.family, layout.kv_dtype) == (problem.layout, problem.kv_dtype)
    )
    shape = (request.total_q, problem.dims.qk_rope_head_dim)
    return {"new_keys": (shape, torch_dtype(stored_as))}


def rotate_keys(
    kv: PagedKV, plan: DecodePlan, rope: RopeInputs, global_kv_lens: torch.Tensor | None
) -> None:
    """Rotate each request's newest keys: in the cache, or from it into the plan's ``new_keys``."""
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_triton.kernels.rope import rotate_keys_kernel

    fused, request = plan.options.rope, plan.request
    assert fused is not None
    if not request.batch_size or not request.max_seqlen_q:
        return
    cache, options, tokens = kv.cache, plan.options, rope.k_pe_tokens
    new_keys = plan.workspace.get("new_keys")
    k_pe, table = cache.field("k_pe"), rope.cos_sin_cache
    has_scale = cache.layout.rope.scale_kind == "per_tensor"
    unused = kv.kv_indptr
    launch(
        rotate_keys_kernel,
        (request.max_seqlen_q, request.batch_size),
        k_pe,
        unused if new_keys is None else new_keys,
        unused if tokens is None else tokens,
        rope.positions,
        table,
        cache.scale if has_scale else unused,
        plan.qo_indptr,
        kv.kv_indptr,
        kv.kv_page_indices,
        kv.kv_last_page_len,
        unused if global_kv_lens is None else global_kv_lens,
        options.cp_world_size,
        options.cp_rank,
        k_pe.shape[0],
        table.shape[0],
        fused.position_offset,
        *k_pe.stride()[:2],
        0 if new_keys is None else new_keys.stride(0),
        0 if tokens is None else tokens.stride(0),
        table.stride(0),
        R=plan.dims.qk_rope_head_dim,
        BLOCK_R=power_of_two(plan.dims.qk_rope_head_dim),
        BLOCK_P=power_of_two(fused.rotary_dim // 2),
        PAGE_SIZE=kv.page_size,
        OFFSET=fused.dim_offset,
        ROTARY=fused.rotary_dim,
        IS_NEOX=fused.is_neox,
        HAS_CP=options.cp_world_size > 1,
        HAS_SCALE=has_scale,
        HAS_TOKENS=tokens is not None,
        WRITE_BACK=new_keys is None,
        num_warps=1,
    )


def kernel_arguments(
    options: AttentionOptions,
    rope: RopeInputs | None,
    new_keys: torch.Tensor | None,
    unused: torch.Tensor,
) -> tuple[torch.Tensor | int, ...]:
    """Return what decode kernels take from ``new_keys_ptr`` to ``position_offset``."""
    if rope is None or options.rope is None:
        return unused, unused, unused, 0, 0, 0, 0
    table = rope.cos_sin_cache
    return (
        unused if new_keys is None else new_keys,
        rope.positions,
        table,
        0 if new_keys is None else new_keys.stride(0),
        table.stride(0),
        table.shape[0],
        options.rope.position_offset,
    )


def kernel_constants(
    options: AttentionOptions, k_pe: torch.Tensor, new_keys: torch.Tensor | None
) -> dict[str, int | bool]:
    """Return the constants of decode kernels that say how to rotate and where keys are."""
    fused = options.rope
    steps, where = [*k_pe.stride()[:2]], 0
    if new_keys is not None:
        # Repeats of a launch know of addresses no more than this.
        apart = (new_keys.data_ptr() - k_pe.data_ptr()) % 16 or 16
        steps.append(apart // k_pe.element_size())
        steps.append(new_keys.stride(0))
        where = 2 if arch_of(k_pe.device).startswith("gfx") else 1
    return {
        # Triton finds out by itself whether strides are multiples of 16.
        "ROPE_ALIGN": math.gcd(8, *steps),
        "ROTARY": 0 if fused is None else fused.rotary_dim,
        "ROPE_OFFSET": 0 if fused is None else fused.dim_offset,
        "IS_NEOX": fused is not None and fused.is_neox,
        "NEW_KEYS": where,
    }
