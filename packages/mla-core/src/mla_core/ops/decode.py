"""Dense decode over a paged latent cache."""

from __future__ import annotations

import torch

from mla_core import env, registry
from mla_core.batch import PagedKV
from mla_core.cache import LatentCache
from mla_core.checks import check_live_rows, check_tensor
from mla_core.dtypes import torch_dtype
from mla_core.errors import LayoutError
from mla_core.launch import Repeat, alignment, is_repeatable, recording
from mla_core.metadata import WorkList
from mla_core.metadata.worklist import check_follows
from mla_core.ops import library
from mla_core.ops.arguments import (
    check_q_scale,
    check_queries,
    check_sink,
    missing_outputs,
    outputs,
)
from mla_core.plan import AttentionOptions, DecodePlan, PlanRequest, build_plan, decode_problem
from mla_core.rope import FusedRope, RopeInputs


def decode(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    *,
    sm_scale: float,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    return_lse: bool = False,
    sink: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    global_kv_lens: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    k_pe_tokens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend each query token to its request's paged latent cache (absorbed, MQA form).

    ``out[t] = softmax(sm_scale * (ql_nope[t] @ kv_c.T + q_pe[t] @ k_pe.T)) @ kv_c``

    Parameters
    ----------
    ql_nope : [total_q, num_heads, kv_lora_rank], dtype of the plan, last dim contiguous
        Query after absorbing W_UK.
    q_pe : [total_q, num_heads, qk_rope_head_dim], like ``ql_nope``
        Rotated query part; width 0 for models without rope. With a plan whose options have a
        `mla_core.rope.FusedRope`, not rotated yet, as the ``k_pe`` of each request's newest
        ``q_len`` keys, which are those of its query tokens; their slots must belong to no other
        request.
    kv : PagedKV
        The batch the plan was made for, or another of the same size and layout.
    plan : DecodePlan
    sm_scale : float
        Multiplies raw scores; ``dims.sm_scale`` (times YaRN's mscale squared) for released models.
    out : [total_q, num_heads, value_dim], bf16, fp16 or fp32, optional
    lse : [total_q, num_heads], fp32, optional
        Giving it implies ``return_lse``.
    sink : [num_heads], fp32, optional
        Extra logit per head with a zero value; the plan must have been made with ``has_sink``.
    q_scale : [1], fp32, optional
        Dequantisation factor of fp8 queries.
    global_kv_lens : [batch_size], int32, optional
        Lengths over all ranks; required with, and only with, round-robin context parallelism.
    cos_sin_cache : [max_position, rotary_dim], bf16, fp16 or fp32, optional
        Cosines of each pair, then sines; required with, and only with, fused RoPE.
    positions : [total_q], int32 or int64, optional
        Position of each query token and of its key; required like ``cos_sin_cache``. One outside
        the table is refused on the CPU and under ``MLA_CHECK=1``; elsewhere the rows that it
        rotates become NaN, without reading past the table.
    k_pe_tokens : [total_q, qk_rope_head_dim], bf16, fp16 or fp32, optional
        With fused RoPE, receives the rotated key of each query token as the scores see it; 0 where
        the key is not in the cache (``q_len`` above the request's length, a hidden page, another
        context-parallel rank).

    Returns
    -------
    out : dtype of ``ql_nope``, bf16 for fp8 queries
    lse : only with ``return_lse``; natural log, -inf (and ``out`` 0) for a row that sees nothing

    Raises
    ------
    LayoutError
        A tensor disagrees with ``plan``; the message names it.

    Notes
    -----
    Not differentiable; for training see `mla_core.prefill`.
    Reads ``latent_dim`` elements per cached token. No host sync and no allocation when ``out``
    (and ``lse``, if wanted) are given, except on the ``reference`` backend.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; absorption as in its appendix C.

    Examples
    --------
    >>> import torch, mla_core
    >>> dims = mla_core.MLADims(num_heads=16)
    >>> cache = mla_core.LatentCache.allocate("fp32", dims, num_pages=4, page_size=16)
    >>> slots = torch.arange(20)
    >>> mla_core.write_kv_cache(torch.randn(20, 512), torch.randn(20, 64), cache, slots)
    >>> table = torch.tensor([[0, 1]], dtype=torch.int32)
    >>> lens = torch.tensor([20], dtype=torch.int32)
    >>> kv = mla_core.PagedKV.from_block_table(cache, table, lens)
    >>> qo_indptr = torch.tensor([0, 1], dtype=torch.int32)
    >>> plan = mla_core.plan_decode(dims, qo_indptr, kv, q_dtype=torch.float32)
    >>> q = torch.randn(1, 16, 576)
    >>> mla_core.decode(q[..., :512], q[..., 512:], kv, plan, sm_scale=dims.sm_scale).shape
    torch.Size([1, 16, 512])
    """
    is_compiling = torch.compiler.is_compiling()
    out_shape = (ql_nope.shape[0], ql_nope.shape[1], plan.dims.value_dim)
    inputs = (ql_nope, q_pe, sink, q_scale, global_kv_lens, cos_sin_cache, positions, k_pe_tokens)
    seen: object = None
    repeats: dict[object, Repeat] | None = None
    if not is_compiling:
        looks = [
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            for tensor in (*inputs, out, lse)
        ]
        seen = (sm_scale, return_lse, kv.cache.kind, kv.kv_indptr.shape, *looks)
        repeats = plan.schedule.memo.get(seen)
    if repeats:
        out, lse = missing_outputs(ql_nope, out_shape, out, lse, return_lse)
        given, whole = _changing((*inputs, out, lse), kv, plan)
        addresses = [tensor.data_ptr() for tensor in (*given, *whole)]
        repeat = repeats.get(alignment((*given, *whole), addresses))
        if repeat is not None and not env.flag("MLA_CHECK") and repeat(addresses):
            return out if lse is None else (out, lse)
    if repeats is None:
        _check(ql_nope, q_pe, kv, plan, sink, q_scale, global_kv_lens)
        out, lse = outputs("decode", ql_nope, out_shape, out, lse, return_lse)
    else:
        out, lse = missing_outputs(ql_nope, out_shape, out, lse, return_lse)
    # A compiled step does not follow the list.
    has_list = plan.is_persistent and not is_compiling
    promises = plan.request.kv_lens is not None or has_list
    reads_values = out.device.type == "cpu" or env.flag("MLA_CHECK")
    if promises and reads_values:
        if plan.request.kv_lens is not None:
            _check_lengths(kv, plan)
        if has_list:
            _check_work_list(kv, plan)
    rope = RopeInputs.checked(
        "decode",
        plan.options.rope,
        plan.dims,
        plan.qo_indptr,
        plan.request.total_q,
        cos_sin_cache,
        positions,
        k_pe_tokens,
    )
    if is_compiling:
        request, options = plan.request, plan.options
        fused = options.rope
        # Only one of the two tells the compiler that the cache changes.
        writes = fused is not None and fused.write_back
        run = torch.ops.mla.decode_write_back if writes else torch.ops.mla.decode
        run(
            ql_nope,
            q_pe,
            *library.flatten_cache(kv.cache),
            kv.kv_indptr,
            kv.kv_page_indices,
            kv.kv_last_page_len,
            plan.qo_indptr,
            sink,
            q_scale,
            global_kv_lens,
            sm_scale,
            plan.backend,
            # A list cannot be handed to a compiled step, nor one be made in each layer.
            sorted(request.problem.features - {"persistent"}),
            [
                request.max_seqlen_q,
                request.max_seqlen_k,
                request.total_pages,
                request.num_kv_splits or 0,
            ],
            [options.causal, options.window or 0, options.cp_world_size, options.cp_rank],
            options.softcap,
            _flat_rope(fused),
            cos_sin_cache,
            positions,
            out,
            lse,
            k_pe_tokens,
        )
        return out if lse is None else (out, lse)
    arguments = ql_nope, q_pe, kv, plan, sm_scale, out, lse, sink, q_scale, global_kv_lens, rope
    # Calls with plans alike resemble each other: those of further layers, and of further steps.
    repeats = plan.schedule.memo.setdefault(seen, {})
    if not is_repeatable(plan.run) or (reads_values and (promises or rope)):
        _run(*arguments)
    else:
        with recording() as tape:
            _run(*arguments)
        given, whole = _changing((*inputs, out, lse), kv, plan)
        if (made := tape.repeat(given, whole)) is not None:
            tensors = (*given, *whole)
            repeats[alignment(tensors, [tensor.data_ptr() for tensor in tensors])] = made
    return out if lse is None else (out, lse)


def _changing(
    tensors: tuple[torch.Tensor | None, ...], kv: PagedKV, plan: DecodePlan
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return a call's tensors without their absences, and those of which kernels get views."""
    given = [tensor for tensor in tensors if tensor is not None]
    given += kv.kv_indptr, kv.kv_page_indices, kv.kv_last_page_len
    given.append(plan.qo_indptr)
    whole = [*kv.cache.buffers, *plan.workspace.values(), *plan.tables.values()]
    if kv.cache.scale is not None:
        whole.append(kv.cache.scale)
    return given, whole


def _check(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    global_kv_lens: torch.Tensor | None,
) -> None:
    request, problem = plan.request, plan.request.problem
    cached, device = kv.cache.dims, kv.cache.device
    check_queries("decode", ql_nope, q_pe, problem.dims, torch_dtype(problem.q_dtype), device)
    if ql_nope.shape[0] != request.total_q:
        raise LayoutError(
            f"decode: ql_nope must have total_q={request.total_q} rows like the plan, "
            f"got shape {tuple(ql_nope.shape)}"
        )
    for name, got, planned in (
        ("batch_size", kv.batch_size, request.batch_size),
        ("page_size", kv.page_size, problem.page_size),
        ("layout", kv.cache.layout.family, problem.layout),
        ("kv_dtype", kv.cache.layout.kv_dtype, problem.kv_dtype),
        ("kv_lora_rank", cached.kv_lora_rank, problem.dims.kv_lora_rank),
        ("qk_rope_head_dim", cached.qk_rope_head_dim, problem.dims.qk_rope_head_dim),
        ("value_includes_rope", cached.value_includes_rope, problem.dims.value_includes_rope),
    ):
        if got != planned:
            raise LayoutError(
                f"decode: kv must have {name}={planned} like the plan, got {got}; plan again"
            )
    if (sink is not None) != ("sink" in problem.features):
        wanted = "given" if sink is None else "None"
        raise LayoutError(
            f"decode: sink must be {wanted} to match the plan's has_sink={sink is None}, "
            f"got {'None' if sink is None else tuple(sink.shape)}"
        )
    check_sink("decode", sink, problem.dims.num_heads, device)
    check_q_scale("decode", ql_nope, q_scale)
    if (global_kv_lens is not None) != (plan.options.cp_world_size > 1):
        raise LayoutError(
            "decode: global_kv_lens must be given if and only if the plan has cp_world_size > 1, "
            f"got {'None' if global_kv_lens is None else tuple(global_kv_lens.shape)} with "
            f"cp_world_size={plan.options.cp_world_size}"
        )
    if global_kv_lens is not None:
        shape, int32 = (kv.batch_size,), (torch.int32,)
        check_tensor(
            "decode", "global_kv_lens", global_kv_lens, shape=shape, dtypes=int32, device=device
        )


def _check_lengths(kv: PagedKV, plan: DecodePlan) -> None:
    """Hold the caller to the promise of ``fixed_lengths`` (reads the lengths)."""
    for name, got, planned in (
        ("seq_lens", kv.seq_lens, plan.request.kv_lens),
        ("query lengths in plan.qo_indptr", plan.qo_indptr.diff(), plan.request.q_lens),
    ):
        if tuple(got.tolist()) != planned:
            raise LayoutError(
                f"decode: {name} must stay as the plan's fixed_lengths promised, got others; "
                "plan again"
            )


def _check_work_list(kv: PagedKV, plan: DecodePlan) -> None:
    """Check that the plan's list is one for the batch as it is now (reads both)."""
    check_follows(
        "decode",
        WorkList(**plan.tables),
        plan.qo_indptr,
        kv.kv_indptr,
        kv.seq_lens,
        page_size=kv.page_size,
        fold=plan.request.work_list_fold,
    )


def _run(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv: PagedKV,
    plan: DecodePlan,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    global_kv_lens: torch.Tensor | None,
    rope: RopeInputs | None,
) -> None:
    """Call the planned backend, under ``MLA_CHECK=1`` after reading every live row."""
    # Passed only where it was planned, so that backends without the feature need not name it.
    extra = {} if rope is None else {"rope": rope}
    if rope is not None:
        assert plan.options.rope is not None
        rope.check_values("decode", plan.options.rope, plan.qo_indptr)
    if env.flag("MLA_CHECK"):
        kv.check_values()
        check_live_rows("decode", kv.cache, kv.token_slots().flatten())
    plan.run(
        ql_nope,
        q_pe,
        kv,
        plan,
        sm_scale=sm_scale,
        out=out,
        lse=lse,
        sink=sink,
        q_scale=q_scale,
        global_kv_lens=global_kv_lens,
        **extra,
    )


def _flat_rope(rope: FusedRope | None) -> list[int]:
    """Return the fields of a rotation as ints, in order; [] for none."""
    if rope is None:
        return []
    flags = int(rope.is_neox), int(rope.write_back)
    return [flags[0], rope.rotary_dim, rope.dim_offset, rope.position_offset, flags[1]]


def _restore_rope(numbers: list[int]) -> FusedRope | None:
    """Invert `_flat_rope`."""
    if not numbers:
        return None
    is_neox, rotary_dim, dim_offset, position_offset, write_back = numbers
    return FusedRope(bool(is_neox), rotary_dim, dim_offset, position_offset, bool(write_back))


def _run_flat(
    ql_nope: torch.Tensor,
    q_pe: torch.Tensor,
    buffers: list[torch.Tensor],
    kv_scale: torch.Tensor | None,
    layout: str,
    dims: list[int],
    page_size: int,
    kv_indptr: torch.Tensor,
    kv_page_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    qo_indptr: torch.Tensor,
    sink: torch.Tensor | None,
    q_scale: torch.Tensor | None,
    global_kv_lens: torch.Tensor | None,
    sm_scale: float,
    backend: str,
    features: list[str],
    limits: list[int],
    mask: list[int],
    softcap: float,
    fused: list[int],
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    k_pe_tokens: torch.Tensor | None,
) -> None:
    """Rebuild the containers of a compiled call and run the planned backend."""
    cache: LatentCache = library.restore_cache(buffers, kv_scale, layout, dims, page_size)
    kv = PagedKV(cache, kv_indptr, kv_page_indices, kv_last_page_len)
    causal, window, cp_world_size, cp_rank = mask
    options = AttentionOptions(
        bool(causal), window or None, softcap, cp_world_size, cp_rank, _restore_rope(fused)
    )
    max_seqlen_q, max_seqlen_k, total_pages, num_kv_splits = limits
    local_dims = cache.dims.with_heads(ql_nope.shape[1])
    request = PlanRequest(
        problem=decode_problem(local_dims, kv, ql_nope.dtype, max_seqlen_q, features),
        options=options,
        batch_size=kv.batch_size,
        total_q=ql_nope.shape[0],
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        total_pages=total_pages,
        num_kv_splits=num_kv_splits or None,
        device_index=out.device.index if out.device.type == "cuda" else -1,
    )
    plan = build_plan(request, registry.record(backend).require(), qo_indptr)
    rope = None
    if cos_sin_cache is not None and positions is not None:
        rope = RopeInputs(cos_sin_cache, positions, k_pe_tokens)
    _run(ql_nope, q_pe, kv, plan, sm_scale, out, lse, sink, q_scale, global_kv_lens, rope)


def _fake(ql_nope: torch.Tensor, *arguments: object) -> None:
    out, lse, _ = arguments[-3:]
    assert isinstance(out, torch.Tensor)
    torch._check(out.shape[:2] == ql_nope.shape[:2])
    if isinstance(lse, torch.Tensor):
        torch._check(lse.shape == ql_nope.shape[:2])


_SCHEMA = (
    f"(Tensor ql_nope, Tensor q_pe, {library.CACHE_SCHEMA}, Tensor kv_indptr, "
    "Tensor kv_page_indices, Tensor kv_last_page_len, Tensor qo_indptr, Tensor? sink, "
    "Tensor? q_scale, Tensor? global_kv_lens, float sm_scale, str backend, str[] features, "
    "SymInt[] limits, int[] mask, float softcap, int[] fused, Tensor? cos_sin_cache, "
    "Tensor? positions, Tensor(a!) out, Tensor(b!)? lse, Tensor(c!)? k_pe_tokens) -> ()"
)
library.define("decode", _SCHEMA, _run_flat, _fake)
library.define(
    "decode_write_back", _SCHEMA.replace("Tensor[]", "Tensor(d!)[]", 1), _run_flat, _fake
)
