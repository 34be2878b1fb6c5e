"""The two servers of the demo: ours over paged latents, and transformers' eager attention."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from mla_core.demo.pages import PagePool, Request, batch_arrays
from mla_core.demo.split import SplitStep
from mla_core.integrations.transformers import PagedLatentCache


class Stopwatch:
    """Seconds spent inside each ``with`` block, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: list[float] = []

    def __enter__(self) -> None:
        """Start."""
        self._synchronise()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        """Stop, and add a lap."""
        self._synchronise()
        self.laps.append(time.perf_counter() - self._start)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PagedServer:
    """Serve a ragged batch from one paged latent cache; one model forward per step.

    Parameters
    ----------
    model : a model that `mla_core.integrations.transformers.enable` has prepared
    cache : PagedLatentCache
    pool : PagePool
        The free pages of ``cache``.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedLatentCache, pool: PagePool) -> None:
        self.model = model
        self.cache = cache
        self.pool = pool
        self.page_size = cache.caches[0].page_size

    def feed(
        self, requests: list[Request], tokens: list[list[int]], *, split: bool = False
    ) -> list[torch.Tensor]:
        """Run new tokens of each request, and keep their latents.

        Parameters
        ----------
        tokens : one list per request, of any lengths >= 1
        split : bool
            Attend to two halves of each context separately and merge the partial results.

        Returns
        -------
        logits : one [len(tokens[b]), vocab_size] per request
        """
        new_lens = [len(part) for part in tokens]
        for request, new in zip(requests, new_lens, strict=True):
            request.resize(request.num_cached + new, self.page_size, self.pool)
        device = self.model.device
        arrays = batch_arrays(requests, new_lens, self.page_size, device)
        inputs = self.cache.begin_step(*arrays)
        if split:
            self.cache.step = SplitStep.halve(self.cache.step)
        packed = torch.tensor([[token for part in tokens for token in part]], device=device)
        logits = self.model(input_ids=packed, **inputs).logits[0]
        for request, new in zip(requests, new_lens, strict=True):
            request.num_cached += new
        return list(logits.split(new_lens))

    def rewind(self, request: Request, num_tokens: int) -> None:
        """Forget the cached latents after the first ``num_tokens``."""
        request.num_cached = num_tokens
        request.resize(num_tokens, self.page_size, self.pool)

    def release(self, request: Request) -> None:
        """Give all pages of a finished request back."""
        self.rewind(request, 0)


class EagerServer:
    """Serve the same batch the usual way: padded on the left, with transformers' own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.ones(0, 0, dtype=torch.long)

    def restart(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Start over with these sequences; return the logits of all their tokens."""
        device, longest = self.model.device, max(map(len, sequences))
        padded = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for row, sequence in enumerate(sequences):
            padded[row, longest - len(sequence) :] = torch.tensor(sequence)
            mask[row, longest - len(sequence) :] = 1
        self._cache = DynamicCache(config=self.model.config)
        self._mask = mask.new_zeros(len(sequences), 0).to(device)
        logits = self._forward(padded.to(device), mask.to(device))
        return [row[longest - len(part) :] for row, part in zip(logits, sequences, strict=True)]

    def feed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run equally many new tokens of each sequence.

        Returns
        -------
        logits : [batch_size, num_new, vocab_size]
        """
        new = torch.tensor(tokens, device=self.model.device)
        return self._forward(new, torch.ones_like(new))

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat((self._mask, mask), dim=1)
        position = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits: torch.Tensor = self.model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        return logits
