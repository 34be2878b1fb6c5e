"""Join both parts of queries and of keys, with and without RoPE, into tensors and not into a cache.

Under the names that engines call, for prefill, whose keys attention reads at once.
"""

from __future__ import annotations

import torch

from mla_core.arch import arch_of
from mla_core.checks import check_tensor
from mla_core.dtypes import dtype_name
from mla_core.errors import LayoutError
from mla_core.layouts.codecs import Cast
from mla_fusions import head_writers
from mla_fusions.compiling import uncompiled
from mla_fusions.latent_writers import ROWS
from mla_fusions.rotation import Keys, Rotation, queries_of, rotate_and_write, rotation_of

Pair = tuple[torch.Tensor, torch.Tensor]


@uncompiled
def fused_qk_cat(
    q1: torch.Tensor, q2: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join ``q1`` with ``q2`` and ``k1`` with ``k2`` along the last dimension.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    q1 : [T, h, d1], bf16, fp16 or fp32, last dim contiguous
    q2 : [T, h, d2], like ``q1``
    k1 : [T, kh, d1], bf16, fp16 or fp32, last dim contiguous
    k2 : [T, kh, d2], like ``k1``

    Returns
    -------
    q_out : [T, h, d1 + d2], like ``q1``
    k_out : [T, kh, d1 + d2], of the dtype of ``q1``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch, which reads and writes every element once: 2 * (h + kh) * (d1 + d2) elements for
    each token. Differences from aiter: any widths and numbers of heads, where it wants powers of
    two and a multiple of ``kh``; 64-bit offsets; no tokens are legal.
    """
    op = "fused_qk_cat"
    _check(op, ("q1", "q2", "k1", "k2"), (q1, q2), (k1, k2))
    # Without a rotation none of its tensors is read.
    return _join(op, (q1, q2), (k1, k2), Rotation(q1, q1, q1, None, None))


@uncompiled
def fused_qk_rope_cat(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_neox: bool,
    *,
    offs: torch.Tensor | None = None,
    rotary_dim: int | None = None,
    dim_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate ``q_pe`` and ``k_pe``, and join each behind its other part.

    Call-compatible with the Triton op of the same name in ROCm/aiter.

    Parameters
    ----------
    q_nope : [T, h, c], bf16, fp16 or fp32, last dim contiguous
    q_pe : [T, h, r], like ``q_nope``
    k_nope : [T, kh, c], bf16, fp16 or fp32, last dim contiguous
    k_pe : [T, kh, r], like ``k_nope``
    pos : [>= T], int64 or int32
        Clamped into the tables.
    cos, sin, is_neox, offs, rotary_dim, dim_offset
        As in `fused_qk_rope_write_kv_cache`.

    Returns
    -------
    q_out : [T, h, c + r], like ``q_nope``
    k_out : [T, kh, c + r], of the dtype of ``q_nope``

    Raises
    ------
    LayoutError, BackendUnavailableError, UnsupportedProblemError

    Notes
    -----
    One launch. Reads and writes every element once, besides a position and a row of both tables for
    each token. Differences from aiter: rotates in fp32 and rounds once; any widths and numbers of
    heads; 64-bit offsets; no tokens are legal.
    """
    op = "fused_qk_rope_cat"
    _check(op, ("q_nope", "q_pe", "k_nope", "k_pe"), (q_nope, q_pe), (k_nope, k_pe))
    turn = rotation_of(
        op,
        cos=cos,
        sin=sin,
        positions=pos,
        offsets=offs,
        num_tokens=q_pe.shape[0],
        width=q_pe.shape[2],
        is_neox=is_neox,
        rotary_dim=rotary_dim,
        dim_offset=dim_offset,
        positions_name="pos",
    )
    return _join(op, (q_nope, q_pe), (k_nope, k_pe), turn)


def _check(op: str, names: tuple[str, str, str, str], query: Pair, key: Pair) -> None:
    """Check parts of queries [T, h, ...] and of keys [T, kh, ...].

    Raises
    ------
    LayoutError
    """
    device = query[0].device
    check_tensor(op, names[0], query[0], shape=("T", "h", "c"), dtypes=ROWS, device=device)
    num_tokens, heads, rank = query[0].shape
    shape: tuple[int | str, ...] = (num_tokens, heads, "r")
    dtypes = (query[0].dtype,)
    check_tensor(op, names[1], query[1], shape=shape, dtypes=dtypes, device=device)
    width = query[1].shape[2]
    check_tensor(op, names[2], key[0], shape=(num_tokens, "kh", rank), dtypes=ROWS, device=device)
    shape, dtypes = (num_tokens, key[0].shape[1], width), (key[0].dtype,)
    check_tensor(op, names[3], key[1], shape=shape, dtypes=dtypes, device=device)
    for name, size in zip((*names[:2], names[2]), (rank, width, key[0].shape[1]), strict=True):
        if not size:
            what = "head" if name == names[2] else "column"
            raise LayoutError(f"{op}: {name} must have at least one {what}, got none")


def _join(op: str, query: Pair, key: Pair, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch; the keys go to where a cache with pages of one token would have them."""
    num_tokens, heads, rank = query[0].shape
    key_heads, width = key[1].shape[1:]
    q_out = query[0].new_empty(num_tokens, heads, rank + width)
    k_out = query[0].new_empty(num_tokens, key_heads, rank + width)
    codec = Cast(dtype_name(k_out.dtype))
    fields, targets = [], []
    for name, part, out in zip(("k1", "k2"), key, k_out.split([rank, width], -1), strict=True):
        fields.append(head_writers.field_of_rows(name, codec, out, 1, part.shape[2], token_dim=0))
        targets.append(head_writers.target_of(part, out, None, None, 1))
    spec = head_writers.spec_of(codec, arch_of(q_out.device), (fields[0], fields[1]), False)
    queries = queries_of(op, *query, q_out, None)
    keys = Keys(spec, targets[0], targets[1], None, num_tokens, key_heads, num_tokens)
    rotate_and_write(op, turn, queries, keys)
    return q_out, k_out
