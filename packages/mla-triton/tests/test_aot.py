"""Compilation for GPUs that are not here: resources within limits, and files that launches find.

Needs neither a GPU nor a vendor's toolkit. Compiles in processes of its own, because Triton's
interpreter, in which the other tests run kernels, replaces the functions the compiler needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mla_core.dims import MLADims
from mla_core.errors import BackendUnavailableError, LayoutError
from mla_triton.aot import DecodeCase, record
from mla_triton.aot_files import install
from mla_triton.backend import GPU_ARCHS

SCRIPT = Path(__file__).with_name("aot_check.py")
#: Laid out beside the environment, for compiling alone.
SECOND_TRITON = Path(__file__).parents[3] / ".nox" / "second-triton"
#: Bytes that a thread may keep in local memory. The rows of sm90 were chosen by measurement, and
#: the quickest ones spill a little; those for fp8 caches, not tuned yet, spill more.
LOCAL_BYTES = {"sm90": 768}
#: AMD's scalar registers in lanes of vector registers: without memory traffic, and counted in the
#: emulator, larger tiles with them take fewer instructions than smaller ones without. Persistent
#: kernels have more of them, and so has gfx942, which turns fp8 into bf16 by many instructions.
SCALAR_SPILLS = {"gfx950": 80, "gfx942": 144}
#: Right, and slow: a tile of these needs more registers than there are, whatever its size.
TOO_WIDE = (
    ("gfx", "/fp32/", "/d1024+"),
    ("sm90", "/fp32/fp8_ds32/", ""),
)


@pytest.fixture(scope="module")
def checks():
    """Compile for all architectures at once; Triton's cache makes the next run quick."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    started = {
        arch: subprocess.Popen(
            [sys.executable, str(SCRIPT), arch],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in sorted(GPU_ARCHS)
    }
    results = {}
    for arch, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        results[arch] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(GPU_ARCHS))
def test_every_row_compiles_within_limits(checks, arch):
    head, *results = checks[arch]
    # A row that no shape reaches is one that was never compiled.
    assert not head["unreached"]
    assert {result["name"] for result in results} >= {
        "mla_triton.kernels.decode:decode_kernel",
        "mla_triton.kernels.decode_worklist:decode_worklist_kernel",
        "mla_triton.kernels.rope:rotate_keys_kernel",
        "mla_core.kernels.reduce:reduce_partials_kernel",
    }
    names = {result["name"] for result in results}
    assert ("mla_triton.kernels.hopper.decode:hopper_decode_kernel" in names) == (arch == "sm90")
    passed = []
    for result in results:
        print(result["configuration"], result["cases"], result["resources"])
        assert result["is_binary"], result
        case, resources = result["cases"][0], result["resources"]
        if ".decode" in result["name"] and "/fp32/" not in case:
            assert result["matrix_instructions"] > 0, result
        excess = result["excess"]
        is_too_wide = any(all(part in case for part in parts) for parts in TOO_WIDE)
        if is_too_wide or resources["local_bytes"] <= LOCAL_BYTES.get(arch, 0):
            excess = [line for line in excess if "local" not in line]
        if is_too_wide:
            excess = [line for line in excess if "spilled" not in line]
        elif resources["scalar_spills"] > SCALAR_SPILLS.get(arch, 0):
            excess.append(f"scalar spills: {resources['scalar_spills']}")
        passed += [f"{case}: {line}: {result['configuration']}" for line in excess]
    assert not passed, "\n".join(passed)


