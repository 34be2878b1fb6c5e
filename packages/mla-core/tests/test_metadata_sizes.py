"""Buffer bounds against values worked out by hand, and the tiling table behind them."""

from __future__ import annotations

import pytest

from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata import DeviceProfile, WorkList, decode_sizes, prefill_sizes
from mla_core.metadata.tiling import HeadTiling, Shape, buffer_tiles, head_tiling, workgroups_per_cu

GFX942 = DeviceProfile("gfx942", 304)
GFX950 = DeviceProfile("gfx950", 256)
GFX942_EXP = DeviceProfile("gfx942", 304, experimental=True)
GFX950_EXP = DeviceProfile("gfx950", 256, experimental=True)
FOUR_TOKENS = HeadTiling(1, 20, 80, one_tile=False)
FP8 = {"q_dtype": "fp8_e4m3fnuz", "kv_dtype": "fp8_e4m3fnuz"}


def _lengths(sizes):
    return sizes.num_workgroups, sizes.max_works, sizes.max_tiles, sizes.max_partials


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # one tile a request: (B + CU - 1) works, min(B + CU - 1, 2 (CU - 1)) partials
        (decode_sizes(32, 1, 16, profile=GFX942), (304, 335, 32, 335)),
        (decode_sizes(1000, 1, 16, profile=GFX942), (304, 1303, 1000, 606)),
        # fp8, 128 heads: one tile a token
        (decode_sizes(2, 2, 128, profile=GFX942, **FP8), (304, 610, 4, 610)),
        # bf16, 128 heads: folded by 8, sized by 16 rows
        (decode_sizes(1, 1, 128, profile=GFX942), (304, 2432, 8, 2432)),
        # sparse: tiles of one token, a row of the batch for every token
        (decode_sizes(4, 2, 16, profile=GFX942, is_sparse=True), (304, 311, 8, 311)),
        # v1.1
        (decode_sizes(4, 1, 16, profile=GFX942, fast_mode=False), (304, 1216, 4, 1216)),
        # v1.0: at most num_kv_splits pieces of a tile
        (
            decode_sizes(4, 1, 16, profile=GFX942, fast_mode=False, intra_batch_mode=True),
            (304, 128, 4, 128),
        ),
        # a split limit can only raise the number of partials: 700 + min(304, 700)
        (decode_sizes(700, 1, 16, profile=GFX942, max_split_per_batch=1), (304, 1003, 700, 1004)),
        (decode_sizes(4, 1, 16, profile=GFX942, max_split_per_batch=2), (304, 307, 4, 307)),
        # two workgroups on each unit
        (
            decode_sizes(1, 1, 64, profile=GFX950_EXP, **FP8),
            (512, 512, 1, 512),
        ),
        # a tiling of one's own: 3 requests of up to 9 / 4 tiles; cuts at 3 boundaries
        (
            decode_sizes(3, 9, 20, profile=DeviceProfile("any", 4), tiling=FOUR_TOKENS),
            (4, 12, 9, 6),
        ),
        (
            decode_sizes(1, 1, 20, profile=DeviceProfile("any", 4), tiling=FOUR_TOKENS),
            (4, 4, 1, 4),
        ),
        (
            decode_sizes(
                2, 3, 20, profile=DeviceProfile("any", 4), tiling=FOUR_TOKENS, is_sparse=True
            ),
            (4, 9, 6, 6),
        ),
        (prefill_sizes(1, 1, 600, profile=DeviceProfile("gfx950", 4)), (4, 12, 3, 12)),
        (prefill_sizes(9, 6, 256, profile=DeviceProfile("gfx950", 4)), (4, 60, 9, 2)),
    ],
)
def test_sizes(sizes, expected):
    assert _lengths(sizes) == expected


def test_shapes_name_every_buffer():
    sizes = decode_sizes(3, 1, 16, profile=DeviceProfile("gfx942", 4))
    buffers = WorkList.empty(sizes)
    assert {name: tuple(getattr(buffers, name).shape) for name in sizes.shapes} == {
        "work_indptr": (5,),
        "work_info": (6, 8),
        "reduce_indptr": (4,),
        "reduce_final_map": (3, 2),
        "reduce_partial_map": (6,),
    }


@pytest.mark.parametrize(
    ("heads", "q_len", "dtypes", "profile", "expected"),
    [
        (16, 1, ("bf16", "bf16"), GFX950, 1),
        (24, 5, ("bf16", "bf16"), GFX950, 2),  # 120 rows in tiles of 64
        (40, 2, ("bf16", "bf16"), GFX950, 2),  # 40 heads fill half of 64 rows: a tile a token
        (48, 3, ("bf16", "bf16"), GFX950, 3),
        (48, 1, ("bf16", "bf16"), GFX950, 3),  # 48 rows match no wider row: tiles of 16
        (32, 4, ("bf16", "bf16"), GFX950, 1),
        (128, 3, ("bf16", "bf16"), GFX950, 3),
        (80, 1, ("bf16", "bf16"), GFX950, 1),
        (32, 3, ("fp8_e4m3", "fp8_e4m3"), GFX950, 2),
        (32, 4, ("fp8_e4m3", "fp8_e4m3"), GFX950, 1),
        (32, 2, ("fp8_e4m3", "fp8_e4m3"), GFX950, 4),
        (64, 1, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942, 1),
        (64, 2, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942, 8),
        (64, 2, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942_EXP, 1),
        (128, 2, ("bf16", "fp8_e4m3"), GFX942, 16),
    ],
)
def test_buffer_tiles(heads, q_len, dtypes, profile, expected):
    assert buffer_tiles(Shape.of(heads, q_len, *dtypes, profile)) == expected


