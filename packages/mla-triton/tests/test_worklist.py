"""Persistent decode: conformance on lists of the host and the device, and lists of others."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import pytest
import torch

from mla_core.arch import arch_of
from mla_core.bench import contenders, parse_case
from mla_core.bench.workload import build_decode
from mla_core.dims import MLADims
from mla_core.errors import LayoutError, UnsupportedProblemError
from mla_core.metadata import DeviceProfile, WorkList, decode_sizes, plan_v1_0, plan_v1_1, plan_v1_2
from mla_core.metadata.tiling import head_tiling
from mla_core.ops import decode, replan
from mla_core.plan import AttentionOptions, plan_decode
from mla_core.testing.assertions import TOLERANCES, assert_close
from mla_core.testing.cases import DecodeCase
from mla_core.testing.conformance import check_decode, decode_cases, plan_case
from mla_core.testing.conformance import run_case as run
from mla_core.testing.poison import poison_
from mla_triton import tuning, worklist
from mla_triton.decode import with_config

pytestmark = pytest.mark.kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PERSISTENT = frozenset({"persistent"})
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
DIMS = MLADims(3, 64, 32)


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch):
    """Cut short contexts too."""
    monkeypatch.setattr(worklist, "PIECE_OVERHEAD_TOKENS", 16)
    monkeypatch.setattr("mla_triton.decode._INTERPRETED_MULTIPROCESSORS", 7)


plan_of = partial(plan_case, backend="triton")


def check(inputs, plan):
    """Run over poison and compare with the truth."""
    for name, buffer in plan.workspace.items():
        if name != "scratch":
            poison_(buffer)
    dtype = inputs.ql_nope.dtype
    out = poison_(torch.empty(inputs.expected_out.shape, dtype=dtype, device=DEVICE))
    lse = poison_(torch.empty(inputs.expected_lse.shape, device=DEVICE))
    run(inputs, plan, out=out, lse=lse)
    assert_close(out, inputs.expected_out, what="out")
    lse_dtype = "fp32" if dtype == torch.float32 else "fp16"
    assert_close(lse, inputs.expected_lse, what="lse", tolerance=TOLERANCES[lse_dtype])
    return out, lse


def list_of(plan):
    """Return the plan's list, with room cut off, on the host."""
    work = WorkList(**{name: table.cpu() for name, table in plan.tables.items()})
    num_works, num_partials = int(work.work_indptr[-1]), int(work.reduce_indptr[-1])
    return replace(
        work,
        work_info=work.work_info[:num_works],
        reduce_partial_map=work.reduce_partial_map[:num_partials],
    )


def on_device(work):
    return WorkList(**{field.name: getattr(work, field.name).to(DEVICE) for field in fields(work)})


def i32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("case", decode_cases("triton", arch_of(DEVICE), PERSISTENT), ids=str)
def test_conformance(case):
    # Both planners make the same list, as another test shows: half the cases for each.
    fixed_lengths = case.seed % 2 == 0
    check_decode("triton", case, DEVICE, persistent=True, fixed_lengths=fixed_lengths)


