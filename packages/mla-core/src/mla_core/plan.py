"""Planning a decode step: which backend, which kernel, how many splits, which workspaces.

Planning may read lengths on the host. Running never does: a `DecodePlan` holds plain numbers and
preallocated buffers, and kernels read every length from device memory. A CUDA graph captured with
a plan therefore stays valid while the contents of ``qo_indptr``, ``kv_indptr``,
``kv_page_indices`` and ``kv_last_page_len`` change in place, as long as no request exceeds the
plan's ``max_seqlen_q``. (``max_seqlen_k`` only guides the split count: longer requests stay right.)

A caller that plans every step anyway may promise ``fixed_lengths``. A backend may then deal out the
work of this batch in advance, and a replay may change only the contents of the cache and of
``kv_page_indices``.

A ``persistent`` plan follows a work list: made on the host with ``fixed_lengths``, given by the
caller, or else made on the device, where `mla_core.replan` makes it again after lengths changed,
in a captured graph too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from mla_core import env
from mla_core.arch import arch_of
from mla_core.backend import Backend
from mla_core.batch import PagedKV, check_qo_indptr, check_query_lens
from mla_core.dims import MLADims
from mla_core.dtypes import FP8_DTYPES, dtype_name
from mla_core.errors import LayoutError
from mla_core.logs import event
from mla_core.metadata import WorkList, WorkListRecipe, WorkListSizes
from mla_core.problem import Problem
from mla_core.rope import FusedRope
from mla_core.select import Choice, select

MAX_KV_SPLITS = 256


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Which keys a query sees and how its scores are shaped.

    Parameters
    ----------
    causal : bool
        Bottom-right aligned: query ``i`` of ``q_len`` sees ``j < kv_len - (q_len - 1 - i)``.
    window : int, optional
        A query at position ``p`` sees only ``p - window < j <= p``.
    softcap : float
        0 for none; else scores become ``softcap * tanh(score / softcap)``.
    cp_world_size, cp_rank : int
        Round-robin context parallelism: local key ``j`` is global key ``j * world_size + rank``.
    rope : FusedRope, optional
        Queries and newest keys arrive unrotated, and decode rotates them.
    """

    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    cp_world_size: int = 1
    cp_rank: int = 0
    rope: FusedRope | None = None

    def __post_init__(self) -> None:
        """Refuse values no kernel can mean."""
        if self.window is not None and self.window < 1:
            raise LayoutError(f"AttentionOptions: window must be None or >= 1, got {self.window}")
        if self.window is not None and not self.causal:
            raise LayoutError("AttentionOptions: window must be None when causal is False")
        if self.softcap < 0:
            raise LayoutError(f"AttentionOptions: softcap must be >= 0, got {self.softcap}")
        if not 0 <= self.cp_rank < self.cp_world_size:
            raise LayoutError(
                "AttentionOptions: cp_rank must be in 0..cp_world_size - 1 with "
                "cp_world_size >= 1, "
                f"got cp_rank={self.cp_rank}, cp_world_size={self.cp_world_size}"
            )

    @property
    def features(self) -> frozenset[str]:
        """The feature words of a problem with these options."""
        asked = {
            "non_causal": not self.causal,
            "window": self.window is not None,
            "softcap": self.softcap > 0,
            "cp_round_robin": self.cp_world_size > 1,
        }
        rope = frozenset[str]() if self.rope is None else self.rope.features
        return rope | {name for name, wanted in asked.items() if wanted}


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Everything a backend may base a schedule on; hashable, so schedules can be cached.

    ``num_kv_splits`` is the caller's wish, or ``None`` for the backend's choice.
    ``device_index`` is -1 off the GPU. ``q_lens`` and ``kv_lens`` are the query and cached tokens
    of each request, ``None`` unless the caller promised that they stay. ``work_list`` bounds a work
    list of the caller's, made for ``work_list_fold`` groups of heads.
    """

    problem: Problem
    options: AttentionOptions
    batch_size: int
    total_q: int
    max_seqlen_q: int
    max_seqlen_k: int
    total_pages: int
    num_kv_splits: int | None = None
    device_index: int = -1
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    work_list: WorkListSizes | None = None
    work_list_fold: int = 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """A backend's answer to a `PlanRequest`.

    Parameters
    ----------
    kernel : str
        Kernel family that will run, for logs and ``mla explain``.
    num_kv_splits : int
        Most partials of one query token; 1 writes the output directly.
    because : str
        Why these numbers, in a few words.
    config : mapping
        Tile sizes and launch parameters, for the log.
    workspace : mapping of str to (shape, torch dtype)
        Buffers `mla_core.decode` needs besides its outputs; a plan allocates them once.
    tables : mapping of str to Tensor, on the CPU
        What was worked out from the lengths of the request, such as a work list; a plan copies
        them to the device once.
    recipe : WorkListRecipe, optional
        For a work list that the device makes: the plan's tables are then buffers of its sizes, and
        ``workspace`` has the recipe's ``scratch``.
    memo : dict
        What ops remember of calls with plans of this schedule: which were checked, and how to
        repeat them. Grows by little: requests and calls that are alike share a schedule and an
        entry.
    """

    kernel: str
    num_kv_splits: int = 1
    because: str = ""
    config: Mapping[str, int] = field(default_factory=dict)
    workspace: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    recipe: WorkListRecipe | None = None
    memo: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A resolved choice: run it with `mla_core.decode` any number of times.

    Parameters
    ----------
    request : PlanRequest
    schedule : Schedule
    backend : str
    run : callable
        The backend's ``decode``.
    qo_indptr : [batch_size + 1], int32
    workspace : mapping of str to Tensor
    choice : Choice, optional
        How the backend was chosen; absent on plans rebuilt inside a compiled graph.
    tables : mapping of str to Tensor
        The schedule's tables on the batch's device; of a persistent plan, its work list.
    """

    request: PlanRequest
    schedule: Schedule
    backend: str
    run: Callable[..., None]
    qo_indptr: torch.Tensor
    workspace: Mapping[str, torch.Tensor]
    choice: Choice | None = None
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def options(self) -> AttentionOptions:
        """Mask and score options."""
        return self.request.options

    @property
    def dims(self) -> MLADims:
        """Model dimensions."""
        return self.request.problem.dims

    @property
    def num_kv_splits(self) -> int:
        """Most partials of one query token."""
        return self.schedule.num_kv_splits

    @property
    def is_persistent(self) -> bool:
        """Whether the caller asked for a work list, which ``tables`` then holds."""
        return "persistent" in self.request.problem.features

    def __str__(self) -> str:
        """One line: backend, kernel, splits and the reason."""
        shown = " ".join(f"{key}={value}" for key, value in self.schedule.config.items())
        because = self.choice.because if self.choice else "rebuilt"
        return (
            f"{self.backend}/{self.schedule.kernel} num_kv_splits={self.num_kv_splits} {shown}"
            f" ({because}; {self.schedule.because})"
        )


