"""`decode_attention_fwd_grouped_rope`: decode with fused RoPE, called as aiter's Triton op is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.errors import LayoutError
from mla_core.ops import decode
from mla_core.plan import MAX_KV_SPLITS, AttentionOptions, plan_decode
from mla_core.rope import FusedRope

_OP = "decode_attention_fwd_grouped_rope"
_LAYOUT_OF = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOATS = tuple(_LAYOUT_OF)
_INTEGERS = (torch.int32, torch.int64)
#: Sections of a configuration and the launch parameters each may set.
_CONFIG_SECTIONS = (
    "fwd_grouped_kernel_stage1_rope",
    "fwd_grouped_kernel_stage1_rope_fp32",
    "fwd_kernel_stage2",
)
# aiter's launcher adds the last four to the dictionary it is given.
_CONFIG_KEYS = frozenset(
    {
        "BLOCK_N",
        "BLOCK_H",
        "num_stages",
        "num_warps",
        "waves_per_eu",
        "matrix_instr_nonkdim",
        "kpack",
        "BLOCK_C",
        "BLOCK_R",
        "BLOCK_DV",
        "NUM_KV_SPLITS",
    }
)


def decode_attention_fwd_grouped_rope(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    o: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    k_pe_tokens: torch.Tensor | None,
    kv_lora_rank: int,
    rotary_dim: int,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor | None,
    attn_logits: torch.Tensor | None,
    num_kv_splits: int,
    sm_scale: float,
    logit_cap: float | None = 0.0,
    use_rope: bool | None = False,
    is_neox_style: bool | None = False,
    config: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Attend one query token of each sequence to its cached rows and write the result into ``o``.

    Parameters
    ----------
    q : [B, H, c + r], bf16, fp16 or fp32, last dim contiguous
        Absorbed queries, latent part first; the rotary part not rotated yet with ``use_rope``.
    k_buffer : [num_tokens, 1, c + r], like ``q``
        Cached rows, ``stride(0)`` elements apart. With ``use_rope`` the rotary part of each
        sequence's last row is not rotated yet; those of the others are. Only read.
    v_buffer : [num_tokens, 1, c]
        Must be ``k_buffer[..., :c]``, the same memory.
    o : [B, H, c], bf16, fp16 or fp32
        Receives the output.
    kv_indptr : [B + 1], int32 or int64
        Prefix sums of cached tokens.
    kv_indices : [>= kv_indptr[B]], int32 or int64
        Row of ``k_buffer`` of each token; -1 hides one. int64 is converted, which allocates.
    k_pe_tokens : [B, r] or [B, 1, r], bf16, fp16 or fp32, or None
        Receives the rotated key of each sequence's last token; not touched without ``use_rope``.
    kv_lora_rank : int
        c; ``r`` is what is left of a row.
    rotary_dim : int
        Even, at most r; the other elements of the rotary part pass through.
    cos_sin_cache : [max_position, rotary_dim], bf16, fp16 or fp32, or None without ``use_rope``
        Cosines of each pair, then sines.
    positions : [B] or [B, 1], int32 or int64, or None without ``use_rope``
        Position of each query, which is that of its sequence's last token.
    attn_logits : scratch, or None
        Not used: a plan has its own partials.
    num_kv_splits : int
        Most pieces a sequence is cut into, 1..256.
    sm_scale : float
        Multiplies raw scores.
    logit_cap : float
        Above 0: scores become ``logit_cap * tanh(score / logit_cap)``.
    use_rope : bool
    is_neox_style : bool
        True pairs the halves of the rotated elements, False neighbours.
    config : mapping, optional
        Launch parameters as in aiter's JSON files. Checked; without effect, since tile sizes come
        from the tuning tables of the backend that runs.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    Differences from aiter: a sequence without rows gives an output (and a row of ``k_pe_tokens``)
    of 0, not NaN, and a position outside the table no read past it. Dims are checked rather than
    assumed: one key head, strides that are honoured or refused, a value buffer that is not the
    latent part of the keys is refused. Offsets are 64-bit. Any backend may run: the Triton kernels
    wherever they can, in their interpreter only when named.

    Runs on the current stream without a host sync. For many steps over batches of one shape, plan
    once with `mla_core.plan.plan_decode` instead.
    """
    del attn_logits
    dims = _dims(q, o, kv_lora_rank)
    cache = _bind(q, k_buffer, v_buffer, dims)
    _check_config(config)
    if not 1 <= num_kv_splits <= MAX_KV_SPLITS:
        raise LayoutError(
            f"{_OP}: num_kv_splits must be in 1..{MAX_KV_SPLITS}, got {num_kv_splits}"
        )
    batch_size, device = q.shape[0], q.device
    shape: tuple[int | str, ...] = (batch_size + 1,)
    check_tensor(_OP, "kv_indptr", kv_indptr, shape=shape, dtypes=_INTEGERS, device=device)
    shape = ("num_indices",)
    check_tensor(_OP, "kv_indices", kv_indices, shape=shape, dtypes=_INTEGERS, device=device)
    kv_indptr = kv_indptr.to(torch.int32)
    last_page_len = (kv_indptr.diff() > 0).int()
    kv = PagedKV.from_csr(cache, kv_indptr, kv_indices.to(torch.int32), last_page_len)
    rope = None
    if use_rope:
        rope = FusedRope(is_neox=bool(is_neox_style), rotary_dim=rotary_dim)
        if positions is not None and positions.ndim == 2 and positions.shape[1] == 1:
            positions = positions[:, 0].contiguous()
        if k_pe_tokens is not None and k_pe_tokens.ndim == 3 and k_pe_tokens.shape[1] == 1:
            k_pe_tokens = k_pe_tokens[:, 0]
    plan = plan_decode(
        dims,
        torch.arange(batch_size + 1, dtype=torch.int32, device=device),
        kv,
        q_dtype=q.dtype,
        options=AttentionOptions(softcap=max(logit_cap or 0.0, 0.0), rope=rope),
        num_kv_splits=num_kv_splits,
        total_q=batch_size,
        max_seqlen_q=1,
        max_seqlen_k=-(-kv_indices.numel() // max(batch_size, 1)),
    )
    decode(
        q[..., :kv_lora_rank],
        q[..., kv_lora_rank:],
        kv,
        plan,
        sm_scale=sm_scale,
        out=o,
        cos_sin_cache=cos_sin_cache if use_rope else None,
        positions=positions if use_rope else None,
        k_pe_tokens=k_pe_tokens if use_rope else None,
    )


def _dims(q: torch.Tensor, o: torch.Tensor, kv_lora_rank: int) -> MLADims:
    shape: tuple[int | str, ...] = ("B", "H", "kv_lora_rank + rope")
    check_tensor(_OP, "q", q, shape=shape, dtypes=_FLOATS, device=q.device)
    batch_size, num_heads, width = q.shape
    if not 0 < kv_lora_rank <= width:
        raise LayoutError(
            f"{_OP}: kv_lora_rank must be in 1..{width}, the width of q, got {kv_lora_rank}"
        )
    shape = (batch_size, num_heads, kv_lora_rank)
    check_tensor(_OP, "o", o, shape=shape, dtypes=_FLOATS, device=q.device)
    return MLADims(num_heads, kv_lora_rank, width - kv_lora_rank)


def _bind(
    q: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, dims: MLADims
) -> LatentCache:
    """Return the rows as a cache with pages of one token."""
    device = q.device
    shape: tuple[int | str, ...] = ("num_tokens", 1, dims.latent_dim)
    check_tensor(_OP, "k_buffer", k_buffer, shape=shape, dtypes=_FLOATS, device=device)
    shape = (k_buffer.shape[0], 1, dims.kv_lora_rank)
    dtypes = (k_buffer.dtype,)
    check_tensor(_OP, "v_buffer", v_buffer, shape=shape, dtypes=dtypes, device=device)
    is_latent = v_buffer.data_ptr() == k_buffer.data_ptr()
    if k_buffer.shape[0] > 1:
        is_latent = is_latent and v_buffer.stride(0) == k_buffer.stride(0)
    if not is_latent:
        raise LayoutError(
            f"{_OP}: v_buffer must be k_buffer[..., :{dims.kv_lora_rank}], the same memory, got "
            f"other memory with strides {v_buffer.stride()}; the latent of MLA is key and value"
        )
    return LatentCache.bind(_LAYOUT_OF[k_buffer.dtype], dims, 1, k_buffer)


def _check_config(config: Mapping[str, Mapping[str, int]] | None) -> None:
    if config is None:
        return
    if unknown := sorted(config.keys() - set(_CONFIG_SECTIONS)):
        raise LayoutError(
            f"{_OP}: config must have sections among {', '.join(_CONFIG_SECTIONS)}, "
            f"got {', '.join(unknown)}"
        )
    for section, values in config.items():
        if unknown := sorted(values.keys() - _CONFIG_KEYS):
            raise LayoutError(
                f"{_OP}: config[{section!r}] must have keys among "
                f"{', '.join(sorted(_CONFIG_KEYS))}, got {', '.join(unknown)}"
            )