@pytest.mark.parametrize(
    ("heads", "q_len", "dtypes", "profile", "fold", "packed", "tiles"),
    [
        (16, 1, ("bf16", "bf16"), GFX942, 1, 128, {0: 0, 1: 1}),
        (16, 9, ("bf16", "bf16"), GFX942, 1, 128, {9: 2, 8: 1, 0: 0}),
        (16, -1, ("bf16", "bf16"), GFX942, 1, 128, {1: 1, 8: 1, 17: 3}),
        (48, 2, ("bf16", "bf16"), GFX942, 3, 128, {2: 1}),
        (128, 2, ("bf16", "bf16"), GFX942, 8, 128, {2: 1}),
        (128, 2, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942, 1, 128, {1: 1, 2: 2}),
        (64, 1, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942, 1, 128, {1: 1}),
        (64, 2, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942, 4, 128, {2: 1}),
        (32, 4, ("fp8_e4m3fnuz", "fp8_e4m3fnuz"), GFX942_EXP, 1, 128, {4: 1}),
        (8, 2, ("bf16", "bf16"), GFX942, 1, 128, {2: 1}),
        (8, 4, ("fp8_e4m3", "fp8_e4m3"), GFX950, 1, 128, {4: 1}),
        (20, 1, ("bf16", "bf16"), GFX950, 1, 128, {1: 1}),
        (24, 5, ("bf16", "bf16"), GFX950, 1, 64, {5: 2}),
        (48, 3, ("bf16", "bf16"), GFX950, 1, 64, {3: 3}),
        (32, 3, ("fp8_e4m3", "fp8_e4m3"), GFX950, 1, 64, {3: 2}),
        (56, 9, ("bf16", "bf16"), GFX950, 1, 128, {9: 3}),  # 3 + 3 + 3, not an empty fourth
        (5, 3, ("bf16", "fp8_e5m2"), DeviceProfile("sm90", 132), 1, 128, {3: 1}),
    ],
)
def test_head_tiling(heads, q_len, dtypes, profile, fold, packed, tiles):
    tiling = head_tiling("plan", heads, q_len, *dtypes, profile)
    assert (tiling.fold, tiling.num_heads, tiling.packed_rows) == (fold, heads // fold, packed)
    assert {n: tiling.num_tiles(n) for n in tiles} == tiles


@pytest.mark.parametrize(
    ("heads", "q_len", "dtypes", "profile"),
    [
        (8, 1, ("bf16", "bf16"), GFX942),
        (8, 2, ("fp8_e4m3", "fp8_e4m3"), GFX950),
        (20, 1, ("bf16", "fp8_e4m3"), GFX950),
    ],
)
def test_heads_that_cannot_fold(heads, q_len, dtypes, profile):
    with pytest.raises(UnsupportedProblemError, match=f"multiple of 16 .* num_heads={heads}"):
        head_tiling("plan", heads, q_len, *dtypes, profile)


def test_two_workgroups_per_unit_only_when_experimental():
    shape = (32, 2, "fp8_e4m3", "fp8_e4m3")
    assert workgroups_per_cu(Shape.of(*shape, GFX950_EXP)) == 2
    assert workgroups_per_cu(Shape.of(*shape, GFX950)) == 1
    assert workgroups_per_cu(Shape.of(32, 3, "fp8_e4m3", "fp8_e4m3", GFX950_EXP)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode_sizes(-1, 1, 16, profile=GFX942), "batch_size must be >= 0, got -1"),
        (lambda: decode_sizes(1, 0, 16, profile=GFX942), "max_seqlen_qo must be >= 1, got 0"),
        (lambda: decode_sizes(1, 1, 0, profile=GFX942), "num_heads must be >= 1, got 0"),
        (
            lambda: decode_sizes(1, 1, 16, num_kv_splits=0, profile=GFX942),
            "num_kv_splits must be >= 1",
        ),
        (lambda: prefill_sizes(1, 0, 1, profile=GFX942), "num_heads_k must be >= 1, got 0"),
        (lambda: prefill_sizes(1, 1, 0, profile=GFX942), "max_qlen must be >= 1, got 0"),
        (lambda: prefill_sizes(-1, 1, 1, profile=GFX942), "batch_size must be >= 0, got -1"),
        (
            lambda: prefill_sizes(1, 1, 1, qlen_granularity=0, profile=GFX942),
            "qlen_granularity must be >= 1, got 0",
        ),
        (lambda: head_tiling("plan", 0, 1, "bf16", "bf16", GFX942), "num_heads must be >= 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LayoutError, match=message):
        call()


@pytest.mark.parametrize(
    "tiling",
    [
        HeadTiling(1, 20, 80, one_tile=False),
        HeadTiling(1, 20, 64, one_tile=False),
        HeadTiling(1, 40, 64, one_tile=False),
        HeadTiling(3, 16, 128, one_tile=False),
        HeadTiling(1, 16, 128, one_tile=True),
    ],
)
def test_bounds_of_a_tiling_hold_for_every_shorter_request(tiling):
    for longest in range(20):
        tiles = [tiling.num_tiles(q_len) for q_len in range(longest + 1)]
        assert max(tiles) <= tiling.max_tiles(longest)
        tokens = [-(-q_len // count) for q_len, count in enumerate(tiles) if count]
        assert max(tokens, default=0) <= tiling.max_tile_tokens(longest)
