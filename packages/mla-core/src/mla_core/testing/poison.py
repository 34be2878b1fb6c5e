"""Poison: fill memory with values that show up when something reads or forgets to write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill in place with NaN, or with all bits set where the dtype has none; return the tensor."""
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        return tensor.fill_(float("nan"))
    if tensor.is_floating_point():
        # 0xFF is NaN in e4m3fn and e5m2; e4m3fnuz has its only NaN at 0x80.
        byte = 0x80 if tensor.dtype == torch.float8_e4m3fnuz else 0xFF
        tensor.view(torch.uint8).fill_(byte)
        return tensor
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Make ``torch.empty`` and its relatives return poison inside the block.

    A kernel that leaves part of an output unwritten then returns NaN instead of old zeros.
    """
    originals = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        )
    }

    def poisoning(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison_(original(*args, **kwargs))

        return allocate

    patches = [
        mock.patch.object(owner, name, poisoning(original))
        for (owner, name), original in originals.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
