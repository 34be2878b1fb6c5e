"""`mla_reduce_v1`: merging the partials of a work list, with the call of ``aiter``."""

from __future__ import annotations

import torch

from mla_core import env
from mla_core.errors import LayoutError
from mla_core.reduce import reduce_tiles

_OP = "mla_reduce_v1"


def mla_reduce_v1(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor | None,
    reduce_partial_map: torch.Tensor,
    max_seqlen_q: int,
    num_kv_splits: int,
    final_output: torch.Tensor,
    final_lse: torch.Tensor | None = None,
) -> None:
    """Merge partials tile by tile into ``final_output`` (and ``final_lse``).

    Parameters
    ----------
    partial_output : [rows, (1,) H, DV], fp32
        Each row normalised by its own denominator.
    partial_lse : [rows, (1,) H (, 1)], fp32, natural log
    reduce_indptr : [tiles + 1], int32
        Tile ``t`` owns the entries ``reduce_indptr[t]:reduce_indptr[t + 1]`` of
        ``reduce_partial_map``.
    reduce_final_map : [tiles, 2], int32, optional
        First and one past the last query row of each tile. Without it all tiles have
        ``reduce_partial_map[1] - reduce_partial_map[0]`` rows.
    reduce_partial_map : [>= reduce_indptr[-1]], int32
        Partial row of the tile's first query row; -1 marks a tile that was not split.
    max_seqlen_q : int
        Bound on the query rows of a tile.
    num_kv_splits : int
        No effect: any number of partials per tile is merged.
    final_output : [T, H, DV], bf16, fp16 or fp32
    final_lse : [T, H], fp32, optional

    Raises
    ------
    LayoutError

    Notes
    -----
    Differences from aiter. A tile with a single partial is written too, so that its row and its
    log-sum-exp exist, as later versions of aiter do. Rows whose partials are all empty give 0 and
    -inf instead of +inf. Any H and DV are accepted. ``max_seqlen_q`` must be a real bound.
    """
    del num_kv_splits
    if partial_output.ndim not in (3, 4) or (
        partial_output.ndim == 4 and partial_output.shape[1] != 1
    ):
        raise LayoutError(
            f"{_OP}: partial_output must be [rows, H, DV] or [rows, 1, H, DV], "
            f"got {tuple(partial_output.shape)}"
        )
    rows, num_heads, value_dim = partial_output.shape[0], *partial_output.shape[-2:]
    accepted = ((rows, num_heads), (rows, num_heads, 1), (rows, 1, num_heads))
    if tuple(partial_lse.shape) not in (*accepted, (rows, 1, num_heads, 1)):
        raise LayoutError(
            f"{_OP}: partial_lse must be [rows={rows}, (1,) H={num_heads} (, 1)] like "
            f"partial_output, got {tuple(partial_lse.shape)}"
        )
    final_map = _final_map(reduce_indptr, reduce_final_map, reduce_partial_map)
    _check_tile_rows(final_map, max_seqlen_q)
    if final_lse is None:
        final_lse = final_output.new_empty(final_output.shape[:2], dtype=torch.float32)
    reduce_tiles(
        partial_output.reshape(rows, num_heads, value_dim),
        partial_lse.reshape(rows, num_heads),
        reduce_indptr,
        final_map,
        reduce_partial_map,
        max_tile_rows=max(max_seqlen_q, 1),
        out=final_output,
        lse=final_lse,
    )


def _final_map(
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor | None,
    reduce_partial_map: torch.Tensor,
) -> torch.Tensor:
    """Return [tiles, 2] query rows, (0, 0) for tiles whose rows stage one wrote itself."""
    num_tiles = reduce_indptr.numel() - 1
    if num_tiles < 0:
        raise LayoutError(f"{_OP}: reduce_indptr must be [tiles + 1], got shape (0,)")
    if reduce_final_map is not None and reduce_final_map.shape != (num_tiles, 2):
        raise LayoutError(
            f"{_OP}: reduce_final_map must be [tiles, 2]=({num_tiles}, 2) to match reduce_indptr, "
            f"got {tuple(reduce_final_map.shape)}"
        )
    num_partials = reduce_partial_map.numel()
    if not num_partials or not num_tiles:
        return reduce_indptr.new_zeros((num_tiles, 2))
    if reduce_final_map is None:
        if num_partials < 2:
            raise LayoutError(
                f"{_OP}: reduce_partial_map must have at least 2 entries without a "
                f"reduce_final_map, got {num_partials}; their distance is the tile length"
            )
        tile = torch.arange(num_tiles, dtype=torch.int32, device=reduce_indptr.device)
        first_row = tile * (reduce_partial_map[1] - reduce_partial_map[0])
        last_row = (tile + 1) * (reduce_partial_map[1] - reduce_partial_map[0])
        reduce_final_map = torch.stack((first_row, last_row), dim=1)
    first = reduce_partial_map[reduce_indptr[:-1].clamp(max=num_partials - 1).long()]
    is_split = (reduce_indptr.diff() > 0) & (first >= 0)
    return torch.where(is_split[:, None], reduce_final_map, 0)


def _check_tile_rows(final_map: torch.Tensor, max_seqlen_q: int) -> None:
    if final_map.numel() and (final_map.device.type == "cpu" or env.flag("MLA_CHECK")):
        longest = int((final_map[:, 1] - final_map[:, 0]).max())
        if longest > max_seqlen_q:
            raise LayoutError(
                f"{_OP}: max_seqlen_q must be at least the rows of the longest tile, {longest}, "
                f"got {max_seqlen_q}"
            )
