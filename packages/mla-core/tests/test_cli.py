"""The command line: what it prints, and what its exit status says."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import mla_core
from mla_core import registry
from mla_core.backend import Backend
from mla_core.bench import ceilings, load_sets
from mla_core.bench.rows import read_rows
from mla_core.cli.backends import local_arch
from mla_core.cli.main import main
from mla_core.errors import BackendUnavailableError
from mla_core.registry import Record

InstallBackend = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

CASE = "decode/fp32/h3/q1/b2/s40/p16"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; return exit status, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(ceilings, "_matmul_tflops", lambda device, dtype: 0.5)
    monkeypatch.setattr(ceilings, "_memory_gbps", lambda device, megabytes: 10.0)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(arguments)
        except SystemExit as exc:  # argparse
            status = int(exc.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``import rich`` fail, as where the extra is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)


def _line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_backends_shows_status_with_cause(run: Run, install_backend: InstallBackend):
    install_backend("nova", priority=321, extra="description='A bright one.',")
    install_backend("broken", source="raise RuntimeError('wrong build')")
    install_backend("absent", extra="probe=lambda arch: exec('raise OSError(arch)'),")
    status, out, _ = run("backends")
    assert status == 0
    nova = _line(out, "nova")
    for part in ("dist-nova 1.2.3", "321", "ok", "decode 1", "A bright one."):
        assert part in nova
    assert "unusable: wrong build" in _line(out, "broken")
    assert "not here: " in _line(out, "absent")
    assert f"OSError: {local_arch()}" in out
    assert _line(out, "reference").split()[1:4] == ["mla-core", mla_core.__version__, "0"]


def test_backends_probes_the_asked_architecture(run: Run, install_backend: InstallBackend):
    install_backend("nova", extra="probe=lambda arch: exec('raise OSError(arch)'),")
    _, out, _ = run("backends", "--arch", "gfx950")
    assert "backends on gfx950" in out
    assert "OSError: gfx950" in out


def test_backends_fails_where_none_can_be_used(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mla_core.registry.records", lambda: ())
    status, out, _ = run("backends")
    assert status == 1
    assert "no distribution registers a backend" in out


def test_narrow_terminals_drop_the_description(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("backends")
    assert "description" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_no_command_lists_the_backends(run: Run, monkeypatch: pytest.MonkeyPatch):
    assert run() == run("backends")


def test_doctor_reports_sections(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLA_BACKEND", "reference")
    monkeypatch.setenv("MLA_BAKCEND", "typo")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path.home() / "my-triton-cache"))
    status, out, _ = run("doctor")
    assert status == 0
    for part in (
        "### mla doctor",
        f"- mla-core: {mla_core.__version__}",
        "- reference: ok (mla-core, mla_core.reference_backend.backend:BACKEND",
        "- MLA_BACKEND: reference",
        "- MLA_BAKCEND: typo (not a setting of this library)",
        "- TRITON_CACHE_DIR: ~/my-triton-cache",
        "- triton: ~/my-triton-cache, absent",
    ):
        assert part in out
    assert str(Path.home()) not in out


def test_doctor_as_json_says_the_same(run: Run):
    report = json.loads(run("doctor", "--json")[1])
    _, text, _ = run("doctor")
    assert list(report) == [
        *("machine", "packages", "torch", "gpus", "backends", "settings", "cache directories")
    ]
    for name, value in (report["packages"] | report["torch"] | report["machine"]).items():
        assert f"- {name}: {value}" in text


def test_doctor_shows_broken_backends(run: Run, install_backend: InstallBackend):
    install_backend("broken", source="raise RuntimeError('wrong build')")
    assert "- broken: unusable: wrong build (dist-broken," in run("doctor")[1]


def test_doctor_needs_no_extra(run: Run, without_rich: None):
    assert run("doctor")[0] == 0


def test_explain_shows_the_choice_and_the_reasons(run: Run, install_backend: InstallBackend):
    install_backend("nova", row="features=frozenset({'lse'}), kv_lora_ranks=frozenset({256})")
    install_backend("picky", row="num_heads=frozenset({128}), page_sizes=frozenset({64})")
    status, out, _ = run(
        *("explain", "--model", "minicpm3-4b", "--heads", "20", "--page-size", "3"),
        *("--features", "softcap,sink", "--arch", "cpu", "--backend", "reference"),
    )
    assert status == 0
    assert "heads=20" in out
    assert "lse+sink+softcap" in out.replace("\n", "")
    assert _line(out, "reference").split()[1:3] == ["chosen", "torch_online_softmax"]
    assert "reference runs torch_online_softmax: backend='reference' was passed" in out
    assert _line(out, "nova").split()[1] == "no"
    for reason in ("num_heads=20 (needs 128)", "page_size=3 (needs 64)", "feature sink (needs"):
        assert reason in out


def test_explain_fails_when_nothing_fits(run: Run):
    status, out, _ = run("explain", "--q-dtype", "fp8_e5m2", "--layout", "fp8", "--arch", "cpu")
    assert status == 1
    assert "no kernel: decode: no kernel for decode on cpu, q=fp8_e5m2" in out
    assert "q_dtype=fp8_e5m2 (needs" in out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("--layout", "fp8_ds656"), "kv=fp8_e4m3 layout=ds656"),
        (("--kv-dtype", "fp8_e4m3"), "kv=fp8_e4m3 layout=standard"),
        (("--q-dtype", "fp16"), "q=fp16 kv=fp16 layout=standard"),
        (("--op", "sparse_decode", "--features", "topk_length"), "sparse_decode on cpu"),
        (
            (
                "--op",
                "write_kv_cache",
            ),
            "write_kv_cache on cpu",
        ),
        (
            (
                "--op",
                "prefill",
            ),
            "prefill on cpu, q=bf16 kv=bf16 layout=expanded",
        ),
    ],
)
def test_explain_understands_ops_and_layouts(run: Run, arguments: tuple[str, ...], shown: str):
    status, out, _ = run("explain", "--arch", "cpu", *arguments)
    assert status == 0
    assert shown in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "zip"), "layout: name must be one of"),
        (("--layout", "fp8", "--kv-dtype", "bf16"), "--kv-dtype must be fp8_e4m3 with --layout"),
        (("--kv-dtype", "int4"), "--kv-dtype must have a standard layout, got int4"),
        (("--op", "prefill", "--layout", "bf16"), "--layout must be left out for prefill"),
        (("--features", "magic"), "features must be among"),
        (("--heads", "0"), "num_heads must be 1..128, got 0"),
        (("--layout", "shuffled_bf16", "--page-size", "3"), "page_size must be a positive multip"),
        (("--layout", "v4_584"), "must be (448, 64)"),
        (("--model", "gpt"), "invalid choice: 'gpt'"),
    ],
)
def test_explain_refuses_contradictions(run: Run, arguments: tuple[str, ...], message: str):
    status, out, err = run("explain", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_bench_writes_rows_and_a_plot(run: Run, tmp_path: Path):
    png = tmp_path / "plots" / "bench.png"
    status, out, _ = run(
        *("bench", CASE, "decode/fp32/h3/q1/b2/s80/p16", "--device", "cpu", "--samples", "2"),
        *("--contenders", "reference,torch_bmm", "--out", str(tmp_path), "--plot", str(png)),
    )
    assert status == 0
    (path,) = (tmp_path / "cpu").glob("cases-*.jsonl")
    rows = read_rows(path)
    assert [row.backend for row in rows] == ["reference", "torch_bmm"] * 2
    assert f"wrote {path}" in out
    assert png.read_bytes().startswith(b"\x89PNG")
    assert _line(out, "decode/").strip() == CASE
    best = [line for line in out.splitlines() if line.startswith((" reference", " torch_bmm"))]
    assert len(best) == 4
    assert " 1.00 " in best[0]


def test_bench_draws_stored_rows(run: Run, tmp_path: Path):
    measured = ("--device", "cpu", "--samples", "2", "--contenders", "reference")
    roofline = tmp_path / "roofline.png"
    assert (
        run("bench", CASE, *measured, "--out", str(tmp_path), "--roofline", str(roofline))[0] == 0
    )
    assert roofline.read_bytes().startswith(b"\x89PNG")
    (path,) = (tmp_path / "cpu").glob("cases-*.jsonl")
    before = path.read_bytes()
    drawn = [tmp_path / "new" / name for name in ("plot.png", "roofline.png")]
    status, out, err = run(
        *("bench", "--plot", str(drawn[0]), "--roofline", str(drawn[1])),
        *("--rows", str(path), str(path)),
    )
    assert (status, out, err) == (0, f"wrote {drawn[0]}\nwrote {drawn[1]}\n", "")
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in drawn)
    assert path.read_bytes() == before


def test_bench_refuses_rows_that_are_none(run: Run, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for text, reason in (("{}", "missing"), ("no json", "Expecting value"), (None, "No such file")):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        status, _, err = run("bench", "--roofline", str(tmp_path / "x.png"), "--rows", str(path))
        assert status == 2
        assert f"--rows must be results files of this command, got {path}: " in err
        assert reason in err
    assert not (tmp_path / "x.png").exists()


def test_bench_works_without_extras(run: Run, without_rich: None, tmp_path: Path):
    status, out, err = run(
        *("bench", CASE, "--device", "cpu", "--samples", "1", "--contenders", "reference"),
    )
    assert status == 0
    assert "[1/1]" in err
    assert CASE in out
    assert _line(out, "reference")


def test_bench_says_who_was_wrong(run: Run, install_backend: InstallBackend):
    path = install_backend("fake", row="features=frozenset({'lse'})")
    kernels = """
