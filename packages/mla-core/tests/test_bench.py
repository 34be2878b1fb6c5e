"""The benchmark: names, data, the gate before timing, and complete rows."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_core import bench, layouts
from mla_core.bench import BenchCase, Prepared, Row, Settings, ceilings, contenders, plot, roofline
from mla_core.bench.rows import commit, read_rows, versions
from mla_core.bench.timing import EventClock, GraphClock, HostClock, summarise
from mla_core.bench.workload import DecodeWorkload, build_decode
from mla_core.errors import BackendUnavailableError, LayoutError, MLAError

InstallBackend = Callable[..., Path]

CPU = torch.device("cpu")
SMALL = Settings(CPU, max_samples=3, min_samples=2, seconds=0.0, ceiling_megabytes=1)
TINY = bench.parse_case("decode/fp32/h3/q1/b2/s40/p16")

#: The columns of a results file, in order.
COLUMNS = [
    *("case", "op", "backend", "kernel", "arch", "device"),
    *("median_us", "p10_us", "p90_us", "bytes", "flops", "gbps", "tflops"),
    *("ceiling_gbps", "ceiling_tflops", "share", "error", "graph"),
    *("versions", "commit", "date"),
]


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests check the bookkeeping; large matmuls would only cost time."""
    monkeypatch.setattr(ceilings, "_matmul_tflops", lambda device, dtype: 0.5)


def test_name_says_everything():
    case = bench.parse_case("decode/bf16/h16/q1/b128/s4096/p64")
    assert case == BenchCase("decode", "bf16", "bf16", 16, 1, 128, 4096, 64)
    assert case.dims.num_heads == 16
    case = bench.parse_case("decode/bf16-fp8ds656/h64/q2/b32/s8192/p64/lognormal")
    assert case.layout == "fp8_ds656"
    assert case.extra == ("lognormal",)


@given(
    q_dtype=st.sampled_from(["bf16", "fp16", "fp32", "fp8_e4m3"]),
    layout=st.sampled_from(layouts.names()),
    numbers=st.lists(st.integers(1, 10**6), min_size=5, max_size=5),
    extra=st.sampled_from([(), ("lognormal",)]),
)
@settings(deadline=None, max_examples=40)
def test_names_round_trip(q_dtype: str, layout: str, numbers: list[int], extra: tuple[str, ...]):
    case = BenchCase("decode", q_dtype, layout, *numbers, extra=extra)
    assert bench.parse_case(str(case)) == case


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("decode", "name must be <op>/"),
        ("decode/bf16/16/q1/b1/s1/p1", "got '16' for h<number>"),
        ("decode/bf16/h16/b1/q1/s1/p1", "got 'b1' for q<number>"),
        ("decode/bf16/h16/q1/b1/s1/px", "got 'px' for p<number>"),
        ("decode/bf16/h0/q1/b1/s1/p1", "num_heads must be >= 1, got 0"),
        ("decode/bf16/h16/q1/b1/s1/p1/uniform", "extra must be among lognormal, got uniform"),
        ("decode/bf16-zip/h16/q1/b1/s1/p1", "layout must be one of .*, got 'zip'"),
        ("decode/int3/h16/q1/b1/s1/p1", "layout must be one of .*, got 'int3'"),
        ("decode/int3-bf16/h16/q1/b1/s1/p1", "dtype: name must be one of .*, got 'int3'"),
        ("encode/bf16/h16/q1/b1/s1/p1", "op must be one of decode, got 'encode'"),
    ],
)
def test_bad_names_are_explained(name: str, message: str):
    with pytest.raises(LayoutError, match=message):
        bench.parse_case(name)


