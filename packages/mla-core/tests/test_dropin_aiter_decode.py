"""aiter's `mla_decode_fwd`: signature, numbers against the truth, and what it refuses."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import LayoutError, MLADims
from mla_core.batch import indptr_of
from mla_core.dropin.aiter import mla_decode_fwd
from mla_core.plan import AttentionOptions
from mla_core.reference import attention, sparse
from mla_core.testing.assertions import assert_close
from mla_core.testing.cases import DecodeCase, DecodeInputs

SMALL = MLADims(3, kv_lora_rank=64, qk_rope_head_dim=32)
REQUIRED = inspect.Parameter.empty


def arguments_of(inputs: DecodeInputs, max_seqlen_q: int) -> dict:
    """Write a case as the arguments of the call."""
    cache = inputs.kv.cache
    buffer = cache.buffers[0]
    if cache.layout.family == "standard":
        buffer = buffer.unsqueeze(2)
    q = torch.cat((inputs.ql_nope, inputs.q_pe), dim=-1)
    out_dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
    return {
        "q": q,
        "kv_buffer": buffer,
        "o": torch.full(inputs.ql_nope.shape, torch.nan, dtype=out_dtype),
        "qo_indptr": inputs.qo_indptr,
        "kv_indptr": inputs.kv.kv_indptr,
        "kv_indices": inputs.kv.kv_page_indices,
        "kv_last_page_lens": inputs.kv.kv_last_page_len,
        "max_seqlen_q": max_seqlen_q,
        "page_size": cache.page_size,
        "sm_scale": inputs.sm_scale,
        "q_scale": inputs.q_scale,
        "kv_scale": cache.scale,
    }


def call(case: DecodeCase, **changes):
    """Run a case and compare output and lse with the truth."""
    inputs = case.build()
    arguments = arguments_of(inputs, max(case.query_lens, default=1))
    if inputs.global_kv_lens is not None:
        arguments["g_kv_indptr"] = indptr_of(inputs.global_kv_lens)
        arguments["cp_world_size"] = case.options.cp_world_size
        arguments["cp_rank"] = case.options.cp_rank
    arguments["causal"] = case.options.causal
    arguments["logit_cap"] = case.options.softcap
    arguments |= changes
    logits, lse = mla_decode_fwd(**arguments, return_lse=True)
    assert_close(arguments["o"], inputs.expected_out, what="o", dtype=arguments["o"].dtype)
    assert_close(lse, inputs.expected_lse, what="lse")
    return logits, lse, arguments["o"]


def test_signature():
    parameters = inspect.signature(mla_decode_fwd).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [
        ("q", REQUIRED),
        ("kv_buffer", REQUIRED),
        ("o", REQUIRED),
        ("qo_indptr", REQUIRED),
        ("kv_indptr", REQUIRED),
        ("kv_indices", REQUIRED),
        ("kv_last_page_lens", REQUIRED),
        ("max_seqlen_q", REQUIRED),
        ("page_size", 1),
        ("nhead_kv", 1),
        ("sm_scale", None),
        ("logit_cap", 0.0),
        ("num_kv_splits", None),
        ("num_kv_splits_indptr", None),
        ("work_meta_data", None),
        ("work_indptr", None),
        ("work_info_set", None),
        ("reduce_indptr", None),
        ("reduce_final_map", None),
        ("reduce_partial_map", None),
        ("q_scale", None),
        ("kv_scale", None),
        ("intra_batch_mode", False),
        ("return_logits", False),
        ("return_lse", False),
        ("g_kv_indptr", None),
        ("cp_world_size", 1),
        ("cp_rank", 0),
        ("causal", True),
    ]
    kinds = {p.kind for p in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


RAGGED = (5, 0, 17, 1, 40)


@pytest.mark.parametrize("q_dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_matches_the_truth(q_dtype, page_size, seed):
    call(
        DecodeCase(
            "ragged", RAGGED, dims=SMALL, page_size=page_size, q_dtype=q_dtype, layout=q_dtype,
            seed=seed,
        )
    )  # fmt: skip


@pytest.mark.parametrize("num_heads", [1, 16, 48, 128])
def test_head_counts(num_heads, seed):
    call(DecodeCase("heads", (9, 0, 33), dims=MLADims(num_heads), page_size=1, seed=seed))


@pytest.mark.parametrize("causal", [True, False])
def test_several_query_tokens(causal, seed):
    # The second request has more query tokens than KV, the third no KV at all.
    call(
        DecodeCase(
            "mtp", (20, 2, 0, 7), q_lens=(4, 3, 2, 0), dims=SMALL, page_size=4, q_dtype="fp32",
            layout="fp32", options=AttentionOptions(causal=causal), seed=seed,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("q_dtype", "layout"),
    [
        ("bf16", "fp8"),
        ("fp8_e4m3", "fp8"),
        ("fp8_e4m3fnuz", "fp8_fnuz"),
        ("bf16", "fp8_seg656"),
    ],
)
def test_quantised_caches(q_dtype, layout, seed):
    dims = MLADims(4)
    call(
        DecodeCase(
            "quantised", RAGGED, dims=dims, page_size=16, q_dtype=q_dtype, layout=layout, seed=seed
        )
    )


def test_scales_of_fp8_caches_default_to_one_and_may_be_scalars(seed):
    case = DecodeCase("scalar", (30,), dims=SMALL, q_dtype="bf16", layout="fp8", seed=seed)
    inputs = case.build()
    arguments = arguments_of(inputs, 1)
    scale = float(arguments.pop("kv_scale"))
    mla_decode_fwd(**arguments, kv_scale=torch.tensor(scale))
    scaled = arguments["o"].clone()
    assert_close(scaled, inputs.expected_out, what="o", dtype="bf16")
    arguments["sm_scale"] *= scale
    mla_decode_fwd(**arguments)
    assert_close(arguments["o"].float() * scale, inputs.expected_out, what="o", dtype="bf16")


def test_scales_of_other_dtypes_have_no_effect(seed):
    call(
        DecodeCase("bf16", (30, 3), dims=SMALL, seed=seed),
        q_scale=torch.tensor([3.0]),
        kv_scale=torch.tensor([5.0]),
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_context_parallel(rank, seed):
    options = AttentionOptions(cp_world_size=3, cp_rank=rank)
    call(
        DecodeCase(
            "cp", (6, 0, 1, 19), q_lens=(2, 3, 4, 1), dims=SMALL, page_size=1, q_dtype="fp32",
            layout="fp32", options=options, seed=seed,
        )
    )  # fmt: skip


def test_logit_cap(seed):
    options = AttentionOptions(softcap=0.7)
    call(
        DecodeCase(
            "softcap", RAGGED, dims=SMALL, q_dtype="fp32", layout="fp32", options=options, seed=seed
        )
    )


def test_negative_logit_cap_means_none(seed):
    call(DecodeCase("uncapped", RAGGED, dims=SMALL, seed=seed), logit_cap=-1.0)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_ragged_batch(data):
    kv_lens = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    q_lens = data.draw(st.lists(st.integers(0, 4), min_size=len(kv_lens), max_size=len(kv_lens)))
    call(
        DecodeCase(
            "any",
            kv_lens,
            q_lens=q_lens,
            dims=SMALL.with_heads(data.draw(st.integers(1, 9))),
            page_size=data.draw(st.integers(1, 8)),
            q_dtype="fp32",
            layout="fp32",
            options=AttentionOptions(causal=data.draw(st.booleans())),
            hidden_page=bool(kv_lens[0]) and data.draw(st.booleans()),
            strided=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 1 << 30)),
        )
    )


def test_default_scale_is_that_of_the_absorbed_width(seed):
    inputs = DecodeCase(
        "scale", (11, 4), dims=SMALL, q_dtype="fp32", layout="fp32", seed=seed
    ).build()
    arguments = arguments_of(inputs, 1) | {"sm_scale": None}
    mla_decode_fwd(**arguments)
    default = arguments["o"].clone()
    mla_decode_fwd(**arguments | {"sm_scale": 96**-0.5})
    assert torch.equal(default, arguments["o"])
    mla_decode_fwd(**arguments | {"sm_scale": inputs.sm_scale})
    assert not torch.equal(default, arguments["o"])


@pytest.mark.parametrize("page_size", [1, 4])
def test_last_page_lens_that_nobody_reads(page_size, seed):
    inputs = DecodeCase(
        "garbage", RAGGED, dims=SMALL, page_size=page_size, q_dtype="fp32", layout="fp32", seed=seed
    ).build()
    arguments = arguments_of(inputs, 1)
    last = arguments["kv_last_page_lens"].clone()
    last[1] = 77
    if page_size == 1:
        last[:] = -5
    mla_decode_fwd(**arguments | {"kv_last_page_lens": last})
    assert_close(arguments["o"], inputs.expected_out, what="o")


def test_output_is_written_in_place_through_its_strides(seed):
    inputs = DecodeCase("views", RAGGED, dims=SMALL, seed=seed).build()
    arguments = arguments_of(inputs, 1)
    total_q, heads, rank = arguments["o"].shape
    wide = torch.full((total_q, 2 * heads, rank), torch.nan, dtype=torch.bfloat16)
    view = wide[:, ::2]
    storage = wide.untyped_storage().data_ptr()
    logits, lse = mla_decode_fwd(**arguments | {"o": view})
    assert lse is None
    assert view.untyped_storage().data_ptr() == storage
    assert_close(wide[:, ::2], inputs.expected_out, what="o", dtype="bf16")
    assert wide[:, 1::2].isnan().all()
    wide[0, 0, 0] = 42.0
    assert logits[0, 0, 0, 0] == 42.0


@pytest.mark.parametrize("num_kv_splits", [1, 3, 16])
def test_logits_have_the_shape_of_the_splits(num_kv_splits, seed):
    case = DecodeCase("splits", RAGGED, dims=SMALL, seed=seed)
    logits, _, o = call(case, num_kv_splits=num_kv_splits)
    assert logits.shape == (5, num_kv_splits, 3, 64)
    for split in range(num_kv_splits):
        assert torch.equal(logits[:, split], o)


def test_rows_past_the_last_request_are_left_alone(seed):
    inputs = DecodeCase("padded", (7, 3), dims=SMALL, seed=seed).build()
    arguments = arguments_of(inputs, 1)
    arguments["q"] = torch.cat((arguments["q"], torch.full_like(arguments["q"], torch.nan)))
    arguments["o"] = arguments["o"].repeat(2, 1, 1)
    _, lse = mla_decode_fwd(**arguments, return_lse=True)
    assert_close(arguments["o"][:2], inputs.expected_out, what="o", dtype="bf16")
    assert arguments["o"][2:].isnan().all()
    assert lse[2:].eq(-torch.inf).all()


def work_list(num_works=6, num_tiles=4) -> dict:
    """Return buffers of plausible shapes, full of garbage."""
    return {
        "work_meta_data": torch.zeros(2, dtype=torch.uint64),
        "work_indptr": torch.full((5,), 9, dtype=torch.int32),
        "work_info_set": torch.full((num_works, 8), -7, dtype=torch.int32),
        "reduce_indptr": torch.full((num_tiles + 1,), 3, dtype=torch.int32),
        "reduce_final_map": torch.full((num_tiles, 2), 1 << 30, dtype=torch.int32),
        "reduce_partial_map": torch.full((8,), 1 << 30, dtype=torch.int32),
    }


def test_the_result_does_not_depend_on_the_work_list(seed):
    case = DecodeCase("persistent", RAGGED, dims=SMALL, page_size=1, seed=seed)
    plain = call(case)
    logits, lse, o = call(
        case, **work_list(), num_kv_splits=304, return_logits=True, intra_batch_mode=True
    )
    assert logits.shape == (5, 1, 3, 64)
    assert torch.equal(o, plain[2])
    assert torch.equal(lse, plain[1])


@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("logit_cap", [0.0, 0.6])
def test_topk_table(q_len, logit_cap, seed):
    """Sparse attention: one row of slots for each query token, though qo_indptr has requests."""
    generator = torch.Generator().manual_seed(seed)
    kv_lens, heads, topk = [9, 0, 30], 3, 12
    total_q, num_slots = len(kv_lens) * q_len, 64
    kv_buffer = torch.randn(num_slots, 1, 1, 96, generator=generator)
    q = torch.randn(total_q, heads, 96, generator=generator)
    table = torch.randint(0, num_slots, (total_q, topk), generator=generator, dtype=torch.int32)
    table[0, 3] = -1
    table[-1, 5:8] = -1
    lens = torch.tensor(kv_lens).clamp(max=topk).repeat_interleave(q_len).to(torch.int32)
    # Entries past a row's length are never read.
    column = torch.arange(topk)
    table = torch.where(column < lens[:, None], table, 1 << 30)
    o = torch.full((total_q, heads, 64), torch.nan)
    logits, lse = mla_decode_fwd(
        q,
        kv_buffer,
        o,
        torch.arange(4, dtype=torch.int32) * q_len,
        indptr_of(torch.tensor(kv_lens)),
        table,
        torch.ones(3, dtype=torch.int32),
        1,
        sm_scale=0.1,
        logit_cap=logit_cap,
        return_lse=True,
        **work_list(),
    )
    rows = kv_buffer.flatten(1)
    expected_out, _, expected_lse = sparse.sparse_attention(
        q[..., :64],
        q[..., 64:],
        rows[:, :64],
        rows[:, 64:],
        table,
        sm_scale=0.1,
        topk_length=lens,
        softcap=logit_cap,
    )
    assert_close(o, expected_out, what="o")
    assert_close(lse, expected_lse, what="lse")
    assert logits.shape == (total_q, 1, heads, 64)
    assert logits.data_ptr() == o.data_ptr()


def test_context_parallel_ranks_merge_to_the_whole(seed):
    """What callers do with the returned lse: merge the ranks' results."""
    generator = torch.Generator().manual_seed(seed)
    world_size, lens, q_len, heads = 3, [7, 2, 12], 2, 2
    q = torch.randn(len(lens) * q_len, heads, 96, generator=generator)
    rows = [torch.randn(n, 96, generator=generator) for n in lens]
    qo_indptr = torch.arange(len(lens) + 1, dtype=torch.int32) * q_len
    outs, lses = [], []
    for rank in range(world_size):
        local = [r[rank::world_size] for r in rows]
        local_lens = torch.tensor([len(r) for r in local])
        pool = torch.cat(local)
        o = torch.full((q.shape[0], heads, 64), torch.nan)
        _, lse = mla_decode_fwd(
            q,
            pool[:, None, None],
            o,
            qo_indptr,
            indptr_of(local_lens),
            torch.arange(len(pool), dtype=torch.int32),
            torch.ones(len(lens), dtype=torch.int32),
            q_len,
            return_lse=True,
            sm_scale=0.1,
            g_kv_indptr=indptr_of(torch.tensor(lens)),
            cp_world_size=world_size,
            cp_rank=rank,
        )
        outs.append(o)
        lses.append(lse)
    total = torch.stack(lses).logsumexp(0)
    merged = sum(torch.exp(lse - total)[..., None] * o for lse, o in zip(lses, outs, strict=True))
    expected_out, expected_lse = attention.decode(
        q[..., :64],
        q[..., 64:],
        [r[:, :64] for r in rows],
        [r[:, 64:] for r in rows],
        qo_indptr,
        sm_scale=0.1,
    )
    assert_close(merged, expected_out, what="merged o", dtype="fp32")
    assert_close(total, expected_lse, what="merged lse", dtype="fp32")


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nhead_kv": 2}, "nhead_kv must be 1, got 2"),
        ({"page_size": 0}, "page_size must be >= 1, got 0"),
        ({"page_size": 8}, r"kv_buffer must be \[num_page, page_size, 1, head_dim\]"),
        ({"q": torch.zeros(2, 96)}, r"q must be \[total_q, num_heads, head_dim\]"),
        ({"q": torch.zeros(2, 3, 96, dtype=torch.float64)}, "q must be bfloat16 or float16"),
        ({"o": torch.zeros(2, 3, 128, dtype=torch.bfloat16)}, "o must be at most as wide as q"),
        ({"o": torch.zeros(3, 3, 64, dtype=torch.bfloat16)}, r"o must be \[2, 3, kv_lora_rank\]"),
        ({"o": torch.zeros(2, 3, 64, dtype=torch.int32)}, "o must be bfloat16 or float16"),
        ({"kv_buffer": torch.zeros(6, 4, 1, 96, dtype=torch.float64)}, "kv_buffer must be bf16"),
        (
            {"kv_buffer": torch.zeros(6, 4, 1, 96, dtype=torch.uint8)},
            r"kv_buffer of uint8 must be \[num_page, page_size \* 656\]",
        ),
        ({"kv_indptr": i32(0, 9, 12)}, r"at least kv_indptr\[-1\]=12"),
        ({"kv_indptr": i32(0, 1)}, "kv_last_page_len must be"),
        ({"kv_indices": i32(0, 99, 1, 2, 3)}, r"kv_page_indices must be in -1\.\.\d+, got 99"),
        ({"kv_last_page_lens": i32(5, 1)}, "kv_last_page_len must be in 1..4"),
        ({"qo_indptr": i32(0, 2, 2)}, "max_seqlen_q must be at least .* 2, got 1"),
        ({"qo_indptr": i32(0, 1, 5)}, "qo_indptr must end at no more than the 2 rows of q, got 5"),
        ({"qo_indptr": i32(0, 1, 2, 2)}, "qo_indptr must be"),
        ({"qo_indptr": torch.zeros(1, 3, dtype=torch.int32)}, "qo_indptr must be 1-D"),
        ({"o": torch.zeros(2, 3, 64, device="meta")}, "o must be on cpu, got meta"),
        ({"qo_indptr": torch.arange(3)}, "qo_indptr must be int32"),
        ({"max_seqlen_q": -1}, "max_seqlen_q must be >= 0, got -1"),
        ({"num_kv_splits": 0}, "num_kv_splits must be in 1..256, got 0"),
        ({"num_kv_splits_indptr": i32(0, 1)}, r"num_kv_splits_indptr must be \[3\]"),
        ({"cp_world_size": 2}, "g_kv_indptr must be given with cp_world_size=2"),
        ({"g_kv_indptr": i32(0, 1, 2)}, "page_size must be 1 with g_kv_indptr, got 4"),
        ({"kv_indices": torch.zeros(2, 4, dtype=torch.int32)}, "page_size must be 1 with a top-k"),
    ],
)  # fmt: skip
def test_bad_input(changes, message):
    inputs = DecodeCase("bad", (5, 9), dims=SMALL, page_size=4).build()
    arguments = arguments_of(inputs, 1)
    arguments["kv_indices"] = arguments["kv_indices"][:5]
    with pytest.raises(LayoutError, match=message):
        mla_decode_fwd(**arguments | changes)


