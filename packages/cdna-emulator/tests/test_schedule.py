"""Every schedule is another order of waves, repeats itself, and moves late copies."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from cdna_emulator.assembler import assemble_kernels
from cdna_emulator.code_object import CodeObject
from cdna_emulator.errors import ArgumentError
from cdna_emulator.launch import run
from cdna_emulator.schedule import DEFAULT_SCHEDULE, SCHEDULES, Schedule

STEPS = 40
#: A wave appends its number to a log in LDS, with nothing but one instruction between entries.
#: LDS: a counter at 0, the log behind it. ds_append counts lanes: one is active.
LOG = f"""
s_load_dwordx2 s[8:9], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshrrev_b32 v1, 6, v0
v_mov_b32 v2, 0
v_readfirstlane_b32 s4, v1
v_lshlrev_b32 v7, 2, v0
ds_write_b32 v7, v2
ds_write_b32 v7, v2 offset:1024
s_waitcnt lgkmcnt(0)
s_barrier
s_mov_b64 exec, 1
v_mov_b32 v3, 4
.rept {STEPS}
ds_add_rtn_u32 v4, v2, v3
ds_write_b32 v4, v1 offset:4
.endr
s_waitcnt lgkmcnt(0)
s_barrier
s_mov_b64 exec, -1
ds_read_b32 v5, v7 offset:4
s_waitcnt lgkmcnt(0)
global_store_dword v7, v5, s[8:9]
"""
#: What LDS holds between the issue of a copy from memory and the wait for it.
COPY = """
s_load_dwordx4 s[8:11], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
v_mov_b32 v2, -1
ds_write_b32 v1, v2
s_mov_b32 m0, 0
s_waitcnt lgkmcnt(0)
global_load_lds_dword v1, s[8:9]
ds_read_b32 v3, v1
s_waitcnt lgkmcnt(0)
global_store_dword v1, v3, s[10:11]
s_waitcnt vmcnt({outstanding})
ds_read_b32 v4, v1
s_waitcnt lgkmcnt(0)
global_store_dword v1, v4, s[10:11] offset:256
"""


@cache
def objects() -> CodeObject:
    kernels = {"log": LOG, "copy": COPY.format(outstanding=0), "store": COPY.format(outstanding=1)}
    kernels["end"] = COPY.format(outstanding=2)
    return CodeObject.read(
        assemble_kernels(
            {name: text.split("\n") for name, text in kernels.items()},
            "gfx942",
            pointers=2,
            group_segment_size=4096,
        )
    )


def order(schedule: str, waves: int = 4, grid: int = 1) -> list[int]:
    """Return the waves in the order in which they took their steps in the last workgroup."""
    out = np.zeros(64 * waves, np.uint32)
    run(objects(), "log", grid, 64 * waves, [out, None], schedule=schedule, checks="none")
    return out[: STEPS * waves].tolist()


def runs(waves: list[int]) -> list[tuple[int, int]]:
    """Return (wave, steps) for steps of one wave after another."""
    changes = [i for i in range(len(waves)) if i == 0 or waves[i] != waves[i - 1]]
    return [
        (waves[start], end - start)
        for start, end in zip(changes, [*changes[1:], len(waves)], strict=True)
    ]


def test_run_to_barrier_and_reversed():
    assert runs(order("run_to_barrier")) == [(wave, STEPS) for wave in range(4)]
    assert runs(order("reversed")) == [(wave, STEPS) for wave in (3, 2, 1, 0)]


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_slices_of_round_robin(steps):
    # A step is two instructions; the prologue up to the barrier is the same for all waves.
    found = runs(order(f"round_robin:{2 * steps}"))
    assert [wave for wave, _ in found[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]
    # The first slice begins with the two instructions behind the barrier.
    assert [count for _, count in found[:12]] == [steps - 1 or 1] * 4 + [steps] * 8


def test_lockstep():
    out = np.zeros(64 * 4, np.uint32)
    run(objects(), "log", 1, 256, [out, None], schedule="round_robin:1", checks="none")
    # Each wave draws its place, then each writes: no wave is ever a whole step ahead.
    steps = out[: 4 * STEPS].reshape(STEPS, 4)
    assert (steps == [0, 1, 2, 3]).all()


def test_random_orders():
    orders = {seed: order(f"random:{seed}") for seed in range(6)}
    for seed, waves in orders.items():
        assert order(f"random:{seed}") == waves
        assert sorted(waves) == sorted(order("run_to_barrier"))
        assert len(runs(waves)) > 4
    assert len({tuple(waves) for waves in orders.values()}) == 6
    # Workgroups draw differently.
    assert order("random:1", grid=2) != orders[1]


def test_schedules_of_the_set_are_different():
    plain = [name for name in SCHEDULES if "+" not in name]
    assert len({tuple(order(name)) for name in plain}) == len(plain)
    late = [name for name in SCHEDULES if "+" in name]
    assert late
    for name in late:
        assert order(name) == order(name.partition("+")[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_repeats(schedule):
    assert order(schedule) == order(schedule)


@pytest.mark.parametrize("kind", ["run_to_barrier", "reversed", "round_robin:3", "random:5"])
@pytest.mark.parametrize(
    ("kernel", "late_lands"), [("copy", True), ("store", True), ("end", False)]
)
def test_late_copies_land_when_a_wait_retires_them(seed, kind, kernel, late_lands):
    given = np.random.default_rng(seed).integers(0, 2**31, 64, dtype=np.uint32)
    missing = np.full(64, 2**32 - 1, np.uint32)
    for late in (False, True):
        out = np.zeros(128, np.uint32)
        schedule = kind + "+late_dma" * late
        run(objects(), kernel, 1, 64, [given, out], schedule=schedule, checks="none")
        # "store" waits for all but the newest of copy and store, "end" for neither.
        np.testing.assert_array_equal(out[:64], missing if late else given)
        np.testing.assert_array_equal(out[64:], given if late_lands or not late else missing)


def test_the_default_is_of_the_set():
    assert DEFAULT_SCHEDULE in SCHEDULES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_to_barrier", Schedule("run_to_barrier")),
        ("reversed+late_dma", Schedule("reversed", 0, True)),
        ("round_robin:7", Schedule("round_robin", 7)),
        ("random:0", Schedule("random", 0)),
        ("random:12+late_dma", Schedule("random", 12, True)),
    ],
)
def test_parse(text, expected):
    assert Schedule.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "forward",
        "round_robin",
        "round_robin:",
        "round_robin:0",
        "round_robin:-1",
        "round_robin:1.5",
        "round_robin:²",
        "round_robin:4294967296",
        "random",
        "random:x",
        "random:18446744073709551616",
        "reversed:1",
        "reversed+",
        "reversed+late",
        "late_dma",
    ],
)
def test_refused(text):
    with pytest.raises(ArgumentError) as caught:
        Schedule.parse(text)
    assert str(caught.value).startswith("schedule must be run_to_barrier, reversed, round_robin:")
    assert str(caught.value).endswith(f"got {text!r}")