def test_packaged_sets_parse_and_hold_the_promised_cases():
    sets = bench.load_sets()
    assert all(case_set.description and case_set.cases for case_set in sets.values())
    assert "decode/bf16/h16/q1/b8/s4096/p64" in map(str, sets["cpu"].cases)
    h200 = sets["h200"].cases
    assert {case.num_heads for case in h200} == {16, 128}
    assert {case.batch_size for case in h200} == {1, 16, 64, 128}
    assert {1024, 32768} <= {case.context for case in h200}
    assert {case.page_size for case in h200} == {1, 16, 64}
    assert any(case.extra for case in h200)
    assert any(case.q_len > 1 for case in h200)
    assert len(set(h200)) == len(h200)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[s]\ndescription = 'd'\ncolour = 1", "'s': keys must be .*, got colour"),
        ("[s]\ndescription = 'd'\n[[s.grid]]\nop = 'decode'", "'s': a grid must have the keys"),
        ("[s]\ndescription = 'd'\ncases = ['decode']", "name must be"),
    ],
)
def test_bad_sets_are_explained(tmp_path: Path, toml: str, message: str):
    (tmp_path / "sets.toml").write_text(toml)
    with pytest.raises(LayoutError, match=message):
        bench.load_sets(tmp_path / "sets.toml")


def test_ragged_lengths_keep_the_mean_and_do_not_change():
    case = bench.parse_case("decode/bf16/h16/q4/b64/s4096/p64/lognormal")
    lens = case.kv_lens()
    assert lens == case.kv_lens()
    assert len(set(lens)) > 32
    assert min(lens) >= case.q_len
    assert sum(lens) / len(lens) == pytest.approx(4096, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "decode/fp32/h3/q1/b2/s40/p16",
        "decode/bf16/h2/q3/b3/s50/p1/lognormal",
        "decode/bf16-fp8ds656/h2/q1/b2/s70/p64",
        "decode/fp8_e4m3-fp8/h2/q1/b2/s70/p16",
    ],
)
def test_data_sets_are_disjoint_and_every_contender_agrees(name: str, seed: int):
    workload = build_decode(bench.parse_case(name), CPU, seed=seed)
    pages = torch.cat([kv.kv_page_indices for kv in workload.kvs])
    assert pages.unique().numel() == pages.numel()
    for kv in workload.kvs:
        kv.check_values()
        assert tuple(kv.seq_lens.tolist()) == workload.kv_lens
    for contender in contenders.find(["reference", "torch_bmm", "sdpa_loop"]):
        if workload.q_scale is not None and contender.name != "reference":
            with pytest.raises(MLAError, match="q_dtype must not be fp8_e4m3"):
                contender.prepare(workload)
            continue
        prepared = contender.prepare(workload)
        for call in (prepared.step, prepared.replay):
            outs = [call(i) for i in range(len(workload.kvs))]
            # torch_bmm rounds its scores to bf16, which few small heads feel most.
            limit = 2e-2 if outs[0].dtype == torch.bfloat16 else 2e-5
            assert 0 < workload.error(outs) < limit, contender.name


def test_error_of_a_workload_is_the_worst_and_keeps_nan(seed: int):
    workload = build_decode(TINY, CPU, seed=seed)
    outs = [truth.clone() for truth in workload.expected]
    assert workload.error(outs) == 0
    outs[-1] *= 1.5
    assert workload.error(outs) == pytest.approx(0.5)
    outs[0][0, 0, 0] = float("nan")
    assert math.isnan(workload.error(outs))


def test_bytes_and_flops_are_those_of_the_formula(seed: int):
    workload = build_decode(bench.parse_case("decode/bf16/h3/q2/b2/s40/p16"), CPU, seed=seed)
    cache, queries, outputs = 2 * 40 * 576 * 2, 4 * 3 * 576 * 2, 4 * 3 * 512 * 2
    assert workload.num_bytes == cache + queries + outputs
    # The first of two query tokens does not see the last key.
    assert workload.num_flops == 2 * 3 * (576 + 512) * 2 * (39 + 40)


