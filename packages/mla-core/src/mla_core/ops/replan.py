"""Making the work list of a persistent plan again, after lengths changed."""

from __future__ import annotations

from mla_core.batch import PagedKV
from mla_core.errors import LayoutError
from mla_core.plan import DecodePlan, make_work_list


def replan(plan: DecodePlan, kv: PagedKV) -> None:
    """Make the plan's work list again, on the device, for the lengths that a batch has now.

    Parameters
    ----------
    plan : DecodePlan
        Made with ``persistent`` and neither ``fixed_lengths`` nor a ``work_list``.
    kv : PagedKV
        Of the plan's batch size and page size. Lengths are those in ``plan.qo_indptr``,
        ``kv.kv_indptr`` and ``kv.kv_last_page_len``.

    Raises
    ------
    LayoutError
        The plan has no list that the device makes, or ``kv`` is of another size.
    BackendUnavailableError
        Triton is older than 3.9 on an AMD GPU.

    Notes
    -----
    Three small kernels, no host sync and no allocation. Call it once per step, before the first
    layer. In a captured step it runs at every replay, so that the list follows lengths written in
    place. A step whose list is stale reads nothing out of bounds but gives wrong results; the CPU
    and ``MLA_CHECK=1`` refuse it.

    Examples
    --------
    ::

        plan = mla_core.plan_decode(dims, qo_indptr, kv, persistent=True)
        with torch.cuda.graph(graph):
            mla_core.replan(plan, kv)
            for layer in layers:
                layer(plan, kv)  # calls mla_core.decode
    """
    recipe = plan.schedule.recipe
    if recipe is None:
        raise LayoutError(
            "replan: plan must be made with persistent=True and neither fixed_lengths nor a "
            f"work_list, got one on {plan.backend}/{plan.schedule.kernel} without a list of the "
            "device's"
        )
    for name, got, planned in (
        ("batch_size", kv.batch_size, recipe.batch_size),
        ("page_size", kv.page_size, recipe.page_size),
    ):
        if got != planned:
            raise LayoutError(
                f"replan: kv must have {name}={planned} like the plan, got {got}; plan again"
            )
    make_work_list(plan, kv)
