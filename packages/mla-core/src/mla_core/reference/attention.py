"""Absorbed MLA attention of ragged queries over dense latents: masks, scores, softmax, values.

scores = sm_scale * (ql_nope @ kv_c.T + q_pe @ k_pe.T);  out = softmax(scores) @ kv_c

Every request is handled on its own and the whole score matrix is materialised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_core.errors import LayoutError
from mla_core.reference.rope import rope, split_cos_sin_cache

NEG_INF = float("-inf")


def visible_mask(
    q_len: int,
    kv_len: int,
    *,
    causal: bool = True,
    window: int | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    global_kv_len: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Say which cached token each query token of one request may see.

    The last query token sits at the last position of the (global) context: query ``i`` has the
    position ``p = global_kv_len - q_len + i`` and sees positions ``j <= p``, with a window only
    ``p - window < j <= p``. Without ``causal`` every query token sees the whole context.

    Parameters
    ----------
    q_len, kv_len : int
        Query tokens, and cached tokens held locally.
    causal : bool
    window : int, optional
        Positions seen, the query's own included; needs ``causal``.
    cp_world_size, cp_rank : int
        Round-robin context parallelism: local token ``j`` has the position
        ``j * cp_world_size + cp_rank``.
    global_kv_len : int, optional
        Context length over all ranks; required when ``cp_world_size > 1``.

    Returns
    -------
    mask : [q_len, kv_len], bool

    Raises
    ------
    LayoutError
        The options contradict each other.
    """
    _check_mask_options(causal, window, cp_world_size, cp_rank, global_kv_len)
    length = kv_len if global_kv_len is None else global_kv_len
    positions = torch.arange(kv_len, device=device) * cp_world_size + cp_rank
    query_positions = torch.arange(q_len, device=device)[:, None] + length - q_len
    mask = (positions < length).expand(q_len, kv_len)
    if causal:
        mask = mask & (positions <= query_positions)
    if window is not None:
        mask = mask & (positions > query_positions - window)
    return mask


def _check_mask_options(
    causal: bool,
    window: int | None,
    cp_world_size: int,
    cp_rank: int,
    global_kv_len: int | None,
) -> None:
    if window is not None and (window < 1 or not causal):
        raise LayoutError(
            f"visible_mask: window must be None or >= 1 with causal=True, got {window} with "
            f"causal={causal}; leave it out to see everything"
        )
    if not 0 <= cp_rank < cp_world_size:
        raise LayoutError(
            f"visible_mask: cp_rank must be in 0..{cp_world_size - 1}, got {cp_rank}; "
            "ranks count from 0"
        )
    if cp_world_size > 1 and global_kv_len is None:
        raise LayoutError(
            "visible_mask: global_kv_len must be given when cp_world_size > 1, got None; "
            "the causal mask is on global positions"
        )