def test_rows_are_complete_and_consistent():
    chosen = contenders.find(["reference", "torch_bmm", "sdpa_loop"])
    events = list(bench.run([TINY], chosen, SMALL))
    assert [event.outcome for event in events] == ["timed"] * 3
    for event, contender in zip(events, chosen, strict=True):
        row = event.row
        assert row is not None
        assert list(dataclasses.asdict(row)) == COLUMNS
        assert (row.case, row.op, row.backend) == (str(TINY), "decode", contender.name)
        assert (row.arch, row.graph) == ("cpu", False)
        assert 0 < row.p10_us <= row.median_us <= row.p90_us
        assert row.gbps == pytest.approx(row.bytes / row.median_us / 1e3)
        assert row.tflops == pytest.approx(row.flops / row.median_us / 1e6)
        by_memory = row.bytes / (row.ceiling_gbps * 1e3)
        by_matmul = row.flops / (row.ceiling_tflops * 1e6)
        assert row.share == pytest.approx(max(by_memory, by_matmul) / row.median_us)
        assert 0 < row.error < 2e-5
        assert row.device
        assert row.kernel
        assert row.date.endswith("+00:00")
    assert "num_kv_splits=1" in events[0].row.kernel


def test_rows_survive_a_file(tmp_path: Path):
    (event,) = bench.run([TINY], contenders.find(["reference"]), SMALL)
    assert event.row is not None
    path = tmp_path / "rows.jsonl"
    path.write_text(event.row.to_json() + "\n\n" + event.row.to_json() + "\n")
    assert read_rows(path) == [event.row, event.row]
    assert list(json.loads(path.read_text().splitlines()[0])) == COLUMNS
    with pytest.raises(TypeError, match="colour"):
        Row.from_json(json.dumps({**dataclasses.asdict(event.row), "colour": 1}))


def test_a_roofline_has_a_point_per_row_under_the_ceilings_of_its_run():
    (event,) = bench.run([TINY], contenders.find(["reference"]), SMALL)
    assert event.row is not None
    row = dataclasses.replace(
        event.row, bytes=10**6, flops=10**8, tflops=1.0, ceiling_gbps=100.0, ceiling_tflops=5.0
    )
    rows = [
        row,
        dataclasses.replace(row, backend="other", graph=True, tflops=2.0),
        dataclasses.replace(row, case="decode/fp32/h128/q2/b2/s40/p16", flops=10**7, tflops=0.5),
        dataclasses.replace(row, ceiling_gbps=50.0),
    ]
    first, second = roofline.draw(rows).axes
    points = [
        line for line in first.lines if line.get_linestyle() == "None" and len(line.get_xdata())
    ]
    xy = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points]
    assert xy == [(100, 1), (100, 2), (10, 0.5)]
    assert len({line.get_color() for line in points}) == 2
    assert [line.get_marker() for line in points] == ["o", "o", "s"]
    (roof,) = [line for line in first.lines if line.get_linestyle() == "-"]
    # 100 GB/s meet 5 TFLOP/s at 50 flops per byte.
    assert list(roof.get_xdata()) == pytest.approx([5, 50, 200])
    assert list(roof.get_ydata()) == pytest.approx([0.5, 5, 5])
    legend = [text.get_text() for text in first.get_legend().get_texts()]
    assert legend == [
        *("ceilings: 100 GB/s, 5 TFLOP/s", "reference", "other (graph)"),
        *("fp32/h3/q1", "fp32/h128/q2"),
    ]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert "ceilings: 50 GB/s, 5 TFLOP/s" in [t.get_text() for t in second.get_legend().get_texts()]


@pytest.mark.parametrize("draw", [plot.draw, roofline.draw])
def test_drawing_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, draw: Callable[[list[Row]], object]
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"must be installed .*mla-core\[plot\]"):
        draw([])


#: Kernels of a fake backend; ``{body}`` spoils the result or not.
FAKE_KERNELS = """
from mla_core.reference_backend import decode as right

CALLS = []

def plan_decode(request):
    return right.plan_decode(request)

def decode(ql_nope, q_pe, kv, plan, **arguments):
    CALLS.append(1)
    right.decode(ql_nope, q_pe, kv, plan, **arguments)
    out = arguments["out"]
    {body}
"""


