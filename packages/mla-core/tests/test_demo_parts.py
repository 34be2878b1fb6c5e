"""The demo's parts: check, pages, split, text and the draft verifier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import mla_core
from mla_core import LatentCache, MLADims, PagedKV
from mla_core.batch import indptr_of
from mla_core.demo import text
from mla_core.demo.check import LogitCheck
from mla_core.demo.pages import PagePool, Request, batch_arrays
from mla_core.demo.session import Session, accept
from mla_core.demo.split import SplitStep
from mla_core.errors import LayoutError, MLAError
from mla_core.integrations.transformers import Step
from mla_core.testing.poison import poison_


def logits_choosing(*tokens: int) -> torch.Tensor:
    """Return one-hot logits whose greedy tokens are these."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()


def test_check_keeps_the_worst_difference(rng):
    eager = torch.randn(3, 50, generator=rng)
    ours = eager.clone()
    ours[1, 7] += 1e-3
    check = LogitCheck(tolerance=0.1)
    check.compare("first", ours, eager)
    check.compare("second", eager, eager)
    assert check.worst_absolute == pytest.approx(1e-3, rel=1e-2)
    assert check.worst_relative == pytest.approx(1e-3 / float(eager[1].std()), rel=1e-2)
    assert check.worst_where == "first"
    assert check.tokens == 6
    assert check.failures == []


def test_check_fails_on_a_difference_above_tolerance(rng):
    eager = torch.randn(2, 50, generator=rng)
    check = LogitCheck(tolerance=0.1)
    check.compare("step", eager - 0.5 * (eager < 0), eager)
    assert len(check.failures) == 1
    assert "step: logits differ by" in check.failures[0]


def test_check_fails_on_nan_and_remembers_it(rng):
    eager = torch.randn(2, 50, generator=rng)
    check = LogitCheck(tolerance=0.1)
    check.compare("bad", torch.where(eager == eager.min(), float("nan"), eager), eager)
    check.compare("good", eager, eager)
    assert check.failures[0].startswith("bad: logits differ by inf")
    assert check.worst_where == "bad"


def test_check_tells_a_wrong_token_from_a_tie():
    eager = torch.tensor([[0.0, 2.0, 1.9999, -1.0]])
    check = LogitCheck(tolerance=1e-3)
    check.compare("tie", torch.tensor([[0.0, 1.9999, 2.0, -1.0]]), eager)
    assert (check.ties, check.failures) == (1, [])
    check = LogitCheck(tolerance=10.0)
    check.compare("wrong", torch.tensor([[0.0, 2.0, 1.0, -1.0]]), eager)
    assert (check.ties, check.failures) == (0, [])
    check = LogitCheck(tolerance=1e-5)
    check.compare("wrong", torch.tensor([[0.0, 1.9999, 2.0, -1.0]]), eager)
    assert check.ties == 0
    assert "wrong: 1 greedy token(s) differ from eager" in check.failures


def test_a_continuation_may_differ_at_a_tie_alone():
    session = Session.__new__(Session)
    session.check = LogitCheck(tolerance=1e-3)
    eager = 4 * logits_choosing(1, 2, 3, 4)
    eager[1, 7] = 4.0
    assert session._continues([1, 2, 3], [1, 2, 3], eager)
    assert session._continues([1, 7], [1, 2, 3], eager)
    assert not session._continues([1, 8], [1, 2, 3], eager)
    assert not session._continues([1, 2], [1, 2, 3], eager)
    assert not session._continues([1, 2, 3, 4], [1, 2, 3], eager)


def test_check_require():
    check = LogitCheck(tolerance=1.0)
    check.require("here", True, "unseen")
    check.require("there", False, "seen")
    assert check.failures == ["there: seen"]


@pytest.mark.parametrize(
    ("drafts", "greedy", "emitted"),
    [
        ([1, 2, 3], (1, 2, 3, 4), [1, 2, 3, 4]),
        ([1, 9, 3], (1, 2, 3, 4), [1, 2]),
        ([9, 2, 3], (1, 2, 3, 4), [1]),
        ([1, 2, 9], (1, 2, 3, 4), [1, 2, 3]),
        ([], (5,), [5]),
    ],
)
def test_accept_stops_at_the_first_wrong_draft(drafts, greedy, emitted):
    assert accept(drafts, logits_choosing(*greedy)) == emitted