def plan_decode(
    dims: MLADims,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    *,
    q_dtype: torch.dtype = torch.bfloat16,
    options: AttentionOptions | None = None,
    has_sink: bool = False,
    batch_invariant: bool = False,
    num_kv_splits: int | None = None,
    total_q: int | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    fixed_lengths: bool = False,
    persistent: bool = False,
    work_list: WorkList | None = None,
    work_list_fold: int = 1,
    backend: str | None = None,
) -> DecodePlan:
    """Choose a backend and a schedule for decode steps over a batch.

    Parameters
    ----------
    dims : MLADims
        Local head count and widths; the widths must be those of ``kv.cache``.
    qo_indptr : [batch_size + 1], int32, on the cache's device
        Prefix sums of query tokens per request.
    kv : PagedKV
    q_dtype : torch.dtype
        Dtype of ``ql_nope`` and ``q_pe``.
    options : AttentionOptions, optional
        Default: causal, nothing else.
    has_sink : bool
        Whether `mla_core.decode` will be given ``sink``.
    batch_invariant : bool
        Fix the split points of a request by its own length alone, so that its output bits do not
        depend on the other requests.
    num_kv_splits : int, optional
        Most partials per query token, 1..256; default: the backend's heuristic.
    total_q, max_seqlen_q, max_seqlen_k : int, optional
        Give all three and planning reads nothing from the device. Otherwise they are read from
        ``qo_indptr`` and ``kv``. With graph replay in mind, give upper bounds.
    fixed_lengths : bool
        Promise that every run of the plan has the lengths of this batch, request by request; they
        are read on the host. Under ``torch.compile`` the promise is not passed on: the compiled
        step runs the schedule for changing lengths.
    persistent : bool
        Ask for a kernel whose workgroups follow a work list, which balances ragged batches. With
        ``fixed_lengths`` the list is made now, on the host. Without, it is made on the device and
        belongs to the present lengths: call `mla_core.replan` after each change, once for all
        layers. ``num_kv_splits`` is then an aim, not a bound. Under ``torch.compile``, the compiled
        step runs a schedule without a list.
    work_list : WorkList, on the cache's device, optional
        Follow this list, made by any dense planner for the batch, instead of one of the backend's;
        implies ``persistent``. It is read when running: whoever changes lengths must rewrite it in
        place. Its tiles have at most ``max_seqlen_q`` query tokens.
    work_list_fold : int
        Groups of heads that ``work_list`` treats as requests of their own, rows of a request's
        first group before those of its second.
    backend : str, optional
        Use this backend or raise.

    Returns
    -------
    DecodePlan

    Raises
    ------
    LayoutError
        An argument disagrees with another; the message names it.
    BackendUnavailableError, UnsupportedProblemError
        See `mla_core.select.select`.
    """
    options = options or AttentionOptions()
    _check_dims(dims, kv)
    if options.rope is not None:
        options.rope.check_dims("plan_decode", dims)
    check_qo_indptr("plan_decode", qo_indptr, kv.batch_size, kv.cache.device)
    if num_kv_splits is not None and not 1 <= num_kv_splits <= MAX_KV_SPLITS:
        raise LayoutError(
            f"plan_decode: num_kv_splits must be in 1..{MAX_KV_SPLITS}, got {num_kv_splits}"
        )
    if total_q is None:
        total_q = int(qo_indptr[-1])
    if max_seqlen_q is None:
        max_seqlen_q = int(qo_indptr.diff().max()) if kv.batch_size else 0
    if max_seqlen_k is None:
        max_seqlen_k = int(kv.seq_lens.max()) if kv.batch_size else 0
    for name, value in (("total_q", total_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            raise LayoutError(f"plan_decode: {name} must be >= 0, got {value}")
    check_query_lens("plan_decode", qo_indptr, total_q, max_seqlen_q)
    if work_list is not None or work_list_fold != 1:
        _check_work_list(work_list, work_list_fold, dims, kv, fixed_lengths)
    wanted = {"lse", *options.features}
    wanted |= {"sink"} if has_sink else set()
    wanted |= {"batch_invariant"} if batch_invariant else set()
    wanted |= {"persistent"} if persistent or work_list is not None else set()
    problem = decode_problem(dims, kv, q_dtype, max_seqlen_q, wanted)
    choice = select(problem, backend)
    request = PlanRequest(
        problem=problem,
        options=options,
        batch_size=kv.batch_size,
        total_q=total_q,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        total_pages=kv.kv_page_indices.numel(),
        num_kv_splits=num_kv_splits,
        device_index=_device_index(kv.cache.device),
        q_lens=tuple(qo_indptr.diff().tolist()) if fixed_lengths else None,
        kv_lens=tuple(kv.seq_lens.tolist()) if fixed_lengths else None,
        work_list=None if work_list is None else work_list.sizes,
        work_list_fold=work_list_fold,
    )
    plan = build_plan(request, choice.backend, qo_indptr, choice)
    if work_list is not None:
        plan = replace(plan, tables=tables_of(work_list))
    elif plan.schedule.recipe is not None:
        make_work_list(plan, kv)
    event(
        "plan_decode",
        backend=plan.backend,
        kernel=plan.schedule.kernel,
        num_kv_splits=plan.num_kv_splits,
        problem=problem,
        because=f"{choice.because}; {plan.schedule.because}",
        **{f"config.{key}": value for key, value in plan.schedule.config.items()},
    )
    return plan


def decode_problem(
    dims: MLADims, kv: PagedKV, q_dtype: torch.dtype, max_seqlen_q: int, features: Iterable[str]
) -> Problem:
    """Return the question a decode step over a batch asks of the backends."""
    layout = kv.cache.layout
    return Problem(
        op="decode",
        arch=arch_of(kv.cache.device),
        q_dtype=dtype_name(q_dtype),
        kv_dtype=layout.kv_dtype,
        dims=dims,
        layout=layout.family,
        page_size=kv.page_size,
        q_len=max(max_seqlen_q, 1),
        features=frozenset(features),
    )


def build_plan(
    request: PlanRequest, backend: Backend, qo_indptr: torch.Tensor, choice: Choice | None = None
) -> DecodePlan:
    """Ask a backend for its schedule, allocate the workspaces and bind everything together."""
    # A schedule for fixed lengths serves one batch: remembering it would only fill the cache.
    ask = _schedule if request.kv_lens is None else _schedule.__wrapped__
    schedule, run = ask(request, backend, env.text("MLA_TUNING_PATH"))
    return bind_schedule(request, schedule, backend.name, run, qo_indptr, choice)


def bind_schedule(
    request: PlanRequest,
    schedule: Schedule,
    backend: str,
    run: Callable[..., None],
    qo_indptr: torch.Tensor,
    choice: Choice | None = None,
) -> DecodePlan:
    """Allocate what a schedule asks for on the batch's device and return the plan."""
    device = qo_indptr.device
    workspace = allocate_workspace(schedule, device)
    tables = {name: table.to(device) for name, table in schedule.tables.items()}
    if schedule.recipe is not None:
        tables = tables_of(WorkList.empty(schedule.recipe.sizes, device))
    return DecodePlan(request, schedule, backend, run, qo_indptr, workspace, choice, tables)


def tables_of(work_list: WorkList) -> dict[str, torch.Tensor]:
    """Return the tensors of a work list by name, as a plan keeps them."""
    return {item.name: getattr(work_list, item.name) for item in fields(WorkList)}


def make_work_list(plan: DecodePlan, kv: PagedKV) -> None:
    """Have the device write the work list of the present lengths into the plan's tables."""
    recipe = plan.schedule.recipe
    assert recipe is not None
    recipe.plan_on_device(
        WorkList(**plan.tables),
        plan.qo_indptr,
        kv.kv_indptr,
        kv.kv_last_page_len,
        plan.workspace["scratch"],
    )


@functools.lru_cache(maxsize=4096)
def _schedule(
    request: PlanRequest, backend: Backend, tuning_path: str
) -> tuple[Schedule, Callable[..., None]]:
    del tuning_path  # A backend may read its tables there: part of the key.
    schedule: Schedule = backend.load("plan_decode")(request)
    return schedule, backend.load("decode")


def allocate_workspace(schedule: Schedule, device: torch.device) -> dict[str, torch.Tensor]:
    """Allocate the buffers a schedule asks for."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in schedule.workspace.items()
    }


def output_dtype(q_dtype: torch.dtype) -> torch.dtype:
    """Dtype of ``out`` when the caller gives none: that of the query, bf16 for fp8 queries."""
    return torch.bfloat16 if dtype_name(q_dtype) in FP8_DTYPES else q_dtype


def _device_index(device: torch.device) -> int:
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def _check_work_list(
    work_list: WorkList | None, fold: int, dims: MLADims, kv: PagedKV, fixed_lengths: bool
) -> None:
    if work_list is None:
        raise LayoutError(f"plan_decode: work_list_fold must be 1 without a work_list, got {fold}")
    if fixed_lengths:
        raise LayoutError(
            "plan_decode: fixed_lengths must be False with a work_list, got True; the list alone "
            "says what is fixed"
        )
    if fold < 1 or dims.num_heads % fold:
        raise LayoutError(
            f"plan_decode: work_list_fold must divide num_heads={dims.num_heads}, got {fold}"
        )
    work_list.check_buffers("plan_decode", kv.cache.device)


def _check_dims(dims: MLADims, kv: PagedKV) -> None:
    cached = kv.cache.dims
    for name in ("kv_lora_rank", "qk_rope_head_dim", "value_includes_rope"):
        if getattr(dims, name) != getattr(cached, name):
            raise LayoutError(
                f"plan_decode: dims.{name} must be {getattr(cached, name)} like the cache's, "
                f"got {getattr(dims, name)}"
            )
