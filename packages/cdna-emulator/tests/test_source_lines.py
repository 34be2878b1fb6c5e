"""Instructions are traced to source lines: those of assembly, and those a compiler left."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cdna_emulator import assembler
from cdna_emulator.assembler import assemble, assemble_lines
from cdna_emulator.code_object import CodeObject
from cdna_emulator.disassembler import disassemble

#: Compiles a kernel for both architectures without a GPU; argument: where the files go.
TRITON = """
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(values, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    read = tl.load(values + index, mask=index < count)
    tl.store(values + index, read * 2, mask=index < count)


for arch in ("gfx942", "gfx950"):
    signature = {"values": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    source = ASTSource(double, signature, {(2,): 256})
    compiled = triton.compile(source, target=GPUTarget("hip", arch, 64))
    Path(sys.argv[1], arch + ".co").write_bytes(compiled.asm["hsaco"])
"""


def test_lines_of_assembly(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(assembler, "assemble", lambda text, arch, debug: text)
        text = assemble_lines(["s_nop 1", "", "s_nop 2"], "gfx942")
    # Lines count from the first instruction up to the directives behind them.
    text = text.replace('# 1 "kernel"\n', "").replace('# 1 "directives of kernel"\n', "")
    first = text.splitlines().index("s_nop 1") + 1
    code_object = CodeObject.read(assemble(text, "gfx942", debug=True))
    start = code_object.kernel().code_address
    found = [code_object.source_line(start + offset) for offset in (-4, 0, 4, 6, 8, 12)]
    lines = [f"source.s:{first + i}" for i in (0, 2, 2, 3)]
    assert found == [None, *lines, None]
    bare = CodeObject.read(assemble(text, "gfx942"))
    assert bare.source_line(bare.kernel().code_address) is None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return a folder with one Triton kernel's code objects, and their source."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    script = folder / "kernel.py"
    script.write_text(TRITON)
    # A process of its own: in this one kernels may belong to Triton's interpreter.
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(folder / "cache")
    subprocess.run([sys.executable, str(script), str(folder)], env=variables, check=True)
    return folder


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_lines_of_a_triton_kernel(compiled, arch):
    code_object = CodeObject.read(compiled / f"{arch}.co")
    kernel = code_object.kernel("double")
    assert code_object.arch == arch
    raw = disassemble(kernel.code, arch, kernel.code_address)
    source = (compiled / "kernel.py").read_text().splitlines()

    def lines(mnemonic: str) -> set[str]:
        """Return the source of all instructions of one kind."""
        found = set()
        for instruction in raw:
            if instruction.text.startswith(mnemonic):
                name = code_object.source_line(instruction.address)
                assert name is not None
                file, _, line = name.partition(":")
                assert file == "kernel.py"
                found.add(source[int(line) - 1].strip())
        return found

    (load,) = lines("buffer_load") | lines("global_load")
    (store,) = lines("buffer_store") | lines("global_store")
    assert load.startswith("read = tl.load(")
    assert store.startswith("tl.store(")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_a_triton_kernel_is_read_like_any_other(compiled, arch):
    kernel = CodeObject.read(compiled / f"{arch}.co").kernel()
    values, count, *_ = kernel.arguments
    assert (values.offset, values.size, values.value_kind) == (0, 8, "global_buffer")
    assert (count.offset, count.size, count.value_kind) == (8, 4, "by_value")
    assert kernel.kernarg_size == kernel.descriptor.kernarg_size
    assert kernel.max_flat_workgroup_size == 256
    assert kernel.descriptor.denorm_mode_32 == 3
    preloaded = kernel.descriptor.kernarg_preload_length
    if preloaded:
        # The code in front loads what firmware would have, then jumps over its own padding.
        raw = disassemble(kernel.code, arch, kernel.code_address)
        prologue = [line for line in raw if line.address < kernel.preload_entry_address]
        (jump,) = [line for line in prologue if line.text.startswith("s_branch")]
        distance = int(jump.text.split()[1])
        assert jump.address + 4 + 4 * distance == kernel.preload_entry_address
        first, number = kernel.descriptor.initial_sgprs()["kernarg_preload"]
        assert number == preloaded
        assert first + number <= kernel.descriptor.user_sgpr_count
