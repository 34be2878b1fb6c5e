"""Equal splits of every request, dealt out evenly: a fixed grid in the form of a work list.

Each request is cut into the same number of pieces, whatever its length, and the pieces, in order,
are spread over the workgroups. Load is balanced only when lengths are; in return the cuts of a
request depend on its own length alone.

The schedule is that of the "v1.0" (intra batch) metadata of AITER (ROCm/aiter), except that a
request in one piece counts no partial, as in all other planners.
"""

from __future__ import annotations

import torch

from mla_core.errors import LayoutError
from mla_core.metadata.profile import DeviceProfile, ceil_div
from mla_core.metadata.ragged import check_one_kv_head, ragged
from mla_core.metadata.tiles import Cuts, assemble, ceil_div_tensor, dense_tiles
from mla_core.metadata.tiling import FIXED_SPLITS, head_tiling
from mla_core.metadata.worklist import WorkList

#: Shortest piece worth a workgroup where the number of splits is not fixed, in tokens.
MIN_SPLIT_TOKENS = 196
#: A last piece of no more tokens than this joins the piece before it.
MAX_TAIL = 4


def plan_v1_0(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    num_heads: int,
    profile: DeviceProfile,
    num_heads_k: int = 1,
    is_causal: bool = True,
    page_size: int = 1,
    kv_granularity: int = 16,
    max_seqlen_qo: int = -1,
    uni_seqlen_qo: int = -1,
    max_split_per_batch: int = -1,
    num_kv_splits: int = 32,
    q_dtype: str = "bf16",
    kv_dtype: str = "bf16",
) -> WorkList:
    """Plan a decode step with equal splits per request, on the host.

    Parameters
    ----------
    max_split_per_batch : int
        When >= 1, no more pieces per request than this.
    num_kv_splits : int
        Never more pieces per tile than this, whatever the batch; what `decode_sizes` assumed.

    The other parameters, the result and the errors are those of `plan_v1_2`.
    """
    check_one_kv_head("plan_v1_0", num_heads_k)
    if num_kv_splits < 1:
        raise LayoutError(f"plan_v1_0: num_kv_splits must be >= 1, got {num_kv_splits}")
    batch = ragged(
        "plan_v1_0",
        qo_indptr,
        kv_indptr,
        kv_last_page_len,
        page_size=page_size,
        kv_granularity=kv_granularity,
        uni_seqlen_qo=uni_seqlen_qo,
    )
    tiling = head_tiling("plan_v1_0", num_heads, max_seqlen_qo, q_dtype, kv_dtype, profile)
    counts = batch.q_len if tiling.one_token else batch.q_len.clamp(max=1)
    tiles = dense_tiles(batch, counts.tolist(), tiling.fold, trims=is_causal)
    num_tiles = tiles.qo_start.numel()

    most = num_kv_splits
    if max_split_per_batch >= 1:
        most = min(most, max_split_per_batch)
    if profile.arch in FIXED_SPLITS:
        splits = torch.full_like(tiles.visible, min(FIXED_SPLITS[profile.arch], num_kv_splits))
    else:
        most = min(most, ceil_div(profile.num_cu, max(num_tiles, 1)))
        splits = (tiles.kv_pages * page_size // MIN_SPLIT_TOKENS).clamp(1, most)
    piece = (ceil_div_tensor(tiles.blocks, splits) * kv_granularity).clamp(min=1)
    pieces = ceil_div_tensor(tiles.visible, piece).clamp(min=1)
    tail = (tiles.visible - (pieces - 1) * piece) * page_size
    has_tail = (pieces > 1) & (tail <= MAX_TAIL)
    num_cuts = torch.where(has_tail, pieces - 2, pieces - 1)

    cut_tile = torch.arange(num_tiles).repeat_interleave(num_cuts)
    nth = torch.arange(cut_tile.numel()) - (num_cuts.cumsum(0) - num_cuts)[cut_tile]
    cuts = Cuts(cut_tile, (nth + 1) * piece[cut_tile])
    share, extra = divmod(num_tiles + cut_tile.numel(), profile.num_cu)
    workgroup = torch.arange(profile.num_cu + 1)
    return assemble(tiles, cuts, workgroup * share + workgroup.clamp(max=extra))
