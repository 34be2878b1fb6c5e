"""Rotate per-head queries and keys, and write keys and values to their pages, in one launch.

Under the names that engines call. These caches belong to the grouped-query layers beside MLA.
"""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.errors import LayoutError
from mla_core.layouts.codecs import Cast
from mla_fusions import head_writers
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS, as_scale
from mla_fusions.rotation import Keys, queries_of, rotate_and_write, rotation_of, undivided


@uncompiled
def fused_qk_rope_reshape_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    v_scale: torch.Tensor | float | None,
    is_neox: bool,
    flash_layout: bool,
    apply_scale: bool = True,
    offs: torch.Tensor | None = None,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    output_zeros: bool = True,
    zeros_out: torch.Tensor | None = None,
    upcast_operand: bool = False,
    *,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Rotate per-head queries and keys, and write keys and values to their pages.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    q : [T, h, d], bf16, fp16 or fp32, last dim contiguous
    k : [>= T, kh, d], bf16, fp16 or fp32, last dim contiguous
        Those of the first T tokens turn; the others are taken as they are.
    v : [as many as k, kh, dv], like ``k``
    key_cache, value_cache
        With ``flash_layout`` as in `reshape_and_cache_flash`, otherwise as in `reshape_and_cache`;
        a ``value_cache`` of five dimensions is the one for ``asm_layout``. Of the dtype of ``k``,
        fp8 or uint8, which holds the flavour of the device.
    slot_mapping : [at most as many as keys], int64 or int32
        As in `fused_qk_rope_cat_and_cache_mla`.
    pos, offs : [>= T], int64 or int32; ``offs`` may be None
        Their sum is clamped into the tables.
    cos, sin, is_neox, rotary_dim, dim_offset
        As in `fused_qk_rope_write_kv_cache`, for heads of width ``d``.
    k_scale, v_scale : fp32, one element, or None
        Rows are divided by them before they are stored, unless they are None or not
        ``apply_scale``. A number is copied to the device in each call, and so is 1 for one None.
    q_out : [T, h, d], bf16, fp16, fp32, fp8 or uint8, or None
        May be ``q`` itself. fp8 is not scaled.
    k_out : like ``k``, or None
        May be ``k`` itself.
    output_zeros : bool
    zeros_out : [T, h, d], bf16, fp16 or fp32, or None
        Receives zeros where ``output_zeros``.
    upcast_operand : bool
        Without effect: rotating is always done in fp32.

    Returns
    -------
    q_out, k_out, key_cache, value_cache, and with ``output_zeros`` zeros_out

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: rotates in fp32 and rounds once; any head dims up to 1024;
    divides by the scales, and saturates; ``k_out`` is written for tokens without a slot too.
    """
    del upcast_operand
    if k_out is None:
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if not output_zeros:
        zeros_out = None
    elif zeros_out is None:
        zeros_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    op = "fused_qk_rope_reshape_and_cache"
    caches, scales = (key_cache, value_cache), (k_scale, v_scale)
    q_out = _rotate_heads(
        op,
        q,
        k,
        v,
        caches,
        slot_mapping,
        pos,
        cos,
        sin,
        scales if apply_scale else (None, None),
        is_neox,
        flash_layout,
        offs,
        q_out,
        k_out,
        zeros_out,
        rotary_dim,
        dim_offset,
    )
    outputs = (q_out, k_out, key_cache, value_cache)
    return outputs if zeros_out is None else (*outputs, zeros_out)


@uncompiled
def fused_qk_rope_cosine_cache_llama(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_scale: torch.Tensor | float | None,
    v_scale: torch.Tensor | float | None,
    is_neox: bool,
    flash_layout: bool,
    apply_scale: bool = True,
    offs: torch.Tensor | None = None,
    q_out: torch.Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate per-head queries and keys, and write keys and values, returning the queries alone.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    q, k, v, key_cache, value_cache, slot_mapping, pos, cos, sin, k_scale, v_scale, is_neox
        As in `fused_qk_rope_reshape_and_cache`, and so are the others.

    Returns
    -------
    q_out, key_cache, value_cache

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Differences from aiter: as for `fused_qk_rope_reshape_and_cache`; head dims need not
    be powers of two, and value caches may be the shuffled ones.
    """
    op = "fused_qk_rope_cosine_cache_llama"
    q_out = _rotate_heads(
        op,
        q,
        k,
        v,
        (key_cache, value_cache),
        slot_mapping,
        pos,
        cos,
        sin,
        (k_scale, v_scale) if apply_scale else (None, None),
        is_neox,
        flash_layout,
        offs,
        q_out,
        None,
        None,
        rotary_dim,
        dim_offset,
    )
    return q_out, key_cache, value_cache