EVERYTHING = DecodeCase(
    "everything",
    (90, 33, 0, 5, 500),
    (3, 1, 2, 2, 1),
    dims=DIMS,
    options=AttentionOptions(window=70, softcap=3.0),
    has_sink=True,
)
CASES = [
    EVERYTHING,
    DecodeCase("rows_over_blocks", (140, 0, 9), (3, 1, 2), dims=MLADims(20, 64)),
    DecodeCase("whole_tokens", (500, 40), (9, 7), dims=MLADims(5, 64), page_size=3),
    DecodeCase("one_request", (700,), dims=DIMS, page_size=64),
    DecodeCase("pages_of_one", (200, 61, 0, 90), (4, 1, 2, 1), dims=DIMS, page_size=1),
    DecodeCase("sink", (200, 0), (2, 1), dims=DIMS, has_sink=True),
    DecodeCase("non_causal", (170, 3), (3, 4), options=AttentionOptions(causal=False), dims=DIMS),
    DecodeCase("fp32", (150, 20), dims=DIMS, layout="fp32", q_dtype="fp32"),
    DecodeCase("hidden", (150, 20), dims=DIMS, hidden_page=True, strided=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fixed_lengths", [True, False], ids=["host", "device"])
def test_small_tiles_and_many_pieces(case, fixed_lengths, seed):
    case = replace(case, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, persistent=True, fixed_lengths=fixed_lengths)
    plan = with_config(plan, tuning.DecodeConfig(**SMALL))
    if not fixed_lengths:
        replan(plan, inputs.kv)
    assert len(list_of(plan).reduce_partial_map) > 0
    list_of(plan).validate()
    check(inputs, plan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_host_and_device_make_the_same_list(case):
    inputs = case.build(DEVICE)
    host, device = (plan_of(case, inputs, persistent=True, fixed_lengths=f) for f in (True, False))
    made, wanted = list_of(device), list_of(host)
    assert torch.equal(made.work_indptr, wanted.work_indptr)
    assert torch.equal(made.work_info, wanted.work_info)
    assert torch.equal(made.reduce_partial_map, wanted.reduce_partial_map)


PLANNERS = {"v1.0": plan_v1_0, "v1.1": plan_v1_1, "v1.2": plan_v1_2}


def foreign_list(planner, case, inputs, *, arch="cpu", num_cu=12, **arguments):
    """Return a list of another kernel family's, and how it folds the heads."""
    profile = DeviceProfile(arch, num_cu)
    q_len = max(case.query_lens)
    fold = head_tiling("test", case.dims.num_heads, q_len, "bf16", "bf16", profile).fold
    work = PLANNERS[planner](
        inputs.qo_indptr.cpu(),
        inputs.kv.kv_indptr.cpu(),
        inputs.kv.kv_last_page_len.cpu(),
        num_heads=case.dims.num_heads,
        profile=profile,
        page_size=case.page_size,
        kv_granularity=max(1, 16 // case.page_size),
        max_seqlen_qo=q_len,
        is_causal=case.options.causal,
        **arguments,
    )
    return work, fold


FOREIGN = [
    ("cpu", EVERYTHING),
    ("cpu", replace(EVERYTHING, page_size=1, dims=MLADims(20, 64), q_lens=(9, 0, 2, 0, 1))),
    # gfx942 takes bf16 heads in groups of 16: rows of one group, then of the next.
    ("gfx942", DecodeCase("folded", (300, 0, 70, 9), dims=MLADims(48, 64), page_size=1)),
    (
        "gfx942",
        DecodeCase("folded", (300, 0, 70), (3, 2, 1), dims=MLADims(32, 64), has_sink=True),
    ),
]


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(
    ("arch", "case"), FOREIGN, ids=[f"{arch}-{case}" for arch, case in FOREIGN]
)
def test_lists_of_every_planner(planner, arch, case, seed):
    case = replace(case, seed=seed)
    inputs = case.build(DEVICE)
    work, fold = foreign_list(planner, case, inputs, arch=arch)
    assert fold == (case.dims.num_heads // 16 if arch == "gfx942" else 1)
    # The cost model of v1.1 cuts little where tiles fill the machine.
    assert len(work.reduce_partial_map) > 0 or planner == "v1.1"
    plan = plan_of(case, inputs, work_list=on_device(work), work_list_fold=fold)
    assert "list of the caller's for 12 workers" in str(plan)
    check(inputs, plan)


def test_order_of_works_and_partials_is_free(seed):
    """Shuffle works over workers, move partial rows, pad every buffer: the same bits."""
    case = replace(EVERYTHING, seed=seed)
    inputs = case.build(DEVICE)
    work, _ = foreign_list("v1.2", case, inputs)
    expected = check(inputs, plan_of(case, inputs, work_list=on_device(work)))
    sizes = decode_sizes(5, 3, 3, profile=DeviceProfile("cpu", 20), max_split_per_batch=30)
    for _ in range(3):
        info = work.work_info[torch.randperm(work.num_works)].clone()
        bounds = torch.randint(0, work.num_works + 1, (19,)).sort().values
        indptr = torch.cat([torch.tensor([0]), bounds, torch.tensor([work.num_works])]).int()
        # Whole pieces swap places in the partial buffers, which have room for more.
        places = torch.randperm(sizes.max_partials)[: len(work.reduce_partial_map)].int() * 3
        moved = dict(zip(work.reduce_partial_map.tolist(), places.tolist(), strict=True))
        info[:, 1] = torch.tensor([moved.get(row, -1) for row in info[:, 1].tolist()])
        shuffled = WorkList.empty(sizes)
        replace(work, work_info=info, work_indptr=indptr, reduce_partial_map=places).copy_into(
            shuffled
        )
        got = check(inputs, plan_of(case, inputs, work_list=on_device(shuffled)))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("has_sink", [False, True])
def test_lists_may_leave_out_requests_without_keys(has_sink, seed):
    case = DecodeCase(
        "empty", (0, 200, 0, 9, 0), (3, 1, 2, 2, 1), dims=DIMS, has_sink=has_sink, seed=seed
    )
    inputs = case.build(DEVICE)
    work, _ = foreign_list("v1.2", case, inputs)
    keep = work.work_info[:, 5] > work.work_info[:, 4]
    assert int(keep.sum()) < work.num_works
    before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.long().cumsum(0)])
    indptr = before[work.work_indptr.long()].int()
    listed = replace(work, work_info=work.work_info[keep].contiguous(), work_indptr=indptr)
    check(inputs, plan_of(case, inputs, work_list=on_device(listed)))


def test_a_caller_rewrites_its_list_in_place(seed):
    case = DecodeCase("before", (170, 40), (2, 1), dims=DIMS, page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    sizes = decode_sizes(2, 2, 3, profile=DeviceProfile("cpu", 12))
    buffers = WorkList.empty(sizes, DEVICE)
    foreign_list("v1.2", case, inputs)[0].copy_into(buffers)
    plan = plan_of(case, inputs, work_list=buffers, total_q=3, max_seqlen_q=2, max_seqlen_k=200)
    check(inputs, plan)
    other = DecodeCase("after", (17, 250), (1, 2), dims=DIMS, page_size=16, seed=seed + 1)
    later = other.build(DEVICE)
    foreign_list("v1.2", other, later)[0].copy_into(buffers)
    plan.qo_indptr.copy_(later.qo_indptr)
    check(later, plan)


def test_a_list_of_the_device_follows_lengths(seed):
    """Plan once, then change lengths in place and have the device make the list again."""
    case = DecodeCase("first", (170, 40, 0), (2, 1, 2), dims=DIMS, page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, persistent=True, total_q=5, max_seqlen_q=4, max_seqlen_k=400)
    addresses = {name: table.data_ptr() for name, table in plan.tables.items()}
    check(inputs, plan)
    for kv_lens, q_lens in (
        ((17, 300, 1), (1, 2, 2)),
        ((0, 0, 0), (4, 1, 0)),
        ((400, 3, 90), (0, 4, 1)),
    ):
        other = DecodeCase("later", kv_lens, q_lens, dims=DIMS, page_size=16, seed=seed + 1)
        later = other.build(DEVICE)
        plan.qo_indptr.copy_(later.qo_indptr)
        replan(plan, later.kv)
        check(later, plan)
    assert {name: table.data_ptr() for name, table in plan.tables.items()} == addresses


def test_a_stale_list_is_refused_where_that_is_cheap(seed, monkeypatch):
    monkeypatch.setenv("MLA_CHECK", "1")
    case = DecodeCase("first", (170, 40), dims=DIMS, page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, persistent=True)
    later = DecodeCase("later", (250, 90), dims=DIMS, page_size=16, seed=seed).build(DEVICE)
    with pytest.raises(LayoutError, match="a work list must be made for the lengths it is used"):
        run(later, plan)
    replan(plan, later.kv)
    check(later, plan)


def test_a_wrong_list_reaches_nothing_outside(seed):
    """Below the checks: whatever a list says, only the batch's rows and buffers are touched."""
    case = DecodeCase("wild", (70, 40), (2, 1), dims=DIMS, page_size=16, seed=seed)
    inputs = case.build(DEVICE)
    work, _ = foreign_list("v1.2", case, inputs)
    wild = work.work_info.clone()
    wild[:, 0] = torch.tensor([-3, 7, 1 << 30, 0])[torch.arange(len(wild)) % 4]
    wild[:, 1:6] = torch.randint(-(1 << 30), 1 << 30, (len(wild), 5))
    listed = replace(
        work,
        work_info=wild,
        work_indptr=torch.tensor(
            [-5, 9999, 0, 4, 2, 1 << 30, 0, -1, 3, 3, 5, 8, 1], dtype=torch.int32
        ),
        reduce_indptr=torch.zeros_like(work.reduce_indptr),
    )
    plan = plan_of(case, inputs, work_list=on_device(listed))
    out = torch.zeros(inputs.expected_out.shape, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.zeros(inputs.expected_lse.shape, device=DEVICE)
    plan.run(
        inputs.ql_nope, inputs.q_pe, inputs.kv, plan, sm_scale=1.0, out=out, lse=lse, sink=None
    )
    assert not out.isnan().any()


@pytest.mark.parametrize("fixed_lengths", [True, False], ids=["host", "device"])
def test_lse_is_optional_and_strides_are_honoured(fixed_lengths, seed):
    case = DecodeCase("strided", (340, 3), (2, 1), dims=DIMS, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, persistent=True, fixed_lengths=fixed_lengths)
    assert_close(run(inputs, plan), inputs.expected_out, what="out")
    wide = torch.full((3, 3, 100), 7.0, dtype=torch.bfloat16, device=DEVICE)
    wide_lse = torch.full((3, 5), 7.0, device=DEVICE)
    padded = torch.nn.functional.pad(inputs.ql_nope.transpose(0, 1), (8, 8))
    strided = replace(inputs, ql_nope=padded[..., 8:-8].transpose(0, 1))
    out, lse = wide.transpose(0, 1)[..., 3:67], wide_lse[:, 1:4]
    run(strided, plan, out=out, lse=lse)
    assert_close(out, inputs.expected_out, what="out")
    assert_close(lse, inputs.expected_lse, what="lse", tolerance=TOLERANCES["fp16"])
    assert (wide[..., :3] == 7).all()
    assert (wide[..., 67:] == 7).all()
    assert (wide_lse[:, [0, 4]] == 7).all()


def test_plans_explain_themselves(seed):
    case = DecodeCase("plan", (3000, 10), dims=MLADims(16), page_size=64, seed=seed)
    inputs = case.build(DEVICE)
    host = plan_of(case, inputs, persistent=True, fixed_lengths=True)
    assert host.is_persistent
    assert "triton/flash_decode_worklist" in str(host)
    assert "list of the host's: " in str(host)
    assert host.num_kv_splits == int(host.tables["reduce_indptr"].diff().max())
    device = plan_of(case, inputs, persistent=True)
    assert "list of the device's for " in str(device)
    assert device.num_kv_splits == device.schedule.config["num_workers"]
    grid = plan_of(case, inputs)
    assert not grid.is_persistent
    assert "worklist" not in grid.schedule.kernel


def test_an_aim_for_the_number_of_pieces():
    case = DecodeCase("aim", (3000, 3000), dims=DIMS, page_size=16)
    inputs = case.build(DEVICE)
    counts = [
        plan_of(case, inputs, persistent=True, fixed_lengths=True, num_kv_splits=aim).num_kv_splits
        for aim in (1, 2, None)
    ]
    assert counts[0] == 1
    assert 2 <= counts[1] < counts[2]


@pytest.mark.parametrize(
    ("num_heads", "block_m"), [(3, 64), (20, 64), (16, 16), (40, 64), (128, 64)]
)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 4096])
def test_tiles_are_whole_tokens_that_fit_a_program(num_heads, block_m, page_size):
    case = DecodeCase("rows", (5,), (1,), dims=MLADims(num_heads, 64), page_size=page_size)
    inputs = case.build(DEVICE)
    request = plan_of(case, inputs, persistent=True).request
    config = tuning.DecodeConfig(block_m, 32, 4, 1, programs_per_sm=2)
    for q_len in (1, 2, 7, 16):
        recipe = worklist.make_schedule(replace(request, max_seqlen_q=q_len), config, 100).recipe
        rows = recipe.max_tile_tokens * num_heads
        assert rows <= max(block_m, num_heads)
        assert recipe.num_workers == 200 // -(-rows // block_m)
        assert recipe.max_tile_tokens == min(q_len, max(1, block_m // num_heads))
    assert recipe.kv_granularity * page_size <= max(16, page_size)


def test_compiled_steps_run_without_a_list(seed):
    case = DecodeCase("compiled", (140, 9), dims=DIMS, seed=seed)
    inputs = case.build(DEVICE)
    plan = plan_of(case, inputs, persistent=True)

    def step(ql_nope, q_pe):
        return decode(ql_nope, q_pe, inputs.kv, plan, sm_scale=inputs.sm_scale)

    out = torch.compile(step, fullgraph=True, backend="eager")(inputs.ql_nope, inputs.q_pe)
    assert_close(out, inputs.expected_out, what="out")


def test_the_benchmark_measures_lists_of_the_device(seed):
    case = parse_case("decode/bf16/h2/q2/b3/s90/p16/lognormal")
    workload = build_decode(case, torch.device(DEVICE), seed=seed)
    (contender,) = contenders.find(["triton+list"])
    prepared = contender.prepare(workload)
    assert prepared.kernel.startswith("flash_decode_worklist")
    for call in (prepared.step, prepared.replay):
        outs = [call(i) for i in range(len(workload.kvs))]
        assert 0 < workload.error(outs) < 2e-2


def test_refusals():
    case = DecodeCase("refused", (40, 9), dims=MLADims(4, 64))
    inputs = case.build(DEVICE)
    work = on_device(foreign_list("v1.2", case, inputs)[0])
    with pytest.raises(LayoutError, match=r"work_list_fold must be 1 without a work_list, got 2"):
        plan_of(case, inputs, work_list_fold=2)
    with pytest.raises(LayoutError, match="work_list_fold must divide num_heads=4, got 3"):
        plan_of(case, inputs, work_list=work, work_list_fold=3)
    with pytest.raises(LayoutError, match="fixed_lengths must be False with a work_list"):
        plan_of(case, inputs, work_list=work, fixed_lengths=True)
    with pytest.raises(LayoutError, match="work_info must be int32"):
        plan_of(case, inputs, work_list=replace(work, work_info=work.work_info.long()))
    with pytest.raises(LayoutError, match=r"reduce_final_map must be \[2, 2\]"):
        plan_of(case, inputs, work_list=replace(work, reduce_final_map=work.reduce_final_map[:1]))
    with pytest.raises(UnsupportedProblemError, match="batch_invariant"):
        plan_of(case, inputs, persistent=True, batch_invariant=True)
    many = replace(work, work_indptr=i32([0] * (worklist.MAX_WORKERS + 2)))
    with pytest.raises(UnsupportedProblemError, match="at most 65535 workgroups, got 65536"):
        plan_of(case, inputs, work_list=many)
    for plan in (
        plan_of(case, inputs),
        plan_of(case, inputs, persistent=True, fixed_lengths=True),
        plan_of(case, inputs, work_list=work),
    ):
        with pytest.raises(LayoutError, match="replan: plan must be made with persistent=True"):
            replan(plan, inputs.kv)
    plan = plan_of(case, inputs, persistent=True)
    other = DecodeCase("other", (40,), dims=case.dims).build(DEVICE)
    with pytest.raises(LayoutError, match="replan: kv must have batch_size=2 like the plan, got 1"):
        replan(plan, other.kv)
    other = DecodeCase("other", (40, 9), dims=case.dims, page_size=4).build(DEVICE)
    with pytest.raises(LayoutError, match="replan: kv must have page_size=16"):
        replan(plan, other.kv)
    with pytest.raises(UnsupportedProblemError, match="persistent"):
        plan_decode(case.dims, inputs.qo_indptr, inputs.kv, persistent=True, backend="reference")