@pytest.mark.parametrize("missing", ["q_scale", "kv_scale"])
def test_fp8_queries_need_both_scales(missing):
    inputs = DecodeCase("fp8", (5,), dims=SMALL, q_dtype="fp8_e4m3", layout="fp8").build()
    with pytest.raises(LayoutError, match=f"{missing} must be given for torch.float8_e4m3fn"):
        mla_decode_fwd(**arguments_of(inputs, 1) | {missing: None})


def test_scales_have_one_element():
    inputs = DecodeCase("fp8", (5,), dims=SMALL, q_dtype="fp8_e4m3", layout="fp8").build()
    with pytest.raises(LayoutError, match="kv_scale must be fp32 with one element"):
        mla_decode_fwd(**arguments_of(inputs, 1) | {"kv_scale": torch.ones(2)})
    with pytest.raises(LayoutError, match=r"q_scale must be float32, got torch\.float64"):
        mla_decode_fwd(**arguments_of(inputs, 1) | {"q_scale": torch.ones(1).double()})


def test_a_topk_table_must_have_a_row_for_each_query_token():
    inputs = DecodeCase("table", (5, 9), dims=SMALL, page_size=1).build()
    arguments = arguments_of(inputs, 1)
    with pytest.raises(LayoutError, match=r"kv_indices must be \[T=2, topk\]"):
        mla_decode_fwd(**arguments | {"kv_indices": torch.zeros(3, 4, dtype=torch.int32)})
    with pytest.raises(LayoutError, match="cp_world_size must be 1 with a top-k table, got 2"):
        mla_decode_fwd(
            **arguments
            | {
                "kv_indices": torch.zeros(2, 4, dtype=torch.int32),
                "g_kv_indptr": i32(0, 9, 20),
                "cp_world_size": 2,
            }
        )


