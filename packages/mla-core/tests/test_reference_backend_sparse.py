"""Sparse decode of the reference backend against the truth, and what the op refuses."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core import LatentCache, LayoutError, MLADims
from mla_core.reference import sparse
from mla_core.testing.assertions import assert_close
from mla_core.testing.poison import poison_

DIMS = MLADims(3, kv_lora_rank=64, qk_rope_head_dim=32)


def make(layout="fp32", dims=DIMS, page_size=4, topk=20, total_q=5, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    cache = LatentCache.allocate(layout, dims, 6, page_size)
    for buffer in cache.buffers:
        poison_(buffer)
    live = torch.randperm(cache.num_slots)[: cache.num_slots // 2]
    cache.write(
        torch.randn(live.numel(), dims.kv_lora_rank),
        torch.randn(live.numel(), dims.qk_rope_head_dim),
        live,
    )
    indices = live[torch.randint(live.numel(), (total_q, topk))].to(torch.int32)
    q = torch.randn(total_q, dims.num_heads, dims.latent_dim).to(dtype)
    return cache, indices, q[..., : dims.kv_lora_rank], q[..., dims.kv_lora_rank :]


def truth(cache, indices, ql_nope, q_pe, **options):
    kv_c, k_pe = cache.read(torch.arange(cache.num_slots), torch.float32)
    out, _, lse = sparse.sparse_attention(
        ql_nope, q_pe, kv_c, k_pe, indices, sm_scale=0.2, **options
    )
    return out, lse


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_matches_the_truth(seed, with_sink, with_length):
    cache, indices, ql_nope, q_pe = make(seed=seed)
    indices[0] = -1
    indices[1, ::3] = -1
    indices[2, 3] = cache.num_slots
    indices[2, 4] = 1 << 30
    sink = torch.randn(DIMS.num_heads) if with_sink else None
    length = torch.tensor([20, 7, 20, 0, 1], dtype=torch.int32) if with_length else None
    out, lse = mla_core.sparse_decode(
        ql_nope,
        q_pe,
        cache,
        indices,
        sm_scale=0.2,
        sink=sink,
        topk_length=length,
        return_lse=True,
    )
    want_out, want_lse = truth(cache, indices, ql_nope, q_pe, sink=sink, topk_length=length)
    assert_close(out, want_out, what="out")
    assert_close(lse, want_lse, what="lse")
    assert (out[0] == 0).all()


@pytest.mark.parametrize("layout", ["fp8_ds656", "fp8_seg656", "bf16"])
def test_layouts(layout):
    dims = MLADims(2)
    cache, indices, ql_nope, q_pe = make(layout, dims, dtype=torch.bfloat16, seed=3)
    out = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=0.2)
    want_out, _ = truth(cache, indices, ql_nope, q_pe)
    assert out.dtype == torch.bfloat16
    assert_close(out, want_out, what="out")


def test_long_lists_take_several_tiles():
    cache, indices, ql_nope, q_pe = make(topk=2500, total_q=2, seed=4)
    out = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=0.2)
    assert_close(out, truth(cache, indices, ql_nope, q_pe)[0], what="out")


def test_softcap():
    cache, indices, ql_nope, q_pe = make(seed=5)
    out = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=0.2, softcap=0.8)
    rows = torch.cat(cache.read(torch.arange(cache.num_slots), torch.float32), 1).double()
    q = torch.cat((ql_nope, q_pe), -1).double()
    for t in range(5):
        keys = rows[indices[t].long()]
        scores = 0.8 * torch.tanh(0.2 * q[t] @ keys.T / 0.8)
        want = torch.softmax(scores, -1) @ keys[:, :64]
        assert_close(out[t], want, what=f"out[{t}]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ql_nope": torch.randn(5, 64)}, r"ql_nope must be \[total_q, num_heads, kv_lora_rank\]"),
        ({"ql_nope": torch.randn(5, 3, 63)}, r"ql_nope must be \[total_q, 3, 64\]"),
        ({"q_pe": torch.randn(5, 2, 32)}, r"q_pe must be \[5, 3, 32\]"),
        ({"q_pe": torch.randn(5, 3, 32).half()}, r"q_pe must be float32"),
        ({"indices": torch.zeros(5, 20)}, r"indices must be int32"),
        ({"indices": torch.zeros(4, 20, dtype=torch.int32)}, r"indices must be \[5, topk\]"),
        ({"topk_length": torch.zeros(4, dtype=torch.int32)}, r"topk_length must be \[5\]"),
        ({"sink": torch.zeros(2)}, r"sink must be \[3\]"),
        ({"sink": torch.zeros(3).half()}, r"sink must be float32"),
        ({"q_scale": torch.ones(1)}, r"q_scale must be None for torch.float32 queries"),
        ({"softcap": -1.0}, r"softcap must be >= 0"),
        ({"out": torch.zeros(5, 3, 63)}, r"out must be \[5, 3, 64\]"),
        ({"out": torch.zeros(5, 3, 64).double()}, r"out must be bfloat16 or float16 or float32"),
        ({"lse": torch.zeros(5, 2)}, r"lse must be \[5, 3\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    cache, indices, ql_nope, q_pe = make()
    good = {"ql_nope": ql_nope, "q_pe": q_pe, "cache": cache, "indices": indices}
    with pytest.raises(LayoutError, match=message):
        mla_core.sparse_decode(**{**good, **change}, sm_scale=1.0)


def test_check_finds_a_nan_in_a_selected_row(monkeypatch):
    monkeypatch.setenv("MLA_CHECK", "1")
    cache, indices, ql_nope, q_pe = make()
    mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=1.0)
    slot = int(indices[1, 2])
    cache.write(torch.full((1, 64), torch.nan), torch.zeros(1, 32), torch.tensor([slot]))
    with pytest.raises(LayoutError, match=f"got one in slot {slot}"):
        mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=1.0)


def test_check_leaves_entries_past_the_topk_length_alone(monkeypatch):
    monkeypatch.setenv("MLA_CHECK", "1")
    cache, indices, ql_nope, q_pe = make()
    lengths = torch.full((indices.shape[0],), 2, dtype=torch.int32)
    tail, head = indices[:, 2:].contiguous(), indices[:, :2].contiguous()
    spared = tail[~torch.isin(tail, head)].unique().long()
    spared = spared[spared >= 0]
    assert spared.numel()
    want = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=1.0, topk_length=lengths)
    nan = torch.full((spared.numel(), 96), torch.nan)
    cache.write(nan[:, :64], nan[:, 64:], spared)
    got = mla_core.sparse_decode(ql_nope, q_pe, cache, indices, sm_scale=1.0, topk_length=lengths)
    assert torch.equal(got, want)
