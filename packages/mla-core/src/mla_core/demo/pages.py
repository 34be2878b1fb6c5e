"""Requests and the pages they own: the part of a serving engine that the demo needs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from mla_core.batch import indptr_of
from mla_core.errors import MLAError


class PagePool:
    """The free pages of a cache, handed out in random order as after long service."""

    def __init__(self, num_pages: int, seed: int) -> None:
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)

    def __len__(self) -> int:
        """Return the number of free pages."""
        return len(self._free)

    def take(self) -> int:
        """Hand out one page."""
        if not self._free:
            raise MLAError("demo: num_pages must cover all live requests, got none left")
        return self._free.pop()

    def give_back(self, pages: list[int]) -> None:
        """Take pages back; they are handed out again first."""
        self._free.extend(pages)


@dataclass
class Request:
    """One sequence being generated.

    ``tokens`` is the prompt and everything generated so far. Its last token has usually not been
    fed to the model yet: ``num_cached`` says how many have.
    """

    name: str
    prompt_len: int
    max_new_tokens: int
    tokens: list[int]
    num_cached: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def is_finished(self) -> bool:
        """Whether the request wants no more tokens."""
        return self.num_generated >= self.max_new_tokens

    def resize(self, num_tokens: int, page_size: int, pool: PagePool) -> None:
        """Own exactly the pages that ``num_tokens`` need."""
        needed = -(-num_tokens // page_size)
        while len(self.pages) < needed:
            self.pages.append(pool.take())
        surplus = self.pages[needed:]
        del self.pages[needed:]
        pool.give_back(surplus)


def batch_arrays(
    requests: list[Request], new_lens: list[int], page_size: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``qo_indptr, kv_indptr, kv_page_indices, kv_last_page_len`` of one step.

    Parameters
    ----------
    new_lens : list of int
        New tokens of each request; its pages must already cover them.
    """

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    lens = [request.num_cached + new for request, new in zip(requests, new_lens, strict=True)]
    return (
        indptr_of(int32(new_lens)),
        indptr_of(int32([len(request.pages) for request in requests])),
        int32([page for request in requests for page in request.pages]),
        int32([(length - 1) % page_size + 1 for length in lens]),
    )