@settings(deadline=None, max_examples=40)
@given(
    page_size=st.integers(1, 5),
    changes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=30),
    seed=st.integers(0, 1000),
)
def test_pages_have_one_owner_each(page_size, changes, seed):
    num_pages = 4 * 12
    pool = PagePool(num_pages, seed)
    requests = [Request(str(i), 0, 0, []) for i in range(4)]
    for index, num_tokens in changes:
        requests[index].resize(num_tokens, page_size, pool)
        assert len(requests[index].pages) == -(-num_tokens // page_size)
        owned = [page for request in requests for page in request.pages]
        assert len(set(owned)) == len(owned)
        assert len(owned) + len(pool) == num_pages
        assert all(0 <= page < num_pages for page in owned)


def test_freed_pages_are_used_first():
    pool = PagePool(8, 0)
    first, second = Request("a", 0, 0, []), Request("b", 0, 0, [])
    first.resize(3, 1, pool)
    freed = set(first.pages)
    first.resize(0, 1, pool)
    second.resize(3, 1, pool)
    assert set(second.pages) == freed


def test_an_empty_pool_says_so():
    with pytest.raises(MLAError, match="num_pages must cover all live requests"):
        Request("a", 0, 0, []).resize(3, 1, PagePool(2, 0))


def test_a_request_counts_what_it_generated():
    request = Request("a", 2, 3, [5, 6, 7, 8])
    assert (request.num_generated, request.is_finished) == (2, False)
    request.tokens.append(9)
    assert request.is_finished


def test_batch_arrays_describe_the_lengths_after_the_step():
    pool = PagePool(16, 0)
    requests = [Request("a", 0, 0, [], num_cached=3), Request("b", 0, 0, [], num_cached=0)]
    for request, total in zip(requests, (8, 5), strict=True):
        request.resize(total, 4, pool)
    qo_indptr, kv_indptr, pages, last = batch_arrays(requests, [5, 5], 4, "cpu")
    assert qo_indptr.tolist() == [0, 5, 10]
    assert kv_indptr.tolist() == [0, 2, 4]
    assert pages.tolist() == requests[0].pages + requests[1].pages
    assert last.tolist() == [4, 1]
    assert {x.dtype for x in (qo_indptr, kv_indptr, pages, last)} == {torch.int32}


def make_step(rng, num_pages_each, page_size=4, q_len=1):
    """Return a step over random latents in a poisoned cache, and queries for it."""
    dims = MLADims(4, kv_lora_rank=32, qk_rope_head_dim=8)
    total = sum(num_pages_each)
    cache = LatentCache.allocate("fp32", dims, total + 2, page_size)
    poison_(cache.buffers[0])
    pages = torch.randperm(total + 2, generator=rng)[:total].int()
    last = torch.randint(1, page_size + 1, (len(num_pages_each),), generator=rng).int()
    kv = PagedKV.from_csr(cache, indptr_of(torch.tensor(num_pages_each)), pages, last)
    slots = kv.token_slots().flatten()
    slots = slots[slots >= 0]
    kv_c = torch.randn(slots.numel(), 32, generator=rng)
    cache.write(kv_c, torch.randn(slots.numel(), 8, generator=rng), slots)
    qo_indptr = indptr_of(torch.full((len(num_pages_each),), q_len))
    plan = mla_core.plan_decode(dims, qo_indptr, kv, q_dtype=torch.float32)
    q = 3 * torch.randn(len(num_pages_each) * q_len, 4, 40, generator=rng)
    nothing = torch.empty(0, dtype=torch.long)
    return Step(kv, qo_indptr, nothing, nothing, plan), cache, q[..., :32], q[..., 32:]


def test_two_halves_merge_to_the_whole(rng):
    # A request of one page has an empty first half.
    step, cache, ql_nope, q_pe = make_step(rng, (5, 1, 2))
    halves = SplitStep.halve(step)
    assert halves.halves[0].seq_lens.tolist() == [8, 0, 4]
    total = torch.stack([half.seq_lens for half in halves.halves]).sum(0)
    assert torch.equal(total, step.kv.seq_lens)
    whole = step.attend(cache, ql_nope, q_pe, 0.2)
    split = halves.attend(cache, ql_nope, q_pe, 0.2)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)


def test_only_one_token_steps_can_be_halved(rng):
    step, *_ = make_step(rng, (3, 2), q_len=2)
    with pytest.raises(LayoutError, match="must decode one token per request"):
        SplitStep.halve(step)


def test_the_tokenizer_is_lossless_and_deterministic():
    tokenizer, again = text.train_tokenizer(400), text.train_tokenizer(400)
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.get_vocab_size() == 400
    sample = "for x in range(3):\n    print(x)  # ü"
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_prompts_are_the_beginnings_of_topics():
    tokenizer = text.train_tokenizer(320)
    lengths = [3, 50, *[7] * 16]
    found = list(text.prompts(tokenizer, lengths))
    assert [len(prompt.tokens) for prompt in found] == lengths
    assert found[0].name == "assignment" == found[16].name
    assert text.topics["comparisons"].startswith(tokenizer.decode(list(found[1].tokens)))
