"""Prefill of the reference backend, forward and backward, against the truth and autograd."""

from __future__ import annotations

import pytest
import torch

import mla_core
from mla_core import LayoutError
from mla_core.testing.assertions import assert_close


def make(q_lens, k_lens, heads, kv_heads, qk, v, dtype, seed):
    torch.manual_seed(seed)
    cu_q = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    cu_k = torch.tensor([0, *k_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(q_lens), heads, qk, dtype=dtype)
    k = torch.randn(sum(k_lens), kv_heads, qk, dtype=dtype)
    value = torch.randn(sum(k_lens), kv_heads, v, dtype=dtype)
    return q, k, value, cu_q, cu_k


def naive(q, k, v, cu_q, cu_k, *, sm_scale, causal=True, window=None, softcap=0.0):
    """One query row and one head at a time, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for b in range(len(cu_q) - 1):
        q_len = int(cu_q[b + 1] - cu_q[b])
        kv_len = int(cu_k[b + 1] - cu_k[b])
        for i in range(q_len):
            position = kv_len - q_len + i
            end = position + 1 if causal else kv_len
            begin = 0 if window is None else max(0, position - window + 1)
            keys = range(int(cu_k[b]) + begin, int(cu_k[b]) + max(end, begin))
            row_out, row_lse = [], []
            for h in range(q.shape[1]):
                if not len(keys):
                    row_out.append(torch.zeros(v.shape[2], dtype=torch.float64))
                    row_lse.append(torch.tensor(-torch.inf, dtype=torch.float64))
                    continue
                scores = sm_scale * (k[keys.start : keys.stop, h // group] @ q[int(cu_q[b]) + i, h])
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                row_out.append(torch.softmax(scores, 0) @ v[keys.start : keys.stop, h // group])
                row_lse.append(torch.logsumexp(scores, 0))
            outs.append(torch.stack(row_out))
            lses.append(torch.stack(row_lse))
    return torch.stack(outs), torch.stack(lses)


OPTIONS = [
    {},
    {"causal": False},
    {"window": 3},
    {"softcap": 1.5},
    {"softcap": 0.7, "window": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(options, dtype):
    q, k, v, cu_q, cu_k = make([3, 0, 5, 1], [3, 4, 9, 0], 4, 2, 24, 16, dtype, seed=1)
    out, lse = mla_core.prefill(q, k, v, cu_q, cu_k, sm_scale=0.3, return_lse=True, **options)
    want_out, want_lse = naive(q, k, v, cu_q, cu_k, sm_scale=0.3, **options)
    assert out.dtype == dtype
    assert_close(out, want_out, what="out")
    assert_close(lse, want_lse, what="lse")


def test_forward_over_more_than_one_query_block():
    q, k, v, cu_q, cu_k = make([600], [700], 1, 1, 8, 8, torch.float32, seed=2)
    out = mla_core.prefill(q, k, v, cu_q, cu_k, sm_scale=0.5)
    want, _ = naive(q, k, v, cu_q, cu_k, sm_scale=0.5)
    assert_close(out, want, what="out")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward_equals_autograd_of_the_naive_form(options):
    q, k, v, cu_q, cu_k = make([3, 5, 2], [4, 5, 1], 4, 2, 12, 8, torch.float32, seed=3)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.randn(q.shape[0], 4, 8)
    out = mla_core.prefill(q, k, v, cu_q, cu_k, sm_scale=0.4, **options)
    got = torch.autograd.grad(out, inputs, grad)
    want_out, _ = naive(q, k, v, cu_q, cu_k, sm_scale=0.4, **options)
    want = torch.autograd.grad(want_out, inputs, grad.double())
    for name, g, w in zip("qkv", got, want, strict=True):
        assert_close(g, w, what=f"grad of {name}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(4, 2)}, r"q must be \[total_q, num_heads, qk_head_dim\]"),
        ({"q": torch.randn(4, 2, 8).double()}, r"q must be bfloat16 or float16 or float32"),
        ({"k": torch.randn(4, 2, 7)}, r"k must be \[total_k, num_kv_heads, 8\]"),
        ({"k": torch.randn(4, 2, 8).half()}, r"k must be float32, got torch.float16"),
        ({"k": torch.randn(4, 3, 8)}, r"k must have a number of heads that divides num_heads=2"),
        ({"v": torch.randn(5, 2, 8)}, r"v must be \[4, 2, v_head_dim\]"),
        ({"q": torch.randn(4, 8, 2).mT}, r"q must have a contiguous last dimension"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, r"cu_seqlens_q must be int32"),
        (
            {"cu_seqlens_k": torch.tensor([0, 2, 4], dtype=torch.int32)},
            r"cu_seqlens_k must be \[2\]",
        ),
        (
            dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.empty(0, dtype=torch.int32)),
            r"cu_seqlens_q must be \[batch_size \+ 1\], got shape \(0,\)",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 3], dtype=torch.int32)},
            r"cu_seqlens_k must rise from 0",
        ),
        (
            {"cu_seqlens_q": torch.tensor([1, 4], dtype=torch.int32)},
            r"cu_seqlens_q must rise from 0",
        ),
        ({"window": 0}, r"window must be None or >= 1, got 0"),
        ({"softcap": -1.0}, r"softcap must be >= 0, got -1.0"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "q": torch.randn(4, 2, 8),
        "k": torch.randn(4, 2, 8),
        "v": torch.randn(4, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32),
    }
    with pytest.raises(LayoutError, match=message):
        mla_core.prefill(**{**good, **change}, sm_scale=1.0)
