"""Every wait, barrier and no-op of the hand-written kernels is needed, and its loss is noticed.

Each ``s_waitcnt`` and ``s_barrier`` in turn is replaced by an instruction that does nothing, each
``s_waitcnt`` in turn is made to wait for one operation less, and the kernel runs in the emulator
until a checker objects or a result changes. Each ``s_nop`` in turn is taken out, and the static
wait-state checker must object. None is redundant.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cdna_emulator
from cdna_emulator import launch
from cdna_emulator.checks.hazards import find_hazards
from cdna_emulator.disassembler import disassemble
from cdna_emulator.instruction import parse
from cdna_emulator.native_core import NativeProgram
from cdna_emulator.program import make_program
from mla_asm import read_catalogs, verified_code_object

ROWS = [row for arch in ("gfx942", "gfx950") for row in read_catalogs()[arch]]
#: Cheap and sharp first: the checkers find most mutants in any order of waves.
SCHEDULES = ("round_robin:64", "run_to_barrier", "reversed", "round_robin:1")
S_NOP = bytes.fromhex("000080bf")
PAGE, HEADS, ROW = 4, 12, 576
Q_LENS, KV_LENS = (3, 1, 1), (421, 150, 20)

each_kernel = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Problem:
    """Requests of many tiles and of one, hidden pages, scores that grow and that do not."""

    def __init__(self, rng: np.random.Generator, row) -> None:
        pages = [-(-length // PAGE) for length in KV_LENS]
        ids = rng.permutation(sum(pages)).astype(np.int32)
        cache = bf16(rng.standard_normal((len(ids), PAGE, ROW)))
        q = bf16(rng.standard_normal((sum(Q_LENS), HEADS, ROW)))
        # Later keys of the first request score higher, so that O is rescaled at every tile; in the
        # others only at the first.
        places = np.argsort(ids)
        growth = np.concatenate([np.arange(pages[0]), np.zeros(sum(pages[1:]))])[places] / 30
        cache[..., 0] = bf16(np.broadcast_to(growth[:, None], cache.shape[:2]) ** 2 * 3)
        q[..., 0] = bf16(np.full(q.shape[:2], 20.0))
        ids[[40, pages[0] + 9]] = -1, len(ids)  # hidden
        qo = np.cumsum([0, *Q_LENS]).astype(np.int32)
        kv = np.cumsum([0, *pages]).astype(np.int32)
        self.inputs = dict(
            ql_nope=np.ascontiguousarray(q[..., :512]),
            q_pe=np.ascontiguousarray(q[..., 512:]),
            kv=cache,
            qo_indptr=qo,
            kv_indptr=kv,
            kv_page_indices=ids,
            kv_last_page_len=np.array([(n - 1) % PAGE + 1 for n in KV_LENS], np.int32),
            work_indptr=None,
            work_info=None,
            page_stride=PAGE * ROW * 2,
            token_stride=ROW * 2,
            sm_scale_log2=192**-0.5 * math.log2(math.e),
            num_heads=HEADS,
            log2_page_size=PAGE.bit_length() - 1,
            num_cache_pages=len(ids),
            is_causal=1,
            out_stride_t=HEADS * 1024,
            out_stride_h=1024,
            ql_nope_stride_t=HEADS * 1024,
            ql_nope_stride_h=1024,
            q_pe_stride_t=HEADS * 128,
            q_pe_stride_h=128,
            reserved=0,
        )
        self.is_persistent = row.is_persistent
        if row.is_persistent:
            cut, last = int(kv[0]) + 64, int(self.inputs["kv_last_page_len"][0])
            behind = (pages[0] - 65) * PAGE + last
            self.inputs["work_indptr"] = np.array([0, 3, 4], np.int32)
            self.inputs["work_info"] = np.array(
                [
                    [0, 0, 0, 3, 0, cut, behind, 0],
                    [1, -1, 3, 4, kv[1], kv[2], 0, 0],
                    [2, -1, 4, 5, kv[2], kv[3], 0, 0],
                    [0, 3, 0, 3, cut, kv[1], 0, 0],
                ],
                np.int32,
            )
            self.launches = [((2, 1, 1), 1)]
        else:
            blocks = -(-max(Q_LENS) * HEADS // row.tile_rows)
            self.launches = [((blocks, splits, len(Q_LENS)), splits) for splits in (1, 2)]

    def run(self, code_object, symbol, schedule):
        """Return the outputs of all launches, or None when a checker objects."""
        results = []
        for grid, splits in self.launches:
            partial_rows = 6 if self.is_persistent else sum(Q_LENS) * splits
            outputs = dict(
                out=np.zeros((sum(Q_LENS), HEADS, 512), np.uint16),
                lse=np.zeros((sum(Q_LENS), HEADS), np.float32),
                partial_out=np.zeros((partial_rows, HEADS, 512), np.float32),
                partial_lse=np.zeros((partial_rows, HEADS), np.float32),
            )
            result = cdna_emulator.run(
                code_object,
                symbol,
                grid,
                256,
                outputs | self.inputs | {"num_splits": splits},
                schedule=schedule,
                checks=["waits", "barrier_writes", "races", "uninitialised", "barriers"],
                max_instructions=2_000_000,
                strict=False,
            )
            if result.findings:
                return None
            results += outputs.values()
        return results


class Mutants:
    """A kernel loaded once, whose instructions are replaced one at a time."""

    def __init__(self, row, problem: Problem) -> None:
        self.row, self.problem = row, problem
        self.code_object = cdna_emulator.CodeObject.read(verified_code_object(row))
        # Loading takes a hundred times as long as running: the program that `run` keeps is changed.
        loaded = launch._load(self.code_object, row.symbol)
        self.program, self.native = loaded.program, loaded.native
        idle = tuple(parse(item, row.arch) for item in disassemble(S_NOP, row.arch))
        self.idle = NativeProgram(make_program(idle, row.arch, row.symbol)).records[0]
        self.expected = self._run(SCHEDULES[0])
        assert self.expected is not None

    def _run(self, schedule):
        return self.problem.run(self.code_object, self.row.symbol, schedule)

    def indices(self, *mnemonics: str) -> list[int]:
        return [
            index
            for index, instruction in enumerate(self.program.instructions)
            if instruction.mnemonic in mnemonics
        ]

    def is_noticed(self, index: int, change: Callable[[Any], None]) -> bool:
        """Whether a run notices that the record of an instruction is changed."""
        record = self.native.records[index]
        original = bytes(record)
        change(record)
        try:
            for schedule in SCHEDULES:
                found = self._run(schedule)
                if found is None or not all(map(same_bits, found, self.expected)):
                    return True
        finally:
            ctypes.memmove(ctypes.addressof(record), original, len(original))
        return False

    def disable(self, record) -> None:
        address = record.address
        ctypes.memmove(ctypes.addressof(record), bytes(self.idle), ctypes.sizeof(record))
        record.address = address

    def is_hazard(self, index: int) -> bool:
        """Whether the static checker notices that an instruction is missing in its basic block."""

        def up_to_branch(items):
            return list(itertools.takewhile(lambda item: item.target is None, items))

        instructions = self.program.instructions
        before = up_to_branch(instructions[max(0, index - 24) : index][::-1])[::-1]
        after = up_to_branch(instructions[index + 1 : index + 25])
        block = tuple(
            dataclasses.replace(item, address=4 * place)
            for place, item in enumerate((*before, *after))
        )
        return bool(find_hazards(make_program(block, self.row.arch, self.row.symbol)))

    def surroundings(self, index: int) -> str:
        around = self.program.instructions[index - 1 : index + 2]
        return f"{around[1].address:#x}: " + " / ".join(item.text for item in around)


def weaken(record) -> None:
    """Let a wait leave one operation more outstanding."""
    for name in ("vmcnt", "lgkmcnt"):
        if (count := getattr(record, name)) >= 0:
            setattr(record, name, count + 1)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.tobytes() == right.tobytes()


@pytest.fixture
def mutants(row, seed):
    return Mutants(row, Problem(np.random.default_rng(seed), row))


@each_kernel
def test_the_problem_reaches_every_wait_and_barrier(mutants):
    reached = np.zeros(len(mutants.program.instructions), bool)
    call = mutants.native.call

    def counting(*args, **kwargs):
        counters = call(*args, **kwargs)
        reached[counters.executed > 0] = True
        return counters

    mutants.native.call = counting
    mutants._run(SCHEDULES[0])
    missed = [
        f"{mutants.program.instructions[index].address:#x}"
        for index in mutants.indices("s_waitcnt", "s_barrier")
        if not reached[index]
    ]
    assert not missed


@each_kernel
def test_every_wait_and_barrier_is_needed(mutants):
    unnoticed = [
        mutants.surroundings(index)
        for index in mutants.indices("s_waitcnt", "s_barrier")
        if not mutants.is_noticed(index, mutants.disable)
    ]
    assert unnoticed == []


@each_kernel
def test_no_wait_may_be_weaker(mutants):
    unnoticed = [
        mutants.surroundings(index)
        for index in mutants.indices("s_waitcnt")
        if not mutants.is_noticed(index, weaken)
    ]
    assert unnoticed == []


@each_kernel
def test_every_no_op_is_needed(mutants):
    unnoticed = [
        mutants.surroundings(index)
        for index in mutants.indices("s_nop")
        if not mutants.is_hazard(index)
    ]
    assert unnoticed == []