@pytest.mark.parametrize("missing", list(work_list())[1:])
def test_a_work_list_comes_whole(missing):
    inputs = DecodeCase("persistent", (5, 9), dims=SMALL, page_size=1).build()
    with pytest.raises(LayoutError, match=f"{missing} must be given with work_meta_data"):
        mla_decode_fwd(**arguments_of(inputs, 1) | work_list() | {missing: None})


def test_a_flat_topk_table_is_not_taken_for_pages():
    inputs = DecodeCase("flat", (5, 9), q_lens=(2, 2), dims=SMALL, page_size=1).build()
    with pytest.raises(LayoutError, match=r"q must have at most .*=2 rows with a work list, got 4"):
        mla_decode_fwd(**arguments_of(inputs, 1) | work_list())


def test_context_parallel_arguments():
    inputs = DecodeCase(
        "cp", (5, 9), dims=SMALL, page_size=1, q_dtype="fp32", layout="fp32"
    ).build()
    arguments = arguments_of(inputs, 1) | {"g_kv_indptr": i32(0, 5, 14)}
    mla_decode_fwd(**arguments)
    assert_close(arguments["o"], inputs.expected_out, what="o")
    with pytest.raises(LayoutError, match="got cp_rank=2, cp_world_size=2"):
        mla_decode_fwd(**arguments | {"cp_world_size": 2, "cp_rank": 2})
    with pytest.raises(LayoutError, match=r"g_kv_indptr must be \[3\]"):
        mla_decode_fwd(**arguments | {"cp_world_size": 2, "g_kv_indptr": i32(0, 5)})


