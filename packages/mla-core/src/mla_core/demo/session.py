"""The session the demo runs: ragged requests come and go, and every step is checked."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mla_core.demo import text
from mla_core.demo.check import LogitCheck
from mla_core.demo.model import SIZES, build_pair
from mla_core.demo.pages import PagePool, Request
from mla_core.demo.server import EagerServer, PagedServer, Stopwatch
from mla_core.dtypes import torch_dtype
from mla_core.integrations.transformers import PagedLatentCache, Prefill
from mla_core.plan import DecodePlan

#: Largest accepted logit difference, relative to the spread of a token's logits.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-1}

#: Draft tokens of the multi-token verify step.
NUM_DRAFTS = 3


@dataclass(frozen=True)
class Options:
    """What `mla_core.demo.main` was asked for; see there."""

    steps: int
    requests: int
    out_dir: Path
    device: str
    backends: tuple[str, ...]
    dtype: str
    page_size: int
    seed: int
    size: str
    contexts: tuple[int, ...]
    prefill: Prefill
    fused: bool = False


class Session:
    """Two servers, the requests they serve, and the checks."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.random = random.Random(options.seed)
        self.check = LogitCheck(TOLERANCES[options.dtype])
        self.merge = LogitCheck(TOLERANCES[options.dtype])
        self.plans: dict[str, DecodePlan] = {}
        self.tokens_per_step: list[int] = []
        self.acceptance: list[str] = []
        self.finished: list[Request] = []
        self.num_reused_pages = 0
        size = SIZES[options.size]
        dtype = torch_dtype(options.dtype)
        self.tokenizer = text.train_tokenizer(size.vocab_size)
        self.ours_model, self.eager_model = build_pair(
            size, options.seed, options.device, dtype, fused=options.fused
        )
        self.running, self.waiting = self._make_requests()
        # As many pages as the running requests can need at worst; those who wait must reuse them.
        needs = sorted(map(self._most_pages, self.running + self.waiting))
        self.num_pages = sum(needs[-options.requests :])
        self.cache = PagedLatentCache.allocate(
            self.ours_model.config,
            num_pages=self.num_pages,
            page_size=options.page_size,
            layout=options.dtype,
            q_dtype=dtype,
            device=self.ours_model.device,
            prefill=options.prefill,
        )
        self.ours = PagedServer(self.ours_model, self.cache, PagePool(self.num_pages, options.seed))
        self.eager = EagerServer(self.eager_model)
        self.ours_watch = Stopwatch(self.ours_model.device)
        self.eager_watch = Stopwatch(self.ours_model.device)

    def _make_requests(self) -> tuple[list[Request], list[Request]]:
        """Return those who start and those who wait for the first to finish."""
        options = self.options
        num_waiting = max(1, options.requests // 3)
        lengths = [self.random.randint(20, 256) for _ in range(options.requests + num_waiting)]
        requests = []
        for index, prompt in enumerate(text.prompts(self.tokenizer, lengths)):
            # The first few finish early, so that the waiting ones find free pages.
            is_short = index < num_waiting
            max_new = options.steps // 3 + 2 * index if is_short else options.steps
            tokens = list(prompt.tokens)
            requests.append(Request(prompt.name, len(tokens), max_new, tokens))
        return requests[: options.requests], requests[options.requests :]

    def _most_pages(self, request: Request) -> int:
        most_tokens = request.prompt_len + request.max_new_tokens + NUM_DRAFTS + 1
        return -(-most_tokens // self.options.page_size)

    def prefill(self, requests: list[Request]) -> None:
        """Run the prompts of new requests and append their first tokens."""
        where = f"prefill of {', '.join(request.name for request in requests)}"
        prompts = [request.tokens for request in requests]
        ours = self.ours.feed(requests, prompts)
        if self.cache.prefill == "absorbed":
            self._remember_plan("decode of prompts")
        eager = self.eager.restart(prompts)
        for request, ours_logits, eager_logits in zip(requests, ours, eager, strict=True):
            self.check.compare(where, ours_logits, eager_logits)
            request.tokens.append(int(ours_logits[-1].argmax()))

    def exchange_finished(self) -> None:
        """Free the pages of finished requests and let waiting ones in."""
        done = [request for request in self.running if request.is_finished]
        if not done:
            return
        freed = {page for request in done for page in request.pages}
        for request in done:
            self.ours.release(request)
        self.finished += done
        self.running = [request for request in self.running if not request.is_finished]
        joining, self.waiting = self.waiting[: len(done)], self.waiting[len(done) :]
        if joining:
            self.prefill(joining)
            self.num_reused_pages += sum(len(freed & set(new.pages)) for new in joining)
        self.running += joining
        self.restart_eager()

    def restart_eager(self, *, num_undone: int = 0) -> None:
        """Bring the eager server to our cached tokens, without the last few of each request."""
        if self.running:
            self.eager.restart(
                [request.tokens[: request.num_cached - num_undone] for request in self.running]
            )

    def decode(self, step: int) -> None:
        """Generate one token for each running request, on both sides."""
        where = f"decode step {step}"
        tokens = [request.tokens[-1:] for request in self.running]
        with self.ours_watch:
            ours = torch.cat(self.ours.feed(self.running, tokens))
        with self.eager_watch:
            eager = self.eager.feed(tokens)[:, 0]
        self._remember_plan("decode")
        self.check.compare(where, ours, eager)
        for request, token in zip(self.running, ours.argmax(-1).tolist(), strict=True):
            request.tokens.append(token)
        self.tokens_per_step.append(len(self.running))

    def decode_split(self) -> None:
        """Run the coming step in two halves of each context first, then forget it."""
        tokens = [request.tokens[-1:] for request in self.running]
        split = torch.cat(self.ours.feed(self.running, tokens, split=True))
        for request in self.running:
            self.ours.rewind(request, request.num_cached - 1)
        unsplit = torch.cat(self.ours.feed(self.running, tokens))
        for request in self.running:
            self.ours.rewind(request, request.num_cached - 1)
        self.merge.compare("split decode", split, unsplit)

    def verify_drafts(self) -> None:
        """Run one multi-token step: the greedy continuation as drafts, one of them wrong."""
        vocab_size = self.ours_model.config.vocab_size
        last = [request.tokens[-1] for request in self.running]
        greedy: list[list[int]] = [[] for _ in last]
        tokens = last
        for _ in range(NUM_DRAFTS):
            tokens = self.eager.feed([[token] for token in tokens])[:, 0].argmax(-1).tolist()
            for continuation, token in zip(greedy, tokens, strict=True):
                continuation.append(token)
        wrong_at = [self.random.randrange(NUM_DRAFTS) for _ in last]
        fed = []
        for first, continuation, wrong in zip(last, greedy, wrong_at, strict=True):
            drafts = list(continuation)
            drafts[wrong] = (drafts[wrong] + 1 + self.random.randrange(vocab_size - 1)) % vocab_size
            fed.append([first, *drafts])
        ours = self.ours.feed(self.running, fed)
        self._remember_plan(f"decode, q_len {NUM_DRAFTS + 1}")
        self.restart_eager(num_undone=NUM_DRAFTS + 1)
        eager = self.eager.feed(fed)
        for row, request in enumerate(self.running):
            where = f"verify step of {request.name}"
            self.check.compare(where, ours[row], eager[row])
            emitted = accept(fed[row][1:], ours[row])
            self.acceptance.append(f"{len(emitted) - 1}/{NUM_DRAFTS}")
            self.check.require(
                where,
                self._continues(emitted, greedy[row][: wrong_at[row] + 1], eager[row]),
                f"accepted {len(emitted) - 1} drafts, the greedy continuation {wrong_at[row]}",
            )
            room = request.max_new_tokens - request.num_generated
            request.tokens += emitted[:room]
            self.ours.rewind(request, len(request.tokens) - 1)
        self.restart_eager()

    @property
    def num_decoded(self) -> int:
        """Tokens generated so far, over all requests."""
        return sum(request.num_generated for request in self.finished + self.running)

    def rate(self, watch: Stopwatch) -> float:
        """Return the median of a server's decode steps in tokens per second."""
        return statistics.median(
            tokens / seconds
            for tokens, seconds in zip(self.tokens_per_step, watch.laps, strict=True)
        )

    def _continues(self, emitted: list[int], greedy: list[int], eager: torch.Tensor) -> bool:
        """Say whether tokens are the greedy continuation, up to a tie in eager's own logits."""
        for position, (token, expected) in enumerate(zip(emitted, greedy, strict=False)):
            if token != expected:
                return self.check.is_tie(token, eager[position])
        return len(emitted) == len(greedy)

    def _remember_plan(self, name: str) -> None:
        plan = self.cache.step.plan
        assert plan is not None
        self.plans.setdefault(name, plan)


def accept(drafts: Sequence[int], logits: torch.Tensor) -> list[int]:
    """Return the tokens a greedy verifier emits: the drafts it agrees with, then its own next one.

    Parameters
    ----------
    drafts : the last ``len(drafts)`` of the ``len(drafts) + 1`` tokens fed
    logits : [len(drafts) + 1, vocab_size]
    """
    greedy = logits.argmax(-1).tolist()
    agreed = 0
    while agreed < len(drafts) and drafts[agreed] == greedy[agreed]:
        agreed += 1
    return greedy[: agreed + 1]
