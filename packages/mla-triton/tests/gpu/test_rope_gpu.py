"""Fused RoPE on a GPU: the conformance cases' odd corners at real sizes, and graph replay."""

from __future__ import annotations

import pytest
import torch

from mla_core import AttentionOptions, FusedRope
from mla_core.batch import indptr_of
from mla_core.dims import MLADims
from mla_core.ops import decode
from mla_core.plan import plan_decode
from mla_core.testing.assertions import assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode
from mla_core.testing.poison import poison_
from mla_core.testing.sync import no_sync

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("seed")]


@pytest.mark.parametrize("num_heads", [1, 16, 128])
@pytest.mark.parametrize("write_back", [False, True])
@pytest.mark.parametrize("is_neox", [False, True])
def test_long_ragged_batch(num_heads, write_back, is_neox):
    options = AttentionOptions(rope=FusedRope(is_neox, 64, write_back=write_back))
    case = DecodeCase(
        "rope_long", (5000, 1, 0, 700), (1, 2, 1, 4), MLADims(num_heads), 64, options=options
    )
    check_decode("triton", case, "cuda")


@pytest.mark.parametrize("write_back", [False, True])
@pytest.mark.parametrize("num_kv_splits", [1, 8])
def test_graph_replays_with_changed_positions_and_lengths(write_back, num_kv_splits):
    options = AttentionOptions(rope=FusedRope(False, 64, write_back=write_back))
    lens = ((900, 17, 1300), (64, 1300, 2), (1, 0, 640))
    cases = [
        DecodeCase("step", kv_lens, (2, 1, 3), page_size=64, options=options, seed=3 * seed)
        for seed, kv_lens in enumerate(lens)
    ]
    builds = [case.build("cuda") for case in cases]
    first = builds[0]
    kv = first.kv
    num_pages = max(inputs.kv.cache.num_pages for inputs in builds)
    assert kv.cache.num_pages == num_pages  # the first batch is the largest
    plan = plan_decode(
        cases[0].dims,
        first.qo_indptr,
        kv,
        options=options,
        num_kv_splits=num_kv_splits,
        backend="triton",
    )
    out = torch.empty(6, 16, 512, dtype=torch.bfloat16, device="cuda")
    k_pe_tokens = torch.empty(6, 64, dtype=torch.bfloat16, device="cuda")
    positions, table = first.positions.long().clone(), first.cos_sin_cache.clone()
    ql_nope, q_pe = first.ql_nope.clone(), first.q_pe.clone()

    def step():
        decode(
            ql_nope,
            q_pe,
            kv,
            plan,
            sm_scale=first.sm_scale,
            out=out,
            cos_sin_cache=table,
            positions=positions,
            k_pe_tokens=k_pe_tokens,
        )

    held = kv.cache.buffers[0].clone()
    step()
    with no_sync():
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for inputs in builds:
        pages = inputs.kv.cache.buffers[0] if inputs is not first else held
        kv.cache.buffers[0][: len(pages)] = pages
        kv.kv_indptr.copy_(inputs.kv.kv_indptr)
        count = int(inputs.kv.kv_indptr[-1])
        kv.kv_page_indices[:count] = inputs.kv.kv_page_indices[:count]
        kv.kv_last_page_len.copy_(inputs.kv.kv_last_page_len)
        plan.qo_indptr.copy_(indptr_of(torch.tensor((2, 1, 3))))
        ql_nope.copy_(inputs.ql_nope)
        q_pe.copy_(inputs.q_pe)
        positions.copy_(inputs.positions)
        table.copy_(inputs.cos_sin_cache)
        poison_(out)
        poison_(k_pe_tokens)
        graph.replay()
        assert_close(out, inputs.expected_out, what="out")
        assert_close(k_pe_tokens, inputs.expected_k_pe_tokens, what="k_pe_tokens")