@pytest.mark.gpu
@pytest.mark.parametrize("num_kv_splits", [None, 1, 4])
def test_captured_call_replays_with_other_lengths(num_kv_splits, seed):
    case = DecodeCase("graph", (70, 1, 300), dims=MLADims(16), page_size=16, seed=seed)
    inputs = case.build("cuda")
    arguments = arguments_of(inputs, 1)
    arguments["o"] = arguments["o"].cuda()
    arguments |= {"num_kv_splits": num_kv_splits, "return_lse": True}
    mla_decode_fwd(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = mla_decode_fwd(**arguments)
    arguments["o"].fill_(torch.nan)
    graph.replay()
    assert_close(arguments["o"], inputs.expected_out, what="o", dtype="bf16")
    assert_close(lse, inputs.expected_lse, what="lse", dtype="bf16")
    # The same pages hold fewer tokens: the last ones become two, one and four long.
    arguments["kv_last_page_lens"].copy_(i32(2, 1, 4))
    graph.replay()
    replayed = arguments["o"].clone(), lse.clone()
    _, eager_lse = mla_decode_fwd(**arguments)
    assert torch.equal(replayed[0], arguments["o"])
    assert torch.equal(replayed[1], eager_lse)
    assert not torch.equal(lse.cpu().double(), inputs.expected_lse)


def test_work_lists_have_their_shapes():
    inputs = DecodeCase("persistent", (5, 9), dims=SMALL, page_size=1).build()
    bad = {"work_info_set": torch.zeros(6, 7, dtype=torch.int32)}
    with pytest.raises(LayoutError, match=r"work_info_set must be \[num_works, 8\]"):
        mla_decode_fwd(**arguments_of(inputs, 1) | work_list() | bad)
