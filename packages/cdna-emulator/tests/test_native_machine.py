"""Waves, barriers, schedules and the checkers of the native core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_lines
from cdna_emulator.launch import Result, run
from cdna_emulator.schedule import SCHEDULES

Array = np.ndarray[Any, Any]
#: s[8:9] and s[10:11]: the two arguments; v1: byte offset of the work-item's dword.
START = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
"""
#: Each work-item gives its dword to the one that mirrors it in the workgroup of 256.
MIRROR = f"""{START}
global_load_dword v2, v1, s[8:9]
s_waitcnt vmcnt(0)
ds_write_b32 v1, v2
v_sub_u32 v3, 1020, v1
s_waitcnt lgkmcnt(0)
s_barrier
ds_read_b32 v4, v3
s_waitcnt lgkmcnt(0)
global_store_dword v1, v4, s[10:11]
"""
#: The same by a copy from memory to LDS; 256 bytes for each wave.
COPY = f"""{START}
v_readfirstlane_b32 s4, v1
s_mov_b32 m0, s4
s_nop 0
global_load_lds_dword v1, s[8:9]
v_sub_u32 v3, 1020, v1
s_waitcnt vmcnt(0)
s_barrier
ds_read_b32 v4, v3
s_waitcnt lgkmcnt(0)
global_store_dword v1, v4, s[10:11]
"""


def lines(text: str) -> list[str]:
    """Return the instructions of a text."""
    return [line.strip() for line in text.split("\n") if line.strip()]


@cache
def assembled(code: tuple[str, ...], pointers: int, lds: int, scratch: int) -> bytes:
    """Assemble once for every schedule."""
    return assemble_lines(
        code, "gfx942", pointers=pointers, group_segment_size=lds, private_segment_size=scratch
    )


def launch(
    text: str | Sequence[str],
    arrays: Sequence[Array],
    *,
    block: int | tuple[int, ...] = 64,
    grid: int | tuple[int, ...] = 1,
    lds: int = 0,
    scratch: int = 0,
    checks: str | Iterable[str] = ("waits", "barrier_writes", "races", "uninitialised", "barriers"),
    **options: Any,
) -> Result:
    """Assemble and run, findings returned."""
    code = assembled(
        tuple(lines(text) if isinstance(text, str) else text), len(arrays), lds, scratch
    )
    return run(
        code, None, grid, block, list(arrays), checks=checks, strict=False, threads=1, **options
    )


def kinds(result: Result) -> list[str]:
    """Return the kinds of the findings, in order of address."""
    return [finding.kind for finding in result.findings]


