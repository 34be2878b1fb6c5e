"""Integer, lane and LDS instructions against facts that owe nothing to either core.

Every test runs on both cores; so do those of test_ops_floats.py, test_ops_conversions.py and
test_ops_matrices.py.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
directed = importlib.import_module("operation_cases.machine")
sys.path.remove(str(HERE))
machine = directed.machine
LANE, U32 = (
    directed.LANE,
    directed.U32,
)


# --- arithmetic with carries, fields and counts


def test_carry_chain_adds_and_subtracts_128_bits(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 32, (2, 4, 64), dtype=np.uint64)
    a[1, :8], b[1, :8] = 0xFFFFFFFF, 0
    a[0, :8], b[0, :8] = 0xFFFFFFFF, 1
    m = machine()
    for k in range(4):
        m.v(10 + k, a[k].astype(U32)).v(20 + k, b[k].astype(U32))
    lines = ["v_add_co_u32_e32 v30, vcc, v10, v20"]
    lines += [f"v_addc_co_u32_e32 v{30 + k}, vcc, v{10 + k}, v{20 + k}, vcc" for k in (1, 2, 3)]
    lines += ["v_sub_co_u32_e32 v40, vcc, v10, v20"]
    lines += [f"v_subb_co_u32_e32 v{40 + k}, vcc, v{10 + k}, v{20 + k}, vcc" for k in (1, 2, 3)]
    m.run(*lines)
    for lane in range(64):
        x, y = (sum(int(n[k, lane]) << 32 * k for k in range(4)) for n in (a, b))
        for first, want in ((30, x + y), (40, x - y)):
            got = sum(int(m.bits(first + k)[lane]) << 32 * k for k in range(4))
            assert got == want % (1 << 128)


def test_scalar_carries_overflow_and_condition(machine):
    m = machine().s(30, 0xFFFFFFFF).s(31, 1).s(32, 0x7FFFFFFF)
    m.run(
        "s_add_u32 s40, s30, s31",  # carry
        "s_addc_u32 s41, s31, s31",
        "s_cselect_b32 s42, 5, 6",  # no carry from that
        "s_add_i32 s43, s32, s31",  # signed overflow
        "s_cselect_b32 s44, 5, 6",
        "s_sub_u32 s45, s31, s30",  # borrow
        "s_subb_u32 s46, s30, s31",
        "s_min_i32 s47, s30, s31",
        "s_cselect_b32 s48, 5, 6",
        "s_absdiff_i32 s49, s31, s30",
        "s_mul_hi_u32 s50, s30, s30",
        "s_mul_hi_i32 s51, s30, s32",
    )
    names = range(40, 52)
    want = [0, 3, 6, 0x80000000, 5, 2, 0xFFFFFFFD, 0xFFFFFFFF, 5, 2, 0xFFFFFFFE, 0xFFFFFFFF]
    assert [int(m.after.sgpr[k]) for k in names] == want


def test_bit_fields_at_their_edges(machine):
    m = machine().v(10, U32(0x87654321))
    offset = LANE.astype(U32) % 40
    width = (LANE.astype(U32) * 7) % 36
    m.v(11, offset).v(12, width).run("v_bfe_u32 v20, v10, v11, v12", "v_bfe_i32 v21, v10, v11, v12")
    for lane in range(64):
        low, size = int(offset[lane]) & 31, int(width[lane]) & 31
        field = 0x87654321 >> low & ((1 << size) - 1)
        assert m.bits(20)[lane] == field
        # The value is extended by its sign before the field is cut out.
        extended = (0x87654321 - (1 << 32)) >> low & ((1 << size) - 1)
        want = extended - (1 << size) if size and extended >> (size - 1) else extended
        assert m.bits(21)[lane] == want % (1 << 32)


def test_scalar_bit_fields_take_width_beyond_the_register(machine):
    m = machine().s(30, 0x80000001).s(31, 32 << 16).s(32, 40 << 16 | 4).s(33, 0)
    m.run(
        "s_bfe_u32 s40, s30, s31",
        "s_bfe_i32 s41, s30, s31",
        "s_bfe_u32 s42, s30, s32",
        "s_bfe_i32 s43, s30, s32",
        "s_bfe_u32 s44, s30, s33",
        "s_cselect_b32 s45, 1, 2",
    )
    want = [0x80000001, 0x80000001, 0x08000000, 0xF8000000, 0, 2]
    assert [int(m.after.sgpr[k]) for k in range(40, 46)] == want


def test_counts_and_first_bits(machine):
    values = np.resize(np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00010000, 0x7FFFFFFF], U32), 64)
    m = (
        machine()
        .v(10, values)
        .run(
            "v_ffbh_u32_e32 v20, v10",
            "v_ffbl_b32_e32 v21, v10",
            "v_ffbh_i32_e32 v22, v10",
            "v_bcnt_u32_b32 v23, v10, 7",
            "v_bfrev_b32_e32 v24, v10",
        )
    )
    none = 0xFFFFFFFF
    np.testing.assert_array_equal(m.bits(20)[:6], [none, 31, 0, 0, 15, 1])
    np.testing.assert_array_equal(m.bits(21)[:6], [none, 0, 31, 0, 16, 0])
    np.testing.assert_array_equal(m.bits(22)[:6], [none, 31, 1, none, 15, 1])
    np.testing.assert_array_equal(m.bits(23)[:6], [7, 8, 8, 39, 8, 38])
    np.testing.assert_array_equal(m.bits(24)[:6], [0, 1 << 31, 1, none, 1 << 15, none - 1])


def test_lane_counts_below(machine):
    mask = 0x0F0F_1234_8000_0001
    m = machine().s(30, mask & 0xFFFFFFFF).s(31, mask >> 32)
    m.run("v_mbcnt_lo_u32_b32 v20, s30, 0", "v_mbcnt_hi_u32_b32 v21, s31, v20")
    want = [(mask & ((1 << lane) - 1)).bit_count() for lane in range(64)]
    np.testing.assert_array_equal(m.bits(21), want)


def test_integers_saturate_with_clamp(machine):
    m = machine().v(10, U32(0xFFFFFFF0)).v(11, U32(0x100)).v(12, U32(0x7FFFFFF0))
    m.v(13, U32(0xFFF0)).v(14, U32(0x7FF0)).run(
        "v_add_u32_e64 v20, v10, v11 clamp",
        "v_sub_u32_e64 v21, v11, v10 clamp",
        "v_add_i32 v22, v12, v11 clamp",
        "v_add_u16_e64 v23, v13, v11 clamp",
        "v_pk_add_i16 v24, v14, v11 clamp",
        "v_mad_i32_i24 v25, v11, v11, v12 clamp",
        "v_sub_i32 v26, v12, v10",
    )
    got = [int(m.bits(k)[0]) for k in range(20, 27)]
    assert got == [0xFFFFFFFF, 0, 0x7FFFFFFF, 0xFFFF, 0x7FFF, 0x7FFFFFFF, 0x80000000]


def test_byte_permutation_menu(machine):
    m = machine().v(10, U32(0x8F6E5D4C)).v(11, U32(0x3B2A1908))
    want = {
        **{k: 0x3B2A1908 >> 8 * k & 255 for k in range(4)},
        **{k + 4: 0x8F6E5D4C >> 8 * k & 255 for k in range(4)},
        **{8: 0x00, 9: 0x00, 10: 0x00, 11: 0xFF, 12: 0, 13: 255, 14: 255, 255: 255},
    }
    selectors = np.resize(np.array(list(want), U32), 64)
    m.v(12, selectors).run("v_perm_b32 v20, v10, v11, v12")
    np.testing.assert_array_equal(m.bits(20) & 255, [want[int(k)] for k in selectors])


def test_wide_multiply_add(machine, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 1 << 32, (2, 64), dtype=np.uint64).astype(U32)
    c = rng.integers(0, 1 << 64, 64, dtype=np.uint64)
    m = machine().v(10, a).v(11, b).v(12, c)
    m.run("v_mad_u64_u32 v[20:21], s[40:41], v10, v11, v[12:13]")
    exact = [int(x) * int(y) + int(z) for x, y, z in zip(a, b, c, strict=True)]
    got = m.bits(20).astype(object) + m.bits(21).astype(object) * (1 << 32)
    assert list(got) == [value % (1 << 64) for value in exact]
    assert m.pair(40) == sum((value >> 64) << lane for lane, value in enumerate(exact))


# --- lanes


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[1,0,3,2]", lambda lane: lane ^ 1),
        ("row_shl:1", lambda lane: lane + 1 if lane % 16 < 15 else None),
        ("row_shr:4", lambda lane: lane - 4 if lane % 16 >= 4 else None),
        ("row_ror:3", lambda lane: lane // 16 * 16 + (lane - 3) % 16),
        ("row_mirror", lambda lane: lane ^ 15),
        ("row_half_mirror", lambda lane: lane ^ 7),
        ("row_bcast:15", lambda lane: lane // 16 * 16 - 1 if lane >= 16 else None),
        ("row_bcast:31", lambda lane: 31 if lane >= 32 else None),
        ("row_newbcast:5", lambda lane: lane // 16 * 16 + 5),
        ("wave_shr:1", lambda lane: lane - 1 if lane else None),
        ("wave_rol:1", lambda lane: (lane + 1) % 64),
    ],
)
def test_dpp_patterns(machine, control, source):
    data = (LANE * 11 + 100).astype(U32)
    m = machine().v(10, data).v(20, U32(7)).v(21, U32(7)).v(22, U32(7))
    m.run(
        f"v_mov_b32_dpp v20, v10 {control} row_mask:0xf bank_mask:0xf",
        f"v_mov_b32_dpp v21, v10 {control} row_mask:0xf bank_mask:0xf bound_ctrl:0",
        f"v_mov_b32_dpp v22, v10 {control} row_mask:0x2 bank_mask:0x8",
    )
    found = [source(int(lane)) for lane in LANE]
    want = [7 if lane is None else data[lane] for lane in found]
    np.testing.assert_array_equal(m.bits(20), want)
    np.testing.assert_array_equal(m.bits(21), [0 if k is None else data[k] for k in found])
    masked = (LANE // 16 == 1) & (LANE // 4 % 4 == 3)
    np.testing.assert_array_equal(m.bits(22), np.where(masked, want, 7))


def test_swizzle_and_permutes(machine, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 1 << 32, 64, np.uint32)
    target = rng.permutation(64).astype(U32)
    m = (
        machine()
        .v(10, data)
        .v(11, target * 4)
        .run(
            "ds_swizzle_b32 v20, v10 offset:swizzle(SWAP,16)",
            "ds_swizzle_b32 v21, v10 offset:swizzle(QUAD_PERM,3,2,1,0)",
            "ds_swizzle_b32 v22, v10 offset:swizzle(BROADCAST,8,3)",
            "ds_bpermute_b32 v23, v11, v10",
            "ds_permute_b32 v24, v11, v10",
            "ds_bpermute_b32 v25, v11, v10 offset:8",
            "s_waitcnt lgkmcnt(0)",
        )
    )
    np.testing.assert_array_equal(m.bits(20), data[LANE ^ 16])
    np.testing.assert_array_equal(m.bits(21), data[LANE ^ 3])
    np.testing.assert_array_equal(m.bits(22), data[LANE // 8 * 8 + 3])
    np.testing.assert_array_equal(m.bits(23), data[target])
    pushed = np.zeros(64, U32)
    pushed[target] = data
    np.testing.assert_array_equal(m.bits(24), pushed)
    np.testing.assert_array_equal(m.bits(25), data[(target + 2) % 64])


def test_lanes_to_scalars_and_swaps(machine):
    data = (LANE + 5).astype(U32)
    m = machine("gfx950").v(10, data).v(11, data + U32(1000)).v(12, data).v(13, data + U32(1000))
    m.exec(0xFF00)
    m.s(42, 77)
    m.run(
        "v_readfirstlane_b32 s40, v10",
        "v_readlane_b32 s41, v10, 63",
        "v_writelane_b32 v10, s42, 2",
        "v_permlane32_swap_b32 v11, v12",
        "v_permlane16_swap_b32 v13, v10",
    )
    assert [int(m.after.sgpr[k]) for k in (40, 41)] == [13, 68]
    # The upper half of the first register changes places with the lower half of the second.
    np.testing.assert_array_equal(m.bits(11), np.where(LANE < 32, data + 1000, data - 32))
    np.testing.assert_array_equal(m.bits(12), np.where(LANE < 32, data + 1032, data))
    written = np.where(LANE == 2, 77, data)
    odd = LANE // 16 % 2 == 1
    np.testing.assert_array_equal(m.bits(13), np.where(odd, written[LANE - 16], data + 1000))
    below = np.where(odd, written, (data + 1000)[(LANE + 16) % 64])
    np.testing.assert_array_equal(m.bits(10), below)


# --- LDS


def test_lds_atomics_return_what_was_there(machine):
    m = machine()
    m.state.lds = np.zeros(4096, np.uint8)
    m.v(10, (LANE % 4 * 4).astype(U32)).v(11, np.ones(64, U32)).v(12, (LANE + 1).astype(U32))
    m.run(
        "ds_add_rtn_u32 v20, v10, v11",
        "ds_max_rtn_u32 v21, v10, v12 offset:64",
        "ds_inc_rtn_u32 v22, v10, v11 offset:128",
        "s_waitcnt lgkmcnt(0)",
        "ds_read_b32 v23, v10",
        "ds_read_b32 v24, v10 offset:64",
        "s_waitcnt lgkmcnt(0)",
    )
    # Lanes go one after another.
    np.testing.assert_array_equal(m.bits(20), LANE // 4)
    np.testing.assert_array_equal(m.bits(21), np.where(LANE < 4, 0, LANE - 3))
    np.testing.assert_array_equal(m.bits(22), LANE // 4 % 2)
    np.testing.assert_array_equal(m.bits(23), 16)
    np.testing.assert_array_equal(m.bits(24), 61 + LANE % 4)


@pytest.mark.parametrize(("bits", "rows"), [(16, 4), (8, 8), (4, 16)])
def test_transposing_reads_give_columns(machine, seed, bits, rows):
    """Each group of 16 lanes reads a tile by rows; lane i gets column i of it."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 1 << bits, (4, rows, 16))
    m = machine("gfx950")
    m.state.lds = np.zeros(4096, np.uint8)
    per_lane = 64 // bits
    for group in range(4):
        flat = tiles[group].reshape(16, per_lane)
        for lane in range(16):
            word = sum(int(value) << bits * k for k, value in enumerate(flat[lane]))
            start = 8 * (16 * group + lane)
            m.state.lds[start : start + 8] = np.frombuffer(word.to_bytes(8, "little"), np.uint8)
    m.v(10, (LANE * 8).astype(U32))
    m.run(f"ds_read_b64_tr_b{bits} v[20:21], v10", "s_waitcnt lgkmcnt(0)")
    both = m.bits(20).astype(object) + m.bits(21).astype(object) * (1 << 32)
    for lane in range(64):
        column = tiles[lane // 16, :, lane % 16]
        assert both[lane] == sum(int(value) << bits * k for k, value in enumerate(column))


# --- registers indexed by M0


def test_register_index_mode(machine):
    m = machine().s(40, 5)
    for k in range(30):
        m.v(10 + k, U32(100 + k))
    m.run(
        "s_set_gpr_idx_on s40, gpr_idx(SRC0)",
        "v_mov_b32_e32 v60, v10",
        "s_set_gpr_idx_off",
        "s_set_gpr_idx_on s40, gpr_idx(DST)",
        "v_mov_b32_e32 v70, v10",
        "s_set_gpr_idx_off",
        "v_mov_b32_e32 v80, v10",
    )
    assert [int(m.bits(k)[0]) for k in (60, 70, 75, 80)] == [105, 0, 100, 100]
