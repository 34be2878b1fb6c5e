"""FlashMLA's functions: signatures, numbers against the truth, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import LatentCache, LayoutError, MLADims, use_backend
from mla_core.dropin import flash_mla
from mla_core.dropin.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from mla_core.reference import attention, sparse
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_, poisoned_empty

REQUIRED = inspect.Parameter.empty
V4 = MLADims(1, kv_lora_rank=448, value_includes_rope=True)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def parameters_of(function) -> list[tuple[str, object]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def test_signatures():
    assert flash_mla.__all__ == [
        "FlashMLASchedMeta",
        "flash_mla_sparse_fwd",
        "flash_mla_with_kvcache",
        "get_mla_metadata",
    ]
    assert parameters_of(flash_mla_with_kvcache) == [
        ("q", REQUIRED),
        ("k_cache", REQUIRED),
        ("block_table", REQUIRED),
        ("cache_seqlens", REQUIRED),
        ("head_dim_v", REQUIRED),
        ("tile_scheduler_metadata", REQUIRED),
        ("num_splits", None),
        ("softmax_scale", None),
        ("causal", False),
        ("is_fp8_kvcache", False),
        ("indices", None),
        ("attn_sink", None),
        ("extra_k_cache", None),
        ("extra_indices_in_kvcache", None),
        ("topk_length", None),
        ("extra_topk_length", None),
    ]
    assert parameters_of(flash_mla_sparse_fwd) == [
        ("q", REQUIRED),
        ("kv", REQUIRED),
        ("indices", REQUIRED),
        ("sm_scale", REQUIRED),
        ("d_v", 512),
        ("attn_sink", None),
        ("topk_length", None),
    ]
    assert parameters_of(get_mla_metadata) == [
        ("cache_seqlens", None),
        ("num_q_tokens_per_head_k", None),
        ("num_heads_k", None),
        ("num_heads_q", None),
        ("is_fp8_kvcache", False),
        ("topk", None),
    ]


class Pool:
    """A poisoned cache with random live rows, and what the rows are after rounding."""

    def __init__(self, layout, dims, page_size, generator, *, num_pages=9, live_share=0.6):
        self.dims = dims
        # A page stride beyond the page, as FlashMLA pads its fp8 blocks.
        dense = LatentCache.allocate(layout, dims, num_pages, page_size).buffers[0]
        row = dense[0].numel()
        padded = poison_(torch.empty(num_pages, row + 64, dtype=dense.dtype))
        inner = torch.empty(dense.shape, device="meta").stride()[1:]
        buffer = padded.as_strided(dense.shape, (row + 64, *inner))
        self.cache = LatentCache.bind(layout, dims, page_size, buffer)
        slots = torch.randperm(num_pages * page_size, generator=generator)
        self.live = slots[: max(1, int(live_share * len(slots)))]
        kv_c = torch.randn(len(self.live), dims.kv_lora_rank, generator=generator)
        k_pe = torch.randn(len(self.live), dims.qk_rope_head_dim, generator=generator)
        self.cache.write(kv_c, k_pe, self.live)

    @property
    def k_cache(self) -> torch.Tensor:
        """The cache as FlashMLA takes it: [num_blocks, page_size, 1, width]."""
        return self.cache.buffers[0].unsqueeze(2)

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.read(torch.arange(self.cache.num_slots))

    def indices(self, shape, generator) -> torch.Tensor:
        """Draw live slots with some that must be masked."""
        picked = torch.randint(len(self.live), shape, generator=generator)
        indices = self.live[picked].to(torch.int32)
        kind = torch.randint(8, shape, generator=generator)
        indices[kind == 0] = -1
        indices[kind == 1] = self.cache.num_slots
        indices[kind == 2] = 1 << 30
        return indices


def dense_batch(layout, dims, lens, q_len, heads, page_size, dtype, generator):
    """Return the arguments of a dense call over a ragged batch and the truth's operands."""
    pages_each = [-(-n // page_size) for n in lens]
    pool = Pool(layout, dims, page_size, generator, num_pages=sum(pages_each) + 2, live_share=1)
    order = torch.randperm(sum(pages_each) + 2, generator=generator).to(torch.int32)
    table = torch.full((len(lens), max(pages_each, default=0) + 2), 1 << 30, dtype=torch.int32)
    kv_c, k_pe, first = [], [], 0
    for b, (n, pages) in enumerate(zip(lens, pages_each, strict=True)):
        table[b, :pages] = order[first : first + pages]
        first += pages
        slots = (table[b, :pages, None].long() * page_size + torch.arange(page_size)).flatten()
        latent, rope = pool.cache.read(slots[:n])
        kv_c.append(latent)
        k_pe.append(rope)
        # What lies past a request's length must not matter.
        for buffer, field in ((slots[n:], "kv_c"), (slots[n:], "k_pe")):
            view = pool.cache.field(field)
            poison_dead(view, buffer, page_size)
    q = torch.randn(len(lens), q_len, heads, dims.latent_dim, generator=generator).to(dtype)
    arguments = {
        "q": q,
        "k_cache": pool.k_cache,
        "block_table": table,
        "cache_seqlens": i32(*lens),
        "head_dim_v": dims.value_dim,
    }
    return arguments, kv_c, k_pe


def poison_dead(view, slots, page_size):
    for slot in slots.tolist():
        poison_(view[slot // page_size, slot % page_size])


def dense_truth(arguments, kv_c, k_pe, *, rank=512, **options):
    q = arguments["q"]
    batch_size, q_len = q.shape[:2]
    flat = q.flatten(0, 1)
    out, lse = attention.decode(
        flat[..., :rank],
        flat[..., rank:],
        kv_c,
        k_pe,
        torch.arange(batch_size + 1) * q_len,
        value_includes_rope=rank == 448,
        **{"sm_scale": q.shape[-1] ** -0.5, "causal": False} | options,
    )
    lse = lse.view(batch_size, q_len, -1).transpose(1, 2)
    return out.view(batch_size, q_len, *out.shape[1:]), lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("page_size", "heads", "q_len"), [(64, 16, 1), (1, 3, 2), (7, 128, 2)])
def test_dense_matches_the_truth(dtype, causal, page_size, heads, q_len, rng):
    layout = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    arguments, kv_c, k_pe = dense_batch(
        layout, MLADims(heads), [70, 0, 1, 64], q_len, heads, page_size, dtype, rng
    )
    schedule, num_splits = get_mla_metadata()
    with poisoned_empty():
        out, lse = flash_mla_with_kvcache(
            **arguments,
            tile_scheduler_metadata=schedule,
            num_splits=num_splits,
            softmax_scale=0.07,
            causal=causal,
        )
    expected_out, expected_lse = dense_truth(arguments, kv_c, k_pe, sm_scale=0.07, causal=causal)
    assert out.shape == (4, q_len, heads, 512)
    assert lse.shape == (4, heads, q_len)
    assert_close(out, expected_out, what="out", dtype=dtype)
    assert_close(lse, expected_lse, what="lse")
    assert lse[1].eq(-torch.inf).all()


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_dense_batch(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    dims = MLADims(data.draw(st.integers(1, 5)), kv_lora_rank=64, qk_rope_head_dim=32)
    lens = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    q_len, page_size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    causal = data.draw(st.booleans())
    arguments, kv_c, k_pe = dense_batch(
        "fp32", dims, lens, q_len, dims.num_heads, page_size, torch.float32, generator
    )
    out, lse = flash_mla_with_kvcache(
        **arguments, tile_scheduler_metadata=FlashMLASchedMeta(), causal=causal
    )
    expected_out, expected_lse = dense_truth(arguments, kv_c, k_pe, rank=64, causal=causal)
    assert_close(out, expected_out, what="out")
    assert_close(lse, expected_lse, what="lse")


@pytest.mark.parametrize(
    ("layout", "dims", "rank"), [("fp8_ds656", MLADims(4), 512), ("v4_584", V4, 448)]
)
@pytest.mark.parametrize("as_fp8", [False, True])
def test_dense_over_fp8_caches(layout, dims, rank, as_fp8, rng):
    arguments, kv_c, k_pe = dense_batch(layout, dims, [70, 0, 5], 2, 4, 64, torch.bfloat16, rng)
    if as_fp8:
        arguments["k_cache"] = arguments["k_cache"].view(torch.float8_e4m3fn)
    out, lse = flash_mla_with_kvcache(
        **arguments,
        tile_scheduler_metadata=FlashMLASchedMeta(),
        causal=True,
        is_fp8_kvcache=True,
    )
    expected_out, expected_lse = dense_truth(arguments, kv_c, k_pe, rank=rank, causal=True)
    assert_close(out, expected_out, what="out", dtype="bf16")
    assert_close(lse, expected_lse, what="lse")


def scaled_by_sink(out, lse, attn_sink):
    """FlashMLA's definition of a sink, on out [..., H, V] and lse [..., H]."""
    weight = torch.exp(lse) / (torch.exp(lse) + torch.exp(attn_sink.double()))
    return out * torch.where(lse == -torch.inf, 0.0, weight)[..., None]


def test_dense_sink_scales_the_output_only(rng):
    arguments, kv_c, k_pe = dense_batch(
        "bf16", MLADims(4), [9, 0, 30], 2, 4, 16, torch.bfloat16, rng
    )
    sink = torch.tensor([0.5, -torch.inf, 3.0, torch.inf])
    out, lse = flash_mla_with_kvcache(
        **arguments, tile_scheduler_metadata=FlashMLASchedMeta(), attn_sink=sink
    )
    expected_out, expected_lse = dense_truth(arguments, kv_c, k_pe)
    assert_close(lse, expected_lse, what="lse")
    expected_out = scaled_by_sink(expected_out, expected_lse.transpose(1, 2), sink)
    expected_out[:, :, 3] = 0
    assert_close(out, expected_out, what="out", dtype="bf16")
    assert out.dtype == torch.bfloat16
    assert not out[:, :, 3].any()


def sparse_truth(q, pool, indices, lengths=None, *, rank=512, sm_scale=None):
    kv_c, k_pe = pool.rows()
    flat = q.flatten(0, -3)
    return sparse.sparse_attention(
        flat[..., :rank],
        flat[..., rank:],
        kv_c,
        k_pe,
        indices.flatten(0, -2),
        sm_scale=sm_scale or q.shape[-1] ** -0.5,
        topk_length=lengths,
        value_includes_rope=rank == 448,
    )


@pytest.mark.parametrize("with_length", [False, True])
@pytest.mark.parametrize(
    ("layout", "dims", "rank", "page_size"),
    [
        ("fp8_ds656", MLADims(4), 512, 64),
        ("fp8_ds656", MLADims(4), 512, 1),
        ("v4_584", V4, 448, 64),
        ("bf16", MLADims(4), 512, 5),
    ],
)
def test_sparse_matches_the_truth(layout, dims, rank, page_size, with_length, rng):
    pool = Pool(layout, dims, page_size, rng)
    q = torch.randn(3, 2, 4, dims.latent_dim, generator=rng).bfloat16()
    indices = pool.indices((3, 2, 40), rng)
    indices[1, 0] = -1
    lengths = i32(40, 17, 0) if with_length else None
    out, lse = flash_mla_with_kvcache(
        q,
        pool.k_cache,
        None,
        None,
        512,
        FlashMLASchedMeta(),
        is_fp8_kvcache=layout != "bf16",
        indices=indices,
        topk_length=lengths,
    )
    per_row = None if lengths is None else lengths.repeat_interleave(2)
    expected_out, _, expected_lse = sparse_truth(q, pool, indices, per_row, rank=rank)
    assert_close(out.flatten(0, 1), expected_out, what="out", dtype="bf16")
    assert_close(lse, expected_lse.view(3, 2, 4).transpose(1, 2), what="lse")
    assert lse[1, :, 0].eq(-torch.inf).all()
    assert not out[1, 0].any()


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_two_caches_are_one_softmax(with_sink, with_length, rng):
    pool, extra = (Pool("fp8_ds656", MLADims(4), ps, rng) for ps in (64, 2))
    q = torch.randn(3, 2, 4, 576, generator=rng).bfloat16()
    indices, extra_indices = pool.indices((3, 2, 30), rng), extra.indices((3, 2, 7), rng)
    # One row sees the first cache only, one the second only, one neither.
    extra_indices[0, 0], indices[0, 1] = -1, -1
    indices[1, 0] = extra_indices[1, 0] = -1
    lengths = (i32(30, 9, 0), i32(7, 3, 7)) if with_length else (None, None)
    sink = torch.randn(4, generator=rng) if with_sink else None
    out, lse = flash_mla_with_kvcache(
        q,
        pool.k_cache,
        None,
        None,
        512,
        FlashMLASchedMeta(),
        softmax_scale=0.05,
        is_fp8_kvcache=True,
        indices=indices,
        attn_sink=sink,
        extra_k_cache=extra.k_cache,
        extra_indices_in_kvcache=extra_indices,
        topk_length=lengths[0],
        extra_topk_length=lengths[1],
    )
    # The truth: one cache with the rows of both.
    joined = []
    for source, length in zip((indices, extra_indices), lengths, strict=True):
        limit = torch.full((3,), source.shape[-1]) if length is None else length
        is_read = torch.arange(source.shape[-1]) < limit[:, None, None]
        joined.append(torch.where(is_read, source, -1))
    num_slots = pool.cache.num_slots
    valid = (joined[0] >= 0) & (joined[0] < num_slots)
    shifted = torch.where(joined[1] >= 0, joined[1].long() + num_slots, -1)
    both = torch.cat((torch.where(valid, joined[0].long(), -1), shifted), dim=-1)
    rows = [torch.cat(parts) for parts in zip(pool.rows(), extra.rows(), strict=True)]
    expected_out, _, expected_lse = sparse.sparse_attention(
        q.flatten(0, 1)[..., :512], q.flatten(0, 1)[..., 512:], *rows, both.flatten(0, 1),
        sm_scale=0.05,
    )  # fmt: skip
    if sink is not None:
        expected_out = scaled_by_sink(expected_out, expected_lse, sink)
    assert_close(out.flatten(0, 1), expected_out, what="out", dtype="bf16")
    assert_close(lse, expected_lse.view(3, 2, 4).transpose(1, 2), what="lse")
    assert lse[1, :, 0].eq(-torch.inf).all()


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
@pytest.mark.parametrize(("width", "d_v"), [(576, 512), (512, 512), (96, 64)])
def test_sparse_prefill_matches_the_truth(width, d_v, with_sink, with_length, rng):
    q = torch.randn(6, 3, width, generator=rng).bfloat16()
    kv = torch.randn(50, 1, width, generator=rng).bfloat16()
    indices = torch.randint(-5, 60, (6, 1, 20), generator=rng, dtype=torch.int32)
    indices[2] = -1
    kv[7] = torch.nan
    indices[indices == 7] = -1
    lengths = i32(20, 5, 20, 0, 1, 33) if with_length else None
    sink = torch.tensor([0.3, torch.inf, -torch.inf]) if with_sink else None
    with poisoned_empty():
        out, max_logits, lse = flash_mla_sparse_fwd(
            q, kv, indices, 0.06, d_v, attn_sink=sink, topk_length=lengths
        )
    expected_out, expected_max, expected_lse = sparse.sparse_attention(
        q[..., :d_v], q[..., d_v:], kv[:, 0, :d_v], kv[:, 0, d_v:], indices[:, 0], sm_scale=0.06,
        topk_length=lengths,
    )  # fmt: skip
    if sink is not None:
        expected_out = scaled_by_sink(expected_out, expected_lse, sink)
        expected_out[:, 1] = 0
    assert out.shape == (6, 3, d_v)
    assert_close(out, expected_out, what="out", dtype="bf16")
    assert_close(max_logits, expected_max, what="max_logits")
    assert_close(lse, expected_lse, what="lse")
    assert max_logits[2].eq(-torch.inf).all()


def test_sparse_prefill_without_indices_or_tokens(rng):
    q, kv = torch.randn(2, 3, 96, generator=rng), torch.randn(5, 1, 96, generator=rng)
    out, max_logits, lse = flash_mla_sparse_fwd(
        q, kv, torch.zeros(2, 1, 0, dtype=torch.int32), 0.1, 64
    )
    assert not out.any()
    assert lse.eq(-torch.inf).all()
    assert max_logits.eq(-torch.inf).all()
    out, _, lse = flash_mla_sparse_fwd(q[:0], kv, torch.zeros(0, 1, 4, dtype=torch.int32), 0.1, 64)
    assert out.shape == (0, 3, 64)
    assert lse.shape == (0, 3)


def test_max_logits_in_blocks_of_tokens(rng, monkeypatch):
    monkeypatch.setattr("mla_core.dropin.flash_mla.sparse.GATHERED_ELEMENTS", 2 * 9 * 96)
    q, kv = torch.randn(5, 3, 96, generator=rng), torch.randn(20, 1, 96, generator=rng)
    indices = torch.randint(20, (5, 1, 9), generator=rng, dtype=torch.int32)
    _, max_logits, _ = flash_mla_sparse_fwd(q, kv, indices, 0.1, 64)
    scores = 0.1 * torch.einsum("thd,tkd->thk", q, kv[indices[:, 0].long(), 0])
    assert_close(max_logits, scores.amax(2), what="max_logits")


def test_lazy_schedule_keeps_the_plan_while_shapes_stay(rng):
    arguments, kv_c, k_pe = dense_batch("bf16", MLADims(2), [9, 30], 1, 2, 16, torch.bfloat16, rng)
    schedule, num_splits = get_mla_metadata()
    assert (schedule.plan, num_splits) == (None, None)
    flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=schedule)
    plan = schedule.plan
    assert plan is not None
    # Other lengths need no other plan, other shapes do.
    arguments["cache_seqlens"] = i32(3, 17)
    _, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=schedule)
    assert schedule.plan is plan
    shorter = [kv_c[0][:3], kv_c[1][:17]], [k_pe[0][:3], k_pe[1][:17]]
    assert_close(lse, dense_truth(arguments, *shorter)[1], what="lse")
    with use_backend("reference"):
        flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=schedule)
        assert schedule.plan is not plan
        plan = schedule.plan
    arguments["q"] = arguments["q"].repeat(1, 2, 1, 1)
    _, lse = flash_mla_with_kvcache(**arguments, tile_scheduler_metadata=schedule, causal=True)
    assert schedule.plan is not plan
    assert_close(lse, dense_truth(arguments, *shorter, causal=True)[1], what="lse")


@pytest.mark.gpu
def test_captured_call_replays_with_other_lengths(rng):
    arguments, kv_c, k_pe = dense_batch(
        "bf16", MLADims(16), [90, 300], 1, 16, 64, torch.bfloat16, rng
    )
    on_device = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    schedule = FlashMLASchedMeta()
    flash_mla_with_kvcache(**on_device, tile_scheduler_metadata=schedule)
    eager_plan = schedule.plan
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_mla_with_kvcache(**on_device, tile_scheduler_metadata=schedule)
    # The graph owns its workspaces: dropping the schedule must not free them.
    assert schedule.plan is not eager_plan
    del schedule, eager_plan
    for lens in ([90, 300], [0, 64]):
        on_device["cache_seqlens"].copy_(i32(*lens))
        out.fill_(torch.nan)
        graph.replay()
        cut = [[row[:n] for row, n in zip(rows, lens, strict=True)] for rows in (kv_c, k_pe)]
        expected_out, expected_lse = dense_truth(arguments, *cut)
        assert_close(out, expected_out, what="out", dtype="bf16")
        assert_close(lse, expected_lse, what="lse", dtype="bf16")


@pytest.mark.parametrize("batch_size", [0, 1, 3, 7])
@pytest.mark.parametrize("topk", [None, 64])
def test_schedule_tensors_cover_each_request_once(batch_size, topk):
    lens = torch.arange(10, 10 + batch_size, dtype=torch.int32)
    schedule, num_splits = get_mla_metadata(lens, 128, 1, 64, True, topk)
    assert schedule.dtype == num_splits.dtype == torch.int32
    assert schedule.shape[1] == 8
    assert num_splits.tolist() == list(range(batch_size + 1))
    seen = []
    for first, begin, last, end, split, *rest in schedule.tolist():
        if first == batch_size:
            continue
        assert (begin, split, rest) == (0, 0, [0, 0, 0])
        assert end == (topk or int(lens[last]))
        seen.extend(range(first, last + 1))
    assert seen == list(range(batch_size))


def test_schedule_tensors_over_several_parts(monkeypatch):
    monkeypatch.setattr("mla_core.dropin.flash_mla.schedule._num_processors", lambda device: 12)
    # 129 query rows are three blocks of 64, so 4 parts; 2 requests leave two of them idle.
    schedule, _ = get_mla_metadata(i32(5, 6), 129, 1)
    assert schedule.tolist() == [
        [2, 0, 2, 0, 0, 0, 0, 0],
        [0, 0, 0, 5, 0, 0, 0, 0],
        [2, 0, 2, 0, 0, 0, 0, 0],
        [1, 0, 1, 6, 0, 0, 0, 0],
    ]


def test_schedule_tensors_are_accepted(rng):
    arguments, kv_c, k_pe = dense_batch("bf16", MLADims(2), [9, 30], 1, 2, 16, torch.bfloat16, rng)
    schedule, num_splits = get_mla_metadata(arguments["cache_seqlens"], 2, 1)
    # Positional, as older callers write it.
    out, lse = flash_mla_with_kvcache(
        arguments["q"],
        arguments["k_cache"],
        arguments["block_table"],
        arguments["cache_seqlens"],
        512,
        schedule,
        num_splits,
        0.07,
        True,
    )
    expected_out, expected_lse = dense_truth(arguments, kv_c, k_pe, sm_scale=0.07)
    assert_close(out, expected_out, what="out", dtype="bf16")
    assert_close(lse, expected_lse, what="lse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2, dtype=torch.int32), 16, 1), r"cache_seqlens must be \[B\]"),
        ((torch.zeros(2), 16, 1), "cache_seqlens must be int32"),
        ((i32(1, 2), None, 1), "num_q_tokens_per_head_k must be >= 1 with cache_seqlens, got None"),
        ((i32(1, 2), 0, 1), "num_q_tokens_per_head_k must be >= 1"),
        ((i32(1, 2), 16, 2), "num_heads_k must be 1, got 2"),
        ((i32(1, 2), 16), "num_heads_k must be 1, got None"),
    ],
)
def test_bad_metadata(arguments, message):
    with pytest.raises(LayoutError, match=message):
        get_mla_metadata(*arguments)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 2, 576, dtype=BF16)}, r"q must be \[B, s_q, H, D\]"),
        ({"q": torch.zeros(2, 1, 2, 576, dtype=torch.float64)}, "q must be bfloat16 or float16"),
        ({"k_cache": torch.zeros(5, 16, 2, 576, dtype=BF16)}, r"k_cache must be .* 1, 576\]"),
        ({"k_cache": torch.zeros(5, 16, 1, 576)}, "k_cache must be .* got .* torch.float32"),
        ({"k_cache": torch.zeros(5, 16, 576, dtype=BF16)}, "k_cache must be"),
        (
            {"k_cache": torch.zeros(5, 16, 1, 576, dtype=BF16, device="meta")},
            "k_cache must be on cpu like q, got meta",
        ),
        ({"is_fp8_kvcache": True}, r"k_cache must be .* 1, 656\] float8_e4m3fn or uint8"),
        (
            {"is_fp8_kvcache": True, "head_dim_v": 256},
            "head_dim_v be 512, with fp8 caches, got head_dim 576 and head_dim_v 256",
        ),
        ({"head_dim_v": 0}, r"head_dim_v must be in 1\.\.576"),
        ({"head_dim_v": 577}, r"head_dim_v must be in 1\.\.576"),
        ({"head_dim_v": 500}, "kv_lora_rank must be a multiple of 32"),
        ({"block_table": None}, "block_table must be given without indices"),
        ({"cache_seqlens": None}, "cache_seqlens must be given without indices"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, "seq_lens must be"),
        (
            {
                "block_table": torch.zeros(3, 4, dtype=torch.int32),
                "cache_seqlens": i32(1, 1, 1),
            },
            r"block_table must be \[B=2, max_blocks\] like q, got 3 rows",
        ),
        ({"cache_seqlens": i32(9, 999)}, "seq_lens must be in 0.."),
        ({"topk_length": i32(1, 1)}, "topk_length must be None without indices"),
        ({"extra_k_cache": torch.zeros(1)}, "extra_k_cache must be None without indices"),
        ({"attn_sink": torch.zeros(3)}, r"attn_sink must be \[2\]"),
        ({"attn_sink": torch.zeros(2).double()}, "attn_sink must be float32"),
        ({"num_splits": i32(0, 1, 2)}, "num_splits must be None with a FlashMLASchedMeta"),
        ({"tile_scheduler_metadata": None}, "must be the two results of get_mla_metadata, got No"),
        (
            {"tile_scheduler_metadata": torch.zeros(1, 8, dtype=torch.int32)},
            "must be the two results of get_mla_metadata, got Tensor and NoneType",
        ),
        (
            {
                "tile_scheduler_metadata": torch.zeros(1, 5, dtype=torch.int32),
                "num_splits": i32(0, 1, 2),
            },
            r"tile_scheduler_metadata must be \[num_sm_parts, 8\]",
        ),
        (
            {
                "tile_scheduler_metadata": torch.zeros(1, 8, dtype=torch.int32),
                "num_splits": i32(0, 1),
            },
            r"num_splits must be \[3\]",
        ),
    ],
)  # fmt: skip
def test_bad_dense_input(changes, message, rng):
    arguments, _, _ = dense_batch("bf16", MLADims(2), [9, 30], 1, 2, 16, BF16, rng)
    arguments["tile_scheduler_metadata"] = FlashMLASchedMeta()
    with pytest.raises(LayoutError, match=message):
        flash_mla_with_kvcache(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": True}, "causal must be False with indices"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int32)}, r"indices must be \[2, 1, topk\]"),
        ({"indices": torch.zeros(2, 1, 4)}, "indices must be int32"),
        ({"topk_length": i32(1)}, r"topk_length must be \[2\]"),
        ({"extra_k_cache": torch.zeros(1)}, "must be given together, got only the cache"),
        ({"extra_indices_in_kvcache": i32(1)}, "must be given together, got only the indices"),
        ({"extra_topk_length": i32(1, 1)}, "extra_topk_length must be None without extra_k_cache"),
        (
            {
                "extra_k_cache": torch.zeros(2, 4, 1, 500, dtype=BF16),
                "extra_indices_in_kvcache": torch.zeros(2, 1, 4, dtype=torch.int32),
            },
            "extra_k_cache must be",
        ),
        (
            {
                "extra_k_cache": torch.zeros(2, 4, 1, 576, dtype=BF16),
                "extra_indices_in_kvcache": torch.zeros(2, 2, 4, dtype=torch.int32),
            },
            r"extra_indices_in_kvcache must be \[2, 1, topk\]",
        ),
        (
            {
                "extra_k_cache": torch.zeros(2, 4, 1, 576, dtype=BF16),
                "extra_indices_in_kvcache": torch.zeros(2, 1, 4, dtype=torch.int32),
                "extra_topk_length": i32(1),
            },
            r"extra_topk_length must be \[2\]",
        ),
    ],
)
def test_bad_sparse_input(changes, message):
    arguments = {
        "q": torch.zeros(2, 1, 3, 576, dtype=BF16),
        "k_cache": torch.zeros(2, 4, 1, 576, dtype=BF16),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": FlashMLASchedMeta(),
        "indices": torch.zeros(2, 1, 4, dtype=torch.int32),
    }
    with pytest.raises(LayoutError, match=message):
        flash_mla_with_kvcache(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 96)}, r"q must be \[s_q, H, D\]"),
        ({"kv": torch.zeros(5, 2, 96)}, r"kv must be \[s_kv, 1, 96\]"),
        ({"kv": torch.zeros(5, 1, 96, dtype=BF16)}, "kv must be float32"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int32)}, r"indices must be \[2, 1, topk\]"),
        ({"d_v": 100}, r"head_dim_v must be in 1\.\.96"),
        ({"attn_sink": torch.zeros(4)}, r"attn_sink must be \[3\]"),
        ({"topk_length": i32(1)}, r"topk_length must be \[2\]"),
    ],
)
def test_bad_sparse_prefill(changes, message):
    arguments = {
        "q": torch.zeros(2, 3, 96),
        "kv": torch.zeros(5, 1, 96),
        "indices": torch.zeros(2, 1, 4, dtype=torch.int32),
        "sm_scale": 0.1,
        "d_v": 64,
    }
    with pytest.raises(LayoutError, match=message):
        flash_mla_sparse_fwd(**arguments | changes)