@pytest.mark.parametrize(
    ("body", "outcome", "detail"),
    [
        ("pass", "timed", ""),
        ("out.mul_(1.01)", "wrong", "relative L2 error 0.01, limit 2e-05; not timed"),
        ("out[0, 0, 0] = float('nan')", "wrong", "relative L2 error nan"),
        ("out.view(-1)[-1] += 1", "wrong", "not timed"),
        ("raise OSError('launch failed')", "failed", "OSError: launch failed"),
    ],
    ids=["right", "scaled", "nan", "one_element", "crash"],
)
def test_a_wrong_kernel_is_not_timed(
    install_backend: InstallBackend, body: str, outcome: str, detail: str
):
    path = install_backend("fake", row="features=frozenset({'lse'})")
    path.write_text(path.read_text() + FAKE_KERNELS.format(body=body))
    chosen = contenders.find(["fake", "reference"])
    events = {event.contender: event for event in bench.run([TINY], chosen, SMALL)}
    assert events["fake"].outcome == outcome, events["fake"].detail
    assert detail in events["fake"].detail
    assert (events["fake"].row is not None) == (outcome == "timed")
    assert events["reference"].outcome == "timed", "the others go on"
    calls, sets = len(sys.modules["fake_dist_fake"].CALLS), len(_sets())
    samples = SMALL.min_samples if outcome == "timed" else 0
    # One call per data set for the check, none for timing unless it passed.
    assert calls == (1 if outcome == "failed" else sets + samples)


def test_an_output_left_unwritten_is_noticed(install_backend: InstallBackend):
    path = install_backend("lazy", row="features=frozenset({'lse'})")
    source = FAKE_KERNELS.format(body="pass").replace("    right.decode", "    return\n    right.d")
    path.write_text(path.read_text() + source)
    (event,) = bench.run([TINY], contenders.find(["lazy"]), SMALL)
    assert (event.outcome, event.row) == ("wrong", None)
    assert "nan" in event.detail


def test_unsupported_case_is_skipped_with_the_reason(install_backend: InstallBackend):
    install_backend("picky", row="page_sizes=frozenset({64})")
    (event,) = bench.run([TINY], contenders.find(["picky"]), SMALL)
    assert event.outcome == "skipped"
    assert "page_size=16 (needs 64)" in event.detail


class Adapter:
    """A third-party contender, as a user would write one."""

    name = "adapter"

    def prepare(self, workload: DecodeWorkload) -> Prepared:
        def call(i: int) -> torch.Tensor:
            return workload.expected[i].to(workload.out_dtype)

        return Prepared("the answer itself", call, call)


def test_an_adapter_competes_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_adapter.py").write_text("CONTENDER = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("my_adapter")
    monkeypatch.setattr(module, "CONTENDER", Adapter())
    (event,) = bench.run([TINY], contenders.find(["my_adapter:CONTENDER"]), SMALL)
    assert event.outcome == "timed"
    assert event.row.kernel == "the answer itself"


@pytest.mark.parametrize("name", ["no_such_backend", "no_such_module:X", "math:no_such_name"])
def test_unknown_contenders_are_refused(name: str):
    with pytest.raises(BackendUnavailableError, match=name.split(":")[0]):
        contenders.find([name])


def test_default_contenders_can_decode(install_backend: InstallBackend):
    install_backend("broken", source="raise RuntimeError")
    names = contenders.names()
    assert {"reference", "torch_bmm", "sdpa_loop"} <= set(names)
    assert "broken" not in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": True}, "graph must be False on cpu"),
        ({"device": torch.device("meta")}, "device must be cpu or cuda, got meta"),
        ({"min_samples": 9}, "min_samples must be in 1..max_samples, got 9 and 3"),
        ({"min_samples": 0}, "min_samples must be in 1..max_samples"),
    ],
)
def test_settings_refuse_what_cannot_be_measured(change: dict[str, object], message: str):
    with pytest.raises(LayoutError, match=message):
        dataclasses.replace(SMALL, **change)


