"""How many ways to split a request's keys, from numbers known at plan time."""

from __future__ import annotations

import math

from mla_core.plan import PlanRequest

#: Loop steps that a program's start, and the merge's launch, cost.
PROGRAM_OVERHEAD = 2.0
MERGE_OVERHEAD = 2.0
#: Splits of a ``batch_invariant`` plan: one number for every batch.
INVARIANT_SPLITS = 16
#: Longest over average request from which lengths count as ragged.
RAGGED = 1.25


def choose_splits(
    *,
    num_programs: int,
    mean_steps: float,
    concurrent_programs: int,
    merge_cost: float,
    max_splits: int,
) -> int:
    """Return the number of splits with the least estimated time, the smaller one of equals.

    The estimate, in loop steps: all waves of average programs, and for several splits the merge.

    Parameters
    ----------
    num_programs : int
        Programs of one split.
    mean_steps : number
        Loop steps over the average request's keys.
    concurrent_programs : int
        Programs the device runs at once.
    merge_cost : float
        Loop steps that writing and reading one split's partials costs.
    max_splits : int

    Examples
    --------
    >>> full = dict(concurrent_programs=132, merge_cost=0.5, max_splits=64)
    >>> choose_splits(num_programs=264, mean_steps=128, **full)
    1
    >>> choose_splits(num_programs=1, mean_steps=128, **full)
    16
    """

    def steps(splits: int) -> float:
        waves = -(-num_programs * splits // concurrent_programs)
        merge = MERGE_OVERHEAD + merge_cost * splits if splits > 1 else 0.0
        return waves * (math.ceil(mean_steps / splits) + PROGRAM_OVERHEAD) + merge

    return min(range(1, max(1, max_splits) + 1), key=steps)


def mean_tokens(request: PlanRequest) -> float:
    """Return the average cached tokens of a request, as far as planning knows.

    The index buffer may be over-allocated: it bounds the mean only from above.
    """
    return request.total_pages * request.problem.page_size / max(1, request.batch_size)