def run(arguments, cache, **variables):
    """Run Python with the compiler on, and a cache of Triton's in a given folder."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SECOND_TRITON.is_dir(), reason="there is no second Triton")
def test_gluon_of_another_release(tmp_path):
    """Gluon's names move between releases, and no interpreter runs it."""
    lines = run([SCRIPT, "hopper"], tmp_path, PYTHONPATH=str(SECOND_TRITON)).splitlines()
    results = [json.loads(line) for line in lines]
    kernels = [result for result in results if result["name"].endswith("hopper_decode_kernel")]
    assert len(kernels) > 20
    for result in kernels:
        assert result["is_binary"]
        assert result["matrix_instructions"] > 0
        spilled = result["resources"]["local_bytes"]
        excess = [
            line
            for line in result["excess"]
            if spilled > LOCAL_BYTES["sm90"] or "local" not in line
        ]
        assert not excess, result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile for one model with the command, and return the folder."""
    place = tmp_path_factory.mktemp("aot")
    arguments = ["-m", "mla_core", "aot", "--arch", "sm90", "gfx942", "--heads", "16"]
    out = run([*arguments, "--out", place / "kernels"], place / "cache")
    assert "16/d512+64/q1/b2/p64" in "".join(out.split())
    return place / "kernels"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
def test_what_was_compiled_is_used(compiled, arch, tmp_path):
    use = [Path(__file__).with_name("aot_use.py"), arch]
    # Two kernels for decode and two for the merge, whatever lengths and batches are.
    assert run(use, tmp_path / "one") == "7 4 4\n"
    assert run(use, tmp_path / "two", MLA_AOT_DIR=str(compiled)) == "7 4 0\n"


@pytest.mark.slow
def test_the_manifest(compiled):
    entries = json.loads((compiled / "manifest.json").read_text())["kernels"]
    assert {entry["arch"] for entry in entries} == {"sm90", "gfx942"}
    for entry in entries:
        assert set(entry["files"]) == {path.name for path in (compiled / entry["key"]).iterdir()}
        suffix = "cubin" if entry["arch"] == "sm90" else "hsaco"
        assert any(name.endswith(suffix) for name in entry["files"])
        for name, digest in entry["files"].items():
            data = (compiled / entry["key"] / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest
        assert set(entry["constants"]) < set(entry["signature"])
        assert 0 < entry["resources"]["registers"] <= 512
        assert entry["resources"]["spills"] == 0


@pytest.mark.slow
def test_files_that_are_not_the_listed_ones_are_refused(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    folder = shutil.copytree(compiled, tmp_path / "kernels")
    entries = json.loads((folder / "manifest.json").read_text())["kernels"]
    counts = Counter(entry["arch"] for entry in entries)
    assert install(folder, "sm90") == counts["sm90"] > 0
    next(folder.glob("*/*.cubin")).write_bytes(b"something else")
    assert install(folder, "gfx942") == counts["gfx942"] > 0
    with pytest.raises(LayoutError, match=r"must be the file whose SHA-256 manifest\.json lists"):
        install(folder, "sm90")
    (folder / "manifest.json").unlink()
    with pytest.raises(LayoutError, match=r"must hold manifest\.json, got none"):
        install(folder)


@pytest.mark.slow
def test_kernels_of_another_triton_are_left_out(compiled, tmp_path, caplog):
    text = (compiled / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"triton": "', '"triton": "0.'))
    assert install(tmp_path) == 0
    assert "were compiled by another Triton" in caplog.text


def test_architectures():
    with pytest.raises(LayoutError, match="arch must be one of sm90, gfx942, gfx950, got 'sm80'"):
        DecodeCase("sm80", MLADims(16))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here")
def test_the_interpreter_must_be_off():
    with pytest.raises(BackendUnavailableError, match="Triton's interpreter must be off"):
        record(DecodeCase("sm90", MLADims(16)))


@pytest.mark.slow
def test_later_launches_get_what_the_first_got():
    names = run([Path(__file__).with_name("launch_repeats.py")], Path.home() / ".triton" / "cache")
    assert names.split() == [
        *("decode_kernel", "decode_worklist_kernel", "hopper_decode_kernel", "merge_kernel"),
        *("reduce_partials_kernel", "rotate_keys_kernel"),
    ]