def values(count: int, seed: int) -> tuple[Array, Array]:
    """Return random input and an output that was not written."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 32, count, dtype=np.uint32), np.zeros(count, np.uint32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("text", [MIRROR, COPY])
def test_schedules_agree(seed: int, schedule: str, text: str) -> None:
    """A right kernel gives one result however waves are interleaved, and no findings."""
    given, out = values(256, seed)
    result = launch(text, (given, out), block=256, lds=1024, schedule=schedule)
    np.testing.assert_array_equal(out, given[::-1])
    assert not result.findings
    assert result.instructions == 4 * (len(lines(text)) + 1)


def without(text: str, start: str, which: int = 0) -> list[str]:
    """Return the lines less the one that begins with ``start``."""
    found = lines(text)
    places = [index for index, line in enumerate(found) if line.startswith(start)]
    del found[places[which]]
    return found


@pytest.mark.parametrize(
    ("text", "removed", "which", "kind"),
    [
        (MIRROR, "s_waitcnt lgkmcnt(0)", 0, "missing_wait"),  # of the arguments
        (MIRROR, "s_waitcnt vmcnt(0)", 0, "missing_wait"),  # of the load
        (MIRROR, "s_waitcnt lgkmcnt(0)", 1, "barrier_writes"),
        (MIRROR, "s_waitcnt lgkmcnt(0)", 2, "missing_wait"),  # of the LDS read
        (MIRROR, "s_barrier", 0, "lds_race"),
        (COPY, "s_waitcnt vmcnt(0)", 0, "missing_wait"),  # of the copy
        (COPY, "s_barrier", 0, "lds_race"),
        (MIRROR, "ds_write", 0, "uninitialised_lds"),
        (MIRROR, "v_sub_u32", 0, "uninitialised_vgpr"),
    ],
)
def test_each_line_is_missed(seed: int, text: str, removed: str, which: int, kind: str) -> None:
    """Every wait, barrier and definition that is taken away is reported as what it is."""
    given, out = values(256, seed)
    result = launch(without(text, removed, which), (given, out), block=256, lds=1024)
    assert kind in kinds(result)
    clean = launch(without(text, removed, which), (given, out), block=256, lds=1024, checks="none")
    assert set(kinds(clean)) <= {"lds_out_of_bounds", "misaligned"}


@pytest.mark.parametrize(
    ("text", "removed"), [(MIRROR, "s_barrier"), (COPY, "s_barrier"), (COPY, "s_waitcnt vmcnt(0)")]
)
def test_schedules_expose_mistakes(seed: int, text: str, removed: str) -> None:
    """Without the line some schedule gives a wrong result."""
    given, out = values(256, seed)
    wrong = []
    for schedule in SCHEDULES:
        out[:] = 0
        code = without(text, removed)
        launch(code, (given, out), block=256, lds=1024, schedule=schedule, checks="none")
        if not np.array_equal(out, given[::-1]):
            wrong.append(schedule)
    assert wrong
    if removed.startswith("s_waitcnt"):
        assert set(wrong) == {schedule for schedule in SCHEDULES if schedule.endswith("late_dma")}


def test_counters_in_order(seed: int) -> None:
    """A wait for all but the newest loads settles the older ones, and only those."""
    given, out = values(64, seed)
    text = f"""{START}
    global_load_dword v2, v1, s[8:9]
    global_load_dword v3, v1, s[8:9]
    global_store_dword v1, v1, s[10:11]
    s_waitcnt vmcnt(2)
    v_add_u32 v4, v2, v2
    v_add_u32 v5, v3, v3
    s_waitcnt vmcnt(1)
    v_add_u32 v6, v3, v3
    """
    result = launch(text, (given, out))
    assert kinds(result) == ["missing_wait"]
    assert "v5" in result.findings[0].instruction
    assert "v3" in result.findings[0].detail


def test_scalar_loads_return_in_any_order(seed: int) -> None:
    """Only a wait for zero settles a scalar load; LDS in the same counter is in order."""
    given, out = values(64, seed)
    text = f"""{START}
    ds_write_b32 v1, v1
    ds_read_b32 v2, v1
    s_load_dword s20, s[8:9], 0x0
    s_waitcnt lgkmcnt(1)
    s_add_u32 s21, s20, s20
    s_waitcnt lgkmcnt(0)
    s_add_u32 s22, s20, s20
    v_add_u32 v3, v2, v2
    """
    result = launch(text, (given, out), lds=256)
    assert kinds(result) == ["missing_wait"]
    assert "s21" in result.findings[0].instruction


def test_overwriting_a_pending_register(seed: int) -> None:
    """A load must not land on a newer value; loads of one queue may follow each other."""
    given, out = values(64, seed)
    text = f"""{START}
    global_load_dword v2, v1, s[8:9]
    global_load_dword v2, v1, s[8:9] offset:4
    v_mov_b32 v2, 0
    s_waitcnt vmcnt(0)
    """
    result = launch(text, (np.append(given, given), out))
    assert kinds(result) == ["missing_wait"]
    assert "v_mov" in result.findings[0].instruction


def test_flat_needs_both_counters(seed: int) -> None:
    """A flat load counts in both counters and is done when both were zero."""
    given, out = values(64, seed)
    for wait, missing in (("vmcnt(0)", True), ("lgkmcnt(0)", True), ("vmcnt(0) lgkmcnt(0)", False)):
        text = f"""{START}
        v_mov_b32 v2, s8
        v_mov_b32 v3, s9
        flat_load_dword v4, v[2:3]
        s_waitcnt {wait}
        v_add_u32 v5, v4, v4
        """
        assert kinds(launch(text, (given, out))) == ["missing_wait"] * missing


def test_waves_may_write_the_same_values(seed: int) -> None:
    """Equal values written by several waves are no race; different ones are."""
    given, out = values(256, seed)
    for source, race in (("v1", False), ("v2", True)):
        text = f"""{START}
        v_mov_b32 v2, v0
        v_and_b32 v1, 0xfc, v1
        ds_write_b32 v1, {source}
        s_waitcnt lgkmcnt(0)
        """
        assert kinds(launch(text, (given, out), block=256, lds=256)) == ["lds_race"] * race


def test_atomics_do_not_race(seed: int) -> None:
    """Atomic operations of several waves agree; a plain read between them does not."""
    given, out = values(256, seed)
    start = f"""{START}
    v_mov_b32 v2, 0
    v_mov_b32 v3, 1
    ds_write_b32 v2, v2
    s_waitcnt lgkmcnt(0)
    s_barrier
    ds_add_u32 v2, v3
    """
    end = """
    ds_read_b32 v4, v2
    s_waitcnt lgkmcnt(0)
    global_store_dword v1, v4, s[10:11]
    """
    result = launch(
        start + "s_waitcnt lgkmcnt(0)\ns_barrier" + end, (given, out), block=256, lds=64
    )
    assert not result.findings
    assert (out == 256).all()
    result = launch(start + end, (given, out), block=256, lds=64)
    assert "lds_race" in kinds(result)


def test_barrier_separates_readers_from_writers(seed: int) -> None:
    """Overwriting what another wave read needs a barrier too."""
    given, out = values(256, seed)
    again = "\ns_barrier\nds_write_b32 v1, v4\ns_waitcnt lgkmcnt(0)"
    assert not launch(MIRROR + again, (given, out), block=256, lds=1024).findings
    found = launch(MIRROR + again.replace("\ns_barrier", ""), (given, out), block=256, lds=1024)
    assert kinds(found) == ["lds_race"]
    # Both are named; which of them came last depends on the schedule.
    assert "ds_write_b32 v1, v4" in str(found.findings[0])
    assert "ds_read_b32 v4, v3" in str(found.findings[0])


def test_divergent_barrier(seed: int) -> None:
    """Waves that meet at different barriers are found; waves that ended do not count."""
    given, out = values(256, seed)
    text = f"""{START}
    v_readfirstlane_b32 s4, v0
    s_cmp_lt_u32 s4, 128
    s_cbranch_scc1 other
    s_barrier
    s_endpgm
    other:
    {{0}}
    """
    result = launch(text.format("s_barrier"), (given, out), block=256)
    assert kinds(result) == ["divergent_barrier"]
    result = launch(text.format("s_nop 0"), (given, out), block=256)
    assert not result.findings


def test_instruction_limit(seed: int) -> None:
    """A loop without end is stopped and named."""
    given, out = values(64, seed)
    text = f"{START}\nagain:\ns_nop 0\ns_branch again"
    result = launch(text, (given, out), max_instructions=10_000)
    assert kinds(result) == ["instruction_limit"]
    assert result.instructions == 10_000


def test_uninitialised_registers(seed: int) -> None:
    """Lanes written under a mask, copies, scalars, and a read of the lanes that are missing."""
    given, out = values(64, seed)
    text = f"""{START}
    s_mov_b64 exec, 0xff
    v_mov_b32 v2, 7
    v_mov_b32 v3, v2
    v_add_u32 v4, v3, v3
    s_mov_b64 exec, -1
    v_mov_b32 v5, v2
    v_add_u32 v6, v5, v5
    s_add_u32 s30, s31, 1
    """
    result = launch(text, (given, out))
    assert kinds(result) == ["uninitialised_vgpr", "uninitialised_sgpr"]
    assert (result.findings[0].lane, result.findings[0].instruction[:15]) == (8, "v_add_u32_e32 v")
    assert "v5" in result.findings[0].detail
    assert "s31" in result.findings[1].detail


def test_a_tail_may_be_loaded_but_not_used(seed: int) -> None:
    """Unwritten LDS counts where it is used."""
    given, out = values(64, seed)
    text = f"""{START}
    v_cmp_gt_u32 vcc, 40, v0
    s_and_saveexec_b64 s[20:21], vcc
    ds_write_b32 v1, v1
    s_mov_b64 exec, s[20:21]
    s_waitcnt lgkmcnt(0)
    ds_read_b32 v4, v1
    s_waitcnt lgkmcnt(0)
    s_and_saveexec_b64 s[20:21], vcc
    v_add_u32 v4, v4, v4
    {{0}}
    global_store_dword v1, v4, s[10:11]
    """
    assert not launch(text.format("s_nop 0"), (given, out), lds=256).findings
    result = launch(text.format("s_mov_b64 exec, s[20:21]"), (given, out), lds=256)
    assert kinds(result) == ["uninitialised_lds"]
    assert result.findings[0].lane == 40


def test_findings_are_merged(seed: int) -> None:
    """One finding for an instruction, with a count and the place it was met first."""
    given, out = values(64, seed)
    text = f"{START}\nglobal_load_dword v2, v1, s[8:9] offset:128\ns_waitcnt vmcnt(0)"
    result = launch(text, (given, out), grid=3, block=128)
    assert kinds(result) == ["out_of_bounds"]
    finding = result.findings[0]
    assert finding.count == 3 * (32 + 64)
    assert (finding.workgroup, finding.wave, finding.lane) == ((0, 0, 0), 0, 32)
    assert "0 bytes past the end of arg0 (256 bytes)" in finding.detail


def test_identity_of_work_items() -> None:
    """Workgroup ids, packed work-item ids, and lanes beyond the last work-item."""
    out = np.zeros((2 * 3 * 2, 5 * 4 * 4, 2), np.uint32)
    text = """
    s_load_dwordx2 s[8:9], s[0:1], 0x0
    s_mul_i32 s5, s4, 3
    s_add_u32 s5, s5, s3
    s_lshl_b32 s5, s5, 1
    s_add_u32 s5, s5, s2
    s_mulk_i32 s5, 640
    v_and_b32 v1, 0x3ff, v0
    v_bfe_u32 v2, v0, 10, 10
    v_bfe_u32 v3, v0, 20, 10
    v_mad_u32_u24 v4, v3, 4, v2
    v_mad_u32_u24 v4, v4, 5, v1
    v_lshl_add_u32 v4, v4, 3, s5
    v_mov_b32 v5, v0
    s_lshl_b32 s6, s3, 8
    s_lshl_b32 s7, s4, 16
    s_or_b32 s6, s6, s7
    s_or_b32 s6, s6, s2
    v_mov_b32 v6, s6
    s_waitcnt lgkmcnt(0)
    global_store_dword v4, v5, s[8:9]
    global_store_dword v4, v6, s[8:9] offset:4
    """
    result = launch(text, (out,), grid=(2, 3, 2), block=(5, 4, 4))
    assert not result.findings
    z, y, x = np.mgrid[0:4, 0:4, 0:5]
    np.testing.assert_array_equal(
        out[:, :, 0], np.broadcast_to((x | y << 10 | z << 20).ravel(), (12, 80))
    )
    z, y, x = np.mgrid[0:2, 0:3, 0:2]
    np.testing.assert_array_equal(
        out[:, :, 1], np.broadcast_to((x | y << 8 | z << 16).ravel()[:, None], (12, 80))
    )
    # Two waves for 80 work-items.
    assert result.instructions == 12 * 2 * (len(lines(text)) + 1)


def test_private_memory_is_of_each_lane(seed: int) -> None:
    """Every work-item of every wave has its own."""
    given, out = values(256, seed)
    text = f"""{START}
    global_load_dword v2, v1, s[8:9]
    v_mov_b32 v3, 16
    s_waitcnt vmcnt(0)
    scratch_store_dword v3, v2, off offset:4
    s_barrier
    s_waitcnt vmcnt(0)
    scratch_load_dword v4, off, off offset:20
    s_waitcnt vmcnt(0)
    global_store_dword v1, v4, s[10:11]
    """
    result = launch(text, (given, out), block=256, scratch=64, schedule="round_robin:1")
    assert not result.findings
    np.testing.assert_array_equal(out, given)


def test_random_schedules_repeat(seed: int) -> None:
    """One seed gives one order, other seeds others."""
    given, out = values(256, seed)
    # Waves draw tickets; the order of tickets is the order of waves.
    text = f"""{START}
    s_nop 0
    s_nop 0
    v_mov_b32 v2, 0
    v_mov_b32 v3, 1
    global_atomic_add v4, v2, v3, s[8:9] sc0
    s_waitcnt vmcnt(0)
    global_store_dword v1, v4, s[10:11]
    """
    orders = []
    for number in (1, 1, 2, 3, 4, 5, 6):
        given[0] = 0
        result = launch(text, (given, out), block=256, schedule=f"random:{number}", grid=8)
        assert not result.findings
        assert given[0] == 8 * 256
        orders.append(out.copy())
    np.testing.assert_array_equal(orders[0], orders[1])
    assert any((orders[0] != other).any() for other in orders[2:])


def test_calls(seed: int) -> None:
    """Jumps to an address go where an instruction starts, or are refused."""
    given, out = values(64, seed)
    text = f"""{START}
    s_getpc_b64 s[20:21]
    s_add_u32 s20, s20, {{0}}
    s_addc_u32 s21, s21, 0
    s_swappc_b64 s[22:23], s[20:21]
    global_store_dword v1, v2, s[10:11]
    s_endpgm
    v_lshlrev_b32 v2, 1, v1
    s_setpc_b64 s[22:23]
    """
    # From behind s_getpc: two of 4 and 8 bytes, a call of 4, a store of 8, the end of 4.
    result = launch(text.format(24), (given, out))
    assert not result.findings
    np.testing.assert_array_equal(out, np.arange(64) * 8)
    assert kinds(launch(text.format(26), (given, out))) == ["unsupported"]