def masked_softmax(
    scores: torch.Tensor, mask: torch.Tensor, sink: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last dimension of what ``mask`` lets through.

    Parameters
    ----------
    scores : [..., H, N] or [..., N], floating
        Already scaled; entries outside the mask are never read, NaN included.
    mask : broadcastable to ``scores``, bool
    sink : [H], optional
        Extra logit with a zero value: it enters the denominator and the lse, once.

    Returns
    -------
    probs : like ``scores``
        0 outside the mask, and in rows that see nothing.
    lse : ``scores.shape[:-1]``
        Natural logarithm; -inf for a row that sees nothing and has no sink.
    """
    scores = torch.where(mask, scores, NEG_INF)
    peak = scores.new_full(scores.shape[:-1], NEG_INF)
    if sink is not None:
        peak = torch.maximum(peak, sink.to(scores))
    if scores.shape[-1]:
        peak = torch.maximum(peak, scores.amax(dim=-1))
    shift = torch.where(peak == NEG_INF, 0.0, peak)
    weights = torch.exp(scores - shift[..., None])
    total = weights.sum(dim=-1)
    if sink is not None:
        total = total + torch.exp(sink.to(scores) - shift)
    probs = weights / torch.where(total == 0, 1.0, total)[..., None]
    return probs, torch.log(total) + shift


def cap_scores(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Squash scaled scores into (-softcap, softcap); 0 leaves them alone."""
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores


def decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: Sequence[torch.Tensor],
    k_pe: Sequence[torch.Tensor],
    qo_indptr: torch.Tensor | Sequence[int],
    *,
    sm_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
    q_scale: float | torch.Tensor = 1.0,
    kv_scale: float | torch.Tensor = 1.0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    global_kv_lens: Sequence[int] | torch.Tensor | None = None,
    value_includes_rope: bool = False,
    kv_ranges: Sequence[tuple[int, int]] | None = None,
    present: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query token to its request's latents; also absorbed prefill and MTP.

    Parameters
    ----------
    ql_nope : [total_q, num_heads, kv_lora_rank]
    q_pe : [total_q, num_heads, qk_rope_head_dim]
        Rotated already; the width may be 0.
    kv_c, k_pe : one [kv_len, kv_lora_rank] and one [kv_len, qk_rope_head_dim] for each request
        ``k_pe`` is rotated already.
    qo_indptr : [batch_size + 1]
    sm_scale : float
    causal, window, cp_world_size, cp_rank :
        See `visible_mask`.
    softcap : float
        When positive, scaled scores become ``softcap * tanh(score / softcap)``.
    sink : [num_heads], optional
        See `masked_softmax`.
    q_scale, kv_scale : float or tensor of one element
        Dequantisation factors of the queries and of the latents (keys and values alike).
    global_kv_lens : [batch_size], optional
        Context lengths over all context-parallel ranks.
    value_includes_rope : bool
        Values are ``kv_c`` followed by ``k_pe`` instead of ``kv_c`` alone.
    kv_ranges : one (begin, end) of local tokens for each request, optional
        Attend only to these; positions stay those of the whole request.
    present : one [kv_len] bool for each request, optional
        Tokens that exist; the others keep their position and their rows are never read.
    dtype : torch.dtype
        Everything is converted to it first.

    Returns
    -------
    out : [total_q, num_heads, value_dim]
    lse : [total_q, num_heads]
        Natural logarithm. A row that sees nothing has ``out`` 0 and ``lse`` -inf.
    """
    batch_size = len(kv_c)
    starts = _starts("decode", qo_indptr, ql_nope.shape[0], batch_size)
    query = torch.cat([ql_nope.to(dtype), q_pe.to(dtype)], dim=-1) * q_scale
    rank, rope_dim = ql_nope.shape[-1], q_pe.shape[-1]
    value_dim = rank + rope_dim if value_includes_rope else rank
    out = query.new_zeros((*query.shape[:2], value_dim))
    lse = query.new_full(query.shape[:2], NEG_INF)
    for b in range(batch_size):
        q = query[starts[b] : starts[b + 1]]
        key = torch.cat([kv_c[b].to(dtype), k_pe[b].to(dtype)], dim=-1) * kv_scale
        begin, end = (0, key.shape[0]) if kv_ranges is None else kv_ranges[b]
        mask = visible_mask(
            q.shape[0],
            key.shape[0],
            causal=causal,
            window=window,
            cp_world_size=cp_world_size,
            cp_rank=cp_rank,
            global_kv_len=None if global_kv_lens is None else int(global_kv_lens[b]),
            device=key.device,
        )
        if present is not None:
            mask, key = mask & present[b], torch.where(present[b][:, None], key, 0.0)
        mask, key = mask[:, begin:end], key[begin:end]
        scores = cap_scores(torch.einsum("qhd,nd->qhn", q, key) * sm_scale, softcap)
        probs, row_lse = masked_softmax(scores, mask[:, None, :], sink)
        out[starts[b] : starts[b + 1]] = torch.einsum("qhn,nd->qhd", probs, key[:, :value_dim])
        lse[starts[b] : starts[b + 1]] = row_lse
    return out, lse


def decode_partials(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: Sequence[torch.Tensor],
    k_pe: Sequence[torch.Tensor],
    qo_indptr: torch.Tensor | Sequence[int],
    *,
    num_kv_splits: int,
    sm_scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    value_includes_rope: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each request's tokens into equal pieces and attend to each piece alone.

    A piece has ``ceil(kv_len / num_kv_splits)`` tokens, so the last ones may be empty. Without
    sinks, which belong in the merge; other parameters as in `decode`.

    Returns
    -------
    partial_out : [num_kv_splits, total_q, num_heads, value_dim]
    partial_lse : [num_kv_splits, total_q, num_heads]
        Natural logarithm; every partial is normalised by its own denominator.
    """
    pieces = [-(-latents.shape[0] // num_kv_splits) for latents in kv_c]
    partials = [
        decode(
            ql_nope,
            q_pe,
            kv_c,
            k_pe,
            qo_indptr,
            sm_scale=sm_scale,
            causal=causal,
            window=window,
            softcap=softcap,
            value_includes_rope=value_includes_rope,
            kv_ranges=[(split * piece, (split + 1) * piece) for piece in pieces],
            dtype=dtype,
        )
        for split in range(num_kv_splits)
    ]
    outs, lses = zip(*partials, strict=True)
    return torch.stack(outs), torch.stack(lses)


def decode_rope(
    query: torch.Tensor,
    latents: Sequence[torch.Tensor],
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    kv_lora_rank: int,
    sm_scale: float,
    is_neox: bool,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode one token of each request, rotating it and its newest key on the way.

    Parameters
    ----------
    query : [batch_size, num_heads, kv_lora_rank + rope]
        The rotary part not rotated yet.
    latents : one [kv_len, kv_lora_rank + rope] for each request, kv_len >= 1
        Rows rotated already, except the last.
    cos_sin_cache : [max_position, rotary_dim]
        Cosines of each pair, then sines; ``rotary_dim`` may be less than the rotary width.
    positions : [batch_size], integer
        Position of the query, which is that of the last row.

    Returns
    -------
    out : [batch_size, num_heads, kv_lora_rank]
    lse : [batch_size, num_heads]
    k_pe_tokens : [batch_size, rope]
        The rotated key of each request's last token; the cache itself is not changed.
    """
    cos, sin = split_cos_sin_cache(cos_sin_cache)
    rotary_dim = cos_sin_cache.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return rope(x, positions, cos, sin, is_neox=is_neox, rotary_dim=rotary_dim, dtype=dtype)

    q_pe = rotate(query[..., kv_lora_rank:])
    k_pe_tokens = rotate(torch.stack([rows[-1, kv_lora_rank:] for rows in latents]))
    k_pe = [
        torch.cat([rows[:-1, kv_lora_rank:].to(dtype), newest[None]])
        for rows, newest in zip(latents, k_pe_tokens, strict=True)
    ]
    out, lse = decode(
        query[..., :kv_lora_rank],
        q_pe,
        [rows[:, :kv_lora_rank] for rows in latents],
        k_pe,
        range(query.shape[0] + 1),
        sm_scale=sm_scale,
        softcap=softcap,
        dtype=dtype,
    )
    return out, lse, k_pe_tokens


def _starts(
    op: str, indptr: torch.Tensor | Sequence[int], total: int, batch_size: int
) -> list[int]:
    starts = [int(x) for x in indptr]
    if len(starts) != batch_size + 1 or starts[0] != 0 or starts[-1] != total:
        raise LayoutError(
            f"{op}: indptr must have {batch_size + 1} entries from 0 to {total}, got "
            f"{len(starts)} entries; pass the prefix sums of the lengths"
        )
    return starts
