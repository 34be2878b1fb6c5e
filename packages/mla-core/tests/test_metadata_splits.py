"""The split-count heuristic against its published check values."""

from __future__ import annotations

import pytest
import torch

from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata import DeviceProfile, choose_num_kv_splits, split_indptr

GFX942 = DeviceProfile("gfx942", 304)
GFX950 = DeviceProfile("gfx950", 256)


def _choose(profile, batch_size, context, q_dtype, **options):
    return choose_num_kv_splits(
        batch_size,
        batch_size * context,
        num_heads=options.pop("num_heads", 16),
        q_len=options.pop("q_len", 1),
        q_dtype=q_dtype,
        profile=profile,
        **options,
    )


@pytest.mark.parametrize(
    ("profile", "batch_size", "context", "bf16", "fp8"),
    [
        (GFX942, 1, 21, 16, 1),
        (GFX942, 1, 1200, 16, 10),
        (GFX942, 1, 8192, 16, 16),
        (GFX942, 32, 1024, 9, 8),
        (GFX942, 64, 8192, 9, 9),
        (GFX942, 128, 8192, 7, 7),
        (GFX942, 256, 8192, 7, 7),
        (GFX950, 32, 1024, 8, 8),
        (GFX950, 64, 8192, 4, 4),
        (GFX950, 128, 8192, 2, 2),
        (GFX950, 256, 8192, 1, 1),
    ],
)
def test_check_values(profile, batch_size, context, bf16, fp8):
    assert _choose(profile, batch_size, context, "bf16") == bf16
    assert _choose(profile, batch_size, context, "fp8_e4m3fnuz") == fp8
    assert _choose(profile, batch_size, context, "fp8_e4m3") == fp8


def test_a_wish_is_kept_unless_fp8_splits_become_too_short():
    assert _choose(GFX942, 4, 1000, "bf16", num_kv_splits=32) == 32
    # 1000 tokens in pieces of at least 128: min(ceil(7.8), floor(999 / 128) + 1)
    assert _choose(GFX942, 4, 1000, "fp8_e4m3", num_kv_splits=32) == 8
    assert _choose(GFX942, 4, 1000, "fp8_e4m3", num_kv_splits=3) == 3
    # 129 tokens: ceil(129 / 64) = 3, then floor(|129 - 2| / 64) + 1 = 2
    assert _choose(GFX942, 1, 129, "fp8_e4m3", num_kv_splits=9, num_heads=24, q_len=2) == 2


def test_cost_of_a_split():
    """3 requests on 4 units: 4 splits fill the wave, worth it from 672.8 = 8 * 84.1 entries on."""
    profile = DeviceProfile("cpu", 4)
    assert _choose(profile, 3, 672, "bf16") == 1
    assert _choose(profile, 3, 673, "bf16") == 4


def test_empty_caches_have_one_split():
    assert _choose(GFX942, 8, 0, "fp8_e4m3") == 1


def test_occupancy_alone():
    # 19 requests on 304 units: 16 splits fill one wave exactly, whatever their length.
    assert _choose(GFX942, 19, 1, "bf16", ignore_total_kv=True) == 16
    assert _choose(GFX942, 38, 1, "fp8_e4m3", num_heads=3, ignore_total_kv=True) == 8
    assert _choose(GFX942, 19, 1, "bf16", ignore_total_kv=True, tile_groups=2) == 8


def test_split_indptr():
    indptr = split_indptr(3, 5, torch.device("cpu"))
    assert indptr.dtype == torch.int32
    assert indptr.tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"total_kv": -1}, "total_kv must be >= 0, got -1"),
        ({"num_kv_splits": 0}, "num_kv_splits must be None or >= 1, got 0"),
        ({"tile_groups": 0}, "tile_groups must be >= 1, got 0"),
    ],
)
def test_bad_input(change, message):
    good = {"batch_size": 1, "total_kv": 1, "num_heads": 16, "q_len": 1, "q_dtype": "bf16"}
    with pytest.raises(LayoutError, match=message):
        choose_num_kv_splits(**{**good, **change}, profile=GFX942)


def test_fp8_shape_without_shortest_split():
    with pytest.raises(UnsupportedProblemError, match=r"num_heads \* q_len must be one of 8, .*40"):
        _choose(GFX942, 1, 100, "fp8_e4m3", num_heads=40)


def test_profile_needs_a_compute_unit():
    with pytest.raises(LayoutError, match="num_cu must be >= 1, got 0"):
        DeviceProfile("gfx942", 0)
