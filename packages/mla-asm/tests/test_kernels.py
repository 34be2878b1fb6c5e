"""The hand-written kernels on what the conformance suite cannot ask for through the public ops.

Arguments are made here, beside the planner: strides of any kind and beyond 4 GiB, pads full of NaN,
hidden pages, scales of any sign, scores far apart, rows that see nothing, work lists cut anywhere.
The expectation is computed in float64.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass

import msgpack
import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

import cdna_emulator
from mla_asm import read_catalogs, verified_code_object

ROWS = [row for arch in ("gfx942", "gfx950") for row in read_catalogs()[arch]]
LATENT, ROPE = 512, 64
NAN = 0x7FC0
#: bf16 weights and outputs, relative to the largest output; lse relative to its own size.
OUT_TOLERANCE, LSE_TOLERANCE = 1e-2, 1e-5


@dataclass(frozen=True)
class Case:
    """Lengths of the requests, and what is unusual about them."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 16
    page_size: int = 1
    splits: int = 1
    causal: bool = True
    hidden: float = 0.0
    sm_scale: float = 192**-0.5
    spread: float = 1.0
    page_bytes: int = 0
    wants_lse: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("ragged", (1, 1, 1, 1, 1), (0, 1, 16, 130, 333)),
    Case("few_heads", (3, 1, 2), (33, 17, 100), heads=5, page_size=4),
    Case("many_heads", (1, 2), (77, 40), heads=128, page_size=2),
    Case("long_query", (21, 3), (90, 4), heads=1, page_size=8),
    Case("longer_query_than_cache", (5,), (3,), splits=2),
    Case("more_splits_than_tiles", (2, 2), (20, 300), heads=7, splits=9),
    Case("splits", (1, 2, 1), (0, 200, 700), page_size=16, splits=4),
    Case("not_causal", (4, 2), (100, 1), causal=False),
    Case("hidden_pages", (2, 1, 1), (150, 200, 8), page_size=4, hidden=0.4),
    Case("no_lse", (1,), (70,), wants_lse=False),
    Case("negative_scale", (1, 2), (300, 90), sm_scale=-0.1),
    Case("no_scale", (2,), (90,), sm_scale=0.0),
    Case("far_scores", (1, 1), (300, 190), spread=5.0),
    Case("pages_beyond_4_gib", (2,), (4,), page_size=2, page_bytes=(1 << 32) + 4096),
    Case("stride_near_4_gib", (2,), (100,), page_size=64, page_bytes=(1 << 32) - 4096),
]


def bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def f64(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Problem:
    """The arguments of a case, apart from outputs and the cut, and what must come out."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        self.case = case
        size = case.page_size
        pages = [-(-length // size) for length in case.kv_lens]
        self.qo = np.cumsum([0, *case.q_lens]).astype(np.int32)
        self.kv = np.cumsum([0, *pages]).astype(np.int32)
        self.last = np.array([(n - 1) % size + 1 if n else 0 for n in case.kv_lens], np.int32)
        total_q, heads = int(self.qo[-1]), case.heads
        cached = sum(pages) + (0 if case.page_bytes else 2)
        self.ids = rng.permutation(cached)[: sum(pages)].astype(np.int32)
        # One row of NaN between pages, 64 bytes of NaN between rows.
        token = LATENT + ROPE + 32
        page = case.page_bytes // 2 or (size + 1) * token
        # Memory between pages that are far apart is never touched.
        cache = np.zeros((cached - 1) * page + (size + 1) * token, np.uint16)
        tokens = np.lib.stride_tricks.as_strided(
            cache, (cached, size + 1, token), (2 * page, 2 * token, 2)
        )
        tokens[:] = NAN
        self.q = np.full((total_q, heads + 1, LATENT + ROPE + 8), NAN, np.uint16)
        wide = LATENT + ROPE
        self.q[:, :heads, :wide] = bf16(rng.standard_normal((total_q, heads, wide)) * case.spread)
        self.rows, self.live = [], []
        for request, length in enumerate(case.kv_lens):
            rows = bf16(rng.standard_normal((length, wide)) * case.spread)
            live = np.ones(length, bool)
            for place in range(pages[request]):
                part = slice(place * size, min(length, (place + 1) * size))
                entry = self.kv[request] + place
                if rng.random() < case.hidden:
                    self.ids[entry] = rng.choice([-1, cached, 2**31 - 1])
                    live[part] = False
                else:
                    tokens[self.ids[entry], : part.stop - part.start, :wide] = rows[part]
            self.rows.append(rows)
            self.live.append(live)
        self.arguments = {
            "ql_nope": self.q,
            "q_pe": self.q.reshape(-1)[LATENT:],
            "kv": cache,
            "qo_indptr": self.qo,
            "kv_indptr": self.kv,
            "kv_page_indices": np.concatenate([self.ids, np.full(3, -7, np.int32)]),
            "kv_last_page_len": self.last,
            "page_stride": 2 * page,
            "token_stride": 2 * token,
            "sm_scale_log2": case.sm_scale * math.log2(math.e),
            "num_heads": heads,
            "log2_page_size": size.bit_length() - 1,
            "num_cache_pages": cached,
            "is_causal": int(case.causal),
            "ql_nope_stride_t": self.q.strides[0],
            "ql_nope_stride_h": self.q.strides[1],
            "q_pe_stride_t": self.q.strides[0],
            "q_pe_stride_h": self.q.strides[1],
            "reserved": 0,
        }

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Return out and lse in float64."""
        case, total_q = self.case, int(self.qo[-1])
        out = np.zeros((total_q, case.heads, LATENT))
        lse = np.full((total_q, case.heads), -np.inf)
        for request, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
            for i in range(q_len):
                seen = self.live[request].copy()
                if case.causal:
                    seen[max(0, kv_len - (q_len - 1 - i)) :] = False
                if not seen.any():
                    continue
                token = self.qo[request] + i
                keys = f64(self.rows[request][seen])
                scores = f64(self.q[token, : case.heads, : LATENT + ROPE]) @ keys.T * case.sm_scale
                top = scores.max(1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(1, keepdims=True)
                out[token] = weights / total @ keys[:, :LATENT]
                lse[token] = (top + np.log(total))[:, 0]
        return out, lse

    def works(self, num_pieces: int, num_workers: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut each request's pages into pieces, not at multiples of anything."""
        works, partial_row = [], 0
        for request, q_len in enumerate(self.case.q_lens):
            begin, end = int(self.kv[request]), int(self.kv[request + 1])
            step = max(1, -(-(end - begin) // num_pieces))
            cuts = [*range(begin, end, step), end] if end > begin else [begin, end]
            for left, right in itertools.pairwise(cuts):
                behind = (end - right - 1) * self.case.page_size + int(self.last[request])
                behind = behind if right < end else 0
                first = partial_row if len(cuts) > 2 else -1
                partial_row += q_len if len(cuts) > 2 else 0
                tokens = self.qo[request], self.qo[request + 1]
                works.append([request, first, *tokens, left, right, behind, 0])
        shares = np.linspace(0, len(works), num_workers + 1).astype(np.int32)
        return shares, np.array(works, np.int32)


def merge(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge normalised partials over their first axis; those with lse -inf are not read."""
    top = lses.max(0)
    safe = np.where(np.isneginf(top), 0, top)
    weights = np.exp(lses.astype(np.float64) - safe)
    total = weights.sum(0)
    parts = np.where(weights[..., None] > 0, weights[..., None] * outs.astype(np.float64), 0)
    with np.errstate(divide="ignore"):
        return parts.sum(0) / np.maximum(total, 1e-300)[..., None], safe + np.log(total)


def run(row, problem: Problem, schedule: str, num_pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Run a kernel with all checks and return out and lse, merged."""
    case, total_q = problem.case, int(problem.qo[-1])
    out = np.full((total_q, case.heads + 1, LATENT + 8), NAN, np.uint16)
    lse = np.full((total_q, case.heads), np.nan, np.float32)
    shares, works = problem.works(num_pieces, num_workers=2)
    if row.is_persistent:
        cut = works[works[:, 1] >= 0]
        shape: tuple[int, ...] = (int((cut[:, 1] + cut[:, 3] - cut[:, 2]).max(initial=1)),)
        grid = (2, 1, 1)
    else:
        shape = (total_q, case.splits)
        grid = (-(-max(case.q_lens) * case.heads // row.tile_rows), case.splits, len(case.q_lens))
    partial_out = np.full((*shape, case.heads, LATENT), np.nan, np.float32)
    partial_lse = np.full((*shape, case.heads), np.nan, np.float32)
    cdna_emulator.run(
        verified_code_object(row),
        row.symbol,
        grid,
        256,
        problem.arguments
        | {
            "out": out,
            "lse": lse if case.wants_lse else None,
            "partial_out": partial_out,
            "partial_lse": partial_lse,
            "out_stride_t": out.strides[0],
            "out_stride_h": out.strides[1],
            "work_indptr": shares if row.is_persistent else None,
            "work_info": works if row.is_persistent else None,
            "num_splits": 0 if row.is_persistent else case.splits,
        },
        schedule=schedule,
    )
    assert (out[:, case.heads] == NAN).all()
    assert (out[..., LATENT:] == NAN).all()
    found, found_lse = f64(out[:, : case.heads, :LATENT]), lse.astype(np.float64)
    if row.is_persistent:
        for request in range(len(case.q_lens)):
            pieces = works[(works[:, 0] == request) & (works[:, 1] >= 0)]
            if len(pieces):
                tokens = slice(*pieces[0, 2:4])
                rows = pieces[:, 1, None] + np.arange(tokens.stop - tokens.start)
                found[tokens], found_lse[tokens] = merge(partial_out[rows], partial_lse[rows])
    elif case.splits > 1:
        found, found_lse = merge(partial_out.swapaxes(0, 1), partial_lse.swapaxes(0, 1))
    return found, found_lse


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, row, seed):
    problem = Problem(case, np.random.default_rng(seed))
    out, lse = problem.expected()
    schedule = cdna_emulator.SCHEDULES[seed % len(cdna_emulator.SCHEDULES)]
    for num_pieces in (1, 3) if row.is_persistent else (1,):
        found, found_lse = run(row, problem, schedule, num_pieces)
        assert np.abs(found - out).max() <= OUT_TOLERANCE * np.abs(out).max()
        if case.wants_lse or num_pieces > 1:
            np.testing.assert_array_equal(np.isneginf(found_lse), np.isneginf(lse))
            finite = np.isfinite(lse)
            error = np.abs(found_lse[finite] - lse[finite])
            assert (error <= LSE_TOLERANCE * np.maximum(1, np.abs(lse[finite]))).all()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")
@pytest.mark.parametrize(
    "changed", [np.s_[1, :5], np.s_[:, 2:3], np.s_[2:, :5]], ids=["token", "head", "request"]
)
def test_bits_of_a_row_depend_on_it_alone(changed, row, seed):
    """Rows of one wave share an instruction stream, so one with far higher scores is put in."""
    case = Case("rows", (2, 1), (400, 330), heads=5, page_size=4)
    problem = Problem(case, np.random.default_rng(seed))
    before = run(row, problem, cdna_emulator.SCHEDULES[0], 1)
    wide = problem.q[..., : LATENT + ROPE]
    wide[changed] = bf16(f64(wide[changed]) * 40)
    after = run(row, problem, cdna_emulator.SCHEDULES[0], 1)
    kept = np.ones((3, case.heads), bool)
    kept[changed] = False
    for left, right in zip(before, after, strict=True):
        np.testing.assert_array_equal(left[kept], right[kept])
        assert (left[~kept] != right[~kept]).any()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.arch}-{row.symbol}")
def test_code_is_padded_and_names_its_target(row):
    elf = ELFFile(io.BytesIO(verified_code_object(row)))
    text = elf.get_section_by_name(".text")
    (kernel,) = elf.get_section_by_name(".dynsym").get_symbol_by_name(row.symbol)
    end = kernel["st_value"] + kernel["st_size"] - text["sh_addr"]
    behind = np.frombuffer(text.data()[end:], np.uint32)
    assert len(behind) >= 256  # a KiB that instructions may be fetched from, all s_nop 0
    assert (behind == 0xBF800000).all()
    assert (text["sh_addr"] + text["sh_size"]) % 64 == 0
    segments = (part for part in elf.iter_segments() if isinstance(part, NoteSegment))
    (note,) = (note for part in segments for note in part.iter_notes())
    metadata = msgpack.unpackb(note["n_descdata"])
    assert metadata["amdhsa.target"] == f"amdgcn-amd-amdhsa--{row.arch}"