from mla_core.plan import Schedule

def plan_decode(request):
    return Schedule(kernel="zeros")

def decode(*arguments, out, **rest):
    out.zero_()
"""
    path.write_text(path.read_text() + kernels)
    status, out, _ = run(
        *("bench", CASE, "--device", "cpu", "--samples", "1", "--contenders", "fake,reference"),
    )
    assert status == 1
    assert "fake: wrong: relative L2 error 1, limit" in out
    assert _line(out, "reference")


def test_bench_fails_when_nothing_was_timed(run: Run, install_backend: InstallBackend):
    install_backend("picky", row="num_heads=frozenset({128})")
    status, out, _ = run("bench", CASE, "--device", "cpu", "--contenders", "picky")
    assert status == 1
    assert "picky: skipped:" in out
    assert "num_heads=3 (needs 128)" in out


def test_bench_lists_sets_and_contenders(run: Run):
    status, out, _ = run("bench", "--list")
    assert status == 0
    assert "decode/bf16/h16/q1/b8/s4096/p64" in out
    assert "torch_bmm, sdpa_loop" in out
    for name in load_sets():
        assert f"{name}: " in out


def test_bench_reads_sets_of_the_user(run: Run, tmp_path: Path):
    sets = tmp_path / "mine.toml"
    sets.write_text(f"[mine]\ndescription = 'd'\ncontenders = ['torch_bmm']\ncases = ['{CASE}']\n")
    status, _, _ = run(
        *("bench", "--sets-file", str(sets), "--set", "mine", "--device", "cpu", "--samples", "1"),
        *("--out", str(tmp_path)),
    )
    assert status == 0
    (path,) = (tmp_path / "cpu").glob("mine-*.jsonl")
    assert [row.backend for row in read_rows(path)] == ["torch_bmm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "moon"), "--set must be one of smoke, cpu"),
        (("decode/bf16",), "name must be <op>/"),
        ((CASE, "--device", "abacus"), "--device must be cpu or cuda, got 'abacus'"),
        ((CASE, "--device", "cpu", "--graph"), "graph must be False on cpu"),
        ((CASE, "--device", "cpu", "--contenders", "moon"), "'moon' is not installed"),
        ((CASE, "--device", "cpu", "--samples", "0"), "min_samples must be in"),
        ((CASE, "--plot", "x.png", "--rows", "x"), "give no cases and no --set with it"),
        (("--set", "cpu", "--plot", "x.png", "--rows", "x"), "give no cases and no --set with it"),
        (("--rows", "x"), "--rows must come with --plot or --roofline"),
    ],
)
def test_bench_refuses_bad_questions(run: Run, arguments: tuple[str, ...], message: str):
    status, _, err = run("bench", *arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("command", ["backends", "explain"])
def test_missing_extra_is_one_friendly_line(run: Run, without_rich: None, command: str):
    status, out, err = run(command)
    assert (status, out) == (2, "")
    assert err == 'mla: this command prints with rich; pip install "mla-core[cli]"\n'


def test_demo_gets_its_own_arguments(run: Run, monkeypatch: pytest.MonkeyPatch):
    seen = []
    fake = types.ModuleType("mla_core.demo.command")
    fake.main = lambda arguments: seen.append(list(arguments)) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mla_core.demo.command", fake)
    assert run("demo", "--steps", "3", "--help")[0] == 7
    assert seen == [["--steps", "3", "--help"]]


def test_demo_without_its_extra_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mla_core.demo.command", None)
    status, _, err = run("demo")
    assert status == 2
    assert 'pip install "mla-core[demo]"' in err


def test_help_names_every_command(run: Run):
    status, out, _ = run("--help")
    assert status == 0
    for command in ("backends", "doctor", "explain", "demo", "bench", "aot", "tune"):
        assert f"    {command}" in out
    assert run("--version")[1] == f"mla-core {mla_core.__version__}\n"


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "mla_core", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["packages"]["mla-core"] == mla_core.__version__


@pytest.mark.parametrize("command", ["aot", "tune"])
def test_commands_of_a_backend_say_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str
):
    def missing(name: str) -> Record:
        raise BackendUnavailableError(f"backend {name!r} is not installed")

    monkeypatch.setattr(registry, "record", missing)
    status, out, err = run(command, "--help")
    assert (status, out) == (2, "")
    assert f"mla: {command}: the backend 'triton' must be installed, got: backend" in err
    assert 'pip install "mla-triton[triton]"' in err


def test_commands_of_a_backend_parse_their_own_options(run: Run, monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("somewhere", "Compiles a lot.")
    module.add_arguments = lambda parser: parser.add_argument("--many", type=int)  # type: ignore[attr-defined]
    module.run = lambda options: options.many  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere", module)
    ours = Backend("triton", 1, (), {}, commands={"aot": "somewhere"})
    record = Record("triton", ("it",), "it:BACKEND", ours, None, 0.0)
    monkeypatch.setattr(registry, "record", lambda name: record)
    assert run("aot", "--many", "5")[0] == 5
    status, out, _ = run("aot", "--help")
    assert status == 0
    assert "usage: mla aot" in out
    assert "Compiles a lot." in out
    # A backend of an older release brings other commands.
    status, _, err = run("tune")
    assert status == 2
    assert "got: brings no command 'tune'" in err