def test_summary_has_the_order_statistics():
    summary = summarise([float(x) for x in range(100, -1, -1)])
    assert (summary.median, summary.p10, summary.p90) == (50, 10, 90)
    single = summarise([7.0])
    assert (single.median, single.p10, single.p90) == (7, 7, 7)


def test_host_clock_walks_over_the_data_sets():
    seen = []

    def call(i: int) -> torch.Tensor:
        seen.append(i)
        return torch.empty(0)

    clock = HostClock(call, 3)
    assert all(clock.sample() > 0 for _ in range(7))
    assert seen == [0, 1, 2, 0, 1, 2, 0]


class StandIn:
    """A stream, an event or a graph whose GPU is a counter of microseconds."""

    now_us = 0.0
    replay_us = 0.0
    recorded_us = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.is_event = enable_timing

    def record(self) -> None:
        self.recorded_us = StandIn.now_us

    def elapsed_time(self, other: StandIn) -> float:
        assert self.is_event
        return (other.recorded_us - self.recorded_us) / 1e3

    def replay(self) -> None:
        StandIn.now_us += StandIn.replay_us

    def synchronize(self, *arguments: object) -> None:
        pass

    wait_stream = __exit__ = synchronize

    def __enter__(self) -> StandIn:
        return self


@pytest.fixture
def stand_in_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what the GPU clocks use of torch.cuda."""
    monkeypatch.setattr(StandIn, "now_us", 0.0)
    for name, value in {
        "Event": StandIn,
        "Stream": StandIn,
        "CUDAGraph": StandIn,
        "current_stream": StandIn,
        "stream": lambda stream: stream,
        "graph": lambda graph: graph,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(("call_us", "tours"), [(5.0, 33), (1000.0, 1)])
def test_event_clock_divides_by_tours_and_data_sets(stand_in_gpu: None, call_us: float, tours: int):
    seen = []

    def call(i: int) -> torch.Tensor:
        seen.append(i)
        StandIn.now_us += call_us
        return torch.tensor(i)

    clock = EventClock(call, 3)
    assert seen == [0, 1, 2], "one tour to find out how long it takes"
    seen.clear()
    assert clock.sample() == pytest.approx(call_us)
    assert seen == [0, 1, 2] * tours


def test_graph_clock_times_replays_only(stand_in_gpu: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandIn, "replay_us", 30.0)
    seen = []

    def call(i: int) -> torch.Tensor:
        seen.append(i)
        StandIn.now_us += 7.0
        return torch.tensor(i)

    clock = GraphClock(call, 3)
    assert seen == [0, 0, 0, 1, 2], "sync check, warm-up, then one captured tour"
    assert [int(out) for out in clock.outputs] == [0, 1, 2]
    seen.clear()
    before = StandIn.now_us
    assert clock.sample() == pytest.approx(10.0)
    assert StandIn.now_us - before >= 490, "short tours are repeated"
    assert seen == []


def test_ceilings_are_measured_and_bind():
    limit = ceilings.measure(CPU, "bf16", megabytes=1)
    assert limit.gbps > 0
    assert limit.tflops == 0.5
    bound = ceilings.Ceilings(gbps=100.0, tflops=2.0)
    assert bound.floor_us(10**8, 1) == pytest.approx(1000)
    assert bound.floor_us(1, 4 * 10**9) == pytest.approx(2000)


def test_provenance():
    found = versions()
    assert torch.__version__.startswith(found["torch"])
    assert found["mla-core"]
    assert commit().removesuffix("-dirty").isalnum()


def _sets() -> tuple[object, ...]:
    return build_decode(TINY, CPU, seed=0).kvs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch_bmm", "sdpa_loop", "triton"])
def test_graph_rows_on_a_gpu(name: str):
    case = bench.parse_case("decode/bf16/h16/q1/b4/s300/p16/lognormal")
    settings = Settings(torch.device("cuda"), graph=True, max_samples=5, seconds=0.1)
    events = list(bench.run([case], contenders.find([name]), settings))
    assert [(event.graph, event.outcome) for event in events] == [
        (False, "timed"),
        (True, "timed"),
    ], [event.detail for event in events]
