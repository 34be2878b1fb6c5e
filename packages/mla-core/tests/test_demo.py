"""The demo end to end, in its smallest form, and what makes it fail."""

from __future__ import annotations

import io
import runpy
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from mla_core import demo
from mla_core.demo import command, report, text
from mla_core.demo.server import PagedServer
from mla_core.errors import BackendUnavailableError, LayoutError, UnsupportedProblemError

TINY = {"size": "tiny", "steps": 9, "requests": 3, "contexts": (16, 40)}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


def test_everything_is_checked_and_passes(tmp_path, console):
    assert demo.main(**TINY, out_dir=tmp_path / "new", console=console) == 0
    printed = console.file.getvalue()
    assert "all checks passed" in printed
    assert "FAILED" not in printed
    assert "expanded: prefill over keys and values of each head" in printed
    for op in ("write_kv_cache", "prefill", "decode", "decode, q_len 4", "reduce_partials"):
        assert f" {op} " in printed
    assert "torch_online_softmax" in printed
    assert "automatic choice by priority" in printed
    # (64 + 16) values of 4 bytes in 2 layers; 4 heads of 48 + 32 values expanded.
    assert "640 (latent)" in printed
    assert "2,560 as expanded heads, 4.0x" in printed
    figure = tmp_path / "new" / "latent_cache.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in printed


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_a_corrupted_cache_row_fails_the_run(tmp_path, console, monkeypatch, value):
    feed, calls = PagedServer.feed, []

    def corrupting(self, requests, tokens, **kwargs):
        calls.append(len(requests))
        if len(calls) == 3:
            rows = self.cache.caches[-1].rows()
            rows[requests[0].pages[0], 5] += value
        return feed(self, requests, tokens, **kwargs)

    monkeypatch.setattr(PagedServer, "feed", corrupting)
    assert demo.main(**TINY, out_dir=tmp_path, console=console) == 1
    printed = console.file.getvalue()
    assert "FAILED  decode step 1: logits differ by" in printed
    assert "all checks passed" not in printed


def test_an_unmerged_half_fails_the_run(tmp_path, console, monkeypatch):
    import torch

    import mla_core

    def first_only(partial_out, partial_lse):
        return partial_out[:, 0].nan_to_num(), torch.logsumexp(partial_lse, 1)

    monkeypatch.setattr(mla_core, "reduce_partials", first_only)
    assert demo.main(**TINY, out_dir=tmp_path, console=console) == 1
    assert "FAILED  split decode: logits differ by" in console.file.getvalue()


def test_a_verifier_that_accepts_everything_fails_the_run(tmp_path, console, monkeypatch):
    from mla_core.demo import session

    monkeypatch.setattr(
        session, "accept", lambda drafts, logits: [*drafts, int(logits[-1].argmax())]
    )
    assert demo.main(**TINY, out_dir=tmp_path, console=console) == 1
    assert "accepted 3 drafts, the greedy continuation" in console.file.getvalue()


def test_a_named_backend_is_used_and_named(tmp_path, console):
    assert demo.main(**TINY, out_dir=tmp_path, backend="reference", console=console) == 0
    assert "use_backend(reference) is active" in console.file.getvalue()


def test_prompts_through_decode(tmp_path, console, monkeypatch):
    import mla_core

    monkeypatch.setattr(mla_core, "prefill", None)
    options = TINY | {"prefill": "absorbed", "steps": 4, "requests": 1}
    assert demo.main(**options, out_dir=tmp_path, console=console) == 0
    printed = console.file.getvalue()
    assert " decode of prompts " in printed
    assert "absorbed: prompts through decode" in printed
    assert "over keys and values of each head" not in printed


def test_fused_layers(tmp_path, console, monkeypatch):
    pytest.importorskip("triton")
    pytest.importorskip("mla_fusions")
    # The interpreter takes milliseconds for each token and head.
    prompts = text.prompts
    monkeypatch.setattr(text, "prompts", lambda model, lengths: prompts(model, [6] * len(lengths)))
    options = TINY | {"prefill": "absorbed", "steps": 4, "requests": 1, "fused": True}
    assert demo.main(**options, out_dir=tmp_path, console=console) == 0
    printed = console.file.getvalue()
    assert "fused: mla-fusions" in printed
    assert "MLAPrologue, MLAEpilogue" in printed
    assert " write_kv_cache " not in printed


def test_a_missing_prefill_names_the_way_out(tmp_path, console, install_backend):
    row = "features=frozenset({'lse'})"
    install_backend("decoder", module="decoder_module", row=row)
    with pytest.raises(UnsupportedProblemError, match="pass --prefill absorbed") as info:
        demo.main(**TINY, out_dir=tmp_path, backend="decoder", console=console)
    assert "prefill: no kernel for prefill on cpu" in str(info.value)


def test_bf16_and_single_token_pages(tmp_path, console):
    options = TINY | {"dtype": "bf16", "page_size": 1}
    assert demo.main(**options, out_dir=tmp_path, console=console) == 0
    assert "320 (latent)" in console.file.getvalue()


def test_an_unknown_backend_is_an_error(tmp_path, console):
    with pytest.raises(BackendUnavailableError, match="backend 'warp' is not installed"):
        demo.main(**TINY, out_dir=tmp_path, backend="warp", console=console)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"steps": 3}, "demo: steps must be >= 4, got 3"),
        ({"requests": 0}, "demo: requests must be >= 1, got 0"),
        ({"page_size": 0}, "demo: page_size must be >= 1, got 0"),
        ({"contexts": ()}, "demo: contexts must be >= 1, got 0"),
        ({"dtype": "fp8"}, "demo: dtype must be one of fp32, bf16, got 'fp8'"),
        ({"size": "huge"}, "demo: size must be one of small, tiny, got 'huge'"),
        ({"prefill": "no"}, "demo: prefill must be one of expanded, absorbed, got 'no'"),
        ({"fused": True}, "demo: prefill must be absorbed with fused, got 'expanded'"),
    ],
)
def test_bad_arguments_are_named(argument, message):
    with pytest.raises(LayoutError, match=f"^{message}$"):
        demo.main(**argument)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib must be .*mla-core\[demo\]"):
        demo.main()


def test_the_command_passes_its_options_on(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(demo, "main", lambda **options: given.update(options) or 7)
    assert command.main(["--steps", "5", "--out-dir", "x", "--backend", "triton,reference"]) == 7
    assert (given["steps"], given["out_dir"], given["backend"]) == (5, "x", "triton,reference")
    monkeypatch.undo()
    assert command.main(["--steps", "1"]) == 2
    assert capsys.readouterr().err == "error: demo: steps must be >= 4, got 1\n"


def test_the_module_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mla_core.demo", "--requests", "0"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("mla_core.demo", run_name="__main__")
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: demo: requests must be >= 1, got 0\n"


def test_only_the_first_failures_are_printed(console):
    report.print_verdict(console, [f"step {i}: [bad]" for i in range(13)])
    printed = console.file.getvalue()
    assert printed.count("[bad]") == 10
    assert "FAILED  and 3 more" in printed
