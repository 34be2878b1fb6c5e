"""What `torch.compile` makes of the ops: calls between the graphs of what is around them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_REASON = "ops of mla_fusions launch kernels by themselves and are no custom ops of torch"


def uncompiled(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have `torch.compile` leave an op as it is: the graph breaks there, and the op runs eagerly.

    With ``fullgraph=True`` torch refuses it, naming the op and the reason.
    """
    disabled: list[Callable[_P, _R]] = []

    @functools.wraps(op)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not disabled:
            # Nobody compiles before this module is there, and importing it takes a second.
            if "torch._dynamo" not in sys.modules:
                return op(*args, **kwargs)
            disabled.append(torch.compiler.disable(op, reason=_REASON))
        return disabled[0](*args, **kwargs)

    # What `torch.compiler.disable` marks functions with: the reason is told from the first time on.
    for name, value in (("_torchdynamo_disable", True), ("_torchdynamo_disable_msg", _REASON)):
        setattr(call, name, value)
    return call