def _rotate_heads(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scales: tuple[torch.Tensor | float | None, torch.Tensor | float | None],
    is_neox: bool,
    is_flash: bool,
    offsets: torch.Tensor | None,
    q_out: torch.Tensor | None,
    k_out: torch.Tensor | None,
    zeros: torch.Tensor | None,
    rotary_dim: int | None,
    dim_offset: int,
) -> torch.Tensor:
    """Check, launch, and return the queries; keys and values lie in pages by head."""
    device = q.device
    page_size = head_writers.check_rows(
        op, k, v, caches[0], slots, page_dim=1 if is_flash else 3, names=("k", "v")
    )
    key_heads, width = k.shape[1], k.shape[2]
    check_tensor(op, "q", q, shape=("T", "h", width), dtypes=ROWS, device=device)
    num_tokens, heads, _ = q.shape
    if k.shape[0] < num_tokens or k.device != device or not key_heads:
        raise LayoutError(
            f"{op}: k must be on {device} with a head or more and at least {num_tokens} tokens, as "
            f"q has, got {tuple(k.shape)} on {k.device}"
        )
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=positions,
        offsets=offsets,
        num_tokens=num_tokens,
        width=width,
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
        positions_name="pos",
    )
    if q_out is None:
        q_out = torch.empty(q.shape, dtype=q.dtype, device=device)
    if k_out is not None:
        check_tensor(op, "k_out", k_out, shape=tuple(k.shape), dtypes=ROWS, device=device)
    queries = queries_of(op, None, q, q_out, None, zeros=zeros)
    if zeros is not None:
        shape = (num_tokens, heads, width)
        check_tensor(op, "zeros_out", zeros, shape=shape, dtypes=ROWS, device=device)
    word = "auto" if caches[0].dtype == k.dtype else "fp8"
    stored = head_writers.as_bytes(op, k, word, *caches)
    codec = head_writers.codec_of(op, k, word, caches[0])
    if is_flash:
        fields = head_writers.flash_fields(op, k, v, stored, page_size, codec)
    else:
        is_shuffled = caches[1].ndim == 5
        fields = head_writers.lane_fields(
            op, k, v, stored, page_size, codec, is_shuffled=is_shuffled
        )
    factors: tuple[torch.Tensor | None, ...] = (None, None)
    if scales != (None, None):
        names = ("k_scale", "v_scale")
        factors = tuple(as_scale(op, *each, device) for each in zip(names, scales, strict=True))
    # Values are the part that is copied, keys the one that turns.
    spec = head_writers.spec_of(codec, arch_of(device), (fields[1], fields[0]), False)
    if factors[0] is None:
        spec = undivided(spec)
    head_dim = 2 if is_flash else 1
    a = head_writers.target_of(v, stored[1], None, factors[1], head_dim)
    b = head_writers.target_of(k, stored[0], None, factors[0], head_dim)
    keys = Keys(
        spec,
        a,
        b,
        slots,
        stored[0].shape[0] * page_size,
        key_heads,
        num_tokens,
        out=k_out,
        is_divided=factors[0] is not None and isinstance(codec, Cast),
    )
    rotate_and_write(op, turn, queries, keys)
    return q_out
