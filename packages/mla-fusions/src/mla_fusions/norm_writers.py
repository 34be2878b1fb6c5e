"""Norm, rotate, quantise and write keys in one launch, and norm the query in it too."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mla_core.arch import arch_of
from mla_core.cache import LatentCache
from mla_core.checks import check_tensor
from mla_core.dims import MLADims
from mla_core.errors import LayoutError
from mla_core.launch import launch
from mla_fusions import norms, rows
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS, SLOTS, check_dense
from mla_fusions.rotation import Keys, Rotation, arguments_of, rotation_of

_V4_BYTES = (torch.float8_e4m3fn, torch.uint8)
#: Constants of a launch without a query.
_NO_QUERY: dict[str, object] = {"Q_SHAPE": None, "QUANT": norms.NONE, "BIAS": 7, "IS_NATIVE": False}


@uncompiled
def fused_kv_norm_rope_write_kv_cache(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor | None,
    kv_weight: torch.Tensor,
    cache: LatentCache,
    slots: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    is_neox: bool,
    kv_epsilon: float = 1e-6,
    kv_out: torch.Tensor | None = None,
    k_pe_out: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    q_weight: torch.Tensor | None = None,
    q_epsilon: float | None = None,
    q_out_unquantized: torch.Tensor | None = None,
    q_out_quantized: torch.Tensor | None = None,
    q_out_scale: torch.Tensor | None = None,
    q_residual: torch.Tensor | None = None,
    q_res_out: torch.Tensor | None = None,
    group_size: int | None = None,
    transpose_scale: bool = False,
    gemma_norm: bool = False,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> None:
    """Norm latents, rotate keys and write both to a cache of any layout; also norm the query.

    All that a model does between its first projection, which makes ``q`` and ``kv_c`` with ``k_pe``
    side by side, and the query's second one.

    Parameters
    ----------
    kv_c : [T, c] or, without ``k_pe``, [T, c + r], bf16, fp16 or fp32, last dim contiguous
        Becomes ``kv_c / sqrt(mean(kv_c^2) + kv_epsilon) * kv_weight``.
    k_pe : [T, r], like ``kv_c``, or None
        Rotated.
    kv_weight : [c] or [c + r], bf16, fp16 or fp32
        With ``c + r`` elements ``k_pe`` is normed too, both together as one row (DeepSeek-V4).
    cache : LatentCache
        Its dims are ``c`` and ``r``.
    slots : [T], int64 or int32
        ``page * page_size + offset``, distinct; one outside the cache skips its token's key.
    positions, cos, sin, is_neox, offs, rotary_dim, dim_offset
        As in `fused_qk_rope_write_kv_cache`.
    kv_epsilon : float
        Added to the mean of the squares.
    kv_out : [T, c], bf16, fp16 or fp32, optional
        Gets the normed latents of all tokens, which prefill multiplies; may be ``kv_c``.
    k_pe_out : [T, r], bf16, fp16 or fp32, optional
        Gets the rotated keys of all tokens; may be ``k_pe``.
    q : [T, n], bf16, fp16 or fp32, optional
    q_weight, q_out_unquantized, q_out_quantized, q_out_scale, q_residual, q_res_out
        As in `fused_qk_rmsnorm_group_quant`; required or not as there.
    q_epsilon : float, optional
        By default ``kv_epsilon``.
    group_size : int, optional
        Elements of a query that share a scale: a power of two from 16 on, or None for the whole
        row. 32 for MXFP4, which None means too.
    transpose_scale : bool
        As in `fused_qk_rmsnorm_group_quant`.
    gemma_norm : bool
        Weights are stored as their difference from 1, of both norms.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Norm and rotation are fp32 and rounded once, to what is stored: a latent that is
    quantised is not rounded to bf16 before. Reads ``c + r`` elements, a slot, a position and a row
    of both tables for each token, and writes the live bytes of the cache, besides what the query
    moves.
    """
    op = "fused_kv_norm_rope_write_kv_cache"
    dims, device = cache.dims, kv_c.device
    rank, width = dims.kv_lora_rank, dims.qk_rope_head_dim
    if k_pe is None:
        shape: tuple[int | str, ...] = ("T", rank + width)
        check_tensor(op, "kv_c", kv_c, shape=shape, dtypes=ROWS, device=device)
        kv_c, k_pe = kv_c[:, :rank], kv_c[:, rank:]
    check_tensor(op, "kv_c", kv_c, shape=("T", rank), dtypes=ROWS, device=device)
    num_tokens = kv_c.shape[0]
    shape, dtypes = (num_tokens, width), (kv_c.dtype,)
    check_tensor(op, "k_pe", k_pe, shape=shape, dtypes=dtypes, device=device)
    check_tensor(op, "slots", slots, shape=(num_tokens,), dtypes=SLOTS, device=device)
    check_tensor(op, "kv_weight", kv_weight, shape=("c",), dtypes=ROWS, device=device)
    if kv_weight.shape[0] not in (rank, rank + width):
        raise LayoutError(
            f"{op}: kv_weight must have {rank} or {rank + width} elements, got {kv_weight.shape[0]}"
        )
    for name, out, columns in (("kv_out", kv_out, rank), ("k_pe_out", k_pe_out, width)):
        if out is not None:
            shape = (num_tokens, columns)
            check_tensor(op, name, out, shape=shape, dtypes=ROWS, device=device)
    if cache.device != device:
        raise LayoutError(f"{op}: cache must be on {device}, got {cache.device}")
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=positions,
        offsets=offs,
        num_tokens=num_tokens,
        width=width,
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
    )
    query = None
    if q is not None:
        query = _query_of(
            op, q, q_weight, kv_epsilon if q_epsilon is None else q_epsilon, q_out_unquantized,
            q_out_quantized, q_out_scale, q_residual, q_res_out, group_size, transpose_scale,
        )  # fmt: skip
        if q.shape[0] != num_tokens or q.device != device:
            raise LayoutError(
                f"{op}: q must have {num_tokens} tokens on {device} as kv_c does, got "
                f"{q.shape[0]} on {q.device}"
            )
    elif q_out_unquantized is not None or q_out_quantized is not None or q_res_out is not None:
        raise LayoutError(f"{op}: q must be given with outputs of it, got None")
    spec = rows.of_layout(cache.layout, dims, cache.page_size, arch_of(device))
    targets = [rows.target_of(cache, name, part) for name, part in (("kv_c", kv_c), ("k_pe", k_pe))]
    a, b = targets[0], None if spec.b is None else targets[1]
    # The kernel knows heads of keys, of which there is one here.
    turned = None if k_pe_out is None or b is None else k_pe_out[:, None]
    keys = Keys(spec, a, b, slots, cache.num_slots, 1, num_tokens, turned)
    _launch(op, keys, turn, kv_weight, kv_epsilon, kv_out, query, gemma_norm)


@uncompiled
def fused_kv_norm_rope_group_quant(
    kv: torch.Tensor,
    kv_weight: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    k_nope_scale_buff: torch.Tensor,
    k_rope_buff: torch.Tensor,
    is_neox: bool = False,
    quant_group_size: int = 64,
    scale_dtype: str = "e8m0",
) -> None:
    """Norm DeepSeek-V4's rows, rotate their tails, and write them to a cache of two buffers.

    Call-compatible with the op of the same name in ROCm/aiter.

    Parameters
    ----------
    kv : [T, 512] or [T, 1, 512], bf16, fp16 or fp32, last dim contiguous
        448 numbers that are quantised and 64 that turn.
    kv_weight : [512], bf16, fp16 or fp32
    positions : [>= T], int64 or int32
        Clamped into the tables.
    slot_mapping : [T], int64 or int32
        ``block * block_size + offset``, distinct; one outside the cache skips its token.
    cos, sin : [max_position, 32 or 64], bf16, fp16 or fp32
        May also be [max_position, 1, 1, columns].
    eps : float
        Added to the mean of the squares.
    k_nope_scale_buff : [num_blocks, block_size, 512], float8_e4m3fn or uint8
        Gets 448 numbers and 7 scales, each twice; the other 50 bytes stay. Core's layout ``v4_nm``,
        dense inside a block.
    k_rope_buff : [num_blocks, block_size, 64], bf16
        Dense inside a block.
    is_neox : bool
        As in `fused_qk_rope_write_kv_cache`.
    quant_group_size : int
        64.
    scale_dtype : str
        ``"e8m0"``.

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch of `fused_kv_norm_rope_write_kv_cache`. Differences from aiter: rounds once, from
    fp32; 64-bit offsets; wrong shapes raise.
    """
    op = "fused_kv_norm_rope_group_quant"
    if quant_group_size != 64 or scale_dtype != "e8m0":
        raise LayoutError(
            f"{op}: quant_group_size and scale_dtype must be 64 and 'e8m0', got {quant_group_size} "
            f"and {scale_dtype!r}"
        )
    device, dims = kv.device, MLADims(1, 448, 64, 448, 512, value_includes_rope=True)
    if kv.ndim == 3 and kv.shape[1] == 1:
        kv = kv[:, 0]
    shape: tuple[int | str, ...] = ("T", dims.latent_dim)
    check_tensor(op, "kv", kv, shape=shape, dtypes=ROWS, device=device)
    shape = (dims.latent_dim,)
    check_tensor(op, "kv_weight", kv_weight, shape=shape, dtypes=ROWS, device=device)
    shape = (kv.shape[0],)
    check_tensor(op, "slot_mapping", slot_mapping, shape=shape, dtypes=SLOTS, device=device)
    for name, tensor, shape, dtypes in (
        ("k_nope_scale_buff", k_nope_scale_buff, ("num_blocks", "block_size", 512), _V4_BYTES),
        ("k_rope_buff", k_rope_buff, (*k_nope_scale_buff.shape[:2], 64), (torch.bfloat16,)),
    ):
        check_tensor(op, name, tensor, shape=shape, dtypes=dtypes, device=device)
        check_dense(op, tensor, name)
    pages = k_nope_scale_buff.view(torch.uint8), k_rope_buff
    cache = LatentCache.bind("v4_nm", dims, k_rope_buff.shape[1], *pages)
    fused_kv_norm_rope_write_kv_cache(
        kv,
        None,
        kv_weight,
        cache,
        slot_mapping,
        positions,
        cos,
        sin,
        is_neox=is_neox,
        kv_epsilon=eps,
    )


def _query_of(
    op: str,
    q: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    codes: torch.Tensor | None,
    scales: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    group: int | None,
    transpose_scale: bool,
) -> norms.NormedQuery:
    """Check a query's norm.

    Raises
    ------
    LayoutError
    """
    if weight is None:
        raise LayoutError(f"{op}: q_weight must be given with q, got None")
    quant = norms.NONE
    if codes is not None and scales is not None:
        if group is None and codes.dtype in norms.FP4:
            group = 32
        quant = norms.quantiser_of(op, codes, group)
    elif codes is not None or scales is not None:
        raise LayoutError(
            f"{op}: q_out_quantized and q_out_scale must be given together, got one of them"
        )
    elif out is None:
        raise LayoutError(f"{op}: q_out_unquantized must be given without q_out_scale, got None")
    return norms.query_of(
        op, quant, group, codes, scales, q, weight, eps, out, residual_out, residual,
        transpose_scale,
    )  # fmt: skip


def _launch(
    op: str,
    keys: Keys,
    turn: Rotation,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor | None,
    query: norms.NormedQuery | None,
    is_gemma: bool,
) -> None:
    """Launch; everything was checked, and nothing waits."""
    kv_c, k_pe = keys.a.rows, keys.a.rows if keys.b is None else keys.b.rows
    num_tokens = kv_c.shape[0]
    rows.require_kernel(op, arch_of(kv_c.device))
    # Imported at the first launch: Triton costs a second and may be absent.
    from mla_fusions.kernels.norm_rope_rows import norm_rope_rows_kernel

    block_t, num_warps = keys.spec.schedule(num_tokens)
    writes_keys = keys.num_slots or normed is not None or keys.out is not None
    num_kv_programs = -(-num_tokens // block_t) if writes_keys else 0
    num_programs = num_kv_programs + (0 if query is None else num_tokens)
    if not num_programs:
        return
    arguments: tuple[object, ...] = (None,) * 7 + (0.0,) + (0,) * 7
    constants = _NO_QUERY
    if query is not None:
        arguments, constants = query.args, query.constants
        num_warps = max(num_warps, query.num_warps)
    pointers, numbers, strides = arguments_of(turn, keys)
    launch(
        norm_rope_rows_kernel,
        (num_programs,),
        *arguments,
        weight,
        normed,
        0 if normed is None else normed.stride(0),
        float(eps),
        *pointers,
        num_kv_programs,
        *numbers,
        turn.cos.stride(0),
        turn.sin.stride(0),
        *strides,
        **constants,
        NORM_WIDTH=weight.shape[0],
        IS_GEMMA=is_gemma,
        ROPE=turn.rope,
        IS_IN_PLACE=_share((kv_c, k_pe), (normed, keys.out)),
        **keys.spec.constants,
        BLOCK_T=block_t,
        num_warps=num_warps,
        # Products and sums round on their own: rotated rows have the same bits on every chip.
        enable_fp_fusion=False,
    )


def _share(read: Iterable[torch.Tensor], written: Iterable[torch.Tensor | None]) -> bool:
    """Say whether memory that is written may be memory that is read."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in read}
    return any(
        tensor is not None and tensor.untyped_storage().data_ptr() in storages for tensor in written
    )
